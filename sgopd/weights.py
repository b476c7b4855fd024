"""Gates that one token does not tell: what a whole rollout says before its tokens are weighed.

The loss knows tokens, not rollouts. So a first call of it, without a gradient, gives both models' log-probabilities of
the sampled tokens (by the same projections as the loss itself, from hidden states that are there: the cost is the
loss's forward once more, no model runs again); the rule makes a number a token of them, rollout by rollout; and that
is the second call's `reliability` or `token_weight`. All of it is a constant for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sgopd.config import Config
from sgopd_kernels import Gate, Stats


class Told(NamedTuple):
    """One rollout of T tokens, with what the first call said of it. Log-probabilities are float64, in nats."""

    student_logprob: Tensor  # [T] log pi_S of the sampled tokens
    teacher_logprob: Tensor  # [T]; -inf in a column that it masks
    verdict: int  # as the gate is told: 1, -1, 0


class Rule(NamedTuple):
    gate: Gate  # of the second call
    argument: Literal["reliability", "token_weight"]  # of the loss, that `weigh` gives
    weigh: Callable[[Told, Config], Tensor]  # -> [T] float64


def q_protect(told: Told, config: Config) -> Tensor:
    """r = 1 - pi_T(y) in an incorrect rollout y, else 0: where the teacher would itself have written what is wrong, its
    word in conflicts counts less. This project's (docs/gates.md). In rollouts of hundreds of tokens pi_T(y) is 0, and
    this is `protect`."""
    r = -torch.expm1(told.teacher_logprob.sum().clamp(max=0.0))
    return (r if told.verdict < 0 else torch.zeros_like(r)).expand_as(told.teacher_logprob)


RULES: dict[str, Rule] = {
    "q-protect": Rule(Gate(1.0, 0.0), "reliability", q_protect),
}


def weigh(rule: Rule, stats: Stats, rows: Tensor, verdict: Tensor, config: Config) -> Tensor:
    """The rule's number for each of n tokens, [n] float32.

    Args:
        stats: the first call's, each [n].
        rows: [n] the rollout that a token belongs to; a rollout's tokens stand together.
        verdict: [n] as the gate is told.
    """
    lengths = rows.unique_consecutive(return_counts=True)[1].tolist()
    columns = stats.student_logprob.double(), stats.teacher_logprob.double(), verdict
    parts = zip(*(column.split(lengths) for column in columns))
    rollouts = [Told(student, teacher, int(words[0])) for student, teacher, words in parts]
    return torch.cat([rule.weigh(told, config) for told in rollouts]).float() if rollouts else verdict.float()
