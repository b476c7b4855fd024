"""The native CPU backend: csrc/cpu/rows.cpp, for the best instruction set of the processor, on torch's threads."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _extension
from ..problem import Problem
from .native import NativeBackend

_ELEMENTS = (torch.float32, torch.bfloat16)
HUGE = 32 * 2**20  # bytes from which the C library maps an allocation of its own, that huge pages can be asked for
LINE = 16  # floats in a cache line


def _unit_stride(tensor: Tensor) -> Tensor:
    """As the extension takes a matrix: rows side by side, none over another. What is not so is copied."""
    if tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]:
        return tensor
    # `contiguous` takes any stride of a dimension of one element.
    return tensor.clone(memory_format=torch.contiguous_format)


def _matrix(tensor: Tensor) -> tuple[int, int, bool]:
    """(address, row stride, is bf16), as the extension takes a matrix."""
    assert tensor.dtype in _ELEMENTS and tensor.stride(1) == 1
    return tensor.data_ptr(), tensor.stride(0), tensor.dtype == torch.bfloat16


def _address(tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Of what the extension reads or writes as `dtype`, rows of unit stride."""
    assert tensor.dtype == dtype and tensor.stride(-1) == 1
    return tensor.data_ptr()


class TopPairs(Protocol):
    """(token, column) pairs of a chunk with their gradient: `_cpu.Pairs`."""

    count: int
    taken: float  # sum of their squares
    left: float  # ... of what stayed in the block
    dense: bool  # too many: nothing was taken

    def restore(self, gradient: int, stride: int) -> None: ...

    def add_hidden_gradient(self, **arguments: object) -> None: ...

    def add_weight_gradient(self, **arguments: object) -> None: ...

    def add_bias_gradient(self, out: int) -> None: ...


