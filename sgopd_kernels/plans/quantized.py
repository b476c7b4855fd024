"""The quantized plan: logits in 16-bit integers; those that carry probability again in fp32; then as filtered.

The error is measured on the logits that are computed twice, and estimated from there for loss, gradients and the
gate's sign.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends.cpu import CpuBackend
from ..options import Head
from ..oracle import STATS
from ..problem import Chunk, Problem
from . import calibration
from .base import NeedsGrad, worst
from .calibration import Setting
from .directions import Residual, extrapolated
from .pairs import Pairs

MEASURED = ("reverse-kl", "forward-kl", "jsd")  # divergences whose error the estimate was held against


class Quantized(Pairs):
    """`teacher`: as `residual`, of the teacher's head."""

    def __init__(
        self,
        problem: Problem,
        backend: CpuBackend,
        needs_grad: NeedsGrad,
        residual: Residual,
        teacher: Residual,
        setting: Setting,
    ) -> None:
        super().__init__(problem, backend, needs_grad, residual)
        self.teacher, self.setting, self.mass = teacher, setting, calibration.FITTED.quantized.mass
        self.measured = residual.weight.new_empty(0)  # [n, 6], of a chunk's quantization (csrc/cpu/refine.cpp)
        self.adds_up = 1.0

    def project(self, chunk: Chunk) -> None:
        p, at, project = self.problem, chunk.positions, self.backend.project_quantized
        assert p.teacher is not None and chunk.z_teacher is not None
        for hidden, side, out in (
            (p.student.hidden, self.residual, chunk.z_student),
            (p.teacher.hidden, self.teacher, chunk.z_teacher),
        ):
            rounding = side.rounding if self.setting.feedback else None
            project(hidden[at], side.weight, out, self.setting.segment(side.weight.shape[1]), rounding)
        self.measured = self.backend.refine(p, at, chunk.z_student, chunk.z_teacher, self.mass)
        self.adds_up = self._adds_up(chunk)

    def _adds_up(self, chunk: Chunk) -> float:
        """How often what `at_most` makes of independent errors the logits' errors are in dH.

        Of a few tokens the logits of every few columns are computed again in fp32. What is extrapolated from their
        errors is `Residual.error`'s.
        """
        p, at, k = self.problem, chunk.positions, self.residual.stride
        assert p.teacher is not None and chunk.z_teacher is not None
        tokens = self.residual.tokens(torch.ones(at.numel(), dtype=torch.bool, device=at.device))
        y = p.token_ids[at][tokens]

        def errors(head: Head, z: Tensor, logsumexp: Tensor) -> tuple[Tensor, Tensor]:
            hidden, scale = head.hidden[at][tokens].float(), head.logit_scale / p.options.temperature
            exact = hidden @ head.weight[: self.v : k].float().T
            # What was refined, the sampled token's logit too, is off by one number a token: of no effect.
            shift = z[tokens, y] - (hidden * head.weight[y].float()).sum(-1)
            off = (z[:, ::k][tokens] - exact - shift.unsqueeze(-1)) * scale
            return off, (exact * scale - logsumexp[tokens].float().unsqueeze(-1)).exp()

        u, prob = errors(p.student, chunk.z_student, self.measured[:, 0])
        v, target = errors(p.teacher, chunk.z_teacher, self.measured[:, 1])
        rows = self.head[::k].float()
        mean = rows.mean(0)
        rows = rows - mean
        norms = rows.square().sum(1).double()
        tail = torch.maximum(prob, target) < self.mass
        e = (prob * (u - v)).where(tail, 0.0)
        hidden = extrapolated((e @ rows).double().square().sum(), e.double().square().sum(0) @ norms, k)
        # G sums to 0, so that the tail's errors come back in the other entries, in proportion to p: along E_p of the
        # head's rows, which is no longer than the row of a token drawn from p.
        expected, e = (self.head[y].float() - mean).square().sum(1).double(), e.double()
        hidden += extrapolated(e.sum(-1).square() @ expected, e.square().sum(-1) @ expected, k)
        independent = float(at_most(p, self.measured, self.mass)[tokens].sum()) / k
        return 0.0 if independent == 0 else float(hidden / norms.mean() / independent) ** 0.5

    def forward(self, chunk: Chunk) -> float:
        super(Pairs, self).forward(chunk)
        loss, noise = self.error(chunk.stats, chunk.scale)
        error = worst(loss, self.take(chunk, noise))
        self.ran = "quantized"
        self.pays = error <= self.budget  # nor would it hold on the chunks to come
        return error

    def error(self, stats: Tensor, scale: Tensor) -> tuple[float, float]:
        loss, noise = refined_error(self.problem, self.measured, self.mass, stats, scale, self.adds_up)
        return loss, calibration.FITTED.quantized.coherence * noise


