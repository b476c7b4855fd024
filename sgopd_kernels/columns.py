"""The filtered plan by columns: gradient products over the vocabulary columns that matter to a chunk.

For devices whose strength is dense products. The columns of a chunk's gradient G [n, V] are ordered by their norm; the
smallest set that leaves no more than the budget's share of ||G||^2 is gathered, G_A [n, A] and W_A [A, H]:

    dH = G_A W_A + (the rest U) B        dW_A += G_A^T H

B [r, H] are the head's leading directions and U = W B^T (sparse.Directions): along them the rest of a row adds up, its
mean first of all. Norms, order and the compaction to A columns stay on the device; the host waits for A, because
shapes are its own, and for the error's estimate: two waits a chunk of milliseconds. (A fixed capacity would need none,
but would pay for its worst chunk in every chunk.) No call with filtered chunks is captured: captured calls are exact.

The columns are distinct, so that the scatter-add into dW has one term an entry and the result repeats bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .backends.torch import TorchBackend
from .problem import Problem
from .sparse import Directions, Product, Report, RestPlan

# Share of columns above which dense products of a gradient rounded to bf16 cost less: 2 (Hs + Ht) + 8 s Hs of split
# products, a gather and a scatter, against 6 Hs + 2 Ht.
MOST_COLUMNS = 0.35
WORTHWHILE = 2.0**33  # multiply-adds of one projection below which a call is not filtered
TILE = 8192  # columns whose head and gradient are gathered at once
SHARE = 0.3  # of the budget: what dropped columns may weigh, before the estimate's factors


@dataclass
class Columns:
    """What a chunk's products run over."""

    index: Tensor  # [A], ascending
    gradient: Tensor  # [n, A] fp32
    hidden: Tensor  # [n, H] fp32: their part of the hidden gradient


@dataclass
class ColumnFilter(RestPlan):
    """One call's filter, on a backend's products. `pays`: until a chunk needs too many columns; the next ones will."""

    problem: Problem
    backend: TorchBackend
    report: Report = field(default_factory=Report)
    pays: bool = True
    _directions: Directions | None = None
    _along: Tensor | None = None

    def product(self) -> Product:
        return self.backend.project

    def held_bytes(self) -> tuple[int, int]:
        """(bytes, bytes a token) held beside logits: a tile of the head and of its gradient; gathered columns."""
        weight = self.problem.student.weight
        columns = int(MOST_COLUMNS * self.problem.vocabulary)
        return min(TILE, columns) * weight.shape[1] * (4 + weight.element_size()), 4 * columns

    def worthwhile(self, rows: Tensor) -> bool:
        return rows.numel() * self.problem.vocabulary * self.problem.student_hidden.shape[1] >= WORTHWHILE

    def probe(self, rows: Tensor) -> None:
        pass

    def chunk(
        self,
        forward: Callable[[None], tuple[Tensor, Tensor | None]],
        z_s: Tensor,
        scale: Tensor,
        need: bool,
    ) -> tuple[Tensor, Columns | None]:
        """(statistics, the columns taken out of the gradient; None where it stays whole in z_s)."""
        values, _ = forward(None)
        if need and not self.pays:
            self.report.error = max(self.report.error, self.backend.gradient_error(self.problem))
        taken = self._take(z_s) if need and self.pays else None
        n, v = z_s.shape
        self.report.entries += n * v
        self.report.kept += n * (v if taken is None else taken.index.numel())
        if taken is None:
            self.report.exact += n
        else:
            self.report.filtered += n
        return values, taken

    def _take(self, g: Tensor) -> Columns | None:
        budget, v = self.problem.spec.budget, g.shape[1]
        ordered, order = torch.linalg.vector_norm(g, dim=0).double().square().sort(descending=True)
        below = ordered.flip(0).cumsum(0).flip(0)  # what this column and all smaller ones weigh: nothing cancels
        count = (below > (SHARE * budget) ** 2 * below[0]).sum()
        left = torch.cat([below, below.new_zeros(1)]).gather(0, count.unsqueeze(0)).squeeze(0)
        needed, energy, lost = torch.stack([count.double(), below[0], left]).tolist()  # the host waits
        if energy == 0:
            return None
        if not needed <= MOST_COLUMNS * v or not energy > 0:  # a NaN is nothing to filter
            self.pays = False
            return None
        index = order[: int(needed)].sort().values
        taken = Columns(index, g[:, index], g.new_zeros(g.shape[0], self.problem.student.weight.shape[1]))
        for tile, part in zip(index.split(TILE), taken.gradient.split(TILE, 1)):
            self.backend.add_hidden_gradient(part, self.problem.student.weight[tile], taken.hidden)
        error = self.left_out(lost, energy, taken.hidden)
        if not error <= budget:
            self.pays = False
            return None
        self.report.error = max(self.report.error, error)
        g.index_fill_(1, index, 0.0)
        return taken

    def gradients(
        self,
        taken: Columns,
        rest: Tensor,
        hidden: Tensor,
        at: Tensor,
        d_hidden: Tensor | None,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
    ) -> None:
        """Adds a chunk's gradients: rest [n, V] what the columns left, hidden [n, H], at [n] its rows in d_hidden."""
        v = self.problem.vocabulary
        if d_hidden is not None:
            d_hidden[at] = self.with_rest(taken.hidden, rest).to(d_hidden.dtype)
        if d_weight is not None:
            for tile, part in zip(taken.index.split(TILE), taken.gradient.split(TILE, 1)):
                rows = d_weight.new_zeros(tile.numel(), d_weight.shape[1])
                self.backend.add_weight_gradient(part, hidden, rows)
                d_weight.index_add_(0, tile, rows)
        if d_bias is not None:
            d_bias[:v] += rest.sum(0)
            d_bias.index_add_(0, taken.index, taken.gradient.sum(0))
