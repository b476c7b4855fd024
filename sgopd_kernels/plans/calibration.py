"""What was fitted or tuned: every number that another model, processor or device might move.

Errors are relative Frobenius errors. On which inputs each was measured, and how to do it again: docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import _extension
from .._checks import number

AUTO = 1.5e-3  # the default budget: what rounding a gradient to bf16 costs
BF16 = 2.0**-8


def budget_of(precision: str | float) -> float:
    """The relative gradient error a call allows; 0: exact."""
    named = {"exact": 0.0, "auto": AUTO, "bf16": BF16}
    if isinstance(precision, str) and precision in named:
        return named[precision]
    expected = "'auto', 'exact', 'bf16' or a relative error above 0 and below 1, such as 1e-3"
    return number("precision", precision, expected, 0.0, 1.0)


@dataclass(frozen=True)
class Setting:
    """A way to screen."""

    segment: int  # products that the screen sums in one int32: longer ones are 8 % faster, a logit's variance 2.5 times
    feedback: bool  # hidden states rounded with feedback
    coherence: float  # its noise in the hidden gradient, against errors that are independent
    kl: float  # where it leaves room for the rest, at a budget of 1: the noise goes with 1 / sqrt(KL)


# From the fastest to the most exact. What rounding a hidden state leaves is one vector for all columns of its token,
# and adds up along what they share: 2.9-5.1 times independent errors measured, 1.5-1.7 with feedback (`Rounding`).
SETTINGS = (Setting(576, False, 5.0, 4e-9), Setting(576, True, 2.5, 1e-9), Setting(192, True, 2.5, 2.5e-10))

# Directions of the head that the rest of a gradient keeps, and that rounding feeds back (csrc/cpu/int16.h).
RANK = int(getattr(_extension.CPU, "DIRECTIONS", 16))
SAMPLED_ROWS = 1024  # of the head, from which they come: 0.5 % more of a row lies outside them than with all rows
# ||rest outside the directions|| against its entries taken as independent: 2.6-4.6 measured
COHERENCE = 5.0
SPREAD = 1.5  # likewise in dW and G itself: 0.8-1.3 measured

# Pairs, on the CPU.
SHARE = 0.25  # of the budget: what is left of ||G|| at first, before the estimate's factors
NOISE_SHARE = 0.9  # of the budget: the most that a screen's noise may take, where there is a rest as well
MOST = 0.12  # share of pairs above which dense products are faster
WORTHWHILE = 2.0**31.5  # multiply-adds of one projection below which a call is exact: 105 tokens of SmolLM2

# The screen.
# Probability from which a logit is computed again in fp32: where the KL leaves no more room than the first setting
# needs, and at most. The variance that the tail leaves in a gradient goes with MASS * tail / KL.
MASS, MOST_MASS = 1e-4, 4e-4
GATE = 1e-4  # log-ratio below which a sign may flip (docs/method.md)
PROBED_ROWS, PROBED_STRIDE = 16, 16

# Columns, on devices.
# Share of columns above which dense products of a gradient rounded to bf16 cost less: 2 (Hs + Ht) + 8 s Hs of split
# products, a gather and a scatter, against 6 Hs + 2 Ht.
MOST_COLUMNS = 0.35
COLUMN_SHARE = 0.3  # of the budget: what dropped columns may weigh, before the estimate's factors
COLUMNS_WORTHWHILE = 2.0**33  # multiply-adds of one projection from which columns are filtered …
NARROW_WORTHWHILE = 2.0**33  # … and from which G may be rounded to bf16
TILE = 8192  # columns whose head and gradient are gathered at once
