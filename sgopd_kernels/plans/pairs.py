"""The filtered plan: gradient products over the (token, column) pairs that matter to a chunk.

Reverse KL's gradient G = w p ((z_S - z_T) - E_p[z_S - z_T]) carries the factor p: of a chunk's entries, 1-4 %
hold all but a thousandth of its norm. They differ from token to token (the union of their columns over 256 tokens is
half of the vocabulary), so the gradient's products run over pairs and not over columns:

    dW = pairs^T H        dH = pairs W + (the residual U) B

with B and U of directions.py. Nothing is trusted that was not measured on the chunk at hand: the threshold comes from a
histogram of |G|, what it leaves is summed, and the error is estimated from that. docs/kernels.md has the constants.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends.cpu import CpuBackend, TopPairs
from ..problem import Chunk, Problem
from . import calibration
from .base import Gradients, NeedsGrad
from .directions import Residual
from .exact import Exact


class Pairs(Exact):
    """`residual`: of the student's head, shared by the plans of a call."""

    backend: CpuBackend

    def __init__(self, problem: Problem, backend: CpuBackend, needs_grad: NeedsGrad, residual: Residual) -> None:
        super().__init__(problem, backend, needs_grad)
        self.residual, self.budget = residual, problem.budget
        self.taken: list[TopPairs] = []  # out of the chunk's gradient; empty: it is whole, and dense
        self.hidden = residual.weight.new_empty(0)  # [n, H] fp32: the pairs' part of its hidden gradient

    def held_bytes(self) -> tuple[int, int]:
        """Beside the exact plan's: threads' scratch; `most` of a row, a column and a value each."""
        fixed, row = super().held_bytes()
        return fixed + 16 * 2**20, row + int(8 * calibration.FITTED.pairs.most * self.v)

    def forward(self, chunk: Chunk) -> float:
        super().forward(chunk)
        return self.take(chunk, 0.0)

    def take(self, chunk: Chunk, noise: float) -> float:
        """Takes the pairs that the budget asks for out of the chunk's gradient, if there are few; the gradients' error.

        `noise`: of the logits, as large as an error of G.
        """
        self.taken, error = self._take(chunk, noise) if self.needs_grad else ([], 0.0)
        self.ran = "filtered" if self.taken else "exact"
        self.kept = sum(pairs.count for pairs in self.taken) if self.taken else chunk.z_student.numel()
        return error

    def _take(self, chunk: Chunk, noise: float) -> tuple[list[TopPairs], float]:
        g = chunk.z_student
        backend, budget, numbers = self.backend, self.budget, calibration.FITTED.pairs
        most, left_for_noise = numbers.most, numbers.noise_share * budget
        first = backend.extract_top(g, numbers.share * budget, most)
        if first.dense:
            return [], _relative(noise, _energy(g) if noise else 0.0)
        taken = [first]
        self.hidden = torch.zeros(g.shape[0], self.head.shape[1], dtype=torch.float32, device=g.device)
        backend.add_pairs_hidden(first, self.head, self.hidden)
        energy = first.taken + first.left  # ||G||^2
        noise = _relative(noise, energy)
        if energy == 0:
            return taken, noise
        active = self.active(chunk)
        left = self.residual.error(first.left, energy, self.hidden, self.residual.probe(g, active))
        error = math.hypot(noise, left)
        if not error <= budget and noise <= left_for_noise and math.isfinite(left):
            room = (budget**2 - noise**2) ** 0.5
            more = backend.extract_top(g, 0.8 * room / left, most)
            if not more.dense:
                taken.append(more)
                backend.add_pairs_hidden(more, self.head, self.hidden)
                energy = first.taken + more.taken + more.left
                left = self.residual.error(more.left, energy, self.hidden, self.residual.probe(g, active))
                error = math.hypot(noise, left)
        if error <= budget:
            return taken, error
        for pairs in taken:
            backend.restore(pairs, g)
        # Quantization that leaves pairs no room would cost dense products: an exact forward pass and pairs are less.
        return [], noise if noise <= left_for_noise else math.inf

    def gradients(self, chunk: Chunk, out: Gradients) -> None:
        if not self.taken:
            super().gradients(chunk, out)
            return
        residual, hidden = chunk.z_student, chunk.hidden.float()
        if out.hidden is not None:
            out.hidden[chunk.positions] = self.residual.add_to(self.hidden, residual).to(out.hidden.dtype)
        for pairs in self.taken:
            if out.weight is not None:
                self.backend.add_pairs_weight(pairs, hidden, out.weight)
            if out.bias is not None:
                self.backend.add_pairs_bias(pairs, out.bias)
        out.empty = False
        if out.bias is not None:
            out.bias[: self.v] += residual.sum(0)


def _relative(noise: float, energy: float) -> float:
    return noise / max(energy, 1e-300) ** 0.5


def _energy(g: Tensor) -> float:
    """||g||^2, without a copy; a row is summed by one thread."""
    return float(torch.linalg.vector_norm(g, dim=1).double().square().sum())
