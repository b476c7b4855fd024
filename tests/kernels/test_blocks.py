"""The plan by blocks against float64, and its estimate against what it estimates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sgopd_kernels import _cpu, gated_kl_loss, gated_topk_kl_loss
from sgopd_kernels.backends.cpu import CpuBackend
from sgopd_kernels.plans import calibration
from sgopd_kernels.plans.blocks import Blocks

DOTS = pytest.mark.skipif("avx512-bf16" not in _cpu.available(), reason="this processor has no AVX512-BF16")
MACHINES = [
    "amx-emulated",
    pytest.param(
        "amx",
        marks=pytest.mark.skipif(
            "amx" not in _cpu.available(), reason="this processor, or its system, has no AMX-BF16"
        ),
    ),
]


@pytest.fixture(autouse=True, params=MACHINES)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, calibrate: Any) -> None:
    monkeypatch.setattr(CpuBackend, "isa", request.param)
    calibrate(blocks={"worthwhile": 0.0})


def inputs(spread: float, distance: float, dtype: torch.dtype, n: int = 70, v: int = 2055, h: int = 65) -> list[Tensor]:
    """Logits of standard deviation `spread`; a teacher at `distance` from the student. Ragged sizes."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, h, generator=g)
    hidden[:, 5] *= 6  # as some dimensions of real hidden states are
    # heads share a direction and have rows of different norms, as real ones do
    weight = (torch.randn(v, h, generator=g) + 0.7) * (spread / h**0.5) * (0.5 + torch.rand(v, 1, generator=g))
    weight[:, 5] /= 6
    teacher_hidden = hidden + distance * torch.randn(n, h, generator=g)
    teacher_weight = weight + distance * 0.3 * weight.std() * torch.randn(v, h, generator=g)
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


