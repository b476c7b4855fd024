"""Products of 16-bit operands on devices, emulated: operands rounded as there, sums in fp32 on the CPU.

fp32 operands as parts (backends/tensor_cores.py), G in fp16 with units of rows (plans/narrow.py), and the bounds that
the units are made by (docs/kernels.md). How a device sums is invisible here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sgopd_kernels import Options, driver
from sgopd_kernels.backends.tensor_cores import TensorCoreBackend, power_above, unit_of
from sgopd_kernels.options import Head
from sgopd_kernels.plans import calibration
from sgopd_kernels.plans.base import NeedsGrad
from sgopd_kernels.problem import Problem

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
ROUNDING = 2.0**-11  # no number is off by more in fp16
BOTH = NeedsGrad(hidden=True, weight=True, bias=True)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("sizes", [(1.0, 1.0), (3e3, 1e-4), (0.05, 0.05)])
@pytest.mark.parametrize("kinds", [(F32, F32), (BF16, F32), (F32, BF16), (F16, F32), (BF16, F16)])
def test_parts_are_as_exact_as_fp32(kinds: tuple[torch.dtype, torch.dtype], sizes: tuple[float, float]) -> None:
    """No term is off by more than 2^-20; in all no more than by products in fp32."""
    hidden, weight = (size * randn(n, 96, seed=n) for size, n in zip(sizes, (33, 700)))
    hidden[5, 7] *= 300  # an outlier takes nothing from the others
    backend, head = TensorCoreBackend(), Head(hidden.to(kinds[0]), weight.to(kinds[1]))
    balance = backend.balance(head, head.hidden.abs().amax().float())
    assert balance is not None and math.log2(float(balance)).is_integer()
    out, fp32 = torch.full((33, 704), math.nan)[:, :700], head.hidden.float() @ head.weight.float().T
    backend.project(head.hidden, head.weight, out, balance)
    truth, terms = (a @ b.T for a, b in ((x.double(), y.double()) for x, y in (
        (head.hidden, head.weight), (head.hidden.abs(), head.weight.abs()))))  # fmt: skip
    error = (out - truth).abs()
    assert bool((error <= 2.0**-20 * terms).all())
    assert float(error.norm()) <= 1.5 * float((fp32 - truth).norm())


def test_fp32_products_stay_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By "exact", and in small calls. Else none is left, in the logits or after them."""
    calls: list[str] = []
    for name in ("project", "add_hidden_gradient", "add_weight_gradient"):
        real = getattr(driver.TorchBackend, name)
        monkeypatch.setattr(
            driver.TorchBackend, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1]
        )
    for kinds in ((F32, F32), (BF16, F32), (F16, F16)):
        run(problem_of(randn(6, 50), randn(6, 50, seed=1), kinds=kinds))
        assert calls == ["add_hidden_gradient", "add_weight_gradient"] if kinds[1] == F16 else calls, "small"
        calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            at_any_size(patch)
            run(problem_of(randn(6, 50), randn(6, 50, seed=1), kinds=kinds))
            assert not calls
            run(problem_of(randn(6, 50), randn(6, 50, seed=1), kinds=kinds, precision="exact"))
            assert "add_weight_gradient" in calls
        calls.clear()


def test_a_hidden_state_that_is_no_number_spoils_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    at_any_size(monkeypatch)
    problem = problem_of(3 * randn(6, 50), 3 * randn(6, 50, seed=1), kinds=(F32, F32))
    scale = torch.full((6,), 1 / 6, dtype=torch.float64)
    expected = run(problem, scale)
    problem.student.hidden[2, 3], problem.token_ids[4] = math.nan, -100
    problem.student.hidden[4] = 1e30  # of an ignored token
    got, kept = run(problem, scale), [0, 1, 3, 5]
    assert got.stats[2, 1].isnan() and got.hidden is not None and expected.hidden is not None
    assert bool(got.hidden[2].isnan().all()) and not bool(got.hidden[4].any())
    assert relative(got.hidden[kept], expected.hidden[kept]) <= 1e-6
    assert relative(got.stats[kept, 1], expected.stats[kept, 1]) <= 1e-6


def test_operands_that_leave_no_room_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    at_any_size(monkeypatch)
    problem = problem_of(randn(6, 50), randn(6, 50, seed=1), kinds=(F32, F32))
    problem.student.hidden[1, 1], problem.student.weight[2, 3] = 900.0, -140.0
    run(problem)
    problem.student.weight[2, 3] = -150.0
    with pytest.raises(ValueError, match=r"less than 131072.*precision='exact'; got 900 and 150"):
        run(problem)


