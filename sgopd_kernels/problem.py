"""What a loss call asks for, as plain data: operands (`Problem`) and choices (`Spec`). Plans and backends read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .gate import ByVerdict


class Head(NamedTuple):
    """A language-model head: logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None


PLAIN = Head(torch.empty(0, 0))  # logits as they are


@dataclass(frozen=True)
class Spec:
    """The call's choices, resolved: no names of presets, no defaults left open."""

    estimator: str = "full"  # "full" | "sampled"
    divergence: str = "reverse-kl"  # "reverse-kl" | "forward-kl" | "jsd"
    beta: float = 0.5  # of "jsd"
    temperature: float = 1.0
    agree: ByVerdict = (1.8, 1.8)  # in correct, in incorrect rollouts
    conflict: ByVerdict = (1.0, 1.0)
    neutral: float = 1.0
    tolerance: float = 0.0
    keep: str = "all"
    ratio_clip: float = 1.0  # bound on the importance ratio, with behaviour log-probabilities
    ignore_index: int = -100
    reduction: str = "mean"  # "mean" | "sum" | "none"
    workspace: int = 0  # bytes a plan may hold above inputs and gradients; 0: the backend's default
    budget: float = 0.0  # relative error of the gradients that a plan may trade for speed; 0: exact
    student_scale: float = 1.0
    teacher_scale: float = 1.0
    reference_scale: float = 1.0
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    reference_softcap: float | None = None

    @property
    def may_weigh_0(self) -> bool:
        """Whether a gate's weight can be 0, which takes rows out of the backward."""
        return self.keep != "all" or 0 in (*self.agree, *self.conflict, self.neutral)

    def encode(self) -> tuple[str, list[float]]:
        """A custom op takes no dataclass: the spec crosses as words and numbers (None as 0: a cap is > 0)."""
        words = ",".join([self.estimator, self.divergence, self.keep, self.reduction])
        numbers = [
            self.beta,
            self.temperature,
            *self.agree,
            *self.conflict,
            self.neutral,
            self.tolerance,
            self.ratio_clip,
            float(self.ignore_index),
            float(self.workspace),
            self.budget,
            self.student_scale,
            self.teacher_scale,
            self.reference_scale,
            self.student_softcap or 0.0,
            self.teacher_softcap or 0.0,
            self.reference_softcap or 0.0,
        ]
        return words, numbers

    @staticmethod
    def decode(words: str, numbers: list[float]) -> Spec:
        estimator, divergence, keep, reduction = words.split(",")
        n = iter(numbers)
        return Spec(
            estimator=estimator,
            divergence=divergence,
            keep=keep,
            reduction=reduction,
            beta=next(n),
            temperature=next(n),
            agree=(next(n), next(n)),
            conflict=(next(n), next(n)),
            neutral=next(n),
            tolerance=next(n),
            ratio_clip=next(n),
            ignore_index=int(next(n)),
            workspace=int(next(n)),
            budget=next(n),
            student_scale=next(n),
            teacher_scale=next(n),
            reference_scale=next(n),
            student_softcap=next(n) or None,
            teacher_softcap=next(n) or None,
            reference_softcap=next(n) or None,
        )


@dataclass(frozen=True)
class Problem:
    """Operands of one call, flattened to N tokens. N may be 0."""

    spec: Spec
    student_hidden: Tensor  # [N, Hs]
    student: Head
    token_ids: Tensor  # [N] int64
    verdict: Tensor  # [N] float32: 1, -1, 0
    teacher_hidden: Tensor | None = None  # [N, Ht]
    teacher: Head | None = None
    teacher_logprob: Tensor | None = None  # [N], in place of a teacher head
    topk_ids: Tensor | None = None  # [N, K] int64, distinct in a row: columns of topk_logprob
    topk_logprob: Tensor | None = None  # [N, K], in place of a teacher head; the rest of its mass is one bucket
    behaviour_logprob: Tensor | None = None  # [N], of the policy that sampled token_ids
    reference_hidden: Tensor | None = None  # [N, Hr]
    reference: Head | None = None
    reliability: Tensor | None = None  # [N] float32 in [0, 1]
    uniform: Tensor | None = None  # [N] in [0, 1): draws of the `random` control

    @property
    def vocabulary(self) -> int:
        """The shared prefix: the shorter of the heads."""
        heads = (self.student, self.teacher, self.reference)
        return min(head.weight.shape[0] for head in heads if head is not None)

    def operands(self) -> list[Tensor]:
        """Hidden states and weights of all models."""
        sides = ((self.student_hidden, self.student), (self.teacher_hidden, self.teacher))
        pairs = (*sides, (self.reference_hidden, self.reference))
        return [t for hidden, head in pairs if head is not None and hidden is not None for t in (hidden, head.weight)]

    def valid_rows(self) -> Tensor:
        """Indices [M] of the tokens that are not ignored."""
        return torch.nonzero(self.token_ids != self.spec.ignore_index).squeeze(-1)

    def reliability_of(self, rows: Tensor) -> Tensor | None:
        return None if self.reliability is None else self.reliability[rows]


@dataclass
class Chunk:
    """n of a call's tokens, with space for their logits in all V columns. A plan computes it, the driver takes over."""

    positions: Tensor  # [n] in the problem's tokens
    hidden: Tensor  # [n, Hs] the student's, 0 where the token is none
    z_student: Tensor  # [n, V] fp32: projections; after the row pass their gradient
    z_teacher: Tensor | None
    z_reference: Tensor | None
    weights: Tensor  # [3, n] float64: what a token may weigh, of `gate.cell_weights`
    forced: Tensor | None  # [n] int8: agreement, where it is drawn
    scale: Tensor  # [n] multiplies each row's gradient
    valid: Tensor | None = None  # [n] bool: which rows are tokens; None: all
    stats: Tensor = field(default_factory=lambda: torch.empty(0))  # [n, 8] float64, in the order of oracle.STATS
    # [n, ceil(V / 32)] fp32 for the squares of the gradient, summed over 32 columns; None: they are not asked for
    energy: Tensor | None = None

    def part(self, rows: slice) -> Chunk:
        """Some of its tokens, in the same space."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        return Chunk(
            self.positions[rows],
            self.hidden[rows],
            self.z_student[rows],
            cut(self.z_teacher),
            cut(self.z_reference),
            self.weights[:, rows],
            cut(self.forced),
            self.scale[rows],
            cut(self.valid),
        )