def truth_of(operands: list[Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    options = {k: x.double() if isinstance(x, Tensor) else x for k, x in options.items()}
    return gradients([t.double() if t.is_floating_point() else t for t in operands], **options)


def error(got: Tensor, true: Tensor) -> float:
    return float((got - true).norm() / true.norm())


@pytest.mark.parametrize("gate", ["opd", "opdvr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("spread", "distance"), [(4.0, 3.0), (4.0, 0.3), (8.0, 0.03), (8.0, 3e-3), (4.0, 3e-4), (0.1, 0.3), (0.1, 3e-3)]
)
def test_within_the_budget(spread: float, distance: float, dtype: torch.dtype, gate: str) -> None:
    """Peaked and flat, from KL 10 to 1e-8."""
    operands = inputs(spread, distance, dtype)
    truth = truth_of(operands, gate=gate)
    got = gradients(operands, gate=gate)
    exact = gradients(operands, gate=gate, precision="exact")
    for mine, other, true in zip(got[:3], exact[:3], truth[:3]):
        # what exact arithmetic can't give (a gradient's own dtype, near-equal models) is not the plan's
        assert error(mine, true) <= calibration.AUTO + 1.5 * error(other, true)
    assert torch.equal(got[3].agree, exact[3].agree)
    assert exact[3].plan == "exact" and exact[3].error_estimate == 0
    if dtype == torch.bfloat16:  # whose exact products run on tiles for the same time
        assert got[3].plan == "exact" and torch.equal(got[2], exact[2])
    else:
        assert got[3].plan == "blocks" and 0 < got[3].error_estimate <= calibration.AUTO and got[3].kept <= 1
        assert got[3].kept < 0.9 or spread < 1


@pytest.fixture(params=["amx-emulated", pytest.param("avx512-bf16", marks=DOTS)])
def by_dot_products(request: pytest.FixtureRequest, machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with AVX512-BF16 and without AMX."""
    monkeypatch.setattr(CpuBackend, "isa", request.param)
    monkeypatch.setattr(CpuBackend, "splits", lambda _: False)


@pytest.mark.parametrize("machine", ["amx-emulated"], indirect=True)
@pytest.mark.parametrize("budget", [1.5e-3, 3e-4])
@pytest.mark.parametrize(("spread", "distance"), [(4.0, 3.0), (8.0, 0.03), (4.0, 3e-4), (0.1, 0.3), (0.1, 3e-3)])
def test_bf16_operands_by_dot_products(by_dot_products: None, spread: float, distance: float, budget: float) -> None:
    """There bf16 operands take the plan, and fp32 ones don't. The result's own rounding is independent of its error."""
    operands = inputs(spread, distance, torch.bfloat16)
    truth, got = truth_of(operands), gradients(operands, precision=budget)
    exact = gradients(operands, precision="exact")
    assert got[3].plan == "blocks" and 0 < got[3].error_estimate <= budget and exact[3].plan == "exact"
    assert torch.equal(got[0], exact[0]), "their logits are exact"
    for mine, other, true in zip(got[1:3], exact[1:3], truth[1:3]):
        assert error(mine, true) <= math.hypot(got[3].error_estimate, 1.01 * error(other, true))
    many = gradients(operands, precision=budget, workspace=2**22)
    assert many[3].plan == "blocks" and error(many[2], got[2]) <= 2 * budget + 2**-9
    assert gradients(inputs(spread, distance, torch.float32))[3].plan != "blocks"


@pytest.mark.parametrize("budget", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize(("spread", "distance"), [(4.0, 0.3), (8.0, 0.1), (0.1, 0.3)])
def test_the_estimate_bounds_the_error(spread: float, distance: float, budget: float) -> None:
    operands = inputs(spread, distance, torch.float32)
    truth, got = truth_of(operands), gradients(operands, precision=budget)
    assert got[3].plan == "blocks"
    assert max(error(m, t) for m, t in zip(got[:3], truth[:3])) <= got[3].error_estimate <= budget


def test_a_budget_that_two_numbers_do_not_keep_is_exact() -> None:
    assert gradients(inputs(4.0, 0.3, torch.float32), precision=1e-5)[3].plan == "exact"


def test_fp32_logits_give_up_where_their_noise_shows(calibrate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between models that nearly agree, where three products would be too few; and they are what is taken elsewhere."""
    # No probe before the estimate of the noise; nor does the guard of the gate's sign refuse them first.
    calibrate(blocks={"worthwhile": 0.0, "kl": 1e-30}, quantized={"gate": 1.0})
    split, forward = [], Blocks.forward

    def watched(plan: Blocks, chunk: Any) -> float:
        began, estimate = plan.split, forward(plan, chunk)
        split.append((began, plan.split))
        return estimate

    monkeypatch.setattr(Blocks, "forward", watched)
    for distance in (0.1, 1e-3, 1e-4):
        operands = inputs(4.0, distance, torch.float32)
        truth, got = truth_of(operands), gradients(operands)
        exact = gradients(operands, precision="exact")
        for mine, other, true in zip(got[:3], exact[:3], truth[:3]):
            assert error(mine, true) <= calibration.AUTO + 1.5 * error(other, true), distance
    assert split[0] == (True, True) and split[-1] == (True, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_where_it_belongs(dtype: torch.dtype, value: float) -> None:
    operands = inputs(6.0, 0.2, dtype)
    operands[0][5, 3] = value
    loss, d_hidden, d_weight, _ = gradients(operands)
    assert loss.isnan() and d_weight.isnan().any(0).all()
    assert d_hidden.isnan().any(-1).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        {"student_bias": "random"},
        {"teacher_bias": "masked"},
        {"student_softcap": 30.0},
        {"divergence": "forward-kl"},
        {"divergence": ("jsd", 0.3)},
        {"estimator": "sampled"},
        {"temperature": 0.7, "student_logit_scale": 1.3},
        {"workspace": 2**22},
        {"reduction": "sum"},
    ],
    ids=str,
)
def test_options_beside_the_plan(options: dict[str, Any], dtype: torch.dtype) -> None:
    operands = inputs(6.0, 0.2, dtype)
    v = operands[1].shape[0]
    random = torch.randn(v, generator=torch.Generator().manual_seed(0))
    biases = {"random": random, "masked": torch.where(random > 1, -torch.inf, 0.0)}
    options = {k: biases[x].to(dtype) if isinstance(x, str) and x in biases else x for k, x in options.items()}
    if "teacher_bias" in options:  # a sampled token that the teacher cannot produce has no log-ratio
        operands[4] = operands[4].where(random[operands[4].clamp(min=0)] <= 1, -100)
    truth, got = truth_of(operands, **options), gradients(operands, **options)
    exact = gradients(operands, precision="exact", **options)
    for mine, other, true in zip(got[:3], exact[:3], truth[:3]):
        assert error(mine, true) <= calibration.AUTO + 1.5 * error(other, true)
    assert got[3].plan == ("exact" if dtype == torch.bfloat16 else "blocks")


def test_a_top_k_and_a_frozen_side() -> None:
    operands = inputs(6.0, 0.2, torch.float32)
    hidden, weight, teacher, teacher_weight, ids, verdict = operands
    top = torch.log_softmax(teacher @ teacher_weight.T, -1).topk(8)
    each = []
    for cast in (torch.float64, torch.float32):
        leaf = hidden.to(cast, copy=True).requires_grad_()
        loss, stats = gated_topk_kl_loss(
            leaf, weight.to(cast), ids, top.indices, top.values.to(cast), verdict, return_stats=True
        )
        loss.backward()
        assert leaf.grad is not None
        each.append(leaf.grad.double())
    assert stats.plan == "blocks" and error(each[1], each[0]) <= calibration.AUTO
    truth = truth_of(operands)
    leaf = weight.clone().requires_grad_()
    gated_kl_loss(hidden, leaf, *operands[2:]).backward()
    assert leaf.grad is not None and error(leaf.grad.double(), truth[2]) <= calibration.AUTO
    with torch.no_grad():
        loss, stats = gated_kl_loss(*operands, return_stats=True)
    assert isinstance(loss, Tensor) and error(loss.double(), truth[0]) <= calibration.AUTO and stats.plan == "blocks"


def test_repeats_bit_for_bit_with_any_number_of_threads() -> None:
    operands, before, each = inputs(6.0, 0.2, torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 1, 3):
            torch.set_num_threads(threads)
            each.append(gradients(operands, precision=1e-3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in each[1:] for a, b in zip(each[0][:3], other[:3]))


def test_a_bf16_head_over_chunks_has_the_gradient_of_one() -> None:
    """Rounded once, as it is written, or summed to 24 bits over chunks; rows beyond the shared vocabulary are 0."""
    operands = inputs(6.0, 0.2, torch.bfloat16)
    operands[1] = torch.cat([operands[1], operands[1][:9]])
    one = gradients(operands)
    many = gradients(operands, workspace=2**22)
    truth = truth_of(operands)[2]
    assert not one[2][-9:].any() and not many[2][-9:].any()
    rounding = error(truth.bfloat16().double(), truth)
    for got in (one, many):
        assert error(got[2], truth) <= rounding + 2e-5
    assert error(one[2], many[2]) <= 2 * rounding


def test_tiny_gradients_and_none(calibrate: Any) -> None:
    """Squares below fp32's smallest number are no reason to leave anything out; equal models have no gradient."""
    operands = inputs(6.0, 0.2, torch.float32)
    scaled = gradients(operands, num_items=1e24)
    truth = truth_of(operands, num_items=1e24)
    assert max(error(m, t) for m, t in zip(scaled[1:3], truth[1:3])) <= calibration.AUTO
    operands[2:4] = operands[:2]
    loss, d_hidden, d_weight, stats = gradients(operands)
    assert float(loss) == 0 and not d_hidden.any() and not d_weight.any() and stats.plan in ("blocks", "exact")
