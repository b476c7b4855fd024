"""The sign-consistency gate (arXiv 2606.09304; ../docs/method.md, section 1) and its published relatives.

A gate turns the verifier's word on a rollout (verdict +1 correct, -1 incorrect, 0 unknown) and the teacher's
word on a token (the sign of d = log pi_T(y) - log pi_S(y)) into that token's weight:

    w = agree     if d * verdict >  tolerance     (both push the same way: extrapolate)
        conflict  if d * verdict < -tolerance     (they disagree: hold back)
        neutral   otherwise                       (d ~ 0, or no verdict: plain distillation)

The weight is a constant for the gradient.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._checks import number, one_of

ByVerdict = tuple[float, float]
CORRECT, INCORRECT, UNKNOWN = 1, -1, 0


@dataclass(frozen=True)
class Gate:
    """Weights of the four (teacher, verdict) cells.

    Args:
        agree: weight where d * verdict > tolerance; one number, or a pair (in correct, in incorrect rollouts).
        conflict: weight where d * verdict < -tolerance; one number or a pair, likewise.
        neutral: weight elsewhere: |d * verdict| <= tolerance, or an unknown verdict.
        tolerance: half-width of the neutral band on d, in nats. >= 0.
        keep: rollouts whose tokens take part: "all", "correct" or "incorrect". The others weigh 0 and still
            count in the denominator of a mean. An unknown verdict is neither correct nor incorrect.
        control: None; "random": agreement is drawn at random with the rate measured in the batch; "shuffled":
            verdicts are permuted along the first dimension of the batch. Both are experimental controls and
            take their randomness from the loss's `generator`.
        reliability: how a rollout's `reliability` r, an argument of the loss, enters. "conflict": the conflict weight
            becomes r + (1 - r) * conflict. "scale": in incorrect rollouts every weight is multiplied by r. "cap": there
            no weight is above r. The last two need the argument.
    """

    agree: float | ByVerdict = 1.8
    conflict: float | ByVerdict = 1.0
    neutral: float = 1.0
    tolerance: float = 0.0
    keep: Literal["all", "correct", "incorrect"] = "all"
    control: Literal["random", "shuffled"] | None = None
    reliability: Literal["conflict", "scale", "cap"] = "conflict"

    def __post_init__(self) -> None:
        for name in ("agree", "conflict"):
            value = getattr(self, name)
            if isinstance(value, (tuple, list)):
                if len(value) != 2:
                    raise ValueError(
                        f"Gate.{name} must be a number or a pair (in correct, in incorrect rollouts), got {value!r}"
                    )
                object.__setattr__(self, name, tuple(number(f"Gate.{name}", x) for x in value))
            else:
                object.__setattr__(self, name, number(f"Gate.{name}", value))
        for name in ("neutral", "tolerance"):
            object.__setattr__(self, name, number(f"Gate.{name}", getattr(self, name)))
        if self.tolerance < 0:
            raise ValueError(f"Gate.tolerance must be >= 0 nats, got {self.tolerance}")
        words = {"keep": ("all", "correct", "incorrect"), "reliability": ("conflict", "scale", "cap")}
        for name, choices in words.items():
            object.__setattr__(self, name, one_of(f"Gate.{name}", getattr(self, name), choices))
        if self.control is not None:
            chosen = one_of("Gate.control (if not None)", self.control, ("random", "shuffled"))
            object.__setattr__(self, "control", chosen)

    @property
    def agree_pair(self) -> ByVerdict:
        return self.agree if isinstance(self.agree, tuple) else (self.agree, self.agree)

    @property
    def conflict_pair(self) -> ByVerdict:
        return self.conflict if isinstance(self.conflict, tuple) else (self.conflict, self.conflict)

    @property
    def may_be_0(self) -> bool:
        """Whether a weight can be 0, which takes tokens out of the backward."""
        return (
            self.needs_reliability or self.keep != "all" or 0 in (*self.agree_pair, *self.conflict_pair, self.neutral)
        )

    @property
    def needs_reliability(self) -> bool:
        """Whether the gate is none without the loss's `reliability`."""
        return self.reliability != "conflict"