def at_most(problem: Problem, report: Tensor, mass: float) -> Tensor:
    """[n]: bounds the sum over a token's tail of p^2 times the variance of its logits. `report`: `backend.refine`'s."""
    assert problem.teacher is not None
    student, teacher = (head.logit_scale / problem.options.temperature for head in (problem.student, problem.teacher))
    return mass * torch.maximum(report[:, 2], report[:, 3]) * (report[:, 4] * student**2 + report[:, 5] * teacher**2)


def refined_error(
    problem: Problem,
    report: Tensor,
    mass: float,
    stats: Tensor,
    scale: Tensor,
    adds_up: float = 1.0,
) -> tuple[float, float]:
    """Of logits with an error of which those with a probability of `mass` were computed again (`backend.refine`).

    (estimate of the loss's error, inf where a gate's sign may flip; noise in G). `adds_up`: how often what independent
    errors would make it is, in dH.
    """
    numbers, most = calibration.FITTED.quantized, at_most(problem, report, mass)
    ratio = numbers.deviations * float(most.max().sqrt())
    loss = float(most.sum() / mass / stats[:, STATS["kl"]].abs().sum().clamp(min=1e-300))
    row_weight = (stats[:, STATS["gate"]] * scale).double()
    noise = adds_up * float((row_weight.square() * most).sum().sqrt())
    return loss if ratio <= numbers.gate else math.inf, noise


def probe(problem: Problem, rows: Tensor) -> tuple[float, float]:
    """(KL, share of the columns that carry probability), of a plain call.

    By every sixteenth column of up to 16 tokens, in fp32, and the two distributions restricted to them. Worth under 1 %
    of a chunk.
    """
    p, numbers = problem, calibration.FITTED.quantized
    assert p.teacher is not None
    probed, stride = numbers.probed_rows, numbers.probed_stride
    at = rows[:: max(1, rows.numel() // probed)][:probed]
    columns = slice(0, p.vocabulary, stride)

    def logits(head: Head) -> Tensor:
        z = head.hidden[at].float() @ head.weight[columns].float().T
        return torch.log_softmax(z * (head.logit_scale / p.options.temperature), -1)

    log_p = logits(p.student)
    log_q = logits(p.teacher)
    # Restricted to a sixteenth of the columns a probability is sixteen times as large.
    mass = (torch.maximum(log_p, log_q) - math.log(stride)).exp()
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).median())
    return kl, float((mass > numbers.mass).float().mean())


def plain(problem: Problem) -> bool:
    """Whether a call's logits are its projections, of two models: what `backend.refine` knows."""
    p = problem
    return (
        p.teacher is not None
        and p.reference is None
        and p.options.estimator == "full"
        and p.divergence[0] in MEASURED
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
        or not backend.quantizes(p.student.hidden, p.student.weight, p.teacher.hidden, p.teacher.weight)
        or rows.numel() == 0
    ):
        return []
    settings = calibration.FITTED.quantized.settings
    kl, share = probe(p, rows)
    if share >= calibration.FITTED.pairs.most:
        return []
    room = kl * p.budget**2
    teacher = Residual(p.teacher.weight[: p.vocabulary], residual.product)
    first = next((i for i, s in enumerate(settings) if room > s.kl), len(settings))
    return [Quantized(p, backend, needs_grad, residual, teacher, setting) for setting in settings[first:]]
