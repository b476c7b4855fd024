"""What is measured and where it goes. docs/metrics.md defines every name.

metrics.jsonl gets one JSON object a line, always; it is the source of the report and of every tracker's curves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgopd.files import sync, writing
from sgopd.processes import Processes
from sgopd.rollout import Rollout
from sgopd_kernels import PLANS, Stats

VERIFIER_FAULTS = ("timeout", "error", "no_answer", "truncated", "crashed")


class MetricsFile:
    """Appends records to a JSON Lines file, unbuffered: a killed run loses nothing that it has written.

    `position` and `sha256`, of what is in the file, are what a checkpoint keeps; opening the file at a position drops
    the lines that came after it.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, path: Path, position: int) -> None:
        self.path = path
        with writing(path):
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (it lives as long as the run)
            self._file.truncate(min(position, os.fstat(self._file.fileno()).st_size))
            sync(path.parent)
        self._file.seek(0)
        self.position = 0
        self._sha = hashlib.sha256()
        while block := self._file.read(1 << 20):
            self._count(block)

    @property
    def sha256(self) -> str:
        return self._sha.hexdigest()

    def write(self, record: dict[str, Any]) -> None:
        # default: YAML has dates, JSON has not
        line = (json.dumps(finite(record), ensure_ascii=False, allow_nan=False, default=str) + "\n").encode()
        with writing(self.path):
            while line:  # a disk that is nearly full takes a part
                written = self._file.write(line)
                self._count(line[:written])
                line = line[written:]

    def _count(self, data: bytes) -> None:
        self.position += len(data)
        self._sha.update(data)

    def sync(self) -> None:
        """Makes everything written so far survive a power cut."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def lost_records(path: Path, state: dict[str, Any]) -> str | None:
    """What a metrics file lacks of that with which a checkpoint's `state` was saved, or None."""
    wanted = state["metrics_position"]
    try:
        with path.open("rb") as file:
            content = file.read(wanted)
    except FileNotFoundError:
        content = b""
    if len(content) < wanted:
        return f"it has {len(content):,} bytes of {wanted:,}"
    # Checkpoints of the first version have no sum.
    if hashlib.sha256(content).hexdigest() != state.get("metrics_sha256", hashlib.sha256(content).hexdigest()):
        return f"its first {wanted:,} bytes have changed (SHA-256)"
    return None


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Sums:
    """Weighted means over micro-batches and processes. Values stay on the device until `means` asks for them."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Any]] = {}  # name -> [total, weight]
        self._counts: dict[str, Any] = {}
        self._largest: dict[str, Any] = {}

    def add(self, name: str, total: Tensor | float, weight: Tensor | float) -> None:
        pair = self._sums.setdefault(name, [0.0, 0.0])
        pair[0], pair[1] = pair[0] + total, pair[1] + weight

    def count(self, name: str, number: Tensor | float) -> None:
        """Something to be added up rather than averaged."""
        self._counts[name] = self._counts.get(name, 0) + number

    def largest(self, name: str, value: Tensor | float) -> None:
        self._largest[name] = greatest([self._largest.get(name, value), value])

    def reduced(self, processes: Processes) -> dict[str, float]:
        """Means, counts and largest values over all processes; a mean whose weight is 0 is left out."""
        sums = {name: (float(total), float(weight)) for name, (total, weight) in self._sums.items()}
        largest = {name: float(value) for name, value in self._largest.items()}
        counts = {name: n.item() if isinstance(n, Tensor) else n for name, n in self._counts.items()}
        everyone = processes.gather([(sums, counts, largest)])
        result: dict[str, float] = {}
        for name in names(part[0] for part in everyone):
            totals, weights = zip(*(part[0][name] for part in everyone if name in part[0]))
            if sum(weights):
                result[name] = sum(totals) / sum(weights)
        for name in names(part[1] for part in everyone):
            result[name] = sum(part[1].get(name, 0) for part in everyone)
        for name in names(part[2] for part in everyone):
            result[name] = greatest([part[2][name] for part in everyone if name in part[2]])
        return result


def greatest(values: Sequence[Any]) -> Any:
    """The largest value; NaN if there is one, which `max` may pass over."""
    return next((value for value in values if value != value), max(values))


def names(dicts: Iterable[dict[str, Any]]) -> list[str]:
    """All keys, in order of first appearance."""
    return list(dict.fromkeys(name for one in dicts for name in one))


def add_token_metrics(
    sums: Sums,
    stats: Stats,
    verdict: Tensor,
    engine_logprob: Tensor | None,
    tolerance: float,
    whole: bool = True,
) -> None:
    """Statistics of N tokens of student rollouts.

    Args:
        stats: the loss's, each [N].
        verdict: [N] 1, -1 or 0, as the gate saw it.
        engine_logprob: [N] log-probabilities from sampling; None once the weights have moved since.
        tolerance: the gate's, in nats.
        whole: the teacher gave its whole distribution; else what cannot be known is left out.
    """
    N = verdict.numel()
    if N == 0:
        return
    d = stats.logratio
    known = {name: whole or not getattr(stats, name).isnan().any() for name in ("kl", "teacher_entropy")}
    if known["kl"]:
        sums.add("kl", stats.kl.sum(), N)
    sums.add("logratio/mean", d.sum(), N)
    sums.add("logratio/abs_mean", d.abs().sum(), N)
    sums.add("gate/mean", stats.gate.sum(), N)
    agree = stats.agree.to(d.dtype)
    sums.add("gate/agree_fraction", agree.sum(), N)
    sums.add("gate/agree_fraction_weighted", (agree * d.abs()).sum(), d.abs().sum())
    sums.add("entropy/student", stats.student_entropy.sum(), N)
    if known["teacher_entropy"]:
        sums.add("entropy/teacher", stats.teacher_entropy.sum(), N)
    if stats.report is not None:  # the reference backend has no plan
        plan, kept, error = stats.report
        for index, name in enumerate(PLANS):
            sums.add(f"plan/{name}", (plan == index) * N, N)
        sums.add("plan/kept", kept * N, N)
        sums.largest("plan/error_estimate", error)
    for word, sign in (("correct", 1), ("incorrect", -1)):
        for cell, inside in (("agree", d * sign > tolerance), ("conflict", d * sign < -tolerance)):
            inside = (inside & (verdict == sign)).to(d.dtype)
            count = inside.sum()
            sums.add(f"cell/{word}_{cell}/share", count, N)
            sums.add(f"cell/{word}_{cell}/logratio_mean", (inside * d).sum(), count)
            sums.add(f"cell/{word}_{cell}/logratio_abs_mean", (inside * d.abs()).sum(), count)
            sums.add(f"cell/{word}_{cell}/gate_mean", (inside * stats.gate).sum(), count)
    if engine_logprob is not None:
        gap = (engine_logprob - stats.student_logprob).abs()
        sums.add("engine/logprob_gap_mean", gap.sum(), N)
        sums.largest("engine/logprob_gap_max", gap.max())


def add_teacher_metrics(
    sums: Sums, stats: Stats, rows: Tensor, names: Sequence[str], teachers: Iterable[str], whole: bool
) -> None:
    """What the student has of each of several teachers: share of N tokens of its rollouts, and divergence.

    Args:
        rows: [N] of which rollout each token is.
        names: of each rollout's teacher.
        whole: as for `add_token_metrics`.
    """
    for name in teachers:
        inside = torch.tensor([one == name for one in names], device=rows.device)[rows]
        sums.add(f"teacher/{name}/share", inside.sum(), len(rows))
        sums.add(f"teacher/{name}/logratio_mean", stats.logratio[inside].sum(), inside.sum())
        if whole or not stats.kl[inside].isnan().any():
            sums.add(f"teacher/{name}/kl", stats.kl[inside].sum(), inside.sum())


def add_rollout_metrics(sums: Sums, rollouts: Sequence[Rollout]) -> None:
    """Statistics of a batch's rollouts."""
    for rollout in rollouts:
        sums.count("phase/teacher_rollouts", rollout.source == "teacher")
        if rollout.source == "teacher":
            continue
        # The prompts of slots that the teacher tried and failed are harder: they would bias the accuracy.
        if not rollout.in_teacher_slot:
            sums.add("rollout/accuracy", rollout.verdict == 1, 1)
        ids = rollout.completion.ids.tolist()
        sums.add("rollout/length_mean", len(ids), 1)
        sums.add("rollout/length_clipped", rollout.completion.truncated, 1)
        if (share := repetition(ids)) is not None:
            sums.add("rollout/repetition", share, 1)
        for word, verdict in (("correct", 1), ("incorrect", -1), ("unknown", 0)):
            sums.count(f"rollout/{word}", rollout.verdict == verdict)


def add_verifier_metrics(sums: Sums, reasons: Sequence[str]) -> None:
    """How often the verifier could not simply say correct or incorrect, by its reasons."""
    for fault in VERIFIER_FAULTS:
        sums.add(f"verifier/{fault}", reasons.count(fault), len(reasons))


def repetition(ids: Sequence[int], n: int = 4) -> float | None:
    """Share of a text's n-grams that it has had before; None for a text that has none."""
    grams = list(zip(*(ids[i:] for i in range(n))))
    return 1.0 - len(set(grams)) / len(grams) if grams else None