PRESETS: dict[str, Gate] = {
    "opd": Gate(1.0, 1.0),  # on-policy distillation: the gate is off
    "sg-opd": Gate(1.8, 1.0),  # arXiv 2606.09304, with the values of arXiv 2608.24696, App. B.2
    "opdvr": Gate(1.0, 0.0),  # arXiv 2608.24696: conflict tokens dropped
    "protect": Gate(1.0, (0.0, 1.0)),  # a token of a verified-correct rollout is never pushed down
    "half": Gate((1.0, 0.5), (0.0, 0.5)),  # this project's: protect, and incorrect rollouts count half
    "trust": Gate(1.0, (0.0, 1.0), reliability="scale"),  # this project's: … as much as the teacher is right there
    "exopd": Gate(1.25, 1.25, 1.25),  # G-OPD's lambda, arXiv 2602.12125: with a reference, else a mere factor
    "inverse": Gate(0.0, 1.0),  # ablation: the wrong way round
    "verified-only": Gate(1.0, 1.0, keep="correct"),  # ablation
    "failure-only": Gate(1.0, 1.0, keep="incorrect"),  # ablation
    "random": Gate(1.8, 1.0, control="random"),  # control; other weights: Gate(..., control="random")
    "shuffled": Gate(1.8, 1.0, control="shuffled"),  # control
}

# Gates that need a whole rollout, or the task reward: they are the package sgopd's, not the loss's.
OF_THE_LOOP = ("q-protect", "rg-opd", "r2-opd", "tgopd", "diffgate")


def resolve_gate(gate: str | Gate) -> Gate:
    """A preset's name or a `Gate` -> `Gate`."""
    if isinstance(gate, Gate):
        return gate
    if isinstance(gate, str):
        if gate in PRESETS:
            return PRESETS[gate]
        close = difflib.get_close_matches(gate, PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        if gate in OF_THE_LOOP:
            hint = ": it weighs whole rollouts, which `sgopd train` does and the loss cannot."
        raise ValueError(f"gate: no preset {gate!r}{hint} Presets: {', '.join(PRESETS)}")
    raise TypeError(f"gate must be a preset's name or a Gate, got {type(gate).__name__}")


def cell_weights(verdict: Tensor, reliability: Tensor | None, gate: Gate) -> Tensor:
    """The weights a token can take, by its rollout alone: [3, N] float64 (agree, conflict, neutral).

    `verdict` [N], `reliability` r [N] in [0, 1] or None. By `gate.reliability`, a teacher known to be right on this
    prompt is trusted in conflicts too (r + (1 - r) * conflict), or one that is wrong itself teaches less of what an
    incorrect rollout holds (r * weight, or min(r, weight)).
    """
    correct, agree, conflict = (verdict > 0).double(), gate.agree_pair, gate.conflict_pair
    kept = {"all": torch.ones_like(correct), "correct": correct, "incorrect": (verdict < 0).double()}[gate.keep]
    agree_N = agree[0] * correct + agree[1] * (1 - correct)
    conflict_N = conflict[0] * correct + conflict[1] * (1 - correct)
    if reliability is not None and not gate.needs_reliability:
        conflict_N = reliability + (1 - reliability) * conflict_N
    weights = torch.stack([agree_N, conflict_N, torch.full_like(agree_N, gate.neutral)]) * kept
    if gate.needs_reliability:
        assert reliability is not None
        limited = weights * reliability if gate.reliability == "scale" else weights.minimum(reliability.double())
        weights = torch.where(verdict < 0, limited, weights)
    return weights


def check_reliability(gate: Gate, given: object) -> None:
    if gate.needs_reliability and given is None:
        raise ValueError(
            f"reliability: the gate weighs an incorrect rollout by it (reliability={gate.reliability!r}, as the preset "
            "'trust' has it), got None: pass the teacher's pass rate on each prompt, in [0, 1], shaped like verdict"
        )


def choose(
    logratio: Tensor, verdict: Tensor, weights: Tensor, tolerance: float, forced: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sign test itself, elementwise: (weight, agree).

    `logratio` d [N], `verdict` [N], `weights` [3, N] from `cell_weights`. `forced` [N] (1 agree, 0 conflict,
    -1 leave to the test) replaces the test's outcome for the `random` control.
    """
    signed = logratio * verdict
    agrees, conflicts = signed > tolerance, signed < -tolerance
    if forced is not None:
        agrees, conflicts = (
            torch.where(forced < 0, agrees, forced == 1),
            torch.where(forced < 0, conflicts, forced == 0),
        )
    weight = torch.where(agrees, weights[0], torch.where(conflicts, weights[1], weights[2]))
    return weight, agrees


def draw_agreement(logratio: Tensor, verdict: Tensor, tolerance: float, uniform: Tensor) -> Tensor:
    """The `random` control: tokens that would be tested get agreement by chance, at the measured rate.

    Returns int8 [N]: 1 agree, 0 conflict, -1 not tested (neutral stays neutral). `uniform` [N] in [0, 1).
    """
    signed = logratio * verdict
    tested = signed.abs() > tolerance
    rate = (signed > tolerance).sum().float() / tested.sum().clamp(min=1)
    return torch.where(tested, (uniform < rate).to(torch.int8), torch.full_like(tested, -1, dtype=torch.int8))
