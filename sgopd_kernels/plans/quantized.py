"""The quantized plan: logits in 16-bit integers; those that carry probability again in fp32; then as filtered.

The error is measured on the logits that are computed twice, and estimated from there for loss, gradients and the
gate's sign.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from ..backends.cpu import CpuBackend
from ..oracle import STATS
from ..problem import Chunk, Problem
from . import calibration
from .base import NeedsGrad, worst
from .calibration import Setting
from .directions import Coefficients, Directions, Residual, feedback
from .pairs import Pairs


class Feedback:
    """Both models' roundings, made when they are first asked for."""

    def __init__(self, residual: Residual, teacher: Tensor) -> None:
        self.residual, self.teacher_weight = residual, teacher

    @cached_property
    def student(self) -> Coefficients:
        return feedback(self.residual.directions)

    @cached_property
    def teacher(self) -> Coefficients:
        return feedback(Directions.of(self.teacher_weight))


class Quantized(Pairs):
    """`mass`: the probability from which a logit is computed again."""

    def __init__(
        self,
        problem: Problem,
        backend: CpuBackend,
        needs_grad: NeedsGrad,
        residual: Residual,
        feedback: Feedback | None,
        setting: Setting,
        mass: float,
    ) -> None:
        super().__init__(problem, backend, needs_grad, residual)
        self.feedback, self.setting, self.mass = feedback, setting, mass
        self.measured = residual.weight.new_empty(0)  # [n, 6], of a chunk's quantization (csrc/cpu/refine.cpp)

    def project(self, chunk: Chunk) -> None:
        p, at, feedback = self.problem, chunk.positions, self.feedback
        assert p.teacher is not None and p.teacher_hidden is not None and chunk.z_teacher is not None
        student, teacher = (feedback.student, feedback.teacher) if feedback else (None, None)
        project = self.backend.project_quantized
        for hidden, weight, out, rounding in (
            (p.student_hidden, self.head, chunk.z_student, student),
            (p.teacher_hidden, p.teacher.weight[: self.v], chunk.z_teacher, teacher),
        ):
            project(hidden[at], weight, out, self.setting.segment(weight.shape[1]), rounding)
        self.measured = self.backend.refine(p, at, chunk.z_student, chunk.z_teacher, self.mass)

    def forward(self, chunk: Chunk) -> float:
        super(Pairs, self).forward(chunk)
        loss, noise = self.error(chunk.stats, chunk.scale)
        error = worst(loss, self.take(chunk, noise))
        self.ran = "quantized"
        self.pays = error <= self.budget  # nor would it hold on the chunks to come
        return error

    def error(self, stats: Tensor, scale: Tensor) -> tuple[float, float]:
        loss, noise = refined_error(self.measured, self.mass, stats, scale)
        return loss, self.setting.coherence * noise


def refined_error(report: Tensor, mass: float, stats: Tensor, scale: Tensor) -> tuple[float, float]:
    """Of logits with an error of which those with a probability of `mass` were computed again (`backend.refine`).

    (estimate of the loss's error, inf where a gate's sign may flip; noise in G, if errors are independent.)
    """
    numbers = calibration.FITTED.quantized
    tail = torch.maximum(report[:, 2], report[:, 3])
    variance = report[:, 4] + report[:, 5]
    at_most = mass * tail * variance  # bounds the sum over the tail of p^2 times the variance
    ratio = numbers.deviations * float(at_most.max().sqrt())
    loss = float((tail * variance).sum() / stats[:, STATS["kl"]].abs().sum().clamp(min=1e-300))
    row_weight = (stats[:, STATS["gate"]] * scale).double()
    noise = float((row_weight.square() * at_most).sum().sqrt())
    return loss if ratio <= numbers.gate else math.inf, noise


def probe(problem: Problem, rows: Tensor) -> tuple[float, float]:
    """(KL, share of the columns that carry probability), of a plain call.

    By every sixteenth column of up to 16 tokens, in fp32, and the two distributions restricted to them. Worth under 1 %
    of a chunk.
    """
    p, numbers = problem, calibration.FITTED.quantized
    assert p.teacher is not None and p.teacher_hidden is not None
    probed, stride = numbers.probed_rows, numbers.probed_stride
    at = rows[:: max(1, rows.numel() // probed)][:probed]
    columns = slice(0, p.vocabulary, stride)

    def logits(hidden: Tensor, weight: Tensor, logit_scale: float) -> Tensor:
        z = hidden[at].float() @ weight[columns].float().T
        return torch.log_softmax(z * (logit_scale / p.spec.temperature), -1)

    log_p = logits(p.student_hidden, p.student.weight, p.student.logit_scale)
    log_q = logits(p.teacher_hidden, p.teacher.weight, p.teacher.logit_scale)
    # Restricted to a sixteenth of the columns a probability is sixteen times as large.
    mass = (torch.maximum(log_p, log_q) - torch.tensor(stride).log()).exp()
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).median())
    return kl, float((mass > numbers.mass).float().mean())


def plain(problem: Problem) -> bool:
    """Whether a call's logits are its projections, of two models: what `backend.refine` knows."""
    p = problem
    return (
        p.teacher is not None
        and p.teacher_hidden is not None
        and p.reference is None
        and p.spec.estimator == "full"
        and all(h.bias is None and h.softcap is None for h in (p.student, p.teacher))
    )


def quantized(
    problem: Problem, backend: CpuBackend, needs_grad: NeedsGrad, residual: Residual, rows: Tensor
) -> list[Quantized]:
    """The quantized plans that may hold for the tokens `rows`, the fastest first; none for flat or nearly equal models.

    They see plain logits: neither bias, softcap nor a third model.
    """
    p = problem
    if (
        not plain(p)
        or p.teacher is None
        or p.teacher_hidden is None
        or not backend.quantizes(p.student_hidden, p.student.weight, p.teacher_hidden, p.teacher.weight)
        or rows.numel() == 0
    ):
        return []
    numbers = calibration.FITTED.quantized
    settings = numbers.settings
    kl, share = probe(p, rows)
    if share >= calibration.FITTED.pairs.most:
        return []
    room = kl * p.spec.budget**2
    both = Feedback(residual, p.teacher.weight[: p.vocabulary])
    first = next((i for i, s in enumerate(settings) if room > s.kl), len(settings))
    at_first = min(numbers.most_mass, numbers.mass * max(1.0, room / settings[0].kl) ** 0.75)
    return [
        Quantized(
            p,
            backend,
            needs_grad,
            residual,
            both if setting.feedback else None,
            setting,
            numbers.mass if later else at_first,
        )
        for later, setting in enumerate(settings[first:])
    ]
