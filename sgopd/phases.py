"""Phased teacher sampling (arXiv 2606.09304, trajectory level): which rollout slots are offered to the teacher, when.

For the first `cold_start_steps` updates a share rho(step) of the slots of each prompt group gets a teacher rollout,
and only if the verifier endorses it; otherwise the slot goes to the student. The batch size never changes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch

from sgopd.config import Config
from sgopd_kernels import CORRECT, UNKNOWN

NO_EXAMPLE = -1  # what is known of it is what is known of all


class PassRates(dict[int, list[int]]):
    """Of somebody's rollouts on each example so far: [rollouts, how many passed]."""

    tried = passed = 0  # over all examples

    def see(self, example: int, passed: bool) -> None:
        counts = self.setdefault(example, [0, 0])
        self[example] = [counts[0] + 1, counts[1] + passed]
        self.tried, self.passed = self.tried + 1, self.passed + passed

    def rate(self, example: int, prior: float, unknown: float) -> float:
        """(passed + prior * g) / (rollouts + prior), with g the share that passed on all examples: the example's share,
        shrunk to g as by `prior` more rollouts. g where that is 0 / 0; `unknown` in place of g before the first."""
        tried, passed = self.get(example, (0, 0))
        mean = self.passed / self.tried if self.tried else unknown
        return (passed + prior * mean) / (tried + prior) if tried + prior else mean

    def to_json(self) -> dict[str, list[int]]:
        return {str(example): counts for example, counts in self.items()}

    def restore(self, state: dict[str, list[int]]) -> None:
        self.clear()
        self.update({int(example): list(counts) for example, counts in state.items()})
        self.tried, self.passed = (sum(column) for column in zip([0, 0], *self.values()))


class Phases:
    """The schedule, and what the verifier said about the teacher so far. Its state belongs to the checkpoint."""

    def __init__(self, config: Config, whole: bool = False) -> None:
        self.config, self.whole = config, whole  # whether r weighs whole rollouts (Gate.reliability)
        self.proposed = 0  # teacher rollouts that asked for a slot
        self.endorsed = 0  # … and got it
        self.probes = PassRates()  # the teacher's, endorsed
        self.attempts = PassRates()  # the student's, correct; kept where a setting asks for them

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

    def record(self, outcomes: Iterable[tuple[int, int, bool]]) -> None:
        """Verified teacher rollouts: (example index, verdict, whether it asked for a slot). Without a verdict, one says
        nothing of the teacher, and gets no slot."""
        for example, verdict, proposed in outcomes:
            if verdict != UNKNOWN:
                self.probes.see(example, verdict == CORRECT)
            self.proposed += proposed
            self.endorsed += proposed and verdict == CORRECT

    def attempt(self, outcomes: Iterable[tuple[int, bool]]) -> None:
        """The student's verified rollouts: (example index, correct)."""
        for example, correct in outcomes:
            self.attempts.see(example, correct)

    def prompt_weight(self, example: int) -> float:
        """p^a (1 - p)^b, PACED's Beta kernel (arXiv 2603.11178; its p (1 - p) is a = b = 1), for the exponents of
        `prompt_weight`. p is the student's pass rate on the example so far, with the share over all examples for one
        more rollout: of a single one it would be 0 or 1, and the weight 0."""
        assert self.config.prompt_weight is not None
        a, b = self.config.prompt_weight
        p = self.attempts.rate(example, prior=1.0, unknown=0.5)
        return p**a * (1.0 - p) ** b

    def reliability(self, example: int) -> float:
        """r: how far the teacher is trusted on this example, in [0, 1], by the config's `teacher_reliability_…`.

        On an example without a rollout (`NO_EXAMPLE`) it is 0 where r is a trust in conflicts (the gate as it stands),
        and the mean over examples where r weighs whole rollouts.
        """
        config = self.config
        rates = self.attempts if config.teacher_reliability_source == "student" else self.probes
        prior, threshold = config.teacher_reliability_prior, config.teacher_reliability_threshold
        if config.gate == "tgopd":  # the paper's
            prior, threshold = prior or 0.0, 2 / 3 if threshold is None else threshold
        prior = float(self.whole) if prior is None else prior
        if not (self.whole or prior or example in rates):
            return 0.0
        rate = rates.rate(example, prior, unknown=float(self.whole))
        if threshold is not None:
            return float(rate >= threshold)
        return rate**config.teacher_reliability_power

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rates = {"probes": self.probes.to_json(), "attempts": self.attempts.to_json()}
        return {"proposed": self.proposed, "endorsed": self.endorsed, **rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.proposed, self.endorsed = state["proposed"], state["endorsed"]
        self.probes.restore(state["probes"])
        self.attempts.restore(state.get("attempts", {}))  # checkpoints of earlier versions have none
