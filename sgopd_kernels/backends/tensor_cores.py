"""Products on tensor cores with fp32 results, for the backends of CUDA devices; cuBLAS computes them.

Operands that are both bf16, or both fp16, are multiplied as they are. Of others, an fp32 one becomes the sum of two
fp16 numbers, 22 bits: a product is then one product of operands three times as wide (two parts against two; what the
two low ones make is left out), at 16-bit rates. That costs 2^-20 of the terms at the most, about as much as summing
them in fp32 does: tests/kernels/test_tensor_cores.py holds it against float64. fp16 reaches from 6e-8 to 65504, so both
operands are brought to one size first, by powers of two (`balance`), and elements down to about a thousandth of the
largest keep all 22 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .._checks import require
from ..options import Head
from ..problem import Chunk, Problem
from .torch import TorchBackend

COLUMNS_AT_ONCE = 8192  # of a product that can't be added in place; of G or a head, brought to fp16
SCALED = 2.0**-12  # what a product of operands in parts is multiplied by
PARTS_BYTES = 24 * 2**20  # of a head's parts at once: they stay in the device's cache between two kernels


@cache
def adds_in_place(device: torch.device) -> bool:
    """Whether this torch adds a product of 16-bit operands to fp32 in one call: since 2.10. Asked once, by doing it."""
    operand = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    out = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(out, operand, operand, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return True


@contextlib.contextmanager
def fp32_sums() -> Iterator[None]:
    """fp16 products are summed in fp32, though a user lets torch sum them in fp16: G reaches 2^15 there."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_fp16_accumulation
    settings.allow_fp16_accumulation = False
    try:
        yield
    finally:
        settings.allow_fp16_accumulation = before


def power_above(x: Tensor) -> Tensor:
    """The power of two in (x, 2 x], exactly, of x >= 0 in fp32; x is taken to lie between 2^-100 and 2^100."""
    x = x.clamp(2.0**-100, 2.0**100)
    return x / torch.frexp(x).mantissa


def largest_of_rows(x: Tensor) -> Tensor:
    """max |x| of each row [rows] of x [rows, columns] as fp32, without a copy of x; 0 where it is not finite."""
    lowest, highest = torch.aminmax(x, dim=1)
    return torch.maximum(-lowest, highest).float().nan_to_num(0.0, 0.0, 0.0)


