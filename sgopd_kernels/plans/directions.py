"""The leading directions of a head's rows: what keeps the residual of a gradient, and what rounding feeds back.

The residual of a row of the gradient, thousands of entries below the threshold, is no noise: heads' rows share
directions, along which it adds up. B [r, H] are those directions (the leading ones of a sample of the head's rows) and
U = W B^T, so that the residual moves dH within them; what is lost is its part outside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import calibration

Product = Callable[[Tensor, Tensor, Tensor], None]  # hidden [n, H], weight [V, H], out [n, V] fp32


@dataclass
class Directions:
    """Leading directions of a head's rows: B [r, H] orthonormal, and what lies along and outside them."""

    basis: Tensor
    inside: Tensor  # [r, r] second moments of a row's part along them
    outside: float  # root mean square norm of a row's part outside them

    @staticmethod
    def of(weight: Tensor) -> Directions:
        v, h = weight.shape
        sample = weight[:: max(1, v // calibration.FITTED.residual.sampled_rows)].float()
        seeded, size = torch.Generator().manual_seed(0), (h, min(calibration.FITTED.residual.rank, h))
        start = torch.randn(size, generator=seeded, dtype=torch.float32, device="cpu").to(weight.device)
        for _ in range(2):
            start = torch.linalg.qr(sample.T @ (sample @ start))[0]
        along = sample @ start
        rest = sample.square().sum() - along.square().sum()
        outside = float((rest / sample.shape[0]).clamp(min=0).sqrt())
        return Directions(start.T.contiguous(), along.T @ along / sample.shape[0], outside)

    def along(self, weight: Tensor, project: Product) -> Tensor:
        """U^T = B W^T [r, V] fp32."""
        out = torch.empty(self.basis.shape[0], weight.shape[0], dtype=torch.float32, device=weight.device)
        project(self.basis, weight, out)
        return out


Coefficients = tuple[Tensor, Tensor]  # [H, 16] fp32 each


def feedback(directions: Directions) -> Coefficients:
    """(b_k, a_k) of rounding with error feedback: `_cpu.project_int16`.

    An element k of a hidden state x is rounded to q_k = round(x_k - a_k . s), s = B (q - x) over the elements before
    it. a_k = (sum_{j >= k} b_j b_j^T + L^-1)^-1 b_k is what makes |W (q - x)|^2 least if the elements from k on could
    take any value, with B the head's directions, b_k its columns, and L their second moments beyond those of all
    others, in units of these (GPTQ's recursion, arXiv 2210.17323, for a matrix of that form).
    """
    basis = directions.basis.double()
    r, h = basis.shape
    if not directions.inside.isfinite().all():  # a NaN in the head, which shows in the logits
        nothing = directions.basis.new_zeros(h, calibration.FITTED.residual.rank)
        return nothing, nothing
    power, axes = torch.linalg.eigh(directions.inside.double())
    others = max(directions.outside**2 / max(h - r, 1), 1e-12 * float(power.sum()), 1e-300)
    inverse = axes @ torch.diag(1 / (power / others - 1).clamp(1e-6, 1e6)) @ axes.T
    behind = torch.einsum("rk,sk->krs", basis, basis).flip(0).cumsum(0).flip(0)
    absorb = torch.linalg.solve(behind + inverse, basis.T)

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, calibration.FITTED.residual.rank - r)).float().contiguous()

    return padded(basis.T), padded(absorb)


def extrapolated(product: Tensor, alone: Tensor, stride: int) -> Tensor:
    """The squared norm of a product over all columns, a `stride`-th of it, from that over every `stride`-th column.

    `alone`: the columns' own squared norms, summed. Were the columns independent `product` would be the same, and grow
    with them; what they have in common grows with their square: k columns for one make k^2 (product - alone) + k alone.
    """
    return torch.maximum(stride * (product - alone) + alone, alone)


class Residual:
    """What a call's plans leave out of their products: kept along the directions of `weight` [V, H], which it owns.

    `product` computes U^T; its rounding matters to the residual alone. Directions are made when first asked for.
    """

    def __init__(self, weight: Tensor, product: Product) -> None:
        self.weight, self.product = weight, product

    @cached_property
    def directions(self) -> Directions:
        return Directions.of(self.weight)

    @cached_property
    def rounding(self) -> Coefficients:
        return feedback(self.directions)

    @cached_property
    def along(self) -> Tensor:
        return self.directions.along(self.weight, self.product)

    @cached_property
    def stride(self) -> int:
        """Of the columns that are probed."""
        numbers = calibration.FITTED.residual
        return max(1, min(numbers.stride, self.weight.shape[0] // numbers.columns))

    @cached_property
    def probed(self) -> Tensor:
        """[V / stride, H] fp32: what lies outside the directions, of every few rows of the head."""
        rows, basis = self.weight[:: self.stride].float(), self.directions.basis
        return torch.addmm(rows, rows @ basis.T, basis, alpha=-1)

    def probe(self, g: Tensor, active: Tensor) -> Tensor:
        """[m, V / stride]: entries of g [n, V] in the columns of `probed`, of a few tokens that have a weight."""
        return g[:, :: self.stride][self.tokens(active)]

    def tokens(self, active: Tensor) -> Tensor:
        """[m] a few of the active ones of a chunk's tokens, all over it."""
        spread = torch.arange(active.numel(), dtype=torch.float32, device=active.device) * 0.6180339887 % 1
        return (active + spread).topk(min(calibration.FITTED.residual.tokens, active.numel())).indices

    def error(self, left: float, energy: float, hidden: Tensor, probe: Tensor) -> float:
        """Estimated error of both gradients: `left` of `energy` = ||G||^2 stayed; hidden [n, H], what was taken.

        `probe`: of what stayed.
        """
        numbers = calibration.FITTED.residual
        s = torch.linalg.vector_norm(probe @ self.probed, dtype=torch.float64).square()
        d = probe.double().square().sum(0) @ torch.linalg.vector_norm(self.probed, dim=1).double().square()
        seen = torch.linalg.vector_norm(probe, dtype=torch.float64).square()
        lost, seen, reach = torch.stack([extrapolated(s, d, self.stride), seen, hidden.norm().double()]).tolist()
        if left == 0:
            return 0.0
        if seen == 0 or reach == 0:
            return math.inf
        lost = (lost * left / seen) ** 0.5 / reach
        return max(numbers.coherence * lost, numbers.spread * (left / energy) ** 0.5)

    def add_to(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """The hidden gradient [n, H]: of what was taken, and of the residual [n, V] along the directions."""
        return torch.addmm(hidden, residual @ self.along.T, self.directions.basis)
