"""The plan by blocks: dense products of bf16 numbers on tiles, with two of them a factor where the energy lies.

For processors whose strength is products of bf16 numbers (AMX, AVX512-BF16; csrc/cpu/tiles.h). Rounding a factor to
bf16 costs 1.6e-3 of a product; as a sum of two bf16 numbers it costs 5e-6, and the product two or three times as long.
But nine tenths of a gradient's energy lie in a hundredth of its blocks of 32 tokens by 32 columns. With two numbers
there and one elsewhere the gradients' error is

    rounding * sqrt(share of the energy elsewhere)

for little more than the time of one product: errors of rounding are independent from entry to entry, so that they add
up along no direction that the head's rows share. The row pass sums the energies.

Logits of bf16 operands are exact on tiles. Those of fp32 operands are three products, good to 2^-17 of their terms;
where they carry probability they are computed again in fp32, which also measures the error of the others. Over budget
they are fp32 products, here and in the chunks to come: the noise in dH goes with 1 / sqrt(KL).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends.cpu import CpuBackend
from ..problem import Chunk, Problem
from . import calibration
from .base import Gradients, NeedsGrad, worst
from .exact import Exact
from .quantized import plain, probe, refined_error

SIDE = 32  # of a block


class Blocks(Exact):
    """`split`: whether fp32 logits come from tiles."""

    backend: CpuBackend

    def __init__(self, problem: Problem, backend: CpuBackend, needs_grad: NeedsGrad, split: bool) -> None:
        super().__init__(problem, backend, needs_grad)
        self.numbers, self.budget, self.split = calibration.FITTED.blocks, problem.budget, split
        step = max(1, self.v // calibration.FITTED.residual.sampled_rows)
        self.row_norm = float(self.head[::step].float().square().sum(1).mean().sqrt())
        # Of a chunk: its rows that weigh something, their gradient [n, V] and its hidden gradient [n, H] fp32; the
        # blocks with two numbers a factor [ceil(n / 32), ceil(V / 32)] uint8, or None for all.
        self.rows = self.gradient_of_rows = self.hidden = torch.empty(0)
        self.fine: Tensor | None = None

    def held_bytes(self) -> tuple[int, int]:
        """Scratch; a token's share of energies, packed operands, sums and the logits computed again."""
        h = self.head.shape[1]
        return self.backend.scratch(self.problem), self.v // 8 + 4 * self.v // 200 + 512 + 16 * h

    def forward(self, chunk: Chunk) -> float:
        if self.needs_grad:
            z = chunk.z_student
            chunk.energy = torch.empty(z.shape[0], -(-self.v // SIDE), dtype=torch.float32, device=z.device)
        error = self._forward(chunk)
        if self.split and not error <= self.budget:
            self.split = False
            error = self._forward(chunk)
        self.pays = error <= self.budget
        return error

    def _forward(self, chunk: Chunk) -> float:
        super().forward(chunk)
        self.ran = "blocks"
        loss = noise = 0.0
        if self.split:
            loss, noise = refined_error(self.problem, self.measured, self.numbers.mass, chunk.stats, chunk.scale)
            if not loss <= self.budget:
                return math.inf
        return worst(loss, self._multiply(chunk, self.numbers.coherence * noise)) if self.needs_grad else loss

    def project(self, chunk: Chunk) -> None:
        if not self.split:
            super().project(chunk)
            return
        p, at = self.problem, chunk.positions
        assert p.teacher is not None and chunk.z_teacher is not None
        self.backend.project_tiles(p.student.hidden[at], self.head, chunk.z_student)
        self.backend.project_tiles(p.teacher.hidden[at], p.teacher.weight[: self.v], chunk.z_teacher)
        self.measured = self.backend.refine(p, at, chunk.z_student, chunk.z_teacher, self.numbers.mass)

    def _multiply(self, chunk: Chunk, noise: float) -> float:
        """The hidden gradient, with as many blocks of two numbers as the budget asks for; the gradients' error."""
        self.gradient_of_rows, self.rows = self.gradient(chunk)
        assert chunk.energy is not None
        n = self.rows.numel()
        if n == 0:
            self.kept = 0
            return 0.0
        energy = chunk.energy if n == chunk.energy.shape[0] else chunk.energy[self.rows]
        rows_of_blocks = torch.nn.functional.pad(energy, (0, 0, 0, -n % SIDE)).unflatten(0, (-1, SIDE))
        energy = rows_of_blocks.sum(1, dtype=torch.float64)
        total = float(energy.sum())
        if total == 0:  # or its squares are below fp32's smallest number: nothing to choose by
            self._set(None)
            self._multiply_hidden()
            return self.numbers.both
        noise /= total**0.5
        ordered, order = energy.flatten().sort()
        below = ordered.cumsum(0)
        coarse = int((below <= (self.numbers.share * self.budget / self.numbers.rounding) ** 2 * total).sum())
        fine = torch.ones_like(energy, dtype=torch.uint8)
        fine.view(-1)[order[:coarse]] = 0
        self._set(fine)
        left = float(below[coarse - 1]) if coarse else 0.0
        error = math.hypot(noise, self._error(left, total))
        if not error <= self.budget and coarse:
            self._set(None)
            error = math.hypot(noise, self._error(0.0, total))
        return error

    def _set(self, fine: Tensor | None) -> None:
        self.fine = fine
        self.kept = self.gradient_of_rows.numel() if fine is None else int(fine.sum()) * SIDE**2

    def _multiply_hidden(self) -> None:
        shape, g = (self.rows.numel(), self.head.shape[1]), self.gradient_of_rows
        self.hidden = torch.zeros(shape, dtype=torch.float32, device=g.device)
        self.backend.add_hidden_gradient_tiles(self.gradient_of_rows, self.fine, self.head, self.hidden)

    def _error(self, left: float, total: float) -> float:
        """Of both gradients, with `left` of ||G||^2 in blocks of one number; makes the hidden one on the way."""
        numbers, error = self.numbers, 0.0

        def rounded(other: Tensor) -> float:
            """The norm of what rounding costs G and, where it is fp32, the other factor."""
            factors = 2 if other.dtype == torch.float32 else 1
            return math.sqrt(factors * numbers.rounding**2 * left + numbers.both**2 * total)

        if self.needs_grad.hidden:
            self._multiply_hidden()
            reach = float(self.hidden.norm())
            error = numbers.hidden * rounded(self.head) * self.row_norm / reach if reach > 0 else math.inf
        return max(error, numbers.weight * rounded(self.problem.student.hidden) / total**0.5)

    def gradients(self, chunk: Chunk, out: Gradients) -> None:
        if self.rows.numel() == 0:
            return
        if out.hidden is not None:
            out.hidden[chunk.positions[self.rows]] = self.hidden.to(out.hidden.dtype)
        if out.weight is not None:
            h = chunk.hidden if self.rows.numel() == chunk.hidden.shape[0] else chunk.hidden[self.rows]
            weight, g = out.weight[: self.v], self.gradient_of_rows
            self.backend.add_weight_gradient_tiles(g, self.fine, h, weight, out.rest, out.empty)
            out.empty = False
        if out.bias is not None:
            out.bias[: self.v] += self.gradient_of_rows.sum(0)


def blocks(problem: Problem, backend: CpuBackend, needs_grad: NeedsGrad, rows: Tensor) -> list[Blocks]:
    """The plan, where the tokens `rows` are worth it and the budget leaves it room; for a processor with tiles.

    bf16 operands alone need no split logits. On AMX they don't take the plan: there the exact plan's products, with two
    numbers for the gradient in all blocks, took less time (docs/notes/tried.md).
    """
    numbers, budget = calibration.FITTED.blocks, problem.budget
    work = rows.numel() * problem.vocabulary * problem.student.hidden.shape[1]
    if rows.numel() == 0 or work < numbers.worthwhile or budget < 4 * numbers.both:
        return []
    narrow = all(t.dtype == torch.bfloat16 for t in problem.operands())
    if narrow and backend.splits():
        return []
    split = not narrow and plain(problem) and probe(problem, rows)[0] * budget**2 > numbers.kl
    return [Blocks(problem, backend, needs_grad, split)]