def unit_of(ratio: Tensor) -> Tensor:
    """units [n] of plans/narrow.py, of bounds on the rows of G over top."""
    e = torch.frexp(ratio.clamp(min=2.0**-60)).exponent.clamp(-24, 15)
    return torch.ldexp(torch.ones_like(ratio), e - 15 + (12 - e).clamp(min=0) // 3)


def narrow_gradient(z_student: Tensor) -> Tensor:
    """Where `rows` leaves a gradient in fp16 [n, V]: over the student's logits, in the first half of each row."""
    return z_student.view(torch.float16)[:, : z_student.shape[1]]


def part_pairs(a: Tensor, b: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which part of a meets which part of b, of two tensors that are multiplied: 0 the high, 1 the low one.

    What is no fp32 has one part. The smallest terms come first, and so are summed first.
    """
    counts = [2 if x.dtype == torch.float32 else 1 for x in (a, b)]
    pairs = sorted(((i, j) for i in range(counts[0]) for j in range(counts[1]) if i + j < 2), key=sum, reverse=True)
    return tuple(i for i, _ in pairs), tuple(j for _, j in pairs)


class TensorCoreBackend(TorchBackend):
    # 2,048 tokens of two models with 152 thousand columns, and the student's head in fp16: below a thousand tokens a
    # chunk, reading the heads and accumulating the weight's gradient decide.
    default_workspace = 3 * 2**30
    row_multiple = 128
    whole_multiples = True  # whole tiles of a product
    waits = True
    narrowing_bytes = 6 * COLUMNS_AT_ONCE  # a token of a chunk: what G is brought from fp32 to fp16 by

    def held_bytes(self, problem: Problem) -> tuple[int, int]:
        return self.cast_bytes(problem), 0

    def narrow_held_bytes(self, problem: Problem) -> tuple[int, int]:
        """`held_bytes` of plans/narrow.py."""
        rows, width = self.narrow_rows(problem), problem.student.weight.shape[1]
        fixed, row_bytes = 2 * min(2 * rows, problem.vocabulary) * width, self.narrowing_bytes  # two tiles: one is made
        if any(not self.multiplies(h.hidden, h.weight) for h in problem.heads):  # parts, and what they are made by
            fixed += 3 * PARTS_BYTES
            row_bytes += 14 * max(h.weight.shape[1] for h in problem.heads)
        return fixed, row_bytes

    def narrow_rows(self, problem: Problem) -> int:
        """Rows of the student's head that are held in fp16: all, once a call, where that is a quarter of the workspace
        or less; else a tile at a time, made anew for each chunk."""
        head, v = problem.student.weight, problem.vocabulary
        if head.dtype == torch.float16:
            return 0
        return v if 2 * v * head.shape[1] <= self.workspace(problem) // 4 else min(v, COLUMNS_AT_ONCE)

    def narrows(self) -> bool:
        """Whether products of fp16 operands have fp32 results."""
        return torch.version.hip is None

    def rows(self, problem: Problem, chunk: Chunk, gradient: torch.dtype | None) -> Tensor:
        """Of a row pass that leaves G in fp32: in fp16 it comes by two passes more, its rows' bounds what they hold."""
        stats = super().rows(problem, chunk, gradient)
        if gradient == torch.float16:
            assert chunk.top is not None
            wide, narrow = chunk.z_student, narrow_gradient(chunk.z_student)
            chunk.units = unit_of(largest_of_rows(wide) / chunk.top)
            inverse = (1 / chunk.units / chunk.top).unsqueeze(1)
            for first in range(0, wide.shape[1], COLUMNS_AT_ONCE):  # ascending: what is written over has been read
                columns = slice(first, first + COLUMNS_AT_ONCE)
                narrow[:, columns] = (wide[:, columns] * inverse).half()
        return stats

    def multiplies(self, *operands: Tensor) -> bool:
        """Whether a product takes these as they are."""
        kinds = {t.dtype for t in operands}
        return len(kinds) == 1 and kinds <= {torch.bfloat16, torch.float16} and self.narrows()

    def balance(self, head: Head, of_hidden: Tensor) -> Tensor | None:
        """[] fp32: what a head's hidden states are multiplied by; its weights are multiplied by 2^12 over it, so that
        the largest of both lie in one binade or two. `of_hidden` []: the largest of the former. None: nothing is split.
        """
        if self.multiplies(head.hidden, head.weight):
            return None
        of_weight = largest_of_rows(head.weight).amax()
        require(
            of_hidden * of_weight < 2.0**17,
            "hidden states and head: the largest elements of both must multiply to less than 131072 to be split into "
            "fp16 numbers; pass precision='exact'",
            lambda: f"got {float(of_hidden):g} and {float(of_weight):g}",
        )
        return power_above((0.5 / SCALED * power_above(of_weight) / power_above(of_hidden)).sqrt())

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool, factor: float = 1.0) -> None:
        """out [fp32] = (out +) factor * a @ b for 16-bit operands, with an fp32 accumulator throughout."""
        assert factor == 1 or not add
        if a.device.type == "cpu":  # interpreted: torch has no such product on the CPU
            wide = a.float() @ b.float()
            out.add_(wide) if add else torch.mul(wide, factor, out=out)
            return
        with fp32_sums():
            if adds_in_place(a.device) and (add or factor != 1):
                torch.addmm(out, a, b, out_dtype=torch.float32, beta=int(add), alpha=factor, out=out)
            elif not add:
                torch.mm(a, b, out_dtype=torch.float32, out=out)
                if factor != 1:
                    out.mul_(factor)
            else:
                for rows, part in zip(out.split(COLUMNS_AT_ONCE), a.split(COLUMNS_AT_ONCE)):
                    rows.add_(torch.mm(part, b, out_dtype=torch.float32))

    def project(self, hidden: Tensor, weight: Tensor, out: Tensor, balance: Tensor | None = None) -> None:
        if self.multiplies(hidden, weight):
            self.multiply(hidden, weight.T, out, add=False)
        elif balance is None:
            super().project(hidden, weight, out)
        else:
            of_hidden, of_weight = part_pairs(hidden, weight)
            wide, inverse = self.parts(hidden, balance, of_hidden), 1 / SCALED / balance
            step = max(256, PARTS_BYTES // (2 * wide.shape[1]) // 256 * 256)
            for first in range(0, weight.shape[0], step):
                columns = slice(first, first + step)
                part = self.parts(weight[columns], inverse, of_weight)
                self.multiply(wide, part.T, out[:, columns], add=False, factor=SCALED)

    def parts(self, x: Tensor, unit: Tensor, which: tuple[int, ...]) -> Tensor:
        """The parts of x [rows, H] times unit [], side by side: [rows, len(which) H] fp16. Those of fp32 add up to
        2^-22 of it; what else has one."""
        rows, width = x.shape
        out = torch.empty(rows, len(which), width, dtype=torch.float16, device=x.device)
        scaled = x.float() * unit
        high = scaled.half()
        for i, part in enumerate(which):
            out[:, i] = high if part == 0 else scaled - high
        return out.view(rows, -1)
