"""What only the values of a call tell: ids out of range, numbers that are no verdicts or log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import require
from .oracle import STATS
from .problem import Problem

# Rounding that is forgiven of a log-probability above 0, and of probabilities that sum to more than 1.
ROUNDING = 1e-3


def _first(ok: Tensor, values: Tensor) -> float | int:
    """Of the values that are not ok."""
    return values[~ok][0].item()


def check_values(problem: Problem, rows: Tensor, v: int) -> None:
    """What only the values tell: ids in range, verdicts in {1, 0, -1}, reliability in [0, 1], log-probabilities."""
    ids, reliability = problem.token_ids[rows], problem.reliability
    ignored = ids == problem.options.ignore_index  # while a graph is captured `rows` are all
    in_range = ((ids >= 0) & (ids < v)) | ignored
    require(
        in_range,
        f"token_ids: ids must lie in the shared vocabulary [0, {v}) or be ignore_index={problem.options.ignore_index}",
        lambda: (
            f"{int((~in_range).sum())} of {ids.numel()} lie outside, the first is {_first(in_range, ids)}. Mask them "
            "with ignore_index, or check that student and teacher share the tokenizer (heads have "
            f"{problem.student.weight.shape[0]} and "
            f"{problem.teacher.weight.shape[0] if problem.teacher else 'no'} rows)"
        ),
    )
    check_rollouts(problem.verdict[rows], None if reliability is None else reliability[rows], ignored)
    if problem.token_weight is not None:
        factor = problem.token_weight[rows]
        finite = factor.isfinite() | ignored
        require(finite, "token_weight: values must be finite", lambda: f"got {_first(finite, factor)}")
    for name in ("teacher_logprob", "behaviour_logprob"):
        words = getattr(problem, name)
        if words is not None:
            check_logprob(name, words[rows], ignored)
    if problem.behaviour_logprob is not None:
        possible = (problem.behaviour_logprob[rows] != -torch.inf) | ignored
        require(possible, "behaviour_logprob: -inf, and yet its policy sampled the token: leave such a token out")
    if problem.topk_ids is not None:
        assert problem.topk_logprob is not None
        ids, log_q = problem.topk_ids[rows], problem.topk_logprob[rows].double()
        ids_ok = ((ids >= 0) & (ids < v)) | ignored.unsqueeze(-1)
        require(ids_ok, f"topk_ids: ids must lie in [0, {v})", lambda: f"got {_first(ids_ok, ids)}")
        top = ids.sort(-1).values
        distinct = (top[:, 1:] != top[:, :-1]) | ignored.unsqueeze(-1)
        require(
            distinct,
            "topk_ids: an id stands twice in a row, and its mass would count twice. Drop the duplicates; where rows "
            "have fewer candidates than K, cut K to the shortest",
        )
        mass = log_q.exp().sum(-1)
        require(
            ~(mass > 1 + ROUNDING) | ignored,  # a NaN goes on, and shows in the loss
            "topk_logprob: probabilities of a row sum to more than 1; pass natural logarithms, normalised over the "
            "whole vocabulary",
            lambda: f"got {float(mass.nan_to_num(0).max()):.4f}",
        )


def check_rollouts(verdict: Tensor, reliability: Tensor | None, ignored: Tensor | bool = False) -> None:
    known = (verdict == 1) | (verdict == 0) | (verdict == -1) | ignored
    require(
        known,
        "verdict: values must be 1 (correct), -1 (incorrect) or 0 (unknown)",
        lambda: f"got {_first(known, verdict)}",
    )
    if reliability is not None:
        within = ((reliability >= 0) & (reliability <= 1)) | ignored
        require(within, "reliability: values must lie in [0, 1]", lambda: f"got {_first(within, reliability)}")


def check_logprob(name: str, values: Tensor, ignored: Tensor | bool = False) -> None:
    """A NaN goes on, and shows in the loss."""
    ok = ~(values > ROUNDING) | ignored
    require(
        ok,
        f"{name}: values are natural logarithms of probabilities, at most 0 (a rounding of 1e-3 is forgiven)",
        lambda: f"got {_first(ok, values):.4g}: pass log-probabilities, not probabilities or their negatives",
    )


def check_sampled(problem: Problem, stats: Tensor) -> None:
    """The sampled estimator needs a finite log-ratio: its advantage. An infinite logit or a NaN shows in the loss."""
    if problem.options.estimator == "sampled":
        words = stats[:, [STATS["student_logprob"], STATS["teacher_logprob"]]]
        entropies = stats[:, [STATS["student_entropy"], STATS["teacher_entropy"]]]
        masked = (words == -torch.inf) & (stats[:, [STATS["gate"]]] != 0)
        shown = ~entropies.isfinite()
        if problem.teacher is None:  # its entropy is not known
            shown[:, 1] = False
        ok = ~masked | shown.any(-1, keepdim=True)
        name = "token_ids" if problem.teacher_logprob is None else "teacher_logprob"
        require(
            ok,
            f"{name}: a sampled token's log-probability is -inf, for the teacher or the student (a masked column), and "
            "the sampled estimator's advantage is infinite: leave the token out with ignore_index, or use "
            "gated_kl_loss with estimator='full'",
            lambda: f"{int((~ok).any(-1).sum())} such tokens, the first at position {int((~ok).any(-1).nonzero()[0])}",
        )
