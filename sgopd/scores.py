"""avg@k and pass@k with standard errors, of one model and of the change between two on the same questions.

The standard library is all it needs: the report reads runs without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def scores(correct: Sequence[int], samples: int, k: int) -> dict[str, Any]:
    """avg@k and pass@k from the number of right answers to each question, out of `samples`."""
    rates = by_question(correct, samples, k)
    average, average_se = mean_and_se(rates["avg"])
    passing, passing_se = mean_and_se(rates["pass"])
    return {
        "eval/k": k,
        "eval/samples": samples,
        "eval/questions": len(correct),
        "eval/avg_at_k": average,
        "eval/avg_at_k_se": average_se,
        "eval/pass_at_k": passing,
        "eval/pass_at_k_se": passing_se,
    }


def by_question(correct: Sequence[int], samples: int, k: int) -> dict[str, list[float]]:
    """Each question's share of right answers ("avg") and pass@k ("pass")."""
    return {
        "avg": [count / samples for count in correct],
        "pass": [pass_at_k(samples, count, k) for count in correct],
    }


def change(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean change and its standard error, paired: over the questions' own changes."""
    return mean_and_se([b - a for a, b in zip(before, after)])


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right (Chen et al. 2021, arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_and_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the latter is NaN for a single value."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
