"""The Triton kernels against float64, in Triton's interpreter on CPU tensors: test_triton.py runs this in a process.

The interpreter computes what the kernels say, not how a device does it: races, out-of-bounds loads and a device's
own rounding of exp are invisible here. Programs run one by one: few tokens, wide rows.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import interpreter  # noqa: E402, F401  before anything imports Triton
import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from sgopd_kernels import Gate, backends, gated_kl_loss, gated_logprob_loss, gated_topk_kl_loss  # noqa: E402
from sgopd_kernels.backends.tensor_cores import TensorCoreBackend, narrow_gradient  # noqa: E402
from sgopd_kernels.backends.triton import TritonBackend  # noqa: E402
from sgopd_kernels.options import Head, Options  # noqa: E402
from sgopd_kernels.plans import calibration  # noqa: E402
from sgopd_kernels.problem import Chunk, Problem  # noqa: E402


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


kit = load("kernel_kit", HERE.parent / "kernels" / "conftest.py")
table = load("errors", HERE.parents[1] / "tools" / "errors.py")
door = load("door", HERE.parent / "kernels" / "test_door.py")
table.N = 10
OPTIONS = table.options()


def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are rounded in small calls too."""
    monkeypatch.setattr(calibration, "FITTED", calibration.FITTED.changed(devices={"narrow_worthwhile": 0.0}))


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name: str) -> None:
    assert max(table.errors(OPTIONS[name], "triton")) <= (5e-4 if "near" in name else 1e-5)


# KL from 1e-6 to above 50; fewer columns than lanes, one more than a block, many blocks.
CASES: dict[str, dict[str, Any]] = {
    "flat": dict(n=6, v=1000, peak=0.1),
    "one-hot": dict(n=6, v=777, peak=25.0),
    "one-token": dict(n=1, v=2, masked=0.0),
    "two-columns": dict(n=9, v=2),
    "one-over": dict(n=5, v=2049, hs=33),
    "padded": dict(n=5, v=1000, v_teacher=1088),
    "blocks": dict(n=5, v=10_001, hs=32),
    "near-1e-2": dict(n=8, near=5e-2),
    "near-1e-4": dict(n=8, near=5e-3),
    "near-1e-6": dict(n=8, near=5e-4),
    "near-blocks": dict(n=5, v=10_001, hs=32, near=1.5e-3),
}


def check(inputs: Any, floor: float = 1e-5, **kwargs: Any) -> None:
    truth = kit.oracle(inputs, **kwargs)
    limit = kit.oracle(inputs, **kwargs, projections=torch.float32)
    loss, d_hidden, d_weight, stats = kit.call(inputs, backend="triton", **kwargs)
    assert stats.backend == "triton" and stats.plan == "exact" and stats.error_estimate == 0
    size = float(truth.losses.abs().sum() / max(int((inputs.token_ids != -100).sum()), 1))
    assert float((loss.double() - truth.loss).abs()) <= size * max(
        floor, 1.5 * float((limit.loss - truth.loss).abs()) / size
    )
    for name, got, exact, fp32 in (
        ("d_hidden", d_hidden, truth.d_hidden, limit.d_hidden),
        ("d_weight", d_weight, truth.d_weight, limit.d_weight),
        ("kl", stats.kl, truth.kl, limit.kl),
    ):
        error, allowed = kit.relative(got, exact), max(floor, 1.5 * kit.relative(fp32, exact))
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"
    clear = (truth.d.abs() > 1e-4) & (inputs.token_ids != -100)
    assert torch.equal(stats.gate[clear], truth.gate.float()[clear])


