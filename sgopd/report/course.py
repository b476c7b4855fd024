"""A run's records one after another, in constant space: what the checks and the live view look at."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from typing import Any

from sgopd.report.quantities import EDGE, edge, mean, number
from sgopd.report.run import Run

Record = dict[str, Any]


class Trend:
    """One quantity over the updates so far; what was not measured is passed over."""

    def __init__(self) -> None:
        self.count, self.total, self.largest = 0, 0.0, -math.inf
        self._early: list[float] = []
        self._late: deque[float] = deque(maxlen=EDGE)

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            return
        self.count, self.total, self.largest = self.count + 1, self.total + value, max(self.largest, value)
        if len(self._early) < EDGE:
            self._early.append(value)
        self._late.append(value)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    @property
    def first(self) -> float:
        """Mean over the first tenth of the measured values (at least one, at most EDGE)."""
        return mean(self._early[: edge(self.count)])

    @property
    def last(self) -> float:
        """Mean over the last tenth of the measured values (at least one, at most EDGE)."""
        return mean(list(self._late)[-edge(self.count) :])


class Course:
    """A run so far.

    Attributes:
        updates, step: updates recorded, and the last one's number.
        trends: of every number in the records of updates, by name.
        before, after, teacher: evaluations that gave an accuracy: of the student before the first update, of the
            student after the latest, of the teacher.
        finished: the run wrote its "end" record.
        settings: the run's, as far as they are known.
    """

    def __init__(self) -> None:
        self.updates = self.step = 0
        self.trends: defaultdict[str, Trend] = defaultdict(Trend)
        self.before: Record | None = None
        self.after: Record | None = None
        self.teacher: Record | None = None
        self.finished = False
        self.settings: Record = {}

    @classmethod
    def of(cls, run: Run) -> Course:
        course = cls()
        for record in [*run.train, *run.evals]:
            course.see(record)
        course.settings = {**run.start, **run.config}  # a resumed run may have others than it began with
        course.finished = run.finished
        return course

    def see(self, record: Record) -> None:
        """The next line of metrics.jsonl."""
        kind = record["kind"]
        if kind == "train":
            self.updates, self.step, self.finished = self.updates + 1, record["step"], False
            for name, value in record.items():
                self.trends[name].add(number(value))
        elif kind == "eval" and math.isfinite(number(record.get("eval/avg_at_k"))):
            if record.get("model", "student") == "teacher":
                self.teacher = record
            elif record["step"] == 0:
                self.before = self.before or record
            else:
                self.after = record
        elif kind == "config":
            self.settings = record
        elif kind == "end":
            self.finished = True

    def has(self, name: str) -> bool:
        return self.trends[name].count > 0
