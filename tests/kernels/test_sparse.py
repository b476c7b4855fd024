"""The filtered and quantized plans against float64, and their estimates against what they estimate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sgopd_kernels import Head, Options, backends, gated_kl_loss
from sgopd_kernels.backends.cpu import CpuBackend
from sgopd_kernels.plans import calibration, directions
from sgopd_kernels.plans.directions import Coefficients, Directions, feedback
from sgopd_kernels.plans.quantized import at_most
from sgopd_kernels.problem import Problem

pytestmark = pytest.mark.skipif(not backends.usable("cpu"), reason="the native CPU extension is not built")

WITHOUT_TILES = [isa for isa in CpuBackend().instruction_sets() if not CpuBackend.module.kernels(isa).tiles]  # type: ignore[union-attr]
QUANTIZES = CpuBackend.module is not None and CpuBackend().kernels().int16


@pytest.fixture(autouse=True)
def any_size(calibrate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an instruction set without tiles, which have a plan of their own."""
    calibrate(pairs={"worthwhile": 0.0})
    monkeypatch.setattr(CpuBackend, "isa", WITHOUT_TILES[0] if WITHOUT_TILES else "")


def inputs(spread: float, distance: float, dtype: torch.dtype, n: int = 70, v: int = 4103, h: int = 65) -> list[Tensor]:
    """Logits of standard deviation `spread`; a teacher at `distance` from the student. Ragged sizes."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, h, generator=g)
    # heads share a direction and have rows of different norms, as real ones do
    weight = (torch.randn(v, h, generator=g) + 0.7) * (spread / h**0.5) * (0.5 + torch.rand(v, 1, generator=g))
    teacher_hidden = hidden + distance * torch.randn(n, h, generator=g)
    teacher_weight = weight + distance * 0.3 * weight.std() * torch.randn(v, h, generator=g)
    with torch.no_grad():
        ids = torch.multinomial(torch.softmax(hidden @ weight.T, -1), 1, generator=g).squeeze(-1)
    ids[::9] = -100
    verdict = torch.randint(0, 2, (n,), generator=g).float() * 2 - 1
    operands = [t.to(dtype) for t in (hidden, weight, teacher_hidden, teacher_weight)]
    return [*operands, ids, verdict]


def gradients(operands: list[Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    hidden, weight = (t.clone().requires_grad_() for t in operands[:2])
    loss, stats = gated_kl_loss(hidden, weight, *operands[2:], return_stats=True, **options)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach().double(), hidden.grad.double(), weight.grad.double(), stats


def error(got: Tensor, true: Tensor) -> float:
    return float((got - true).norm() / true.norm())


def settings(**changes: Any) -> dict[str, Any]:
    return {"settings": tuple(replace(s, **changes) for s in calibration.FITTED.quantized.settings)}


@pytest.mark.parametrize("gate", ["opd", "sg-opd", "opdvr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("spread", "distance"), [(4.0, 0.3), (4.0, 0.03), (8.0, 0.1), (4.0, 1e-4)])
def test_within_the_budget(spread: float, distance: float, dtype: torch.dtype, gate: str) -> None:
    operands = inputs(spread, distance, dtype)
    truth = gradients([t.double() if t.is_floating_point() else t for t in operands], gate=gate)
    got = gradients(operands, gate=gate, backend="cpu")
    exact = gradients(operands, gate=gate, backend="cpu", precision="exact")
    for mine, other, true in zip(got[:3], exact[:3], truth[:3]):
        # what exact arithmetic can't give (a gradient's own dtype, near-equal models) is not the plan's
        assert error(mine, true) <= calibration.AUTO + 1.5 * error(other, true)
    assert torch.equal(got[3].agree, exact[3].agree)
    assert exact[3].plan == "exact" and exact[3].kept == 1 and exact[3].error_estimate == 0
    assert got[3].error_estimate <= calibration.AUTO


@pytest.mark.skipif(not QUANTIZES, reason="this processor has no 16-bit projections")
@pytest.mark.parametrize("side", [1, 3], ids=["student", "teacher"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_in_a_head_shows_in_the_loss(
    monkeypatch: pytest.MonkeyPatch, calibrate: Any, value: float, side: int
) -> None:
    """In a few rows, which the probe does not see: a head without directions has nothing to feed back."""
    asked: list[Directions] = []

    def spied(of: Directions) -> Coefficients:
        asked.append(of)
        return feedback(of)

    monkeypatch.setattr(directions, "feedback", spied)
    calibrate(quantized=settings(feedback=True))
    operands = inputs(4.0, 0.3, torch.float32)
    operands[side][20] = value
    assert not torch.isfinite(gradients(operands, backend="cpu")[0]) and asked
    along, absorb = feedback(Directions.of(operands[side]))
    assert along.shape == absorb.shape == (65, 16) and not along.any() and not absorb.any()


def shared_directions(spread: float, rank: int, distance: float) -> list[Tensor]:
    """A head most of whose rows lies in `rank` directions, and a teacher that differs outside them."""
    n, v, h = 48, 16_384, 192
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, h, generator=g)
    hidden[:, 5] *= 12  # as some dimensions of real hidden states are
    shared = torch.linalg.qr(torch.randn(h, rank, generator=g))[0].T
    share = 0.9 if rank > 1 else 0.7
    weight = share * (h / rank) ** 0.5 * torch.randn(v, rank, generator=g) @ shared
    weight = (weight + (1 - share**2) ** 0.5 * torch.randn(v, h, generator=g)) * (spread / h**0.5)
    weight[:, 5] /= 12
    step = torch.randn(n, h, generator=g)
    teacher_hidden = hidden + distance * (step - step @ shared.T @ shared)
    teacher_weight = weight + distance * 0.3 * weight.std() * torch.randn(v, h, generator=g)
    ids = torch.multinomial(torch.softmax(hidden @ weight.T, -1), 1, generator=g).squeeze(-1)
    return [hidden, weight, teacher_hidden, teacher_weight, ids, torch.ones(n)]


@pytest.mark.parametrize(("spread", "rank", "distance"), [(4.0, 4, 1e-2), (6.0, 4, 3e-3), (6.0, 1, 3e-3)])
def test_the_estimate_refuses_a_screen_whose_noise_adds_up(
    calibrate: Any, spread: float, rank: int, distance: float
) -> None:
    """Rounding a hidden state moves all logits of its token together, along what the head's rows share."""
    # No probe before the estimate.
    calibrate(quantized=settings(kl=1e-30))
    operands = shared_directions(spread, rank, distance)
    truth = gradients([t.double() if t.is_floating_point() else t for t in operands])
    assert error(gradients(operands, backend="cpu")[1], truth[1]) <= calibration.AUTO
    calibrate(quantized={"coherence": 0.0})
    unguarded = gradients(operands, backend="cpu")
    if unguarded[3].plan == "quantized":  # not on a processor without 16-bit products
        assert error(unguarded[1], truth[1]) > 1.5 * calibration.AUTO