@pytest.mark.parametrize("estimator", ["full", "sampled"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str, estimator: str) -> None:
    check(kit.make_inputs(**CASES[case], seed=len(case)), estimator=estimator)


@pytest.mark.parametrize("near", [None, 5e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs(dtype: torch.dtype, near: float | None) -> None:
    """Rounded once, to the inputs' dtype: what G in fp16 adds is nothing beside that."""
    inputs = kit.make_inputs(n=10, near=near, seed=11, dtype=dtype)
    truth, limit = kit.oracle(inputs), kit.oracle(inputs, projections=torch.float32)
    loss, d_hidden, d_weight, stats = kit.call(inputs, backend="triton", precision="exact")
    assert d_hidden.dtype == d_weight.dtype == dtype
    assert stats.error_estimate == (calibration.FITTED.devices.rounding if dtype == torch.bfloat16 else 0)
    assert kit.relative(loss, truth.loss) <= max(1e-5, 1.5 * kit.relative(limit.loss, truth.loss))
    for got, exact, fp32 in ((d_hidden, truth.d_hidden, limit.d_hidden), (d_weight, truth.d_weight, limit.d_weight)):
        rounding = kit.relative(exact.to(dtype), exact)
        assert kit.relative(got, exact) <= 1.1 * rounding + 1.5 * kit.relative(fp32, exact) + 2e-5


def test_models_a_large_constant_apart() -> None:
    """Moments are centred: a constant on all of the teacher's logits, which changes no probability, costs no digits."""
    inputs = kit.make_inputs(n=10, v=1003, hs=16, masked=0.0, seed=3)
    # Multiples of 1/8: logits are multiples of 1/64 and exact in fp32, with the constant too.
    inputs = kit.Inputs(*((t * 8).round() / 8 for t in inputs.args()[:4]), *inputs.args()[4:])
    bias = torch.full((1003,), 4096.0)
    truth = kit.call(inputs.to(torch.float64), teacher_bias=bias.double())
    got = kit.call(inputs, backend="triton", precision="exact", teacher_bias=bias)
    assert float(truth[3].kl.min()) >= 0.05, "below, the divergence is summed again from terms of second order"
    for mine, true in zip(got[:3], truth[:3]):
        assert kit.relative(mine, true) <= 2e-6


def in_fp32(inputs: Any, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """(d_hidden, d_weight, stats) of bf16 inputs before they are rounded to bf16: G, in fp16, is all that was."""
    g = inputs.to(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sgopd_kernels.plans.narrow.fits", lambda problem: True)
        return kit.call(g, backend="triton", **options)[1:]


@pytest.mark.parametrize("near, gate", [(None, "sg-opd"), (5e-4, "sg-opd"), (5e-2, "opdvr")])
def test_a_gradient_in_fp16(monkeypatch: pytest.MonkeyPatch, gate: str, near: float | None) -> None:
    # Several blocks a row: the narrow gradient is written over logits that are still to be read.
    monkeypatch.setattr("sgopd_kernels.backends.triton.BLOCK", 256)
    inputs = kit.make_inputs(n=7, v=1003, near=near, seed=5, dtype=torch.bfloat16)
    truth = kit.call(inputs.to(torch.float64), gate=gate)
    exact = kit.call(inputs.to(torch.float32), backend="triton", gate=gate, precision="exact")
    *got, stats = in_fp32(inputs, gate=gate, precision="exact")
    assert stats.plan == "exact" and 2e-4 < stats.error_estimate < 3e-4
    assert torch.equal(stats.kl, exact[3].kl), "the statistics are those of fp32 logits"
    for a, b, true in zip(got, exact[1:3], truth[1:3]):
        assert kit.relative(a, true) <= kit.relative(b, true) + 3.5e-4


WORDS: list[Any] = [
    "reverse-kl",
    "forward-kl",
    *((name, a) for name, a in (("jsd", 0.3), ("skew-reverse-kl", 0.1), ("skew-forward-kl", 0.9), ("alpha", 0.6))),
]


# Of a row's unit: of the power of two that the row is bounded by.
EXPONENTS = {e - 15 + max(12 - e, 0) // 3: e for e in range(-24, 16)}


@pytest.mark.parametrize("near", [None, 3e-2, 1e-3])
@pytest.mark.parametrize("divergence", WORDS, ids=str)
def test_every_divergence(divergence: Any, near: float | None) -> None:
    """Value, fp32 gradient and fp16 gradient; whose largest entry uses what fp16 has, and no more."""
    inputs = kit.make_inputs(n=5, v=400, near=near, masked=0.0, seed=7, dtype=torch.bfloat16)
    truth = kit.call(inputs.to(torch.float64), divergence=divergence, backend="reference")
    peer = kit.call(inputs.to(torch.float32), divergence=divergence, backend="torch", precision="exact")
    chunks, rows = [], TritonBackend.rows

    def seen(self: TritonBackend, problem: Problem, chunk: Chunk, *rest: Any) -> Tensor:
        chunks.append(chunk)
        return rows(self, problem, chunk, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonBackend, "rows", seen)
        narrow = in_fp32(inputs, divergence=divergence)
    left = narrow_gradient(chunks[-1].z_student).abs().amax(1)
    for unit, most in zip(chunks[-1].units.log2().tolist(), left.tolist()):
        assert 2.0**-2 < most <= 2.0 ** (EXPONENTS[int(unit)] - unit), "the bound on the row holds"
    wide = kit.call(inputs.to(torch.float32), backend="triton", divergence=divergence, precision="exact")
    for got, more in ((wide[1:], 0.0), (narrow, 4e-4)):
        for a, b, c in zip(got[:2], truth[1:3], peer[1:3]):
            assert kit.relative(a, b) <= max(1e-5, 1.5 * kit.relative(c, b)) + more
        assert kit.relative(got[2].kl, truth[3].kl) <= max(1e-5, 1.5 * kit.relative(peer[3].kl, truth[3].kl))


def test_operands_in_fp32_are_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that splits them is torch's lines, bit for bit."""
    x, unit = torch.randn(3, 5001)[:, :5000], torch.tensor(4.0)
    for which in ((1, 0, 0), (0, 1, 0), (0,)):
        assert torch.equal(TritonBackend().parts(x, unit, which), TensorCoreBackend().parts(x, unit, which))
    inputs = kit.make_inputs(n=6, v=600, near=5e-2, seed=11)
    truth = kit.oracle(inputs)
    at_any_size(monkeypatch)
    _, d_hidden, d_weight, stats = kit.call(inputs, backend="triton")
    assert stats.error_estimate == pytest.approx(2.97e-4, rel=1e-2) and kit.relative(stats.kl, truth.kl) <= 2e-5
    for got, true in ((d_hidden, truth.d_hidden), (d_weight, truth.d_weight)):
        assert 1e-4 < kit.relative(got, true) <= 4e-4


@pytest.mark.parametrize("estimator", ["full", "sampled"])
@pytest.mark.parametrize("gate", ["opdvr", "verified-only"])
def test_rows_without_weight_leave_the_backward(gate: str, estimator: str) -> None:
    inputs = kit.make_inputs(n=24, v=300, seed=13)
    truth = kit.call(inputs.to(torch.float64), gate=gate, estimator=estimator)
    got = kit.call(inputs, gate=gate, estimator=estimator, backend="triton")
    for a, b in zip(got[:3], truth[:3]):
        assert kit.relative(a, b) <= 1e-5
    off = truth[3].gate == 0
    assert 0 < int(off.sum()) < 24 and not got[1][off].any()


@pytest.mark.parametrize("gate", ["sg-opd", "opdvr", "failure-only"])
def test_a_captured_call_reads_no_value(monkeypatch: pytest.MonkeyPatch, gate: str) -> None:
    """While a graph is captured every token takes part; the ignored ones, NaN here, leave no trace."""
    inputs = kit.make_inputs(n=16, v=300, seed=3)
    expected = kit.call(inputs, gate=gate, backend="triton")
    ignored = inputs.token_ids == -100
    assert ignored.any()
    hidden = inputs.student_hidden.masked_fill(ignored.unsqueeze(-1), math.nan)
    monkeypatch.setattr(TritonBackend, "capturing", lambda self, device: True)
    got = kit.call(replace(inputs, student_hidden=hidden), gate=gate, backend="triton")
    for a, b in zip(got[:3], expected[:3]):
        assert kit.relative(a, b) <= 1e-6
    assert torch.equal(got[3].kl, expected[3].kl) and torch.equal(got[3].gate, expected[3].gate)


@pytest.mark.parametrize("gate", ["sg-opd", "opdvr"])
def test_what_a_capture_promises(monkeypatch: pytest.MonkeyPatch, gate: str) -> None:
    """Where no token is ignored and none weighs 0, the bits of a call without a graph. Else statistics and hidden
    gradients to rounding, and the head's gradient too: its sum runs over the tokens in another order. (docs/gpu.md)"""
    inputs = kit.make_inputs(n=60, v=301, masked=0.0, seed=1, dtype=torch.bfloat16)
    eager = kit.call(inputs, gate=gate, backend="triton", precision="exact")
    monkeypatch.setattr(TritonBackend, "capturing", lambda self, device: True)
    captured, again = (kit.call(inputs, gate=gate, backend="triton", precision="exact") for _ in range(2))
    same = [torch.equal(a, b) for a, b in zip(captured[:3], eager[:3])]
    assert all(torch.equal(a, b) for a, b in zip(captured[:3], again[:3]))
    assert same[:2] == [True, True] and (same[2] or gate == "opdvr")
    assert kit.relative(captured[2], eager[2]) <= 1e-4, "of a sum that was rounded to bf16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_moves_no_bit(dtype: torch.dtype) -> None:
    inputs = kit.make_inputs(n=8, v=500, seed=5, dtype=dtype)
    plain = kit.call(inputs, backend="triton", precision="exact")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = kit.call(inputs, backend="triton", precision="exact")
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], mixed[:3]))


@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_the_first_chunk_writes_the_heads_gradient(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Whatever its memory held: NaN here. Also where no chunk came, and in rows beyond the shared vocabulary."""
    at_any_size(monkeypatch)

    def soiled(self: Any, rows: int, columns: int, device: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((rows, columns), math.nan, dtype=dtype)

    monkeypatch.setattr(TritonBackend, "accumulator", soiled)
    inputs = kit.make_inputs(n=20, v=300, v_teacher=280, seed=2, dtype=torch.bfloat16)
    truth = kit.oracle(inputs)
    for workspace in (None, 1_400_000 if precision == "exact" else 60_000):  # one chunk; several
        got = kit.call(inputs, backend="triton", precision=precision, workspace=workspace)[2]
        assert kit.relative(got, truth.d_weight) <= 2**-8 and not got[280:].any()
    inputs.token_ids[:] = -100
    assert not kit.call(inputs, backend="triton", precision=precision)[2].any()
    inputs.token_ids[:] = 3
    assert not kit.call(inputs, backend="triton", precision=precision, gate=Gate(0.0, 0.0, 0.0))[2].any()


def test_chunks_change_nothing() -> None:
    inputs = kit.make_inputs(n=40, v=2000, seed=2)
    whole, again = kit.call(inputs, backend="triton"), kit.call(inputs, backend="triton")
    small = kit.call(inputs, backend="triton", workspace=300_000)
    for a, b, c in zip(whole[:3], again[:3], small[:3]):
        assert torch.equal(a, b) and kit.relative(c, a) <= 1e-6


@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_a_sampled_token_without_mass(offset: float) -> None:
    """z - t is centred at the sampled token; here that is an outlier, far from where the mass is."""
    inputs = kit.make_inputs(n=6, v=500, near=5e-3, masked=0.0, seed=1)
    bias = torch.zeros(500)
    bias[7] = -40.0 - offset
    inputs.token_ids[:] = 7
    double = inputs.to(torch.float64)
    truth = kit.call(double, student_bias=bias.double(), backend="reference", estimator="full")
    got = kit.call(inputs, student_bias=bias, backend="triton", estimator="full")
    peer = kit.call(inputs, student_bias=bias, backend="torch", estimator="full")
    for a, b, c in zip(got[1:3], truth[1:3], peer[1:3]):
        assert kit.relative(a, b) <= max(1e-5, 1.5 * kit.relative(c, b))


def test_infinite_and_undefined_logits() -> None:
    inputs = kit.make_inputs(n=6, v=700, masked=0.0, seed=4)
    bad = inputs.student_hidden.clone()
    bad[2] = math.nan
    loss, d_hidden, d_weight, stats = kit.call(replace(inputs, student_hidden=bad), backend="triton")
    assert loss.isnan() and d_hidden[2].isnan().all() and stats.kl[2].isnan() and d_weight.isnan().any()
    assert not d_hidden[[0, 1, 3, 4, 5]].isnan().any()
    bad = inputs.teacher_hidden.clone()
    bad[1] = math.nan
    loss, d_hidden, *_ = kit.call(replace(inputs, teacher_hidden=bad), backend="triton")
    assert loss.isnan() and d_hidden[1].isnan().all()


@pytest.mark.parametrize("divergence", ["reverse-kl", ("jsd", 0.3)])
def test_a_softcap_leaves_masked_columns_masked(divergence: Any) -> None:
    """-inf on the student's side alone, on the teacher's, on both."""
    inputs = kit.make_inputs(n=6, v=300, seed=2)
    inputs.token_ids.clamp_(max=249)
    for student, teacher in ((250, 300), (300, 250), (250, 260)):
        masks = (torch.where(torch.arange(300) < end, 0.0, -torch.inf) for end in (student, teacher))
        options = dict(zip(("student_bias", "teacher_bias"), masks), student_softcap=20.0, teacher_softcap=20.0)
        truth = kit.call(inputs.to(torch.float64), divergence=divergence, backend="reference", **options)
        got = kit.call(inputs, divergence=divergence, backend="triton", **options)
        assert not got[2][min(student, teacher) :].any()
        for a, b in zip(got[:3], truth[:3]):
            assert kit.relative(a, b) <= 1e-5


def test_an_undefined_importance_ratio_is_not_clipped_to_a_number() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 16, generator=g), torch.randn(100, 16, generator=g)
    behaviour = torch.tensor([-1.0, math.nan, -1.0, -1.0])
    arguments = (hidden, weight, torch.arange(4), -torch.ones(4), torch.ones(4))
    loss = gated_logprob_loss(*arguments, behaviour_logprob=behaviour, reduction="none", backend="triton")
    assert isinstance(loss, Tensor) and loss.isnan().tolist() == [False, True, False, False]


def test_equal_models_have_no_gradient() -> None:
    inputs = kit.make_inputs(n=5, v=900, near=0.0)
    for divergence in ("reverse-kl", "forward-kl", ("jsd", 0.3)):
        loss, d_hidden, d_weight, _ = kit.call(inputs, backend="triton", divergence=divergence)
        assert loss == 0 and not d_hidden.any() and not d_weight.any()


def test_reference_beyond_the_teachers_support() -> None:
    """log pi_R is over all of its own columns, those the teacher cannot produce too."""
    inputs = kit.make_inputs(n=6, v=400, seed=9)
    g = torch.Generator().manual_seed(1)
    bias = torch.zeros(400, dtype=torch.float64)
    bias[300:] = -torch.inf
    inputs.token_ids.clamp_(max=299)
    third = {
        "reference_hidden": torch.randn(6, 64, generator=g, dtype=torch.float64),
        "reference_weight": torch.randn(400, 64, generator=g, dtype=torch.float64) * 0.4,
        "teacher_bias": bias,
    }
    for estimator in ("full", "sampled"):
        truth = kit.call(inputs.to(torch.float64), **third, estimator=estimator)
        got = kit.call(inputs, **{k: t.float() for k, t in third.items()}, estimator=estimator, backend="triton")
        for a, b in zip(got[:3], truth[:3]):
            assert kit.relative(a, b) <= 1e-5


def both(call: Any, hidden: Tensor, weight: Tensor, *rest: Any, **options: Any) -> None:
    results = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        h, w = (t.detach().to(dtype, copy=True).requires_grad_() for t in (hidden, weight))
        loss = call(h, w, *rest, backend=backend, **options)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    for a, b in zip(results[1], results[0]):
        assert kit.relative(a, b) <= 1e-5


def test_teachers_that_give_log_probabilities() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 32, generator=g), torch.randn(500, 32, generator=g) * 0.5
    ids, verdict = torch.randint(0, 500, (8,), generator=g), torch.tensor([1, -1, 0, 1, 1, -1, -1, 0])
    lq, behaviour = -5 * torch.rand(8, generator=g), -5 * torch.rand(8, generator=g)
    both(gated_logprob_loss, hidden, weight, ids, lq, verdict)
    both(gated_logprob_loss, hidden, weight, ids, lq, verdict, behaviour_logprob=behaviour, ratio_clip=1.5)
    top = torch.log_softmax(torch.randn(8, 500, generator=g) * 3, -1).topk(20, -1)
    both(gated_topk_kl_loss, hidden, weight, ids, top.indices, top.values, verdict)


def test_controls_and_tolerance() -> None:
    inputs = kit.make_inputs(n=16, v=300, seed=6)
    for options in ({"gate": "random"}, {"gate": "shuffled"}):
        seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
        truth = kit.call(inputs.to(torch.float64), generator=seeds[0], **options)
        got = kit.call(inputs, generator=seeds[1], backend="triton", **options)
        assert torch.equal(got[3].gate, truth[3].gate) and kit.relative(got[1], truth[1]) <= 1e-5


def test_without_gradients_nothing_is_written() -> None:
    g = torch.Generator().manual_seed(0)
    z, t = torch.randn(4, 300, generator=g), torch.randn(4, 300, generator=g)
    problem = Problem(
        Options(),
        Head(torch.randn(4, 8), torch.randn(300, 8)),
        torch.arange(4),
        torch.ones(4),
        teacher=Head(torch.ones(4, 8), torch.ones(300, 8)),
    )
    before = z.clone(), t.clone()
    backend = backends.get("triton")
    weights = torch.ones(3, 4, dtype=torch.float64)
    chunk = Chunk(torch.arange(4), problem.student.hidden, z, t, None, weights, None, torch.ones(4))
    stats = backend.rows(problem, chunk, None)
    assert torch.equal(z, before[0]) and torch.equal(t, before[1])
    assert torch.equal(stats, backend.rows(problem, chunk, torch.float32)) and not torch.equal(z, before[0])
    assert torch.equal(t, before[1])


def test_rows_move() -> None:
    z = torch.randn(9, 5000)
    expected = z.clone()
    expected[[1, 4]] = expected[[8, 7]]
    backends.get("triton").move_rows(z, torch.tensor([1, 4]), torch.tensor([8, 7]))
    assert torch.equal(z, expected)


def test_wrong_ids_are_refused() -> None:
    inputs = kit.make_inputs(n=4, v=50, masked=0.0)
    inputs.token_ids[1] = 50
    with pytest.raises(ValueError, match="token_ids"):
        gated_kl_loss(*inputs.args(), backend="triton")


# What the doors say of masked columns, -inf and NaN, on this backend.


@pytest.mark.parametrize("case", door.TOPK_ENDS)
def test_topk_at_the_ends(case: str) -> None:
    door.test_topk_at_the_ends(kit, case, "triton")


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_sampled_token_that_is_masked(side: str) -> None:
    door.test_a_sampled_token_that_is_masked(kit, side, "triton")


def test_words_at_the_ends() -> None:
    door.test_words_at_the_ends(kit, "triton")
