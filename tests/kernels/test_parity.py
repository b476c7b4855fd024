"""The loss against float64: values, gradients and statistics of every backend, where distillation lives."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch

from sgopd_kernels.backends.cpu import CpuBackend
from sgopd_kernels.backends.torch import ieee_matmul
from sgopd_kernels.gate import draw_agreement
from sgopd_kernels.plans.base import PLANS

BACKENDS = ["torch", "cpu"]
WITHOUT_TILES = [i for i in CpuBackend().instruction_sets() if not CpuBackend().module.kernels(i).tiles]  # type: ignore[union-attr]

# name: make_inputs(...). KL from 1e-6 to 50, flat to one-hot, ragged sizes, padded vocabularies.
CASES = {
    "flat": dict(peak=0.1),
    "usual": dict(peak=3.0),
    "peaked": dict(n=32, v=5003, peak=8.0),
    "one-hot": dict(n=33, v=777, peak=25.0),
    "widths": dict(hs=48, ht=80),
    "teacher-padded": dict(v=1000, v_teacher=1088),
    "student-padded": dict(v=1088, v_teacher=1000),
    "one-token": dict(n=1, v=2, masked=0.0),
    "two-columns": dict(n=127, v=2),
    "ragged": dict(n=127, v=1025, hs=33),
    "vocabulary": dict(n=12, v=49_152, hs=32, peak=3.0),
    "near-1e-1": dict(near=1.5e-1),
    "near-1e-2": dict(near=5e-2),
    "near-1e-3": dict(near=1.5e-2),
    "near-1e-4": dict(near=5e-3),
    "near-1e-5": dict(near=1.5e-3),
    "near-1e-5-peaked": dict(n=32, v=5003, peak=8.0, near=5e-4),
    "near-vocabulary": dict(n=12, v=49_152, hs=32, peak=3.0, near=1.5e-3),
}


def check(kit: Any, inputs: Any, backend: str, floor: float = 1e-5, **kwargs: Any) -> None:
    truth = kit.oracle(inputs, **kwargs)
    limit = kit.oracle(inputs, **kwargs, projections=torch.float32)
    loss, d_hidden, d_weight, stats = kit.call(inputs, backend=backend, **kwargs)
    assert stats.backend == backend and stats.plan == "exact"
    losses = kit.per_token(inputs, backend=backend, **kwargs)
    # A sum of terms of both signs has no relative error of its own: measured against the sum of their sizes.
    size = truth.losses.abs().sum() / max(int((inputs.token_ids != -100).sum()), 1)
    allowed = max(floor, 1.5 * float((limit.loss - truth.loss).abs() / size))
    assert float((loss.double() - truth.loss).abs()) <= allowed * float(size), "loss"
    for name, got, exact, fp32 in (
        ("loss per token", losses, truth.losses, limit.losses),
        ("d_hidden", d_hidden, truth.d_hidden, limit.d_hidden),
        ("d_weight", d_weight, truth.d_weight, limit.d_weight),
        ("kl", stats.kl, truth.kl, limit.kl),
    ):
        error, allowed = kit.relative(got, exact), max(floor, 1.5 * kit.relative(fp32, exact))
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"
    # The sign test: no flip where the sign is above the noise.
    clear = (truth.d.abs() > 1e-4) & (inputs.token_ids != -100)
    assert torch.equal(stats.gate[clear], truth.gate.float()[clear])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["full", "sampled"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(kit: Any, case: str, estimator: str, backend: str) -> None:
    inputs = kit.make_inputs(**CASES[case], seed=len(case))
    check(kit, inputs, backend, estimator=estimator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["full", "sampled"])
@pytest.mark.parametrize("gaps", [(16, 6), (20, 8), (20, 14), (24, 10)], ids=str)
def test_a_student_that_is_sure(kit: Any, gaps: tuple[int, int], estimator: str, backend: str) -> None:
    """1 - p of the sampled token from 2e-3 to 3e-6 in every row: the gradient is of that size, or of the tail's."""
    inputs = kit.make_inputs(n=64, v=4096, hs=128, masked=0.0)
    generator = torch.Generator().manual_seed(1)
    weight = inputs.student_weight / inputs.student_weight.norm(dim=1).mean()
    towards = weight[inputs.token_ids] / weight[inputs.token_ids].norm(dim=1, keepdim=True) ** 2
    student, teacher = (gap * towards + 0.3 * torch.randn(64, 128, generator=generator) for gap in gaps)
    heads = {"student_weight": weight, "teacher_weight": weight}
    sure = dataclasses.replace(inputs, student_hidden=student, teacher_hidden=teacher, **heads)
    check(kit, sure, backend, estimator=estimator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("case", ["usual", "near-1e-4"])
def test_temperature(kit: Any, case: str, temperature: float, backend: str) -> None:
    check(kit, kit.make_inputs(**CASES[case], seed=7), backend, temperature=temperature)


def test_the_range_of_divergences_is_covered(kit: Any) -> None:
    mean = {c: float(kit.oracle(kit.make_inputs(**CASES[c], seed=len(c))).kl.mean()) for c in CASES}
    assert min(mean.values()) < 1e-5 and max(mean.values()) > 50, mean


@pytest.mark.parametrize("estimator", ["full", "sampled"])
@pytest.mark.parametrize("case", ["usual", "teacher-padded", "near-1e-3"])
def test_reference_is_the_oracle(kit: Any, case: str, estimator: str) -> None:
    """Two independent derivations agree to float64's own rounding."""
    inputs = kit.make_inputs(**CASES[case], seed=3, dtype=torch.float64)
    truth = kit.oracle(inputs, estimator=estimator)
    loss, d_hidden, d_weight, stats = kit.call(inputs, estimator=estimator)
    assert stats.backend == "reference" and loss.dtype == torch.float64
    assert kit.relative(loss, truth.loss) < 1e-12
    assert kit.relative(d_hidden, truth.d_hidden) < 1e-12
    assert kit.relative(d_weight, truth.d_weight) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("near", [None, 5e-3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_inputs(kit: Any, backend: str, near: float | None, dtype: torch.dtype) -> None:
    """The truth is float64 on the same operands; gradients are rounded once, to the inputs' dtype."""
    inputs = kit.make_inputs(near=near, seed=11, dtype=dtype)
    truth = kit.oracle(inputs)
    limit = kit.oracle(inputs, projections=torch.float32)
    loss, d_hidden, d_weight, stats = kit.call(inputs, backend=backend)
    assert loss.dtype == torch.float32 and d_hidden.dtype == d_weight.dtype == dtype
    assert kit.relative(loss, truth.loss) <= max(1e-5, 1.5 * kit.relative(limit.loss, truth.loss))
    assert kit.relative(stats.kl, truth.kl) <= max(1e-5, 1.5 * kit.relative(limit.kl, truth.kl))
    for got, exact, fp32 in ((d_hidden, truth.d_hidden, limit.d_hidden), (d_weight, truth.d_weight, limit.d_weight)):
        # Rounding once costs eps / 2 an entry at the most (fp16 may also underflow: allow its absolute step).
        rounding = kit.relative(exact.to(dtype), exact)
        assert kit.relative(got, exact) <= 1.1 * rounding + 1.5 * kit.relative(fp32, exact) + 1e-6


def test_instruction_sets_agree(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sgopd_kernels.backends.cpu import CpuBackend

    sets = CpuBackend().instruction_sets()
    assert "base" in sets
    for isa in sets:
        monkeypatch.setattr(CpuBackend, "isa", isa)
        for case in ("usual", "near-1e-5", "one-hot"):
            check(kit, kit.make_inputs(**CASES[case], seed=5), "cpu")
    monkeypatch.setattr(CpuBackend, "isa", "sse9")
    with pytest.raises(ValueError, match="isa"):
        kit.call(kit.make_inputs(), backend="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunking_and_threads_change_nothing(kit: Any, backend: str) -> None:
    inputs = kit.make_inputs(n=333, v=2000, seed=2)
    whole = kit.call(inputs, backend=backend)
    again = kit.call(inputs, backend=backend)
    for a, b in zip(whole[:3], again[:3]):
        assert torch.equal(a, b)
    small = kit.call(inputs, backend=backend, workspace=(49 if backend == "torch" else 1) * 2**20)
    for a, b in zip(whole[:3], small[:3]):
        assert kit.relative(b, a) <= 1e-6
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = kit.call(inputs, backend=backend)
    finally:
        torch.set_num_threads(threads)
    assert kit.relative(single[1], whole[1]) <= 1e-6
    assert torch.equal(single[3].kl, whole[3].kl) or kit.relative(single[3].kl, whole[3].kl) <= 1e-6


ALL, CUDA, CPU = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def precisions() -> list[str]:
    return [s.fp32_precision for s in (ALL, CUDA, CPU)]


@pytest.fixture
def untouched() -> Iterator[None]:
    """Settings of fp32 products as a process begins with them, and afterwards as they were."""
    legacy, before = torch.get_float32_matmul_precision(), precisions()
    for setting in (ALL, CUDA, CPU):
        setting.fp32_precision = "none"
    yield
    ALL.fp32_precision = "none"
    torch.set_float32_matmul_precision(legacy)
    for setting, value in zip((ALL, CUDA, CPU), before):
        setting.fp32_precision = value


# How a user asks for rounded fp32 products.
SETTINGS: dict[str, Callable[[], None]] = {
    "legacy": partial(torch.set_float32_matmul_precision, "medium"),
    "cuda": partial(setattr, CUDA, "fp32_precision", "tf32"),
    "cpu": partial(setattr, CPU, "fp32_precision", "bf16"),
    "all": partial(setattr, ALL, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_matmul_settings_are_ignored(
    kit: Any, untouched: None, backend: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 or bf16 is what they ask for; after the call they are as they were."""
    seen, mm = set(), torch.mm

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.update(precisions()[1:])
        return mm(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", spy)
    SETTINGS[setting]()
    asked = precisions()
    assert asked != ["none"] * 3
    kit.call(kit.make_inputs(seed=9), backend=backend)
    assert seen and seen <= {"ieee", "none"} and precisions() == asked
    ALL.fp32_precision = "none"
    assert setting != "all" or precisions() == ["none"] * 3, "what was inherited is pinned"


def test_threads_share_the_setting_of_fp32_products(untouched: None) -> None:
    """Whoever was first leaves first, and the other is still inside: the last one out puts back what was there."""
    CPU.fp32_precision = "bf16"
    holds = ieee_matmul(), ieee_matmul()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(holds[0].__enter__).result()
        other.submit(holds[1].__enter__).result()
        one.submit(holds[0].__exit__, None, None, None).result()
        assert CPU.fp32_precision == "ieee"
        one.submit(kept_by_another).result()
        assert CPU.fp32_precision == "ieee"
        other.submit(holds[1].__exit__, None, None, None).result()
    assert CPU.fp32_precision == "bf16"


def kept_by_another() -> None:
    """A whole call beside the thread that is inside."""
    with ieee_matmul():
        assert CPU.fp32_precision == "ieee"


DEFAULTS = [torch.bfloat16, torch.float16, torch.float64, "meta"]  # torch's default dtype, or device
CALLS: list[dict[str, Any]] = [{"gate": "random"}, {"gate": "shuffled", "token_weight": 0.1, "reliability": 0.3}]


@contextlib.contextmanager
def by_default(chosen: torch.dtype | str) -> Iterator[None]:
    before = torch.get_default_dtype()
    with torch.device(chosen) if isinstance(chosen, str) else contextlib.nullcontext():
        torch.set_default_dtype(before if isinstance(chosen, str) else chosen)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def test_the_random_controls_rate_is_not_rounded() -> None:
    """A third, which bf16 has as 0.334."""
    d, uniform = torch.tensor([1.0, -1.0, -1.0]), torch.full((3,), 0.3336)
    with by_default(torch.bfloat16):
        assert draw_agreement(d, torch.ones(3), 0.0, uniform).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "backend, isa", [("torch", ""), *(("cpu", isa) for isa in ["", "amx-emulated", *WITHOUT_TILES[:1]])]
)
def test_torchs_defaults_move_no_bit(
    kit: Any, calibrate: Any, monkeypatch: pytest.MonkeyPatch, backend: str, isa: str
) -> None:
    """Nor memory: what C++ is given as fp32 is fp32, whatever dtype torch makes its tensors of."""
    calibrate(pairs={"worthwhile": 0.0}, blocks={"worthwhile": 0.0})
    monkeypatch.setattr(CpuBackend, "isa", isa)
    inputs = kit.make_inputs(n=48, v=2500, hs=64, peak=12.0, near=0.3, seed=5)

    def call(options: dict[str, Any]) -> list[Any]:
        torch.manual_seed(7)
        loss, d_hidden, d_weight, stats = kit.call(inputs, backend=backend, **options)
        return [loss, d_hidden, d_weight, stats.kl, stats.gate, stats.report]

    for options in CALLS:
        want = call(options)
        plan = PLANS[int(want[-1][0])]
        assert plan in {"torch": ["exact"], "amx-emulated": ["blocks"]}.get(isa or backend, [*PLANS]), plan
        for default in DEFAULTS:
            with by_default(default):
                got = call(options)
            assert all(torch.equal(a, b) for a, b in zip(got, want)), (options, default)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["full", "sampled"])
@pytest.mark.parametrize("gate", ["opdvr", "protect", "inverse", "verified-only", "failure-only"])
def test_rows_without_weight_leave_the_backward(kit: Any, gate: str, estimator: str, backend: str) -> None:
    """The rows that stay are compacted: each must keep its own hidden state and its own place."""
    inputs = kit.make_inputs(n=150, v=700, seed=13)
    truth = kit.call(inputs.to(torch.float64), gate=gate, estimator=estimator)
    got = kit.call(inputs, gate=gate, estimator=estimator, backend=backend, reduction="mean")
    for a, b in zip(got[:3], truth[:3]):
        assert kit.relative(a, b) <= 1e-5
    off = truth[3].gate == 0
    assert 0 < int(off.sum()) < 150 and not got[1][off].any()