def test_each_plan_is_taken_where_it_pays() -> None:
    assert gradients(inputs(8.0, 0.1, torch.float32))[3].plan == "quantized"
    near = gradients(inputs(8.0, 1e-4, torch.float32))[3]
    assert near.plan != "quantized"  # too near for 16 bits
    flat = gradients(inputs(0.01, 0.3, torch.float32, v=2048))[3]
    assert flat.plan == "exact" and flat.kept == 1


@pytest.mark.parametrize("budget", [1e-2, 1e-3, 1e-4])
def test_a_smaller_budget_is_a_smaller_error(budget: float) -> None:
    operands = inputs(6.0, 0.2, torch.float32)
    truth = gradients([t.double() if t.is_floating_point() else t for t in operands])
    got = gradients(operands, precision=budget)
    assert max(error(m, t) for m, t in zip(got[:3], truth[:3])) <= budget
    assert got[3].error_estimate <= budget


def test_the_estimate_bounds_the_error() -> None:
    for spread, distance in [(4.0, 0.3), (8.0, 0.1), (6.0, 0.02)]:
        operands = inputs(spread, distance, torch.float32)
        truth = gradients([t.double() if t.is_floating_point() else t for t in operands])
        got = gradients(operands, precision=1e-2)
        assert got[3].plan != "exact"
        assert max(error(m, t) for m, t in zip(got[1:3], truth[1:3])) <= got[3].error_estimate


@pytest.mark.parametrize(
    "setting", [s for s in calibration.FITTED.quantized.settings if s.feedback], ids=lambda s: str(s.products)
)
@pytest.mark.parametrize(("spread", "rank", "distance"), [(4.0, 1, 1e-2), (6.0, 16, 3e-3), (6.0, 48, 3e-3)])
def test_the_estimate_holds_with_feedback(
    calibrate: Any, setting: calibration.Setting, spread: float, rank: int, distance: float
) -> None:
    """With shared directions fewer, as many and three times as many as those that rounding feeds back."""
    calibrate(quantized={"settings": (replace(setting, kl=1e-30),)})
    operands = shared_directions(spread, rank, distance)
    truth = gradients([t.double() if t.is_floating_point() else t for t in operands])
    got = gradients(operands, precision=5e-3)
    assert max(error(m, t) for m, t in zip(got[:3], truth[:3])) <= got[3].error_estimate
    assert got[3].plan == ("quantized" if QUANTIZES else "filtered")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("segment", [64, 192])
