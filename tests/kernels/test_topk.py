"""Top-k teachers: the k + 1 buckets against float64, the full KL at k = V, never negative, bad input refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sgopd_kernels import gated_topk_kl_loss


def teacher(inputs: Any, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(ids, log-probabilities) in float64."""
    z = inputs.teacher_hidden.double() @ inputs.teacher_weight.double().T / temperature
    top = torch.log_softmax(z, -1).topk(k, -1)
    return top.indices, top.values


def call(inputs: Any, top: tuple[Tensor, Tensor], **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    hidden = inputs.student_hidden.clone().requires_grad_()
    weight = inputs.student_weight.clone().requires_grad_()
    loss, stats = gated_topk_kl_loss(
        hidden, weight, inputs.token_ids, *top, inputs.verdict, return_stats=True, **kwargs
    )
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad, stats


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("k", [1, 8, 64])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "student_softcap": 9.0, "student_logit_scale": 1.4}])
def test_against_buckets_in_float64(kit: Any, k: int, options: dict[str, float], backend: str) -> None:
    inputs = kit.make_inputs(n=90, v=800, seed=k)
    ids, log_q = teacher(inputs, k, options.get("temperature", 1.0))
    h, w = inputs.student_hidden.double().requires_grad_(), inputs.student_weight.double().requires_grad_()
    z = h @ w.T * options.get("student_logit_scale", 1.0)
    if cap := options.get("student_softcap"):
        z = cap * torch.tanh(z / cap)
    log_p = torch.log_softmax(z / options.get("temperature", 1.0), -1)
    p_tail, q_tail = 1 - log_p.exp().gather(-1, ids).sum(-1), 1 - log_q.exp().sum(-1)
    top_p = log_p.gather(-1, ids)
    kl = (top_p.exp() * (top_p - log_q)).sum(-1) + p_tail * (p_tail.log() - q_tail.log())
    y = inputs.token_ids.clamp(min=0).unsqueeze(-1)
    inside = ids == y
    outside = q_tail.log() - p_tail.log()
    d = torch.where(inside.any(-1), (inside * (log_q - log_p.gather(-1, y))).sum(-1), outside).detach()
    signed = d * inputs.verdict
    gate = torch.where(signed > 0, 1.8, 1.0)
    valid = inputs.token_ids != -100
    truth = (gate * kl)[valid].mean()
    truth.backward()
    loss, d_hidden, d_weight, stats = call(inputs, (ids, log_q.float()), backend=backend, **options)
    assert kit.relative(loss, truth.detach()) < 1e-5
    assert kit.relative(d_hidden, h.grad) < 1e-5 and kit.relative(d_weight, w.grad) < 1e-5
    assert kit.relative(stats.kl[valid], kl.detach()[valid]) < 1e-5 and bool((stats.kl >= 0).all())
    assert torch.equal(stats.gate[valid], gate.float()[valid])
    reference = call(inputs.to(torch.float64), (ids, log_q), **options)
    assert kit.relative(reference[0], truth.detach()) < 1e-6 and kit.relative(reference[1], h.grad) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_all_columns_are_the_full_divergence(kit: Any, backend: str) -> None:
    inputs = kit.make_inputs(n=40, v=60, seed=4)
    full = kit.call(inputs, backend=backend)
    ids, log_q = teacher(inputs, 60)
    top = call(inputs, (ids, log_q.float()), backend=backend)
    for a, b in zip(top[:3], full[:3]):
        assert kit.relative(a, b) < 3e-5


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_near_equal_models_stay_positive(kit: Any, backend: str) -> None:
    """Where a loss without the tail goes negative (the mass outside the top k moved)."""
    inputs = kit.make_inputs(n=200, v=500, peak=1.0, near=3e-3, seed=3)
    *_, stats = call(
        inputs, tuple(t.float() if t.is_floating_point() else t for t in teacher(inputs, 4)), backend=backend
    )
    assert float(stats.kl.min()) >= 0 and float(stats.kl.max()) < 1e-3


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
@pytest.mark.parametrize("tail", ["a part of the tail", "all of the tail", "sampled from there"])
def test_a_student_that_masks_columns(
    kit: Any, tail: str, softcap: float | None, temperature: float, backend: str
) -> None:
    """By a bias of -inf: they have no part of the tail. Where none is left the teacher's mass is there nevertheless."""
    inputs = kit.make_inputs(n=40, v=300, hs=32, seed=5)
    ids, log_q = teacher(inputs, 8, temperature)
    mask = torch.zeros(300)
    if tail == "a part of the tail":
        mask[100:] = -torch.inf
        mask[ids.flatten()] = 0
    else:
        ids, log_q = (x[:1].expand(40, 8) for x in (ids, log_q))
        mask[:] = -torch.inf
        mask[ids[0]] = 0
    inside = ids[torch.arange(40), torch.arange(40) % 8]
    outside = (mask == -torch.inf).nonzero()[:40, 0]
    sampled = torch.where(torch.arange(40) % 2 == 0, inside, outside) if tail == "sampled from there" else inside
    inputs.token_ids[:] = sampled.where(inputs.token_ids != -100, -100)
    options = dict(student_softcap=softcap, temperature=temperature)
    want = call(inputs.to(torch.float64), (ids, log_q), student_bias=mask.double(), backend="reference", **options)
    got = call(inputs, (ids, log_q.float()), student_bias=mask, backend=backend, **options)
    assert all(kit.relative(a, b) < 1e-5 for a, b in zip(got[:3], want[:3]))
    assert kit.relative(got[3].kl, want[3].kl) < 1e-5 and torch.equal(got[3].gate, want[3].gate)
    assert torch.allclose(got[3].teacher_logprob, want[3].teacher_logprob, rtol=1e-5, atol=1e-5)
    beyond = (inputs.token_ids[:, None] == outside).any(-1)
    assert beyond.any() == (tail == "sampled from there") and bool((got[3].logratio[beyond] == torch.inf).all())


def test_refusals(kit: Any) -> None:
    inputs = kit.make_inputs(n=6, v=20, hs=8, masked=0.0)
    ids, log_q = teacher(inputs, 3)
    for broken, match in (
        ((ids[:, :2], log_q), "topk_logprob"),
        ((ids.float(), log_q), "topk_ids"),
        ((ids.clone().fill_(4), log_q), "twice"),
        ((ids + 20, log_q), r"\[0, 20\)"),
        ((ids, log_q * 0), "more than 1"),
    ):
        for backend in ("cpu", "torch", "reference"):
            with pytest.raises(ValueError, match=match):
                call(inputs, broken, backend=backend)
