"""The parity suite of tests/kernels on a device: every backend against float64 on the CPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("SGOPD_GPU_DRY_RUN") != "1":
    pytest.skip("needs a CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

CASES = (
    "flat",
    "usual",
    "peaked",
    "one-hot",
    "widths",
    "teacher-padded",
    "student-padded",
    "one-token",
    "two-columns",
    "ragged",
    "vocabulary",
    "near-1e-1",
    "near-1e-2",
    "near-1e-3",
    "near-1e-4",
    "near-1e-5",
    "near-1e-5-peaked",
    "near-vocabulary",
)
SOME = ("usual", "ragged", "near-1e-3")  # for a dry run, where a row costs the interpreter milliseconds


def skip_most(device: Any, case: str) -> None:
    if device.dry and case not in SOME:
        pytest.skip("a dry run takes some of the cases")


def test_all_cases_are_listed(parity: Any) -> None:
    assert set(CASES) == set(parity.CASES)


@pytest.mark.parametrize("estimator", ["full", "sampled"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(kit: Any, parity: Any, device: Any, backend: str, case: str, estimator: str) -> None:
    skip_most(device, case)
    parity.check(kit, kit.make_inputs(**parity.CASES[case], seed=len(case)), backend, estimator=estimator)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("case", ["usual", "near-1e-4"])
def test_temperature(kit: Any, parity: Any, device: Any, backend: str, case: str, temperature: float) -> None:
    skip_most(device, case)
    parity.check(kit, kit.make_inputs(**parity.CASES[case], seed=7), backend, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("near", [None, 5e-3])
def test_low_precision_inputs(kit: Any, parity: Any, backend: str, near: float | None, dtype: torch.dtype) -> None:
    parity.test_low_precision_inputs(kit, backend, near, dtype)


@pytest.mark.parametrize("estimator", ["full", "sampled"])
@pytest.mark.parametrize("gate", ["opdvr", "protect", "inverse", "verified-only", "failure-only"])
def test_rows_without_weight(kit: Any, parity: Any, device: Any, backend: str, gate: str, estimator: str) -> None:
    if device.dry and gate != "opdvr":
        pytest.skip("a dry run takes one of the gates")
    parity.test_rows_without_weight_leave_the_backward(kit, gate, estimator, backend)


OPTIONS = (
    "default (sg-opd, full reverse KL)",
    "near",
    "sampled",
    "sampled, near",
    "forward KL",
    "forward KL, near",
    "JSD 0.1",
    "JSD 0.5",
    "JSD 0.9",
    "JSD 0.5, near",
    "reference",
    "reference, sampled",
    "temperature 0.7",
    "logit scales",
    "softcaps",
    "softcap, sampled",
    "biases",
    "all of the heads' options",
    "-inf columns of the student",
    "-inf columns of the teacher",
    "gate opdvr",
    "gate protect, reliability 0.3",
    "gate verified-only",
    "reduction sum",
    "reduction none",
)


def test_all_options_are_listed(options: Any) -> None:
    assert set(OPTIONS) == set(options.options())


@pytest.mark.parametrize("name", OPTIONS)
def test_option(options: Any, device: Any, backend: str, name: str) -> None:
    if device.dry and not name.startswith(("default", "biases", "-inf", "JSD 0.1")):
        pytest.skip("a dry run takes some of the options")
    bound = 5e-4 if "near" in name else 1e-5
    assert max(options.errors(options.options()[name], backend, device.name)) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 127, 8192])
def test_sizes(kit: Any, backend: str, n: int, dtype: torch.dtype) -> None:
    """An odd vocabulary, no alignment anywhere."""
    inputs = kit.make_inputs(n=n, v=1021, hs=33, ht=47, masked=0.1 if n > 1 else 0.0, seed=n, dtype=dtype)
    truth = kit.oracle(inputs)
    loss, d_hidden, d_weight, stats = kit.call(inputs, backend=backend)
    assert d_hidden.shape == inputs.student_hidden.shape and stats.kl.shape == inputs.token_ids.shape
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    assert kit.relative(loss, truth.loss) <= 1e-5
    assert kit.relative(d_hidden, truth.d_hidden) <= rounding and kit.relative(d_weight, truth.d_weight) <= rounding


def test_views(kit: Any, backend: str) -> None:
    """Every other token of a longer batch, a head that is a slice of a wider one."""
    whole = kit.make_inputs(n=80, v=515, hs=40, seed=4, masked=0.0)
    wide = torch.zeros(520, 64)
    wide[3:518, 8:48] = whole.student_weight
    view = type(whole)(
        whole.student_hidden[::2],
        wide[3:518, 8:48],
        whole.teacher_hidden[::2],
        whole.teacher_weight.T.contiguous().T,
        whole.token_ids[::2],
        whole.verdict[::2],
    )
    truth = kit.oracle(view)
    loss, d_hidden, d_weight, _ = kit.call(view, backend=backend)
    assert kit.relative(loss, truth.loss) <= 1e-5
    assert kit.relative(d_hidden, truth.d_hidden) <= 1e-5 and kit.relative(d_weight, truth.d_weight) <= 1e-5


def test_a_nan_stays_in_its_row(kit: Any, backend: str) -> None:
    clean, dirty = (kit.make_inputs(n=12, v=300, hs=16, masked=0.0, seed=8) for _ in range(2))
    dirty.student_hidden[7] = torch.nan
    expected, got = kit.per_token(clean, backend=backend), kit.per_token(dirty, backend=backend)
    others = torch.arange(12) != 7
    assert bool(got[7].isnan()), "a NaN that came in must not vanish"
    assert torch.equal(got[others], expected[others])


def test_default_precision_keeps_its_budget(kit: Any, device: Any, backend: str) -> None:
    """Peaked logits, bf16, large enough for any plan to be taken; 2^-8 is the rounding of the result itself."""
    size = dict(v=1000, hs=32) if device.dry else dict(n=1024, v=16_001, hs=1024)
    inputs = kit.make_inputs(**size, peak=8.0, near=0.3, seed=5, dtype=torch.bfloat16)
    truth = kit.oracle(inputs)
    loss, d_hidden, d_weight, stats = kit.call(inputs, backend=backend, precision="auto")
    assert stats.error_estimate <= 1.5e-3
    assert kit.relative(loss, truth.loss) <= 1.5e-3
    for got, exact in ((d_hidden, truth.d_hidden), (d_weight, truth.d_weight)):
        rounding = kit.relative(exact.bfloat16(), exact)
        assert kit.relative(got, exact) <= 1.5e-3 + 1.1 * rounding, (stats.plan, stats.kept)
