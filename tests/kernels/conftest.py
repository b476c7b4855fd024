"""Seeded inputs and an oracle of their own for the kernel tests.

`oracle` is written a second time from docs/method.md, from logits and in float64, so that a mistake in
`sgopd_kernels.oracle` cannot hide behind itself. `limit` is the same with fp32 projections: the error no fp32
method can be asked to beat.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

BACKENDS = ("torch", "cpu")


@dataclass(frozen=True)
class Inputs:
    """Operands of one call; `args()` in the order of `gated_kl_loss`."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    token_ids: Tensor
    verdict: Tensor

    def args(self) -> tuple[Tensor, ...]:
        return tuple(self.__dict__.values())

    def to(self, dtype: torch.dtype) -> Inputs:
        return replace(
            self, **{k: t.to(dtype) for k, t in self.__dict__.items() if t.is_floating_point() and k != "verdict"}
        )


def make_inputs(
    n: int = 200,
    v: int = 1000,
    hs: int = 64,
    ht: int | None = None,
    v_teacher: int | None = None,
    peak: float = 3.0,
    near: float | None = None,
    masked: float = 0.2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """`peak`: standard deviation of the logits (0.1 flat, 3 a language model, 8 nearly one-hot). `near`: the teacher
    is the student's head on hidden states perturbed by this much; None: an unrelated teacher."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = randn(n, hs), randn(v, hs) * (peak / hs**0.5)
    if near is None:
        ht = ht or hs
        t_hidden, t_weight = randn(n, ht), randn(v_teacher or v, ht) * (peak / ht**0.5)
    else:
        t_hidden, t_weight = hidden + near * randn(n, hs), weight.clone()
    ids = torch.randint(0, min(v, v_teacher or v), (n,), generator=g)
    ids[torch.rand(n, generator=g) < masked] = -100
    verdict = torch.randint(-1, 2, (n,), generator=g)
    return Inputs(hidden.to(dtype), weight.to(dtype), t_hidden.to(dtype), t_weight.to(dtype), ids, verdict)


@dataclass
class Truth:
    loss: Tensor
    losses: Tensor  # [N], before the mean
    d_hidden: Tensor
    d_weight: Tensor
    kl: Tensor  # [N], 0 where ignored
    d: Tensor  # [N]
    gate: Tensor  # [N]


def oracle(
    inputs: Inputs,
    *,
    agree: float = 1.8,
    conflict: float = 1.0,
    neutral: float = 1.0,
    tolerance: float = 0.0,
    estimator: str = "full",
    temperature: float = 1.0,
    projections: torch.dtype = torch.float64,
) -> Truth:
    """Reverse KL, mean over valid tokens, by autograd on float64 logits made by projections of the given dtype."""
    h, w, th, tw = (t.to(projections) for t in inputs.args()[:4])
    v = min(w.shape[0], tw.shape[0])
    n = h.shape[0]
    ids, verdict = inputs.token_ids, inputs.verdict.double()
    valid = ids != -100
    count = max(int(valid.sum()), 1)
    out = Truth(
        torch.zeros((), dtype=torch.float64),
        torch.zeros(n, dtype=torch.float64),
        torch.zeros(h.shape, dtype=torch.float64),
        torch.zeros(w.shape, dtype=torch.float64),
        *(torch.zeros(n, dtype=torch.float64) for _ in range(3)),
    )
    for rows in torch.nonzero(valid).squeeze(-1).split(max(1, 2**24 // v)):
        z = (h[rows] @ w[:v].T).double().requires_grad_()
        log_p = torch.log_softmax(z / temperature, -1)
        log_q = torch.log_softmax((th[rows] @ tw[:v].T).double() / temperature, -1)
        y = ids[rows].unsqueeze(-1)
        d = (log_q - log_p).gather(-1, y).squeeze(-1).detach()
        signed = d * verdict[rows]
        gate = torch.full_like(d, neutral)
        gate[signed > tolerance] = agree
        gate[signed < -tolerance] = conflict
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        loss = gate * kl if estimator == "full" else -gate * d * log_p.gather(-1, y).squeeze(-1)
        total = loss.sum() / count
        (g,) = torch.autograd.grad(total, z)
        out.loss += total.detach()
        out.losses[rows] = loss.detach()
        out.d_hidden[rows] = g @ w[:v].double()
        out.d_weight[:v] += g.T @ h[rows].double()
        out.kl[rows], out.d[rows], out.gate[rows] = kl.detach(), d, gate
    return out


def per_token(inputs: Inputs, **kwargs: Any) -> Tensor:
    """The losses before the mean, [N]."""
    from sgopd_kernels import gated_kl_loss

    with torch.no_grad():
        losses = gated_kl_loss(*inputs.args(), reduction="none", **kwargs)
    assert isinstance(losses, Tensor)
    return losses


def relative(got: Tensor, truth: Tensor) -> float:
    """Frobenius error; absolute where the truth is 0."""
    norm = float(truth.double().norm())
    error = float((got.double() - truth.double()).norm())
    return error / norm if norm > 0 else error


def call(inputs: Inputs, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    """gated_kl_loss with statistics, and its gradients: (loss, d_hidden, d_weight, stats)."""
    from sgopd_kernels import gated_kl_loss

    hidden = inputs.student_hidden.detach().clone().requires_grad_()
    weight = inputs.student_weight.detach().clone().requires_grad_()
    args = (hidden, weight, *inputs.args()[2:])
    loss, stats = gated_kl_loss(*args, return_stats=True, **kwargs)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad, stats


def run_ranks(function: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """function(rank, *args) in `world` gloo processes that form one group; their results, by rank."""
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank, args=(function, rank, world, folder, args)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    errors = [path.read_text() for path in folder.glob("*.error")]
    assert not errors and all(process.exitcode == 0 for process in processes), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(function: Callable[..., Any], rank: int, world: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(function(rank, *args), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def calibrate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """calibrate(pairs={"worthwhile": 0.0}): other numbers in the calibration, for one test."""
    from sgopd_kernels.plans import calibration

    return lambda **parts: monkeypatch.setattr(calibration, "FITTED", calibration.FITTED.changed(**parts))


@pytest.fixture(scope="session")
def kit() -> Any:
    """The functions above, for test modules: importlib mode has no sibling imports."""

    class Kit:
        BACKENDS = BACKENDS

    for function in (make_inputs, oracle, per_token, relative, call, run_ranks):
        setattr(Kit, function.__name__, staticmethod(function))
    return Kit