def test_feedback_takes_the_screens_error_off_the_heads_directions(segment: int, dtype: torch.dtype) -> None:
    hidden, weight, *_ = (t.to(dtype) for t in shared_directions(4.0, 4, 1e-2)[:2])
    if not QUANTIZES:
        pytest.skip("this processor has neither AVX2 nor AVX512-VNNI")
    backend = CpuBackend()
    exact = hidden.double() @ weight.double().T
    rounding = feedback(Directions.of(weight))

    def noise(rounding: Coefficients | None) -> tuple[float, float]:
        out = torch.empty(exact.shape)
        backend.project_quantized(hidden, weight, out, segment, rounding)
        e = out.double() - exact
        return float(e.norm() / exact.norm()), float((e @ weight.double()).norm())

    (plain, along), (fed, fed_along) = noise(None), noise(rounding)
    assert fed_along < 0.2 * along
    assert fed < 1.1 * plain
    # Directions that are none: every element stays within 1.5 steps of its place, and no accumulator overflows.
    rounding[1].fill_(1e6)
    assert noise(rounding)[0] < 4 * plain


def test_the_estimate_knows_what_was_refined(calibrate: Any) -> None:
    """Where the KL leaves room, fewer logits are computed again in fp32: with far fewer, the plan must be refused."""
    # the sign's guard would refuse it as well
    calibrate(quantized={**settings(kl=1e-30), "mass": 0.1, "gate": 1.0})
    for distance in (0.01, 0.003, 0.001):
        operands = inputs(4.0, distance, torch.float32)
        truth = gradients([t.double() if t.is_floating_point() else t for t in operands])
        got = gradients(operands, precision=1e-2)
        assert max(error(m, t) for m, t in zip(got[:3], truth[:3])) <= 1e-2


@pytest.mark.parametrize("mass", [1e-4, 0.1])
def test_the_bound_of_what_was_not_refined_is_reached(mass: float) -> None:
    """By a tail of entries that all have the probability below which nothing is computed again."""
    student, teacher = (Head(torch.empty(1, 1), torch.empty(9, 1), logit_scale=scale) for scale in (1.0, 2.0))
    problem = Problem(Options(temperature=0.5), student, torch.zeros(1).long(), torch.ones(1), teacher=teacher)
    count, variances = 7, (0.3, 0.2)  # of the student's and the teacher's projections
    report = torch.tensor([[0.0, 0.0, count * mass, 0.5 * count * mass, *variances]], dtype=torch.float64)
    expected = count * mass**2 * (variances[0] * 2.0**2 + variances[1] * 4.0**2)
    assert float(at_most(problem, report, mass)) == pytest.approx(expected)


@pytest.mark.parametrize("row", [5, 16, 33])
def test_a_nan_shows_where_it_belongs(row: int) -> None:
    """In the loss, its token's row of dH and all of dW, also where thresholds come from a sample of other tokens."""
    operands = inputs(6.0, 0.2, torch.float32)
    operands[0][row, 3] = torch.nan
    loss, d_hidden, d_weight, _ = gradients(operands)
    assert loss.isnan() and d_weight.isnan().any(0).all()
    assert d_hidden.isnan().any(-1).nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("options", [{"student_bias": True}, {"student_softcap": 30.0}, {"divergence": "forward-kl"}])
def test_options_beside_the_plans(options: dict[str, Any]) -> None:
    operands = inputs(6.0, 0.2, torch.float32)
    if "student_bias" in options:
        options = {"student_bias": torch.randn(operands[1].shape[0], generator=torch.Generator().manual_seed(0))}
    double = {k: x.double() if isinstance(x, Tensor) else x for k, x in options.items()}
    truth = gradients([t.double() if t.is_floating_point() else t for t in operands], **double)
    got = gradients(operands, **options)
    assert max(error(m, t) for m, t in zip(got[:3], truth[:3])) <= calibration.AUTO
    assert got[3].plan == ("quantized" if "divergence" in options else "filtered")


def test_repeats_bit_for_bit_with_any_number_of_threads() -> None:
    operands, before = inputs(6.0, 0.2, torch.float32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradients(operands)
        again = gradients(operands)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one[:3], again[:3]):
        assert torch.equal(a, b)


def test_nan_is_not_hidden() -> None:
    operands = inputs(6.0, 0.2, torch.float32)
    operands[0][1] = float("nan")
    loss, d_hidden, _, stats = gradients(operands)
    assert loss.isnan() and d_hidden[1].isnan().any() and stats.plan != "quantized"


def test_instruction_sets_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = inputs(6.0, 0.2, torch.float32)
    backend: Any = backends.get("cpu")
    best = gradients(operands)
    for isa in WITHOUT_TILES:
        monkeypatch.setattr(backend, "isa", isa)
        for a, b in zip(gradients(operands)[:3], best[:3]):
            assert error(a, b) < 1e-4
