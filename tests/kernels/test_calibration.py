"""The calibration's factors against what was measured on real models, and against made-up states that need them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import calibrate as tool
import pytest
import torch
from torch import Tensor

from sgopd_kernels.backends.cpu import CpuBackend
from sgopd_kernels.plans import calibration

QUANTIZES = CpuBackend.module is not None and CpuBackend().kernels().int16
# What `tools/calibrate.py --json` wrote: docs/kernels.md has it as a table.
RECORDED = [json.loads(line) for line in Path(__file__).with_name("calibration.jsonl").read_text().splitlines()]
QUANTIZED = [tool.name_of(s) for s in calibration.FITTED.quantized.settings]


def too_small(factors: list[str]) -> list[dict[str, Any]]:
    """Measurements that the factor in force does not cover with its margin."""
    value, margin = tool.in_force()[factors[0]], calibration.FITTED.margin
    return [r for r in RECORDED if r.get("factor") in factors and tool.matters(r) and r["ratio"] * margin > value]


@pytest.mark.parametrize(
    ("factors", "part", "number"),
    [
        (QUANTIZED, "quantized", "coherence"),
        (["residual"], "residual", "coherence"),
        (["spread"], "residual", "spread"),
        (["blocks, hidden"], "blocks", "hidden"),
        (["blocks, weight"], "blocks", "weight"),
        (["blocks, noise"], "blocks", "coherence"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_factor_covers_what_was_measured(calibrate: Any, factors: list[str], part: str, number: str) -> None:
    measured = {row["model"] for row in RECORDED if row.get("factor") in factors and tool.matters(row)}
    assert measured == set(calibration.FITTED.models)
    assert too_small(factors) == []
    calibrate(**{part: {number: 0.9 * getattr(getattr(calibration.FITTED, part), number)}})
    assert too_small(factors) != [], "a factor a tenth smaller would show"


def test_the_guard_of_a_gates_sign_has_room() -> None:
    assert any(row.get("factor") == "log-ratio" and tool.matters(row) for row in RECORDED)
    assert too_small(["log-ratio"]) == []


def test_the_prompts_held_out_are_covered() -> None:
    held_out = [row for row in RECORDED if "plan" in row and row["held_out"] and row["plan"] != "exact"]
    assert len(held_out) >= 300
    assert sum(row["covered"] for row in held_out) >= 0.99 * len(held_out)


def made_up(spread: float, power: float, distance: float, n: int = 48, v: int = 16_384, h: int = 192) -> list[Tensor]:
    """A head whose rows' moments fall with a power of their rank, after a mean they share; a teacher of another body.

    As in real hidden states one element is an order larger than the others.
    """
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, h, generator=g)
    axes = torch.linalg.qr(torch.randn(h, h, generator=g))[0]
    moments = (torch.arange(h) + 1.0) ** -power
    weight = torch.randn(v, h, generator=g) * (moments * (h / moments.square().sum()) ** 0.5) @ axes.T
    weight = (weight + 0.15 * h**0.5 * axes[:, 0]) * (0.5 + torch.rand(v, 1, generator=g)) * (spread / h**0.5)
    hidden[:, 5] *= 12
    weight[:, 5] /= 12
    ids = torch.multinomial(torch.softmax(hidden @ weight.T, -1), 1, generator=g).squeeze(-1)
    return [hidden, weight, hidden + distance * torch.randn(n, h, generator=g), weight, ids]


@pytest.mark.skipif(not QUANTIZES, reason="the native CPU extension, with AVX2 or AVX512-VNNI")
@pytest.mark.parametrize(("spread", "power", "distance"), [(4.0, 1.0, 0.02), (7.0, 0.7, 0.05)])
def test_the_estimate_holds_on_made_up_heads(
    calibrate: Any, monkeypatch: pytest.MonkeyPatch, spread: float, power: float, distance: float
) -> None:
    """Their noise adds up to 8 and 1 times what independent errors make: no one factor would do for both."""
    monkeypatch.setattr(CpuBackend, "isa", tool.plain())
    chunk = tool.Chunk("made up", "", "", 0, made_up(spread, power, distance))
    true, _ = tool.truth(chunk.operands)
    assert tool.whole(chunk, true, calibration.AUTO)["covered"]
    ratios = [(name, found["ratio"]) for name, found in tool.factors(chunk, true) if name in (*QUANTIZED, "residual")]
    assert len(ratios) == 5
    assert all(ratio <= 1.1 * tool.in_force()[name] for name, ratio in ratios), ratios
