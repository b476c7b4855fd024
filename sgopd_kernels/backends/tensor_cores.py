"""Products on tensor cores with fp32 results, for the backends of CUDA devices; cuBLAS computes them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from ..problem import Problem
from .torch import TorchBackend

SPLIT_COLUMNS = 8192  # of G that are split at once


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


class TensorCoreBackend(TorchBackend):
    """Products whose operands are both bf16, or both fp16, as they are; of fp32 heads and of mixed types, in fp32."""

    # 2,048 tokens of two models with 152 thousand columns: below a thousand tokens a chunk, reading the heads and
    # accumulating the weight's gradient decide.
    default_workspace = 5 * 2**29
    row_multiple = 128  # tokens a chunk: whole tiles of a product
    waits = True

    def held_bytes(self, problem: Problem, narrow: bool) -> tuple[int, int]:
        if not self.takes(problem.student.hidden, problem.student.weight):
            return self.cast_bytes(problem), 0
        return 0, 0 if narrow else 8 * SPLIT_COLUMNS  # a tile in bf16 twice, and a difference in fp32

    def takes(self, *operands: Tensor) -> bool:
        """Whether products of G take these as they are."""
        return all(t.dtype == torch.bfloat16 for t in operands) and torch.version.hip is None

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        """out [fp32] = (out +) a @ b for 16-bit operands, with an fp32 accumulator throughout."""
        if a.device.type == "cpu":  # interpreted: torch has no such product on the CPU
            wide = a.float() @ b.float()
            out.add_(wide) if add else out.copy_(wide)
        elif not add:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
        elif adds_in_place(a.device):
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            for rows, part in zip(out.split(SPLIT_COLUMNS), a.split(SPLIT_COLUMNS)):
                rows.add_(torch.mm(part, b, out_dtype=torch.float32))

    def project(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        same = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
        if same and torch.version.hip is None:
            self.multiply(hidden, weight.T, out, add=False)
        else:
            super().project(hidden, weight, out)

    def _parts(self, gradient: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """(columns, the bf16 tensors whose sum the gradient is there)."""
        if gradient.dtype == torch.bfloat16:
            yield slice(None), [gradient]
            return
        for first in range(0, gradient.shape[1], SPLIT_COLUMNS):
            columns = slice(first, first + SPLIT_COLUMNS)
            high = gradient[:, columns].bfloat16()
            yield columns, [high, (gradient[:, columns] - high).bfloat16()]

    def add_hidden_gradient(self, gradient: Tensor, weight: Tensor, out: Tensor, add: bool = True) -> None:
        if not self.takes(weight):
            super().add_hidden_gradient(gradient, weight, out, add)
            return
        for columns, parts in self._parts(gradient):
            for part in parts:
                self.multiply(part, weight[columns], out, add)
                add = True

    def add_weight_gradient(self, gradient: Tensor, hidden: Tensor, out: Tensor, add: bool = True) -> None:
        if not self.takes(hidden):
            super().add_weight_gradient(gradient, hidden, out, add)
            return
        for columns, parts in self._parts(gradient):
            for i, part in enumerate(parts):
                self.multiply(part.T, hidden, out[columns], add or i > 0)
