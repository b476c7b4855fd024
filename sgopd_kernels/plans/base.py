"""What the driver asks of a plan, and what a plan leaves behind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..problem import Chunk

PLANS = ("exact", "filtered", "quantized", "blocks")  # as `Report.tensor` numbers them, the cheapest last
KEPT = 1  # where `Report.tensor` has the share


@dataclass(frozen=True)
class NeedsGrad:
    """Which gradients are wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass
class Gradients:
    """Sums over a call's chunks; None where one is not wanted."""

    hidden: Tensor | None  # [N, Hs], each row written once
    weight: Tensor | None  # [V, Hs] fp32, or bf16 where the backend sums in it (`CpuBackend.rounds_sums`)
    bias: Tensor | None  # [V] fp32
    rest: Tensor | None = None  # [V, Hs] int8, beside a bf16 sum over several chunks
    empty: bool = True  # nothing was added to `weight` yet: the first chunk writes it, whatever it holds
    unit: Tensor | None = None  # [] fp32: `weight` is still to be multiplied by it


class Plan(Protocol):
    """One way to compute a chunk. A call's chunks go through it one after another."""

    pays: bool  # chunks to come should try it
    ran: str  # of PLANS: what the last chunk came to
    kept: int  # entries of that chunk's gradient that entered its products one by one

    def held_bytes(self) -> tuple[int, int]:
        """(bytes, bytes a token of a chunk) held beside logits."""
        ...

    def forward(self, chunk: Chunk) -> float:
        """Sets the chunk's statistics, and leaves its gradient for `gradients`.

        Returns the estimated error of loss and gradients; NaN or infinite where there is none.
        """
        ...

    def gradients(self, chunk: Chunk, out: Gradients) -> None:
        """Adds the gradients of the chunk that `forward` has just seen."""
        ...


@dataclass
class Report:
    """What a call's plans did."""

    plan: int = 0  # the cheapest that ran, of PLANS
    kept: float = 0.0  # entries of the gradient that entered its products
    entries: float = 0.0
    error: float = 0.0  # the worst chunk's estimate

    def add(self, plan: Plan, entries: int, error: float) -> None:
        self.plan = max(self.plan, PLANS.index(plan.ran))
        self.kept += plan.kept
        self.entries += entries
        self.error = max(self.error, error)

    def tensor(self) -> Tensor:
        """[3] float64: plan, share kept, error estimate."""
        share = self.kept / self.entries if self.entries else 1.0
        return torch.tensor([self.plan, share, self.error], dtype=torch.float64, device="cpu")


def worst(*errors: float) -> float:
    """The largest, or NaN if there is one: `max` loses it."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)
