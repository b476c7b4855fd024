"""Every divergence and `token_weight` against formulas written a second time, in float64, by autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sgopd_kernels import Head, Options, SampledTeacher, TopKTeacher, backends, gated_kl_loss, gated_loss
from sgopd_kernels.backends.cpu import CpuBackend

KINDS: list[Any] = [
    "reverse-kl",
    "forward-kl",
    ("jsd", 0.3),
    ("skew-reverse-kl", 0.1),
    ("skew-forward-kl", 0.1),
    ("alpha", 0.3),
    ("alpha", 0.9),
]
ISAS = [("torch", ""), *(("cpu", isa) for isa in backends.get("cpu").instruction_sets())]  # type: ignore[attr-defined]


def divergence(kind: Any, z: Tensor, t: Tensor) -> Tensor:
    p, q = z.softmax(-1), t.softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a.clamp(min=1e-300) / b.clamp(min=1e-300)).log(), 0.0).sum(-1)

    name, a = (kind, 0.0) if isinstance(kind, str) else kind
    if name == "alpha":
        power = torch.where((p > 0) & (q > 0), p.clamp(min=1e-300) ** a * q.clamp(min=1e-300) ** (1 - a), 0.0)
        return (1 - power.sum(-1)) / (a * (1 - a))
    return {
        "reverse-kl": lambda: kl(p, q),
        "forward-kl": lambda: kl(q, p),
        "jsd": lambda: a * kl(q, a * q + (1 - a) * p) + (1 - a) * kl(p, a * q + (1 - a) * p),
        "skew-reverse-kl": lambda: kl(p, a * p + (1 - a) * q),
        "skew-forward-kl": lambda: kl(q, a * q + (1 - a) * p),
    }[name]()


def relative(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true).norm() / true.norm())


@pytest.fixture
def isa() -> Any:
    yield lambda name: setattr(CpuBackend, "isa", name)
    CpuBackend.isa = ""


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("backend", ["reference", *ISAS], ids=str)
@pytest.mark.parametrize(("spread", "distance"), [(3.0, 1.0), (8.0, 3.0), (0.2, 0.3), (3.0, 1e-2)])
def test_against_its_formula(kind: Any, backend: Any, spread: float, distance: float, isa: Any) -> None:
    n, v, h = 40, 300, 24
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(n, h, generator=g), torch.randn(v, h, generator=g) * spread / h**0.5
    teacher = hidden + distance * torch.randn(n, h, generator=g)
    ids, masks = torch.randint(40, v, (n,), generator=g), [torch.zeros(v), torch.zeros(v)]
    if kind != "forward-kl":  # infinite where the student lacks a column
        masks[0][5:9] = -torch.inf
        masks[1][20:25] = -torch.inf
    name, instruction_set = (backend, "") if isinstance(backend, str) else backend
    isa(instruction_set)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = gated_kl_loss(
        x,
        w,
        teacher,
        weight,
        ids,
        1,
        gate="opd",
        divergence=kind,
        student_bias=masks[0],
        teacher_bias=masks[1],
        backend=name,
    )
    loss.backward()
    # The same fp32 projections: what is looked at is the divergence.
    z, t = ((a @ weight.T).double() + b.double() for a, b in zip((hidden, teacher), masks))
    z = z.masked_fill(t == -torch.inf, -torch.inf).requires_grad_()
    true = divergence(kind, z, t).mean()
    true.backward()
    assert z.grad is not None and x.grad is not None and w.grad is not None
    near = 1e-5 if distance == 1e-2 else 2e-6  # reading a product of another order
    assert abs(float(loss) - float(true)) <= 10 * near * float(true)
    assert relative(x.grad, z.grad @ weight.double()) <= 10 * near
    assert relative(w.grad, z.grad.T @ hidden.double()) <= 10 * near


@pytest.mark.parametrize("kind", [k for k in KINDS if not isinstance(k, str)], ids=str)
def test_equal_models_have_none(kind: Any) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 8, generator=g), torch.randn(70, 8, generator=g)
    x = hidden.clone().requires_grad_()
    for backend in ("cpu", "torch"):
        loss = gated_kl_loss(x, weight, hidden, weight, torch.arange(9), 1, divergence=kind, backend=backend)
        loss.backward()
        assert abs(float(loss)) < 1e-13 and float(x.grad.abs().max()) < 1e-9  # type: ignore[union-attr]


def test_ends_of_a_parameter() -> None:
    ends = {
        ("jsd", 0.0): "forward-kl",
        ("jsd", 1.0): "reverse-kl",
        ("alpha", 0.0): "forward-kl",
        ("alpha", 1.0): "reverse-kl",
        ("skew-reverse-kl", 0.0): "reverse-kl",
        ("skew-forward-kl", 0.0): "forward-kl",
    }
    for given, name in ends.items():
        assert Options(divergence=given) == Options(divergence=name)
    for given in (("skew-reverse-kl", 1.0), ("alpha", 1.1), ("reverse-kl", 0.5), "alpha"):
        with pytest.raises(ValueError, match="divergence"):
            Options(divergence=given)  # type: ignore[arg-type]
    # Close to an end a family is close to what stands there.
    z, t = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    assert torch.allclose(divergence(("alpha", 1 - 1e-6), z, t), divergence("reverse-kl", z, t), rtol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("form", ["full", "sampled", "logprob", "topk", "reference head"])
def test_token_weight(kit: Any, backend: str, form: str) -> None:
    """Linear: calls with weights a and 1 - a add up to one without; 0 leaves a token out; `Stats.gate` shows it."""
    i = kit.make_inputs(n=24, v=60, hs=12, seed=4)
    g = torch.Generator().manual_seed(1)
    share = torch.rand(24, generator=g)
    share[:5] = 0.0
    log_q = torch.log_softmax(i.teacher_hidden @ i.teacher_weight.T, -1)
    at = i.token_ids.clamp(min=0)
    teacher: Any = Head(i.teacher_hidden, i.teacher_weight)
    options, extra = Options(reduction="sum"), {}
    if form == "logprob":
        teacher = SampledTeacher(log_q.gather(-1, at[:, None]).squeeze(-1))
    elif form == "topk":
        teacher = TopKTeacher(*reversed(log_q.topk(7, -1)))  # type: ignore[arg-type]
    elif form == "reference head":
        extra["reference"] = Head(i.teacher_hidden.flip(0), i.teacher_weight)
    if form in ("sampled", "logprob"):
        options = Options(reduction="sum", estimator="sampled")

    def run(weight: Tensor | float | None) -> tuple[Tensor, Tensor, Any]:
        x = i.student_hidden.clone().requires_grad_()
        student = Head(x, i.student_weight)
        loss, stats = gated_loss(
            student,
            teacher,
            i.token_ids,
            i.verdict,
            options,
            token_weight=weight,
            backend=backend,
            return_stats=True,
            **extra,
        )
        loss.backward()
        assert x.grad is not None
        return loss.detach(), x.grad, stats

    whole, part, other = run(None), run(share), run(1 - share)
    assert math.isclose(float(whole[0]), float(part[0] + other[0]), rel_tol=1e-5)
    assert relative(part[1] + other[1], whole[1].double()) < 1e-5
    assert bool((part[1][:5] == 0).all())
    if form != "reference head":
        assert torch.allclose(part[2].gate, whole[2].gate * share)
    assert torch.equal(run(2.0)[1], 2 * whole[1])


def test_token_weight_at_the_door(kit: Any) -> None:
    i = kit.make_inputs(n=6, v=20, hs=8, masked=0.0)
    for wrong in (torch.full((6,), torch.nan), torch.ones(5), torch.inf, "1"):
        with pytest.raises((ValueError, TypeError), match="token_weight"):
            gated_kl_loss(*i.args(), token_weight=wrong)
