"""Numbers of a run: means that skip what was not measured, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

EDGE = 20  # the most values that are the beginning, or the end, of a series


def number(value: Any) -> float:
    """`value` as a float; NaN for None, text and everything else that is no number."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def mean(values: Sequence[float]) -> float:
    """Mean of the finite values; NaN without any."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def total(values: Sequence[float]) -> float:
    """Sum of the finite values."""
    return sum(value for value in values if math.isfinite(value))


def last_tenth(values: Sequence[float]) -> float:
    """Mean over the last tenth of the measured values (at least one, at most EDGE)."""
    finite = [value for value in values if math.isfinite(value)]
    return mean(finite[-edge(len(finite)) :])


def edge(count: int) -> int:
    """How many of `count` values are its beginning, or its end."""
    return min(EDGE, max(1, count // 10))


def show(value: float, unit: str = "") -> str:
    """A number with its unit, to three digits or so; shares ("%") are given in [0, 1]."""
    if not math.isfinite(value):
        return "–"
    magnitude = abs(value)
    if unit == "%":
        text = f"{100 * value:.1f}"
    elif magnitude and (magnitude < 1e-3 or magnitude >= 1e6):
        text = f"{value:.2e}"
    elif magnitude >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    # A no-break space: a number and its unit stay on one line.
    return f"{text}\u00a0{unit}".strip().replace("-", "−")


def points(change: float, error: float = math.nan) -> str:
    """A change of a share in percentage points, with its standard error where there is one."""
    if not math.isfinite(change):
        return "–"
    text = f"{100 * change:+.1f}" + (f" ± {100 * error:.1f}" if math.isfinite(error) else "")
    return text.replace("-", "−")
