"""Products on tiles: AMX and AVX512-BF16 where the processor has them, and AMX's emulation in plain C++."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sgopd_kernels import _cpu
from sgopd_kernels.backends.cpu import CpuBackend

AMX = "amx" in _cpu.available()
DOTS = "avx512-bf16" in _cpu.available()
MACHINES = [
    "amx-emulated",
    pytest.param("avx512-bf16", marks=pytest.mark.skipif(not DOTS, reason="this processor has no AVX512-BF16")),
    pytest.param("amx", marks=pytest.mark.skipif(not AMX, reason="this processor, or its system, has no AMX-BF16")),
]
FP32, BF16 = torch.float32, torch.bfloat16
# (n, V, H): one of each; edges in a tile, a strip, a panel, a step of sums; H 2,048: bf16 rows 4,096 bytes apart
SIZES = [(1, 1, 1), (5, 63, 33), (37, 130, 65), (64, 64, 64), (33, 600, 31), (3, 70, 2048)]
ONE, TWO = 2e-3, 6e-6  # what operands of one and of two limbs come to: 2^-9 and 2^-17, and sums in fp32


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> CpuBackend:
    backend = CpuBackend()
    monkeypatch.setattr(backend, "isa", request.param)
    return backend


def operand(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows that neither begin nor lie at multiples of anything."""
    x = torch.randn(rows, width + 3, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)[:, 1 : width + 1]


