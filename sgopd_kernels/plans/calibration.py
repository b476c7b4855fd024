"""The numbers that were fitted, and those that say where a plan begins to pay, in one frozen object: `FITTED`.

`python tools/calibrate.py` measures it, and docs/kernels.md has its tables. Numbers are of two kinds:

- *fitted*: factors of the error estimates, `margin` times the largest ratio of true to estimated error seen on the
  models named. One that is too small breaks a promise: tests/kernels/test_calibration.py turns red.
- *tuned*: where one way becomes faster than another. One that is off costs time alone.

A new plan adds its numbers so: a frozen dataclass here, each number with its kind, what was measured and the command; a
field of `Calibration`; in its module `calibration.FITTED.<field>.<number>`, read when a call runs, so that a test or
a measurement can put another object there; for a fitted factor, a line in tools/calibrate.py that measures its ratio.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .. import _extension
from ..options import PRECISIONS

AUTO = PRECISIONS["auto"]


@dataclass(frozen=True)
class Setting:
    """A way to quantize logits."""

    products: int  # about so many are summed in one int32: a row of a head is cut into equal segments
    feedback: bool  # hidden states rounded with feedback
    kl: float  # tuned: where it leaves room for the residual, at a budget of 1: the noise goes with 1 / sqrt(KL)

    def segment(self, width: int) -> int:
        """Products that one int32 sums, even: `products`, or equal parts of a wider row.

        Longer sums are faster: of 576 by 8 % over 192, at 2.5 times a logit's variance. Sums of one length leave noise
        in proportion to the logits' spread, whatever the width.
        """
        parts = max(1, round(width / self.products))
        equal = -(-width // (2 * parts)) * 2
        return max(self.products, equal) if parts == 1 else equal


@dataclass(frozen=True)
class ResidualNumbers:
    """What pairs and columns leave out of their products (directions.py)."""

    rank: int = int(getattr(_extension.CPU, "DIRECTIONS", 16))  # directions of the head kept (csrc/cpu/int16.h)
    sampled_rows: int = 1024  # tuned: of the head, for its directions; 0.5 % more lies outside them than with all rows
    # Fitted: what is lost outside the directions, in dH, against what a probe of the chunk makes of it
    coherence: float = 1.45
    spread: float = 2.0  # fitted: what is lost in dW and G itself, against entries that are independent
    tokens: int = 32  # tuned: of a chunk, that are probed …
    stride: int = 16  # … in every so many columns …
    columns: int = 2048  # … but in no fewer


@dataclass(frozen=True)
class PairNumbers:
    """Gradient products over pairs, on the CPU (pairs.py). All tuned."""

    share: float = 0.25  # of the budget: what is left of ||G|| at first, before the estimate's factors
    noise_share: float = 0.9  # of the budget: the most that quantization noise may take, where a residual is left too
    most: float = 0.12  # share of pairs above which dense products are faster
    worthwhile: float = 2.0**31.5  # multiply-adds of one projection below which a call is exact: 105 tokens of SmolLM2


@dataclass(frozen=True)
class QuantizedNumbers:
    """Logits in integers (quantized.py)."""

    # From the fastest to the most exact.
    settings: tuple[Setting, ...] = (
        Setting(576, False, 4e-9),
        Setting(576, True, 1e-9),
        Setting(192, True, 2.5e-10),
    )
    # Fitted: the noise in dH against what a probe of the chunk makes of it. What rounding a hidden state leaves is one
    # vector for all columns of its token, and adds up along what they share.
    coherence: float = 1.75
    # Tuned: probability from which a logit is computed again in fp32. From 4e-4 the guard of a gate's sign, below,
    # would refuse what it lets pass from 1e-4.
    mass: float = 1e-4
    deviations: float = 5.0  # of independent errors, that a log-ratio may be off; what came of it is in the table
    gate: float = 1e-4  # log-ratio below which a sign may flip (docs/method.md)
    probed_rows: int = 16  # tuned
    probed_stride: int = 16  # tuned: columns


@dataclass(frozen=True)
class BlockNumbers:
    """Products of bf16 numbers on tiles, two of them where the gradient's energy lies (blocks.py)."""

    # What rounding both operands costs in dH and dW against independent errors of 2^-9: by arithmetic 0.42 of 2^-8, for
    # each operand that is not bf16 itself.
    rounding: float = 1.65e-3
    both: float = 6e-6  # likewise with two numbers each
    # Fitted: the hidden gradient's error against that of independent entries and rows of one norm, and the weight's.
    hidden: float = 1.55
    weight: float = 1.6
    share: float = 0.3  # tuned: of the budget, what rounding may take; less is more blocks with two
    # Fitted: noise of fp32 logits in dH against errors that are independent.
    coherence: float = 9.2
    mass: float = 1e-3  # tuned: probability from which a logit is computed again in fp32
    kl: float = 2e-11  # tuned: where fp32 logits leave room, at a budget of 1: the noise goes with 1 / sqrt(KL)
    worthwhile: float = 2.0**28  # tuned: multiply-adds of one projection below which a call is exact


@dataclass(frozen=True)
class DeviceNumbers:
    """Dense products of 16-bit numbers, on devices. By arithmetic: no device has measured them."""

    # What rounding one operand to fp16 costs in dH and dW: 0.42 of 2^-11 (measured by tools/gradient_rounding.py).
    rounding: float = 2.1e-4
    narrow_worthwhile: float = 2.0**33  # tuned: multiply-adds of one projection from which fp32 operands are rounded


@dataclass(frozen=True)
class Calibration:
    models: tuple[str, ...] = ("49,152 x 576", "262,144 x 640")  # SmolLM2-135M and Gemma 3 270M: whose hidden states
    command: str = "python tools/calibrate.py"
    margin: float = 1.1
    residual: ResidualNumbers = field(default_factory=ResidualNumbers)
    pairs: PairNumbers = field(default_factory=PairNumbers)
    quantized: QuantizedNumbers = field(default_factory=QuantizedNumbers)
    devices: DeviceNumbers = field(default_factory=DeviceNumbers)
    blocks: BlockNumbers = field(default_factory=BlockNumbers)

    def changed(self, **parts: dict[str, Any]) -> Calibration:
        """Another one, for a measurement or a test: changed(pairs={"worthwhile": 0.0})."""
        return replace(self, **{name: replace(getattr(self, name), **changes) for name, changes in parts.items()})


FITTED = Calibration()
