"""Phased teacher sampling (arXiv 2606.09304, trajectory level): which rollout slots are offered to the teacher, when.

For the first `cold_start_steps` updates a share rho(step) of the slots of each prompt group gets a teacher rollout,
and only if the verifier endorses it; otherwise the slot goes to the student. The batch size never changes.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from sgopd.config import Config


class Phases:
    """The schedule, and what the verifier said about the teacher so far. Its state belongs to the checkpoint."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.proposed = 0  # teacher rollouts that asked for a slot
        self.endorsed = 0  # … and got it
        self.probes: dict[int, list[int]] = defaultdict(lambda: [0, 0])  # example -> [teacher rollouts, endorsed]

    def share(self, step: int) -> float:
        """rho: the share of slots offered to the teacher in the update after `step` updates."""
        config = self.config
        if step >= config.cold_start_steps:
            return 0.0
        progress = step / config.cold_start_steps
        left = {
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
            "constant": 1.0,
        }[config.teacher_share_schedule]
        return config.teacher_share * left

    def slots(self, step: int, groups: int, seed: int) -> list[int]:
        """Teacher slots of each of `groups` prompt groups of num_generations slots.

        The expectation is share * num_generations for every group, each group gets that rounded down or up, and
        the total is within one of its expectation (systematic sampling: one uniform draw, evenly spaced), so a
        share of 0.3 means 0.3 of the batch even with one rollout a prompt.
        """
        per_group = self.share(step) * self.config.num_generations
        offset = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()
        marks = [math.floor(group * per_group + offset) for group in range(groups + 1)]
        return [after - before for before, after in itertools.pairwise(marks)]

    def record(self, outcomes: Iterable[tuple[int, bool, bool]]) -> None:
        """Verified teacher rollouts: (example index, endorsed, whether it asked for a slot)."""
        for example, endorsed, proposed in outcomes:
            self.probes[example][0] += 1
            self.probes[example][1] += endorsed
            self.proposed += proposed
            self.endorsed += proposed and endorsed

    def reliability(self, example: int) -> float:
        """Endorsed share of the teacher's rollouts on this example so far; 0 (the gate as it stands) without any."""
        tried, endorsed = self.probes.get(example, (0, 0))
        return endorsed / tried if tried else 0.0

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        probes = {str(example): counts for example, counts in self.probes.items()}
        return {"proposed": self.proposed, "endorsed": self.endorsed, "probes": probes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.proposed, self.endorsed = state["proposed"], state["endorsed"]
        self.probes.clear()
        self.probes.update({int(example): list(counts) for example, counts in state["probes"].items()})