def products(b: CpuBackend, n: int, v: int, h: int, hidden: torch.dtype, weight: torch.dtype) -> Iterator[Any]:
    """(what, product, float64's, its limit) of every way to call them, in outputs whose surroundings are watched."""
    x, w, g = operand(n, h, hidden, 1), operand(v, h, weight, 2), operand(n, v, FP32, 3)
    fine = (torch.rand(-(-n // 32), -(-v // 32), generator=torch.Generator().manual_seed(4)) < 0.5).to(torch.uint8)
    limit = 2e-7 if hidden == weight == BF16 else TWO
    out = torch.full((n, v + 9), 7.0)
    b.project_tiles(x, w, out[:, :v])
    assert bool((out[:, v:] == 7).all()), "it wrote beyond its columns"
    yield "logits", out[:, :v], x.double() @ w.double().T, limit
    for blocks in (fine, None):
        limit = TWO if blocks is None else ONE
        start = operand(n, h + 5, FP32, 5)
        out = start.clone()
        b.add_hidden_gradient_tiles(g, blocks, w, out[:, :h])
        assert torch.equal(out[:, h:], start[:, h:])
        yield "dH", out[:, :h] - start[:, :h], g.double() @ w.double(), 2 * limit
        start = operand(v, h + 5, FP32, 6)
        out = start.clone()
        b.add_weight_gradient_tiles(g, blocks, x, out[:, :h])
        assert torch.equal(out[:, h:], start[:, h:])
        yield "dW", out[:, :h] - start[:, :h], g.double().T @ x.double(), 2 * limit


@pytest.mark.parametrize("on", MACHINES, indirect=True)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_within_what_their_limbs_hold(on: CpuBackend, sizes: tuple[int, int, int]) -> None:
    n, v, h = sizes
    for hidden, weight in itertools.product((FP32, BF16), repeat=2):
        for what, got, true, limit in products(on, n, v, h, hidden, weight):
            reach = float(true.norm()) if true.numel() > 100 else float(true.norm()) + 1  # few terms may cancel
            assert float((got.double() - true).norm()) <= limit * reach, (what, hidden, weight)


@pytest.mark.skipif(not AMX, reason="this processor, or its system, has no AMX-BF16")
def test_the_emulation_is_amx_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CpuBackend()
    for n, v, h in SIZES:
        for hidden, weight in itertools.product((FP32, BF16), repeat=2):
            each = []
            for isa in ("amx", "amx-emulated"):
                monkeypatch.setattr(backend, "isa", isa)
                each.append(list(products(backend, n, v, h, hidden, weight)))
            for (what, a, *_), (_, b, *_) in zip(*each):
                assert torch.equal(a, b), (what, n, v, h)


@pytest.mark.parametrize("on", MACHINES, indirect=True)
def test_the_number_of_threads_changes_no_bit(on: CpuBackend) -> None:
    sizes = (70, 300, 130) if on.isa == "amx-emulated" else (200, 4100, 330)  # that all of the threads are worth
    before, each = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 7):
            torch.set_num_threads(threads)
            each.append([got.clone() for _, got, *_ in products(on, *sizes, FP32, FP32)])
    finally:
        torch.set_num_threads(before)
    for other in each[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each[0], other))


@pytest.mark.parametrize("on", MACHINES, indirect=True)
def test_a_denormal_is_0_and_what_is_not_finite_shows(on: CpuBackend) -> None:
    x, w = torch.ones(2, 40).bfloat16(), torch.full((3, 40), 1e-39).bfloat16()
    out = torch.empty(2, 3)
    on.project_tiles(x, w, out)
    assert bool((out == 0).all())
    for dtype, value in itertools.product((FP32, BF16), (torch.inf, -torch.inf, torch.nan)):
        x, w = torch.ones(2, 40).to(dtype), torch.ones(3, 40).to(dtype)
        w[1, 7] = value
        on.project_tiles(x, w, out)
        assert out.isfinite().tolist() == [[True, False, True]] * 2
        assert dtype == FP32 or torch.equal(out[:, 1].nan_to_num(7), torch.tensor([value] * 2).nan_to_num(7))


@pytest.mark.parametrize("on", MACHINES, indirect=True)
def test_a_weight_gradient_in_bf16(on: CpuBackend) -> None:
    """Written once it is rounded once; over chunks it keeps 24 bits, and is at every time what these round to."""
    v, h = 70, 45
    total, fp32 = torch.zeros(v, h, dtype=torch.float64), torch.zeros(v, h)
    out, rest = torch.full((v, h + 3), 7.0, dtype=BF16), torch.full((v, h + 3), 7, dtype=torch.int8)
    for chunk in range(40):
        g, x = operand(33, v, FP32, chunk), operand(33, h, BF16, 100 + chunk)
        total += g.double().T @ x.double()
        on.add_weight_gradient_tiles(g, None, x, fp32, first=chunk == 0)
        on.add_weight_gradient_tiles(g, None, x, out[:, :h], rest[:, :h], first=chunk == 0)
        # its own rounding is half of its last bit
        assert float((out[:, :h].double() - fp32.double()).norm()) <= 1.01 * float(
            (fp32.bfloat16().double() - fp32.double()).norm()
        )
        assert bool((out[:, h:] == 7).all() and (rest[:, h:] == 7).all())
    assert float((fp32.double() - total).norm() / total.norm()) < TWO
    once = torch.empty(v, h, dtype=BF16)
    on.add_weight_gradient_tiles(g, None, x, once, first=True)
    fresh = torch.empty(v, h)
    on.add_weight_gradient_tiles(g, None, x, fresh, first=True)
    assert torch.equal(once, fresh.bfloat16())
    with pytest.raises(ValueError, match="rest, or first"):
        on.add_weight_gradient_tiles(g, None, x, once)


@pytest.mark.skipif(AMX, reason="this processor has AMX-BF16")
def test_without_amx_there_is_no_such_instruction_set() -> None:
    with pytest.raises(ValueError, match="isa"):
        _cpu.kernels("amx")


def test_an_instruction_set_without_tiles_refuses() -> None:
    with pytest.raises(ValueError, match="needs AMX-BF16"):
        _cpu.project_tiles(
            hidden=(64, 1, False), n=1, weight=(64, 1, False), v=1, h=1, out=64, out_stride=1, isa="base"
        )
