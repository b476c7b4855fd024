"""What several adapters need: a verdict from a score, and the gate's metrics as ratios of sums over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

GATE_METRICS = ("gate/mean", "gate/agree_fraction", "logratio/abs_mean", "rollout/accuracy", "rollout/unknown")


def verdict_of(score: Tensor, correct_at: float) -> Tensor:
    """Scores [B] -> verdicts [B] int64: 1 from `correct_at` on, -1 below, 0 where NaN."""
    return torch.where(score >= correct_at, 1, -1).masked_fill(score.isnan(), 0)


def gate_sums(d: Tensor, weight: Tensor, agree: Tensor, verdict: Tensor, mask: Tensor) -> Tensor:
    """(numerator, denominator) of each of GATE_METRICS, [5, 2] float64; tensors [B, T], verdict [B, 1].

    Sums over tokens or rollouts, so that processes of unequal size weigh rightly. Agreement is of tokens that have a
    verdict.
    """
    every = torch.ones_like(verdict, dtype=torch.bool)
    ratios = (
        (weight, mask),
        (agree, mask & (verdict != 0)),
        (d.abs(), mask),
        (verdict > 0, every),
        (verdict == 0, every),
    )
    return torch.stack([torch.stack([(x.double() * over).sum(), over.sum().double()]) for x, over in ratios])


def log_ratios(trainer: Any, names: Sequence[str], sums: Tensor) -> None:
    """Logs the ratios of `sums` [K, 2] over all processes of a TRL trainer. A collective: every process calls it."""
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, (top, bottom) in zip(names, trainer.accelerator.gather(sums.unsqueeze(0)).sum(0).tolist()):
        # TRL's log leaves NaN out of its averages: no word is not a fraction of zero.
        metrics[name].append(top / bottom if bottom else float("nan"))
