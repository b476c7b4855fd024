"""What a backend does to its device: memory, bits, streams, graphs, synchronisation, bounds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from sgopd_kernels import backends, gated_kl_loss

if not torch.cuda.is_available() and os.environ.get("SGOPD_GPU_DRY_RUN") != "1":
    pytest.skip("needs a CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

MIB = 2**20


def step(inputs: Any, backend: str, **options: Any) -> tuple[torch.Tensor, ...]:
    """(loss, d_hidden, d_weight) of one forward and backward on the inputs' device; no synchronisation of its own."""
    hidden, weight = (t.detach().requires_grad_() for t in (inputs.student_hidden, inputs.student_weight))
    loss = gated_kl_loss(hidden, weight, *inputs.args()[2:], backend=backend, **options)
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), d_hidden, d_weight


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


def skip_twice(device: Any, backend: str, once: str) -> None:
    if device.dry and backend != once:
        pytest.skip(f"slow, and a dry run has it with {once}")


def only_triton(backend: str) -> None:
    if backend != "triton":
        pytest.skip(f"backend {backend!r} waits for the device in every chunk")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1024, 8192])
def test_memory(kit: Any, device: Any, backend: str, n: int, dtype: torch.dtype) -> None:
    """Above inputs and gradients: the workspace, dW's fp32 accumulator where it isn't the gradient, 64 MiB of slack
    (cuBLAS's own workspace, per-token statistics), whatever N."""
    v, h = (500, 16) if device.dry else (50_001, 512)
    inputs = kit.on_device(kit.make_inputs(n=n, v=v, hs=h, masked=0.0, dtype=dtype))
    workspace = 512 * MIB
    step(inputs, backend, workspace=workspace)  # compilation, cuBLAS handles
    peak = device.peak(lambda: step(inputs, backend, workspace=workspace))
    gradients = (inputs.student_hidden.numel() + v * h) * dtype.itemsize
    accumulator = v * h * 4 if dtype != torch.float32 else 0
    above = peak - gradients - accumulator
    assert above <= workspace + 64 * MIB, f"{above / MIB:.0f} MiB"