class CpuBackend(NativeBackend):
    name = "cpu"
    module = _extension.CPU
    isa = ""  # "": the best one

    def kernels(self) -> Any:
        """What the instruction set has: `_cpu.Kernels`."""
        assert self.module is not None
        return self.module.kernels(self.isa)

    def runs_on(self) -> dict[str, Any]:
        return {"threads": torch.get_num_threads(), "isa": self.isa}

    def scratch(self, problem: Problem) -> int:
        """What products pack and threads hold: 25 MiB of 256 were measured, less in a smaller workspace."""
        return self.workspace(problem) // 8

    def held_bytes(self, problem: Problem) -> tuple[int, int]:
        """Beside a tile of a head: the fp32 sum of a bf16 head's gradient, which at the most halves the chunks."""
        scratch = self.scratch(problem)
        if self.rounds_sums(problem):
            return scratch, 16 * problem.student.weight.shape[1]  # packed operands and sums
        fixed, row_bytes = super().held_bytes(problem)
        head = problem.student.weight
        total = 4 * head.numel() if head.dtype == torch.bfloat16 else 0
        return fixed + scratch + min(total, self.workspace(problem) // 2), row_bytes

    def logits(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Rows an odd number of cache lines apart: a column's entries then lie in different sets of a cache."""
        lines = -(-columns // LINE) | 1
        out = super().logits(rows, LINE * lines, device)[:, :columns]
        if self.module is not None and 4 * rows * LINE * lines >= HUGE:
            self.module.advise_huge_pages(out.data_ptr(), 4 * rows * LINE * lines)
        return out

    def accumulator(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros, which pairs are added to; fresh pages are zero as they come, without a pass of their own."""
        nbytes = dtype.itemsize * rows * columns
        if nbytes < HUGE or not hasattr(mmap, "MAP_ANONYMOUS"):
            return torch.zeros(rows, columns, dtype=dtype, device=device)
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel built without them
                pages.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(pages, dtype=dtype).view(rows, columns)

    def project(self, hidden: Tensor, weight: Tensor, out: Tensor, balance: Tensor | None = None) -> None:
        """bf16 operands on tiles where the processor has them: fp32 results without fp32 copies."""
        if hidden.dtype == weight.dtype == torch.bfloat16 and self.has_tiles(hidden, weight):
            self.project_tiles(hidden, weight, out)
        else:
            super().project(hidden, weight, out, balance)

    def add_hidden_gradient(self, gradient: Tensor, weight: Tensor, out: Tensor, add: bool = True) -> None:
        """A bf16 head on tiles: the gradient as two bf16 numbers, its 16 leading bits."""
        if weight.dtype == torch.bfloat16 and self.has_tiles(weight):
            self.add_hidden_gradient_tiles(gradient, None, weight, out if add else out.zero_())
        else:
            super().add_hidden_gradient(gradient, weight, out, add)

    def add_weight_gradient(
        self, gradient: Tensor, hidden: Tensor, out: Tensor, add: bool = True, rest: Tensor | None = None
    ) -> None:
        if hidden.dtype == torch.bfloat16 and self.has_tiles(hidden):
            self.add_weight_gradient_tiles(gradient, None, hidden, out, rest, first=not add)
        else:
            super().add_weight_gradient(gradient, hidden, out, add)

    # --- products on tiles of bf16 numbers (csrc/cpu/tiles.h) ---

    def has_tiles(self, *operands: Tensor) -> bool:
        """Whether the processor has them, and for these operands."""
        if self.module is None or not self.kernels().tiles:
            return False
        return all(t.dtype == torch.bfloat16 or (t.dtype in _ELEMENTS and self.splits()) for t in operands)

    def splits(self) -> bool:
        """Whether tiles are fast enough for an fp32 operand as two bf16 numbers: AMX's are, dot products are not."""
        return self.kernels().wide_tiles

    def rounds_sums(self, problem: Problem) -> bool:
        """A tile's product is rounded as it is written: all plans of bf16 operands then run on tiles."""
        pair = problem.student.hidden, problem.student.weight
        return all(t.dtype == torch.bfloat16 for t in pair) and self.has_tiles(*problem.operands())

    def project_tiles(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        """out [n, V] fp32 = hidden @ weight.T; fp32 operands as two bf16 numbers, three products."""
        assert self.module is not None
        hidden, weight = _unit_stride(hidden), _unit_stride(weight)
        self.module.project_tiles(
            hidden=_matrix(hidden),
            n=hidden.shape[0],
            weight=_matrix(weight),
            v=weight.shape[0],
            h=weight.shape[1],
            out=_address(out),
            out_stride=out.stride(0),
            **self.runs_on(),
        )

    def _tiled(self, gradient: Tensor, fine: Tensor | None) -> dict[str, Any]:
        blocks = {"fine": 0, "fine_stride": 0}
        if fine is not None:
            blocks = {"fine": _address(fine, torch.uint8), "fine_stride": fine.stride(0)}
        n, v = gradient.shape
        return {"gradient": _address(gradient), "stride": gradient.stride(0), "n": n, "v": v, **blocks}

    def add_hidden_gradient_tiles(self, gradient: Tensor, fine: Tensor | None, weight: Tensor, out: Tensor) -> None:
        """out [n, H] fp32 += gradient @ weight.

        `fine` [ceil(n / 32), ceil(V / 32)] uint8: in which blocks both operands have 16 bits, and not 8; None: in all.
        """
        assert self.module is not None
        weight = _unit_stride(weight)
        self.module.add_hidden_gradient_tiles(
            **self._tiled(gradient, fine),
            weight=_matrix(weight),
            h=weight.shape[1],
            out=_address(out),
            out_stride=out.stride(0),
            **self.runs_on(),
        )

    def add_weight_gradient_tiles(
        self,
        gradient: Tensor,
        fine: Tensor | None,
        hidden: Tensor,
        out: Tensor,
        rest: Tensor | None = None,
        first: bool = False,
    ) -> None:
        """out [V, H] += gradient.T @ hidden, in fp32, or in bf16 with `rest` [V, H] int8: 8 more bits of the sum.

        `first`: nothing was added yet, and what `out` holds is not read; bf16 then needs no rest.
        """
        assert self.module is not None
        hidden = _unit_stride(hidden)
        beside = {} if rest is None else {"rest": _address(rest, torch.int8), "rest_stride": rest.stride(0)}
        self.module.add_weight_gradient_tiles(
            **self._tiled(gradient, fine),
            hidden=_matrix(hidden),
            h=hidden.shape[1],
            out=_matrix(out),
            first=first,
            **beside,
            **self.runs_on(),
        )

    # --- what the filtered and quantized plans are made of: fp32 and bf16 heads ---

    def has_pairs(self, weight: Tensor) -> bool:
        """Whether the products over pairs take this head."""
        return self.module is not None and weight.dtype in _ELEMENTS

    def quantizes(self, *operands: Tensor) -> bool:
        """Whether there are 16-bit projections of these operands on this processor."""
        return all(map(self.has_pairs, operands)) and self.kernels().int16

    def project_quantized(
        self, hidden: Tensor, weight: Tensor, out: Tensor, segment: int, feedback: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """out [n, V] = hidden @ weight.T in 16-bit integers where the processor can: csrc/cpu/project_int16.cpp.

        `segment`: products summed in one int32. `feedback`: coefficients [H, 16] of rounding the hidden states.
        """
        if self.module is None or not self.kernels().int16:
            self.project(hidden, weight, out)
            return
        hidden, weight = _unit_stride(hidden), _unit_stride(weight)
        self.module.project_int16(
            hidden=_matrix(hidden),
            n=hidden.shape[0],
            weight=_matrix(weight),
            v=weight.shape[0],
            h=weight.shape[1],
            out=_address(out),
            out_stride=out.stride(0),
            segment=segment,
            along=0 if feedback is None else _address(feedback[0]),
            absorb=0 if feedback is None else _address(feedback[1]),
            **self.runs_on(),
        )

    def refine(self, problem: Problem, rows: Tensor, z_s: Tensor, z_t: Tensor, mass: float) -> Tensor:
        """fp32 logits where either model has probability `mass`; returns a report [n, 6] (csrc/cpu/refine.cpp)."""
        assert self.module is not None and problem.teacher is not None
        n, v = z_s.shape
        report = torch.zeros(n, 6, dtype=torch.float64, device="cpu")
        ids = problem.token_ids[rows].contiguous()
        sides = {
            "student": _address(z_s),
            "student_stride": z_s.stride(0),
            "student_scale": problem.student.logit_scale / problem.options.temperature,
            "teacher": _address(z_t),
            "teacher_stride": z_t.stride(0),
            "teacher_scale": problem.teacher.logit_scale / problem.options.temperature,
            "report": report.data_ptr(),
            **self.runs_on(),
        }
        pairs = self.module.select_mass(**sides, n=n, v=v, token_ids=ids.data_ptr(), threshold=mass)
        hidden = _unit_stride(problem.student.hidden[rows].float())
        teacher_hidden = _unit_stride(problem.teacher.hidden[rows].float())
        weights = [_unit_stride(w) for w in (problem.student.weight, problem.teacher.weight)]
        pairs.refine(
            **sides,
            student_hidden=_matrix(hidden),
            student_weight=_matrix(weights[0]),
            student_width=hidden.shape[1],
            teacher_hidden=_matrix(teacher_hidden),
            teacher_weight=_matrix(weights[1]),
            teacher_width=teacher_hidden.shape[1],
        )
        return report

    def extract_top(self, g: Tensor, budget: float, most: float) -> TopPairs:
        """The largest entries out of g [n, V], until the others hold budget^2 of ||g||^2; at most `most` of all."""
        assert self.module is not None
        n, v = g.shape
        pairs: TopPairs = self.module.extract_top(
            gradient=_address(g), stride=g.stride(0), n=n, v=v, budget=budget, most=most, **self.runs_on()
        )
        return pairs

    def restore(self, pairs: TopPairs, g: Tensor) -> None:
        pairs.restore(_address(g), g.stride(0))

    def add_pairs_hidden(self, pairs: TopPairs, weight: Tensor, out: Tensor) -> None:
        weight = _unit_stride(weight)
        pairs.add_hidden_gradient(
            weight=_matrix(weight), h=weight.shape[1], out=_address(out), out_stride=out.stride(0), **self.runs_on()
        )

    def add_pairs_weight(self, pairs: TopPairs, hidden: Tensor, out: Tensor) -> None:
        hidden = _unit_stride(hidden)
        pairs.add_weight_gradient(
            hidden=_matrix(hidden), h=hidden.shape[1], out=_address(out), out_stride=out.stride(0), **self.runs_on()
        )

    def add_pairs_bias(self, pairs: TopPairs, out: Tensor) -> None:
        pairs.add_bias_gradient(_address(out))

    def instruction_sets(self) -> list[str]:
        """Of the build and this processor, best first; the first one is used."""
        return [] if self.module is None else list(self.module.available())
