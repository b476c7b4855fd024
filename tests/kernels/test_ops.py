"""The loss as a torch citizen: opcheck, torch.compile, autocast, one backward, memory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
from typing import Any

import pytest
import torch

from sgopd_kernels import Gate, _cpu, backends, gated_kl_loss
from sgopd_kernels.backends.cpu import CpuBackend


@pytest.mark.parametrize("strides", ["usual", "transposed", "spread"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(kit: Any, reduction: str, strides: str) -> None:
    """Real and fake outputs have the same strides, whatever the operands' are: a compiler relies on it."""
    from sgopd_kernels import Head, Options
    from sgopd_kernels.ops import fused_loss
    from sgopd_kernels.problem import Problem, encode

    i = kit.make_inputs(n=7, v=33, hs=8, masked=0.0)
    bias = torch.linspace(-1, 1, 66)[::2]
    leaves = i.student_hidden, i.student_weight
    if strides == "transposed":  # as a head that is stored [H, V]
        leaves = tuple(x.t().contiguous().t() for x in leaves)
    elif strides == "spread":
        leaves = tuple(x.repeat_interleave(2, 1)[:, ::2] for x in leaves)
    student = Head(*(x.detach().requires_grad_() for x in (*leaves, bias)))
    teacher = Head(i.teacher_hidden, i.teacher_weight)
    problem = Problem(Options(reduction=reduction), student, i.token_ids, i.verdict.float(), teacher)
    torch.library.opcheck(
        fused_loss,
        (student.hidden, student.weight, student.bias, None, *encode(problem), "cpu", "", [True, True, True]),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_compiled_equals_eager_bitwise(kit: Any, backend: str) -> None:
    inputs = kit.make_inputs(n=40, v=200, hs=16, seed=6)

    def step(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return gated_kl_loss(hidden * 1.5, weight, *inputs.args()[2:], backend=backend) * 2.0

    def run(function: Any) -> tuple[torch.Tensor, ...]:
        hidden = inputs.student_hidden.clone().requires_grad_()
        weight = inputs.student_weight.clone().requires_grad_()
        loss = function(hidden, weight)
        loss.backward()
        return loss.detach(), hidden.grad, weight.grad

    torch._dynamo.reset()
    # aot_eager: the graph, the fake kernels and the partitioned backward without a C++ compilation per test.
    for a, b in zip(run(step), run(torch.compile(step, fullgraph=True, backend="aot_eager"))):
        assert torch.equal(a, b)


def test_autocast_keeps_exact_logits(kit: Any) -> None:
    """Under autocast the hidden states arrive in bf16 and the head stays fp32: nothing is rounded further."""
    inputs = kit.make_inputs(seed=3)
    half = inputs.student_hidden.bfloat16()
    exact = gated_kl_loss(half.float(), *inputs.args()[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = gated_kl_loss(half, *inputs.args()[1:])
    assert torch.equal(exact, mixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_autocast_moves_no_bit(
    kit: Any, calibrate: Any, monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype
) -> None:
    """Nor of what the plans multiply in torch: a probe, the residual along the head's directions."""
    calibrate(pairs={"worthwhile": 0.0})
    # Pairs, whose plans do that, in place of tiles.
    monkeypatch.setattr(CpuBackend, "isa", next(i for i in _cpu.available() if not _cpu.kernels(i).tiles))
    inputs = kit.make_inputs(n=48, v=2500, hs=64, peak=12.0, near=0.3, seed=5, dtype=dtype)
    plain = kit.call(inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = kit.call(inputs, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], mixed[:3]))
    assert mixed[3].error_estimate == plain[3].error_estimate
    assert mixed[3].plan in (("exact",) if backend == "torch" else ("quantized", "filtered"))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_first_chunk_writes_the_heads_gradient(kit: Any, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Whatever its memory held: NaN here. Also where no chunk came, and in rows beyond the shared vocabulary."""

    def soiled(self: Any, rows: int, columns: int, device: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((rows, columns), torch.nan, dtype=dtype)

    monkeypatch.setattr(type(backends.get("torch")), "accumulator", soiled)
    if backend == "cpu":
        monkeypatch.setattr(type(backends.get("cpu")), "accumulator", soiled)
    inputs = kit.make_inputs(n=40, v=300, v_teacher=280, seed=2)
    truth = kit.oracle(inputs)
    for workspace in (None, 40_000 + (0 if backend == "cpu" else 48 * 2**20)):  # one chunk; several
        got = kit.call(inputs, backend=backend, precision="exact", workspace=workspace)[2]
        assert kit.relative(got, truth.d_weight) <= 1e-5 and not got[280:].any()
    inputs.token_ids[:] = -100
    assert not kit.call(inputs, backend=backend)[2].any()
    inputs.token_ids[:] = 3
    assert not kit.call(inputs, backend=backend, gate=Gate(0.0, 0.0, 0.0))[2].any()


def test_second_derivatives_and_second_backwards_are_refused(kit: Any) -> None:
    inputs = kit.make_inputs(n=5, v=20, hs=8)
    hidden = inputs.student_hidden.clone().requires_grad_()
    loss = gated_kl_loss(hidden, *inputs.args()[1:])
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss = gated_kl_loss(hidden, *inputs.args()[1:])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        loss.backward()


def test_a_loss_scale_saves_fp16_gradients_from_underflow(kit: Any) -> None:
    """A mean over many tokens makes gradients below fp16's range: they are rounded after the scale has multiplied."""
    inputs = kit.make_inputs(n=2000, v=300, hs=32, peak=0.3, masked=0.0, dtype=torch.float16)
    truth = kit.call(inputs.to(torch.float64))
    hidden = inputs.student_hidden.clone().requires_grad_()
    weight = inputs.student_weight.clone().requires_grad_()
    (gated_kl_loss(hidden, weight, *inputs.args()[2:]) * 65536.0).backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float16 and weight.grad is not None
    assert kit.relative(hidden.grad.double() / 65536, truth[1]) < 1e-3
    assert kit.relative(weight.grad.double() / 65536, truth[2]) < 1e-3


def test_accumulation_adds_up(kit: Any) -> None:
    """Two micro-batches with num_items of both equal one batch."""
    inputs = kit.make_inputs(n=80, v=150, hs=16)
    whole = kit.call(inputs)
    items = int((inputs.token_ids != -100).sum())
    hidden = inputs.student_hidden.clone().requires_grad_()
    weight = inputs.student_weight.clone().requires_grad_()
    for part in (slice(0, 30), slice(30, 80)):
        gated_kl_loss(
            hidden[part],
            weight,
            inputs.teacher_hidden[part],
            inputs.teacher_weight,
            inputs.token_ids[part],
            inputs.verdict[part],
            num_items=items,
        ).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert kit.relative(hidden.grad, whole[1]) < 1e-6 and kit.relative(weight.grad, whole[2]) < 1e-6


_PEAK = """
    import ctypes, sys, torch
    from sgopd_kernels import gated_kl_loss
    from sgopd_kernels.backends.cpu import CpuBackend
    from sgopd_kernels.plans import calibration

    backend, dtype, plan, n, v, h = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:])
    calibration.FITTED = calibration.FITTED.changed(pairs={"worthwhile": 0.0})
    if plan in ("quantized", "filtered"):
        sets = CpuBackend().instruction_sets()
        CpuBackend.isa = next(isa for isa in sets if not CpuBackend.module.kernels(isa).tiles)
    precision = "exact" if plan == "exact" else "auto"
    libc = ctypes.CDLL("libc.so.6")

    def status(key):
        return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024

    def run(n):
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(n, h, generator=g).to(dtype).requires_grad_()
        weight = (torch.randn(v, h, generator=g) * 4 / h**0.5).to(dtype).requires_grad_()
        near = hidden.detach() + 0.3 * torch.randn(n, h, generator=g)
        other = (near.to(dtype), weight.detach().clone())
        ids, verdict = torch.randint(0, v, (n,), generator=g), torch.ones(n)
        libc.malloc_trim(0)
        open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark
        before = status("VmRSS")
        options = {"backend": backend, "precision": precision, "return_stats": True}
        loss, stats = gated_kl_loss(hidden, weight, *other, ids, verdict, **options)
        loss.backward()
        assert n == 16 or stats.plan == plan, stats.plan
        gradients = sum(t.grad.numel() * t.grad.element_size() for t in (hidden, weight))
        return status("VmHWM") - before - gradients

    run(16)  # libraries, thread pools
    print(run(n))
"""


AMX = pytest.mark.skipif(not _cpu.kernels().wide_tiles, reason="this processor has no AMX-BF16")
DOTS = pytest.mark.skipif(
    not _cpu.kernels().tiles or _cpu.kernels().wide_tiles, reason="not the processor's best: AVX512-BF16 without AMX"
)


def peak_bytes(backend: str, dtype: str, plan: str, n: int, v: int, h: int) -> int:
    command = [sys.executable, "-c", textwrap.dedent(_PEAK), backend, dtype, plan, *map(str, (n, v, h))]
    # Elsewhere than the checkout, which `-c` would put before the installed package.
    with tempfile.TemporaryDirectory() as elsewhere:
        return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=elsewhere).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the high-water mark from /proc")
@pytest.mark.parametrize(
    "backend, dtype, plan, n",
    [
        ("cpu", "float32", "exact", 4096),
        ("cpu", "float32", "quantized", 4096),
        ("cpu", "bfloat16", "exact", 4096),
        pytest.param("cpu", "float32", "blocks", 4096, marks=AMX),
        pytest.param("cpu", "bfloat16", "blocks", 4096, marks=DOTS),
        ("torch", "float32", "exact", 1024),
    ],
)
def test_peak_memory_is_bounded_whatever_n(backend: str, dtype: str, plan: str, n: int) -> None:
    """Above inputs and gradients: the workspace of 256 MiB, also for 4 times the tokens.

    Only the CPU backend counts what its libraries' products hold.
    """
    mib = 2**20
    bound = (256 if backend == "cpu" else 272) * mib
    # bf16 heads: their fp32 gradient accumulator (49,152 x 16) is 3 MiB of it.
    for tokens in (n // 4, n):
        peak = peak_bytes(backend, dtype, plan, tokens, 49_152, 16)
        assert peak <= bound, f"{tokens} tokens: {peak / mib:.0f} MiB"
