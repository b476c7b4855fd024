"""The filtered plan by columns: gradient products over the vocabulary columns that matter to a chunk.

For devices whose strength is dense products. The columns of a chunk's gradient G [n, V] are ordered by their norm; the
smallest set that leaves no more than the budget's share of ||G||^2 is gathered, G_A [n, A] and W_A [A, H]:

    dH = G_A W_A + (the residual U) B        dW_A += G_A^T H

B [r, H] are the head's leading directions and U = W B^T (directions.py): along them the residual of a row adds up, its
mean first of all. Norms, order and the compaction to A columns stay on the device; the host waits for A, because
shapes are its own, and for the error's estimate: two waits a chunk of milliseconds. (A fixed capacity would need none,
but would pay for its worst chunk in every chunk.) No call with filtered chunks is captured: captured calls are exact.

The columns are distinct, so that the scatter-add into dW has one term an entry and the result repeats bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.torch import TorchBackend
from ..problem import Chunk, Problem
from . import calibration
from .base import Gradients, NeedsGrad
from .directions import Residual
from .exact import Exact


class Columns(Exact):
    """Until a chunk needs too many columns; the next ones will."""

    def __init__(self, problem: Problem, backend: TorchBackend, needs_grad: NeedsGrad) -> None:
        super().__init__(problem, backend, needs_grad)
        self.residual = Residual(self.head, backend.project)
        # What the chunk's products run over: columns [A], ascending; their gradient [n, A] fp32. None: all, dense.
        self.taken: tuple[Tensor, Tensor] | None = None
        self.hidden = self.head.new_empty(0)  # [n, H] fp32: their part of the hidden gradient

    def held_bytes(self) -> tuple[int, int]:
        """Beside the exact plan's: a tile of the head and of its gradient; gathered columns."""
        fixed, row = super().held_bytes()
        columns = int(calibration.FITTED.columns.most * self.v)
        tile = min(calibration.FITTED.columns.tile, columns) * self.head.shape[1] * (4 + self.head.element_size())
        return fixed + tile, row + 4 * columns

    def forward(self, chunk: Chunk) -> float:
        super().forward(chunk)
        self.taken, error = self._take(chunk) if self.needs_grad else (None, 0.0)
        self.ran = "exact" if self.taken is None else "filtered"
        self.kept = chunk.z_student.numel() if self.taken is None else self.taken[1].numel()
        return error

    def _take(self, chunk: Chunk) -> tuple[tuple[Tensor, Tensor] | None, float]:
        g, budget = chunk.z_student, self.problem.budget
        ordered, order = torch.linalg.vector_norm(g, dim=0).double().square().sort(descending=True)
        below = ordered.flip(0).cumsum(0).flip(0)  # what this column and all smaller ones weigh: nothing cancels
        count = (below > (calibration.FITTED.columns.share * budget) ** 2 * below[0]).sum()
        left = torch.cat([below, below.new_zeros(1)]).gather(0, count.unsqueeze(0)).squeeze(0)
        needed, energy, lost = torch.stack([count.double(), below[0], left]).tolist()  # the host waits
        if energy == 0:
            return None, 0.0
        self.pays = needed <= calibration.FITTED.columns.most * self.v and energy > 0  # a NaN is nothing to filter
        if not self.pays:
            return None, 0.0
        index = order[: int(needed)].sort().values
        gradient = g[:, index]
        self.hidden = g.new_zeros(g.shape[0], self.head.shape[1])
        for tile, part in zip(
            index.split(calibration.FITTED.columns.tile), gradient.split(calibration.FITTED.columns.tile, 1)
        ):
            self.backend.add_hidden_gradient(part, self.head[tile], self.hidden)
        probe = self.residual.probe(g, self.active(chunk))
        taken = torch.zeros(self.v, dtype=torch.bool, device=g.device).index_fill_(0, index, True)
        probe[:, taken[:: self.residual.stride]] = 0.0
        error = self.residual.error(lost, energy, self.hidden, probe)
        self.pays = error <= budget
        if not self.pays:
            return None, 0.0
        g.index_fill_(1, index, 0.0)
        return (index, gradient), error

    def gradients(self, chunk: Chunk, out: Gradients) -> None:
        if self.taken is None:
            super().gradients(chunk, out)
            return
        residual, (index, gradient) = chunk.z_student, self.taken
        if out.hidden is not None:
            out.hidden[chunk.positions] = self.residual.add_to(self.hidden, residual).to(out.hidden.dtype)
        if out.weight is not None:
            for tile, part in zip(
                index.split(calibration.FITTED.columns.tile), gradient.split(calibration.FITTED.columns.tile, 1)
            ):
                rows = out.weight.new_zeros(tile.numel(), out.weight.shape[1])
                self.backend.add_weight_gradient(part, chunk.hidden, rows)
                out.weight.index_add_(0, tile, rows)
        if out.bias is not None:
            out.bias[: self.v] += residual.sum(0)
            out.bias.index_add_(0, index, gradient.sum(0))