# --- G in fp16 ---


def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = calibration.FITTED.changed(devices={"narrow_worthwhile": 0.0})
    monkeypatch.setattr(calibration, "FITTED", changed)


def problem_of(z: Tensor, t: Tensor, kinds: tuple[torch.dtype, torch.dtype] = (BF16, BF16), **options: Any) -> Problem:
    """Hidden states of 48 dimensions and heads of [V, 48] beside biases, which carry the logits z and t [N, V] of one
    token each in turn: a bias is the same for all tokens, so every token takes z[0] and t[0]."""
    n, v = z.shape
    hidden, weight = randn(n, 48, seed=2).to(kinds[0]), (randn(v, 48, seed=3) / 7).to(kinds[1])
    other = (randn(n, 48, seed=4) * 0.3 + hidden.double()).to(kinds[0])
    heads = Head(hidden, weight, z[0].float()), Head(other, weight, t[0].float())
    ids = torch.arange(n) % v
    return Problem(Options(**{"gate": "opd", **options}), heads[0], ids, torch.ones(n), heads[1])


def run(problem: Problem, scale: Tensor | None = None, backend: TensorCoreBackend | None = None) -> driver.Result:
    """Gradients in fp32, as they are before they are rounded to the operands' dtype."""
    n = problem.token_ids.numel()
    valid = int((problem.token_ids != -100).sum())
    scale = torch.full((n,), 1 / valid, dtype=torch.float64) if scale is None else scale
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "gradient_dtype", lambda leaf: F32)
        return driver.run(problem, backend or TensorCoreBackend(), scale, BOTH)


def wide(problem: Problem) -> Problem:
    """The same operands in fp32, exactly."""
    heads = (problem.student, problem.teacher)
    fp32 = [replace(h, hidden=h.hidden.float(), weight=h.weight.float()) for h in heads if h is not None]
    return replace(problem, student=fp32[0], teacher=fp32[1], options=Options(gate="opd", precision="exact"))


def relative(a: Tensor | None, b: Tensor | None) -> float:
    assert a is not None and b is not None
    return float((a.double() - b.double()).norm() / b.double().norm())


NUMBERS: dict[str, Callable[[int], Tensor]] = {
    "a mean over 8,192": lambda n: torch.full((n,), 1 / 8192, dtype=torch.float64),
    "a loss scale": lambda n: torch.full((n,), 2.0**16, dtype=torch.float64),
    "incoming gradients of any size and sign": lambda n: (-4.0) ** -torch.arange(n, dtype=torch.float64),
    "nearly nothing": lambda n: torch.full((n,), 1e-18, dtype=torch.float64),
}


@pytest.mark.parametrize("scale", NUMBERS)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 400.0])
def test_neither_saturates_nor_underflows(spread: float, scale: str) -> None:
    """From equal models to a KL of hundreds of nats, whatever multiplies the loss: dH, dW and db to G's rounding."""
    z = 3 * randn(12, 300)
    problem = problem_of(z, z + spread * randn(12, 300, seed=1))
    assert problem.teacher is not None
    problem.teacher.hidden.copy_(problem.student.hidden)  # what differs is the bias alone
    given = NUMBERS[scale](12)
    got, truth = run(problem, given), run(wide(problem), given)
    for a, b in ((got.hidden, truth.hidden), (got.weight, truth.weight), (got.bias, truth.bias)):
        assert bool(a.isfinite().all()) and relative(a, b) <= ROUNDING  # type: ignore[union-attr]
    # Each row by itself, though one is 2^-22 of another.
    assert got.hidden is not None and truth.hidden is not None
    rows = (got.hidden.double() - truth.hidden).norm(dim=1) / truth.hidden.double().norm(dim=1)
    assert float(rows.max()) <= ROUNDING