@pytest.mark.parametrize("precision", ["exact", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bitwise(kit: Any, device: Any, backend: str, dtype: torch.dtype, precision: str) -> None:
    size = dict(v=600, hs=32) if device.dry else dict(n=1500, v=32_003, hs=512)
    inputs = kit.on_device(kit.make_inputs(**size, peak=8.0, near=0.3, dtype=dtype))
    first = step(inputs, backend, precision=precision)
    for _ in range(1 if device.dry else 4):
        # other addresses, and what was in them
        noise = torch.full((3 * MIB,), torch.nan, device=device.name)
        assert same(first, step(inputs, backend, precision=precision))
        del noise


def test_chunks_change_nothing(kit: Any, device: Any, backend: str) -> None:
    size = dict(v=600, hs=32) if device.dry else dict(n=1500, v=32_003, hs=512)
    inputs = kit.on_device(kit.make_inputs(**size))
    whole = step(inputs, backend, precision="exact", workspace=2**30)
    parts = step(inputs, backend, precision="exact", workspace=2**28)
    for a, b in zip(whole, parts):
        assert kit.relative(b, a) <= 1e-6


@pytest.mark.parametrize("gate", ["sg-opd", "opdvr"])
@pytest.mark.parametrize("precision", ["exact", "auto"])
def test_host_synchronisations(
    kit: Any, device: Any, backend: str, precision: str, gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wait a call, for the number of valid tokens, however many chunks; one a chunk where rows may leave."""
    only_triton(backend)
    v, workspace = (301, MIB // 16) if device.dry else (8001, 32 * MIB)  # a dry run has few tokens, and two chunks
    inputs = kit.on_device(kit.make_inputs(n=2000, v=v, hs=64, dtype=torch.bfloat16))
    options = {"precision": precision, "workspace": workspace, "gate": gate, "num_items": 1234}
    step(inputs, backend, **options)  # compilation
    rows, chunks = backends.get(backend).rows, []
    monkeypatch.setattr(backends.get(backend), "rows", lambda *a, **k: (chunks.append(1), rows(*a, **k))[1])
    waits = device.synchronisations(lambda: step(inputs, backend, **options))
    assert len(chunks) > 1 and waits <= 1 + (len(chunks) if gate == "opdvr" else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bit_operands(kit: Any, device: Any, dtype: torch.dtype) -> None:
    """fp32 results: written over whatever was there, times a number, added to what was there, between other columns."""
    multiply = backends.get("triton").multiply  # type: ignore[attr-defined]
    n, v, h = (5, 64, 16) if device.dry else (300, 8192, 512)
    g = torch.Generator(device.name).manual_seed(0)
    a, b = (torch.randn(*size, generator=g, device=device.name).to(dtype) for size in ((n, h), (v, h)))
    truth = a.double() @ b.double().T

    def place() -> torch.Tensor:
        return torch.full((n, 2 * v), torch.nan, device=device.name)[:, v // 2 : v // 2 + v]

    written, halved = place(), place()
    multiply(a, b.T, written, add=False)
    multiply(a, b.T, halved, add=False, factor=0.5)
    assert kit.relative(written.cpu(), truth.cpu()) <= 1e-6 and kit.relative(halved.cpu(), truth.cpu() / 2) <= 1e-6
    added, again = written.clone(), written.clone()
    multiply(a, b.T, added, add=True)
    multiply(a, b.T, again, add=True)
    assert kit.relative(added.cpu(), 2 * truth.cpu()) <= 1e-6 and torch.equal(added, again)


@pytest.mark.parametrize("gate", ["sg-opd", "opdvr"])
def test_graph_capture(kit: Any, device: Any, backend: str, gate: str) -> None:
    """Captured once, replayed on other inputs: the bits of a call without a graph, where no row leaves that."""
    only_triton(backend)
    size = dict(n=700, v=301 if device.dry else 3001, hs=64, dtype=torch.bfloat16)
    static = kit.on_device(kit.make_inputs(**size, seed=0, masked=0.0))
    replay = device.captured(lambda: step(static, backend, gate=gate, precision="exact"))
    for seed in (1, 2):
        fresh = kit.on_device(kit.make_inputs(**size, seed=seed, masked=0.0))
        for to, origin in zip(static.args(), fresh.args()):
            to.copy_(origin)
        replayed = [t.clone() for t in replay()]
        eager = step(fresh, backend, gate=gate, precision="exact")
        assert same(tuple(replayed), tuple(replay()))
        if gate == "sg-opd":
            assert same(tuple(replayed), eager)
        for a, b in zip(replayed, eager):
            assert kit.relative(a, b) <= (1e-6 if a.dtype == torch.float32 else 1e-3)  # rounded to bf16, by other sums


def test_side_stream(kit: Any, device: Any, backend: str) -> None:
    """Inputs that a busy side stream has yet to write: a kernel on another stream reads zeros."""
    inputs = kit.on_device(kit.make_inputs(n=700, v=301 if device.dry else 3001, hs=64))
    expected = step(inputs, backend)
    late = type(inputs)(*(torch.zeros_like(t) for t in inputs.args()))
    device.synchronize()
    with device.busy_stream():
        for to, origin in zip(late.args(), inputs.args()):
            to.copy_(origin, non_blocking=True)
        got = step(late, backend)
    device.synchronize()
    assert same(got, expected)


def test_compiled_equals_eager(kit: Any, device: Any, backend: str) -> None:
    skip_twice(device, backend, "triton")
    inputs = kit.on_device(kit.make_inputs(n=40, v=301, hs=32))

    def loss_of(hidden: torch.Tensor) -> torch.Tensor:
        return gated_kl_loss(hidden * 1.5, *inputs.args()[1:], backend=backend) * 2.0

    def run(function: Any) -> tuple[torch.Tensor, ...]:
        hidden = inputs.student_hidden.clone().requires_grad_()
        loss = function(hidden)
        return loss.detach(), *torch.autograd.grad(loss, hidden)

    torch._dynamo.reset()
    assert same(run(loss_of), run(torch.compile(loss_of, fullgraph=True, backend="aot_eager")))


def test_offsets_beyond_32_bits(kit: Any, device: Any, backend: str) -> None:
    """One chunk of more than 2^31 logits; its last rows against the same rows alone."""
    n, v, workspace = (20, 301, 2**28) if device.dry else (15_000, 151_936, 40 * 2**30)
    if backend == "torch" and not device.dry:
        pytest.skip("the torch backend works in blocks of rows")
    if not device.dry and torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free device memory")
    g = torch.Generator(device.name).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device.name)

    hidden, weight, teacher, t_weight = randn(n, 8), randn(v, 8), randn(n, 8), randn(v, 8)
    ids = torch.randint(0, v, (n,), generator=g, device=device.name)

    def gradient(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = hidden[rows].clone().requires_grad_()
        args = (leaf, weight, teacher[rows], t_weight, ids[rows], 1)
        loss, stats = gated_kl_loss(
            *args, backend=backend, precision="exact", workspace=workspace, reduction="sum", return_stats=True
        )
        loss.backward()
        assert leaf.grad is not None
        return leaf.grad, stats.kl

    d_all, kl_all = gradient(slice(None))
    d_last, kl_last = gradient(slice(n - 16, n))
    assert kit.relative(kl_all[-16:], kl_last) <= 1e-6 and kit.relative(d_all[-16:], d_last) <= 1e-5


def test_ids_out_of_range_stop_the_device(backend: str, device: Any) -> None:
    """On a device the check costs no synchronisation, and so comes late: but it comes."""
    skip_twice(device, backend, "torch")
    script = f"""
        import torch
        from sgopd_kernels import gated_kl_loss
        make = lambda *s: torch.randn(*s, device="{device.name}")
        ids = torch.full((4,), 999, device="{device.name}")
        gated_kl_loss(make(4, 8), make(50, 8), make(4, 8), make(50, 8), ids, 1, backend="{backend}")
        torch.cuda.synchronize() if "{device.name}" == "cuda" else None
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode != 0 and "token_ids" in done.stderr, done.stderr[-2000:]


_SMALL = """
    import torch
    from sgopd_kernels import gated_kl_loss
    device, backend = {device!r}, {backend!r}
    g = torch.Generator().manual_seed(0)
    n = {n}
    make = lambda *s: torch.randn(*s, generator=g).bfloat16().to(device)
    for gate in ("sg-opd", "opdvr"):
        leaves = make(n, 24).requires_grad_(), make(1021, 24).requires_grad_()
        ids = torch.randint(0, 1021, (n,), generator=g).to(device)
        verdict = (torch.randint(0, 2, (n,), generator=g) * 2 - 1).to(device)
        gated_kl_loss(*leaves, make(n, 40), make(1021, 40), ids, verdict, gate=gate, backend=backend).backward()
        print(float(leaves[1].grad.float().norm()))
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str, backend: str, device: Any, tmp_path: Path) -> None:
    """Reads and writes out of bounds; races in shared memory. The caching allocator hides the former: off."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None and not device.dry:
        pytest.skip("compute-sanitizer is not on the PATH")
    if backend == "torch" or (device.dry and tool != "memcheck"):
        pytest.skip("no kernels of ours" if backend == "torch" else "a dry run runs the program once")
    path = tmp_path / "small.py"
    path.write_text(textwrap.dedent(_SMALL.format(device=device.name, backend=backend, n=5 if device.dry else 37)))
    wrapped = [] if device.dry else [str(sanitizer), "--tool", tool, "--error-exitcode", "9"]
    done = subprocess.run(
        [*wrapped, sys.executable, str(path)],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer doesn't support this device or runtime")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
