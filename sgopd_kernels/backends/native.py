"""Backends whose row work is one fused native pass; the GEMMs stay torch's. Contract: csrc/rows.h."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..options import DIVERGENCES, Head
from ..problem import Chunk, Problem
from .torch import TorchBackend


class NativeBackend(TorchBackend):
    """`module` is the extension; `runs_on` the arguments of its own: threads, a stream."""

    module: ModuleType | None = None

    def available(self) -> bool:
        return self.module is not None

    def runs_on(self) -> dict[str, Any]:
        raise NotImplementedError

    def held_bytes(self, problem: Problem) -> tuple[int, int]:
        return self.cast_bytes(problem), 0

    def rows(self, problem: Problem, chunk: Chunk, gradient: torch.dtype | None) -> Tensor:
        assert self.module is not None
        options, rows = problem.options, chunk.positions
        divergence = problem.divergence[0]
        n, v = chunk.z_student.shape
        stats = torch.empty(n, self.module.COLUMNS, dtype=torch.float64, device=chunk.z_student.device)
        # Everything the call reads stays referenced in this list until it returns.
        held: list[Tensor | None] = []

        def take(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
            held.append(None if tensor is None else tensor.to(dtype).contiguous())
            return 0 if held[-1] is None else held[-1].data_ptr()

        def head(h: Head | None) -> tuple[int, float, float]:
            if h is None:
                return 0, 1.0, 0.0
            return take(None if h.bias is None else h.bias[:v]), h.logit_scale, h.softcap or 0.0

        def logits(z: Tensor | None) -> tuple[int, int]:
            if z is None:
                return 0, 0
            assert z.dtype == torch.float32 and z.stride(1) == 1
            return z.data_ptr(), z.stride(0)

        def select(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        (student, student_stride), (teacher, teacher_stride), (reference, reference_stride) = map(
            logits, (chunk.z_student, chunk.z_teacher, chunk.z_reference)
        )
        energy = chunk.energy
        assert energy is None or (energy.dtype == torch.float32 and energy.shape[0] == n and energy.is_contiguous())
        self.module.rows(
            rows=n,
            vocabulary=v,
            student=student,
            student_stride=student_stride,
            teacher=teacher,
            teacher_stride=teacher_stride,
            reference=reference,
            reference_stride=reference_stride,
            student_head=head(problem.student),
            teacher_head=head(problem.teacher),
            reference_head=head(problem.reference),
            token_ids=take(problem.token_ids[rows], torch.int64),
            verdict=take(problem.verdict[rows]),
            weights=take(chunk.weights, torch.float64),
            forced=take(chunk.forced, torch.int8),
            row_scale=take(chunk.scale),
            teacher_logprob=take(select(problem.teacher_logprob)),
            behaviour_logprob=take(select(problem.behaviour_logprob)),
            stats=stats.data_ptr(),
            energy=0 if energy is None else energy.data_ptr(),
            sampled=options.estimator == "sampled",
            divergence=list(DIVERGENCES).index(divergence),
            **problem.row_numbers,
            temperature=options.temperature,
            gradient=gradient is not None,
            **self.runs_on(),
        )
        return stats