def test_chunks_share_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one token, the nearest models last: dW is one sum. And the head in tiles, made for each chunk."""
    z = 3 * randn(8, 300)
    problem = problem_of(z, z + 0.5 * randn(8, 300, seed=1))
    assert problem.teacher is not None
    problem.teacher.hidden[4:] = problem.student.hidden[4:]
    whole, sizes = run(problem), []
    monkeypatch.setattr(TensorCoreBackend, "row_multiple", 1)
    monkeypatch.setattr("sgopd_kernels.backends.tensor_cores.COLUMNS_AT_ONCE", 64)
    small = replace(problem, options=Options(gate="opd", workspace=60_000))
    multiply = TensorCoreBackend.multiply
    monkeypatch.setattr(
        TensorCoreBackend,
        "multiply",
        lambda self, a, b, *r, **k: (sizes.append(b.shape), multiply(self, a, b, *r, **k)),
    )
    parts = run(small)
    assert (64, 48) in sizes and sizes.count((48, 300)) >= 8
    for a, b in ((parts.hidden, whole.hidden), (parts.weight, whole.weight), (parts.bias, whole.bias)):
        assert relative(a, b) <= 1e-6


def test_units_and_powers() -> None:
    x = torch.cat([torch.tensor([0.0, 2.0**-30, 1.0, 2.0**15 - 1]), torch.rand(100).exp2() ** 40 * 2.0**-22])
    x.clamp_(max=2.0**15 - 1)
    units = unit_of(x)
    assert torch.equal(units.log2(), units.log2().round()) and float((x / units).max()) < 2.0**15
    assert float(units.min()) >= 2.0**-27 and float(units.max()) <= 1  # in fp16, times 2^15: exactly
    order = x.argsort()
    assert bool((units[order].diff() >= 0).all() and (x / units)[order][-1] > (x / units)[order][1])
    assert power_above(torch.tensor([1.0, 3.0, 0.75])).tolist() == [2.0, 4.0, 1.0]


# --- the bounds ---


def pair(kl: float, deviation: float, seed: int, one: bool) -> tuple[Tensor, Tensor]:
    """(log p, log q) [20, 200], of a KL near this one; `one`: by one column's logit alone, which moves either way."""
    z, noise = deviation * randn(20, 200, seed=seed), randn(20, 200, seed=seed + 1)
    if one:
        rows = torch.arange(20)
        column = torch.zeros_like(noise)
        column[rows, z.argmax(-1) if seed % 2 else rows] = noise[:, 0].sign()
        noise = column
    log_p, size = torch.log_softmax(z, -1), torch.full((20, 1), (2 * kl) ** 0.5, dtype=torch.float64)
    for _ in range(20):
        log_q = torch.log_softmax(z + size * noise, -1)
        size *= (kl / divergence(log_p, log_q).unsqueeze(-1)).clamp(0.1, 10) ** 0.5
    return log_p, log_q


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of rows, from terms that are all positive."""
    return (log_q.exp() - log_p.exp() - log_p.exp() * (log_q - log_p)).clamp(min=0).sum(-1)


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("deviation", [0.01, 3.0, 12.0])
@pytest.mark.parametrize("kl", [1e-8, 1e-6, 1e-4, 1e-2, 1.0, 30.0])
def test_no_gradient_is_above_its_bound(kl: float, deviation: float, one: bool) -> None:
    for seed in (0, 1):
        log_p, log_q = pair(kl, deviation, seed, one)
        p, q, r, k = log_p.exp(), log_q.exp(), log_p - log_q, divergence(log_p, log_q)
        most, bound = (p * (r - k.unsqueeze(-1))).abs().amax(-1), (2 * p.amax(-1) * k).sqrt() + k
        assert bool((most <= 1.001 * bound + 1e-15).all()), "reverse KL"
        bound = torch.minimum((divergence(log_q, log_p) / 2).sqrt(), p.maximum(q).amax(-1))
        assert bool(((p - q).abs().amax(-1) <= 1.001 * bound + 1e-15).all()), "forward KL"


def test_the_bound_is_no_looser_than_it_must_be() -> None:
    """Two columns attain it to a factor of 2, where p is small and where it is large; and a smaller slope of K, as
    (2/3 + p), does not hold: p = 1e-3 against e^-100 of it."""
    for p, q in ((0.5, 0.5 - 1e-4), (1e-3, 1e-3 * math.exp(-100)), (0.999, 0.01), (1e-3, 0.9)):
        k = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        g = abs(p * (math.log(p / q) - k))
        assert g <= math.sqrt(2 * max(p, 1 - p) * k) + k
        assert g <= math.sqrt(2 * p * k) + max(p, 1 - p) * k
        if p in (0.5, 1e-3) and q < p:
            assert g >= 0.5 * (math.sqrt(2 * p * k) + k)
    p, q = 1e-3, 1e-3 * math.exp(-100)
    k = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert p * (math.log(p / q) - k) > math.sqrt(2 * p * k) + (2 / 3 + p) * k
