"""The exact plan with 16-bit operands in both gradient products, for the tensor cores of devices: G in fp16.

fp16 holds 11 bits of a number, where bf16 holds 8: rounding G costs 2e-4 of dH and dW, whatever the KL, an eighth of
what rounding them to bf16 does. What it lacks is range, 2^-24 to 2^16; so every row of G has a unit of its own, a power
of two:

    G[n] = top * units[n] * (what is left in fp16)

`top` is the call's: no coefficient of a row (its weight times what the reduction, the head and the temperature multiply
it by) is larger. The row pass knows a bound on what the coefficient multiplies (docs/kernels.md has the proofs; for the
reverse KL sqrt(2 p K) + K, with p the row's largest probability and K its KL), and so a power of two 2^e that the row
over `top` lies below. Its largest entry lies below 2^m in fp16, m = 15 - (12 - e) / 3: a third of the exponent stays in
G, and two thirds are units, which dW's other operand is multiplied by. So neither runs out for any e from -24 to 15,
that is for a KL from 1e-14 to 3e4 nats, and all chunks are summed in one unit.

Heads and hidden states go to fp16 by powers of two: bf16 values within 2^-30 of the largest stay what they are, and of
fp32 ones three bits more are kept than bf16 has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends.tensor_cores import TensorCoreBackend, largest_of_rows, narrow_gradient, power_above
from ..options import Head
from ..problem import Chunk, Problem
from . import calibration
from .base import Gradients, NeedsGrad
from .exact import Exact


class Narrow(Exact):
    """`tokens` [M], `valid` [M], `weights` [3, M], `scale` [M]: the call's, as chunks have parts of them."""

    backend: TensorCoreBackend
    form = torch.float16

    def __init__(
        self,
        problem: Problem,
        backend: TensorCoreBackend,
        needs_grad: NeedsGrad,
        tokens: Tensor,
        valid: Tensor | None,
        weights: Tensor,
        scale: Tensor,
    ) -> None:
        super().__init__(problem, backend, needs_grad)
        self.tokens, self.valid, self.weights, self.scale = tokens, valid, weights, scale
        self.error = error_of(problem)
        self.splits = problem.budget > 0 and worthwhile(problem)
        self.balances: dict[int, Tensor | None] = {}
        self.top: Tensor | None = None
        self.tiles: list[tuple[int, Tensor]] = []  # of the head in fp16, where it is held
        self.head_unit: Tensor | float = 1.0  # that fp16 head's

    def held_bytes(self) -> tuple[int, int]:
        return self.backend.narrow_held_bytes(self.problem)

    def left_by_rows(self, chunk: Chunk) -> Tensor:
        return narrow_gradient(chunk.z_student)

    def forward(self, chunk: Chunk) -> float:
        if self.needs_grad:
            chunk.top = self.top_of_call()
        super().forward(chunk)
        return self.error if self.needs_grad else 0.0

    def balance(self, head: Head) -> Tensor | None:
        if not self.splits:
            return None
        if id(head) not in self.balances:
            self.balances[id(head)] = self.backend.balance(head, self.largest_hidden(head))
        return self.balances[id(head)]

    def largest_hidden(self, head: Head) -> Tensor:
        """[] of the call's tokens: what ignored ones hold is anything."""
        sizes = largest_of_rows(head.hidden)[self.tokens]
        return (sizes if self.valid is None else sizes * self.valid).amax()

    def top_of_call(self) -> Tensor:
        if self.top is None:
            options, head = self.problem.options, self.problem.student
            # With a reference a row that counts weighs 1: the gate moves the target.
            most = self.weights.abs().amax(0) if self.problem.reference is None else 1.0
            coefficient = (self.scale.abs() * most).nan_to_num(0.0, 0.0, 0.0).amax()
            self.top = power_above((coefficient * (abs(head.logit_scale) / options.temperature)).float())
        return self.top

    def head_tiles(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows in fp16) of the head."""
        if self.head.dtype == torch.float16:
            yield 0, self.head
            return
        if isinstance(self.head_unit, float):
            self.head_unit = power_above(largest_of_rows(self.head).amax()) * 2.0**-15
        step = self.backend.narrow_rows(self.problem)
        for first in range(0, self.v, step):
            if step < self.v or not self.tiles:
                part = self.head[first : first + step]
                self.tiles = [
                    (first, torch.mul(part, 1 / self.head_unit, out=torch.empty_like(part, dtype=torch.float16)))
                ]
            yield self.tiles[0]

    def gradients(self, chunk: Chunk, out: Gradients) -> None:
        g, order = self.gradient(chunk)
        if order.numel() == 0:
            return
        h, at, units, top = chunk.hidden, chunk.positions, chunk.units, chunk.top
        assert units is not None and top is not None
        if order.numel() < at.numel():
            h, at, units = h[order], at[order], units[order]
        if out.hidden is not None:
            g_h = torch.empty(at.numel(), h.shape[1], dtype=torch.float32, device=h.device)
            for first, part in self.head_tiles():
                self.backend.multiply(g[:, first : first + part.shape[0]], part, g_h, add=first > 0)
            out.hidden[at] = g_h.mul_((units * (top * self.head_unit)).unsqueeze(-1)).to(out.hidden.dtype)
        if out.weight is not None:
            if out.unit is None:
                out.unit = power_above(self.largest_hidden(self.problem.student)) * (top * 2.0**-15)
            narrow = torch.mul(h, (units * (top / out.unit)).unsqueeze(-1)).half()
            self.backend.multiply(g.T, narrow, out.weight[: self.v], add=not out.empty)
            out.empty = False
        if out.bias is not None:
            added = torch.empty(1, self.v, dtype=torch.float32, device=h.device)
            self.backend.multiply((units * 2.0**15).half().unsqueeze(0), g, added, add=False)
            out.bias[: self.v] += added.squeeze(0) * (top * 2.0**-15)


def worthwhile(problem: Problem) -> bool:
    """Whether the call is large enough for what is faster and less exact."""
    return problem.student.hidden.numel() * problem.vocabulary >= calibration.FITTED.devices.narrow_worthwhile


def error_of(problem: Problem) -> float:
    """Of dH and dW: G's rounding, and that of a head or of hidden states in fp32."""
    fp32 = torch.float32 in (problem.student.hidden.dtype, problem.student.weight.dtype)
    return calibration.FITTED.devices.rounding * math.sqrt(2 if fp32 else 1)


def fits(problem: Problem) -> bool:
    """Gradients that are rounded to bf16 don't feel it; others by their budget."""
    if problem.student.hidden.dtype == problem.student.weight.dtype == torch.bfloat16:
        return True
    return problem.budget >= error_of(problem) and worthwhile(problem)
