"""The Triton backend: cuBLAS products with fp32 results around one fused row pass (triton_kernels.py).

Logits are fp32 whatever the operands; so are the accumulated gradients. The gradient G [n, V] is left in fp16 over the
student's logits (plans/narrow.py), or in fp32 where a call is small or "exact" and its heads are not bf16.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..options import DIVERGENCES
from ..problem import Chunk, Problem
from .tensor_cores import TensorCoreBackend, narrow_gradient

# Columns a program holds at once, and its warps. Fewer where a divergence takes many operations, or a third model is
# there.
BLOCK, BLOCK_SMALL, WARPS = 2048, 1024, 8
MOVE_BLOCK = 4096


def _kernels() -> Any:
    """Imported at the first use: Triton takes a while to import, and TRITON_INTERPRET is read then."""
    from . import triton_kernels

    return triton_kernels


class TritonBackend(TensorCoreBackend):
    name = "triton"
    narrowing_bytes = 0  # the kernel does it

    def available(self) -> bool:
        if importlib.util.find_spec("triton") is None:
            return False
        try:
            _kernels()
        except ImportError:  # a Triton that does not fit this Python or this system
            return False
        return True

    def interpreted(self) -> bool:
        import triton

        return not isinstance(_kernels().rows_kernel, triton.runtime.JITFunction)

    def launch(self, kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
        """Every kernel starts here, on the current stream of the current device, the operands' (driver.run)."""
        kernel[grid](**arguments)

    def logits(self, rows: int, columns: int, device: torch.device) -> Tensor:
        return super().logits(rows, -(-columns // 16) * 16, device)[:, :columns]  # aligned rows

    def rows(self, problem: Problem, chunk: Chunk, gradient: torch.dtype | None) -> Tensor:
        options = problem.options
        divergence = problem.divergence[0]
        z_student, z_teacher, z_reference = chunk.z_student, chunk.z_teacher, chunk.z_reference
        n, v = z_student.shape
        stats = torch.empty(n, 8, dtype=torch.float64, device=z_student.device)
        if n == 0:
            return stats
        student, teacher, reference = problem.student, problem.teacher, problem.reference
        g = None if gradient is None else narrow_gradient(z_student) if gradient == torch.float16 else z_student
        if gradient == torch.float16:
            chunk.units = torch.empty(n, dtype=torch.float32, device=z_student.device)

        def flat(tensor: Tensor | None) -> Tensor | None:  # a number for all tokens comes expanded
            return None if tensor is None else tensor.contiguous()

        def stride(z: Tensor | None) -> int:
            assert z is None or z.stride(1) == 1
            return 0 if z is None else z.stride(0)

        self.launch(
            _kernels().rows_kernel,
            (n,),
            student=z_student,
            student_stride=stride(z_student),
            gradient=g,
            gradient_stride=stride(g),
            top=None if gradient != torch.float16 else chunk.top,
            units=None if gradient != torch.float16 else chunk.units,
            teacher=z_teacher,
            teacher_stride=stride(z_teacher),
            reference=z_reference,
            reference_stride=stride(z_reference),
            student_bias=flat(student.bias),
            teacher_bias=None if teacher is None else flat(teacher.bias),
            reference_bias=None if reference is None else flat(reference.bias),
            student_scale=student.logit_scale,
            teacher_scale=1.0 if teacher is None else teacher.logit_scale,
            reference_scale=1.0 if reference is None else reference.logit_scale,
            student_softcap=student.softcap,
            teacher_softcap=None if teacher is None else teacher.softcap,
            reference_softcap=None if reference is None else reference.softcap,
            inverse_temperature=1 / options.temperature,
            rows=chunk.positions,
            token_ids=flat(problem.token_ids),
            verdict=flat(problem.verdict),
            teacher_logprob=flat(problem.teacher_logprob),
            behaviour_logprob=flat(problem.behaviour_logprob),
            weights=chunk.weights,
            weights_stride=chunk.weights.stride(0),
            forced=flat(chunk.forced),
            row_scale=flat(chunk.scale),
            stats=stats,
            V=v,
            **problem.row_numbers,
            SAMPLED=options.estimator == "sampled",
            DIVERGENCE=list(DIVERGENCES).index(divergence),
            BLOCK=BLOCK_SMALL if divergence not in ("reverse-kl", "forward-kl") or reference is not None else BLOCK,
            num_warps=WARPS,
        )
        return stats

    def move_rows(self, z: Tensor, to: Tensor, origin: Tensor) -> None:
        n, v = to.numel(), z.shape[1]
        if n > 0:
            self.launch(
                _kernels().move_rows_kernel,
                (n, -(-v // MOVE_BLOCK)),
                z=z,
                stride=z.stride(0),
                to=to,
                origin=origin,
                V=v,
                BLOCK=MOVE_BLOCK,
                num_warps=WARPS,
            )

    def parts(self, x: Tensor, unit: Tensor, which: tuple[int, ...]) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        rows, width = x.shape
        out = torch.empty(rows, len(which) * width, dtype=torch.float16, device=x.device)
        self.launch(
            _kernels().parts_kernel,
            (rows, -(-width // MOVE_BLOCK)),
            x=x,
            stride=x.stride(0),
            unit=unit,
            out=out,
            H=width,
            COUNT=len(which),
            LOW=sum(part << i for i, part in enumerate(which)),
            BLOCK=MOVE_BLOCK,
            num_warps=WARPS,
        )
        return out
