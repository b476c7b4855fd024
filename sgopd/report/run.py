"""Reads a run directory. Whatever is missing or cut short leaves a gap in the report, never an error."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

from sgopd.files import LOCK, LOCKED_BY
from sgopd.report.quantities import number
from sgopd.scores import by_question, change

Record = dict[str, Any]

COMPLETIONS_SHOWN = 6  # of the first and of the last step kept, each


@dataclass(frozen=True)
class Run:
    """What a run directory holds."""

    name: str
    train: list[Record]  # one an update, by step
    evals: list[Record]  # by step; "model" says whose
    config: Record
    config_text: str
    start: Record  # the "config" record: the program's version, the device, what was found before the first rollout
    finished: bool  # the run wrote its "end" record
    unreadable: list[str] = field(default_factory=list)  # what could not be read, in sentences
    completions: list[Record] = field(default_factory=list)  # of the first and of the last step kept
    folder: str = ""  # as it was named

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in self.train]

    def series(self, key: str) -> list[float]:
        """`key` at every update; NaN where it was not measured."""
        return [number(record.get(key)) for record in self.train]

    def has(self, key: str) -> bool:
        return any(math.isfinite(value) for value in self.series(key))

    def evaluations(self, model: str) -> list[Record]:
        """Evaluations of the "student" or the "teacher" that gave an accuracy, by step."""
        mine = [record for record in self.evals if record.get("model", "student") == model]
        return [record for record in mine if math.isfinite(number(record.get("eval/avg_at_k")))]

    @property
    def before(self) -> Record | None:
        """The student's evaluation before the first update."""
        return next((record for record in self.evaluations("student") if record["step"] == 0), None)

    @property
    def after(self) -> Record | None:
        """The student's last evaluation after some update."""
        later = [record for record in self.evaluations("student") if record["step"] > 0]
        return later[-1] if later else None

    @property
    def teacher(self) -> Record | None:
        evaluations = self.evaluations("teacher")
        return evaluations[-1] if evaluations else None


def paired(before: Record | None, after: Record | None, which: str) -> tuple[float, float] | None:
    """Change of "avg"@k or "pass"@k between two evaluations, with its standard error over the questions' own changes.

    None where they are not of the same questions, or do not have the right answers to each.
    """
    if before is None or after is None or before.get("eval/questions_sha256") != after.get("eval/questions_sha256"):
        return None
    if which == "pass" and before.get("eval/k") != after.get("eval/k"):
        return None
    earlier, later = question_rates(before), question_rates(after)
    if earlier is None or later is None or len(earlier["avg"]) != len(later["avg"]):
        return None
    return change(earlier[which], later[which])


def question_rates(record: Record) -> dict[str, list[float]] | None:
    """avg@k and pass@k of each question of an evaluation; None where it has them not."""
    counts, samples, k = (record.get(f"eval/{name}") for name in ("correct", "samples", "k"))
    if not (isinstance(counts, list) and counts and isinstance(samples, int) and isinstance(k, int) and k >= 1):
        return None
    if k > samples or not all(isinstance(count, int) and 0 <= count <= samples for count in counts):
        return None
    return by_question(counts, samples, k)


def read_run(run_dir: Path) -> Run:
    """Reads metrics.jsonl, config.yaml and completions/*.parquet of `run_dir`.

    Raises:
        FileNotFoundError: there is no metrics.jsonl: it is not a run directory.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"run_dir {str(run_dir)!r} has no metrics.jsonl; expected the output_dir of a run of `sgopd train`"
        )
    unreadable: list[str] = []
    records, bad_lines = read_metrics(path)
    if bad_lines and not records and not is_run(run_dir):
        raise FileNotFoundError(
            f"run_dir {str(run_dir)!r}: its metrics.jsonl is no run's; none of its lines is a record"
        )
    if bad_lines:
        unreadable.append(
            f"{bad_lines} line{'s' * (bad_lines > 1)} of metrics.jsonl could not be read and "
            f"{'were' if bad_lines > 1 else 'was'} left out (a killed run may cut its last line short)."
        )
    # A resumed run may have written a step twice: the later record holds.
    train = {r["step"]: r for r in records if r["kind"] == "train"}
    evals = {(r["step"], r.get("model", "student")): r for r in records if r["kind"] == "eval"}
    config, config_text = _read_config(run_dir / "config.yaml", unreadable)
    return Run(
        name=run_dir.resolve().name,
        train=[train[step] for step in sorted(train)],
        evals=[evals[key] for key in sorted(evals)],
        config=config,
        config_text=config_text,
        start=next((r for r in records if r["kind"] == "config"), {}),
        finished=any(r["kind"] == "end" for r in records),
        unreadable=unreadable,
        completions=_read_completions(run_dir / "completions", unreadable),
        folder=str(run_dir),
    )


def is_run(folder: Path) -> bool:
    """Whether a run of this program was at work in `folder`: its lock file is there, or its first record."""
    try:
        lock = (folder / LOCK).read_bytes() if (folder / LOCK).is_file() else b"none"
        with (folder / "metrics.jsonl").open("rb") as file:
            record = json.loads(file.readline(1 << 20))
        first = record["kind"] == "config" and "model_name_or_path" in record
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        first = False
    # After a power cut, all or a part of it may be gone.
    return first or LOCKED_BY.startswith(lock.strip(b"\0")[: len(LOCKED_BY)])


def read_metrics(path: Path) -> tuple[list[Record], int]:
    """The records of a metrics file, and how many of its lines are none."""
    records, bad_lines = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # not at U+2028, as splitlines does
        if not line.strip():
            continue
        if (record := parse_record(line)) is not None:
            records.append(record)
        else:
            bad_lines += 1
    return records, bad_lines


def parse_record(line: str) -> Record | None:
    """A line of metrics.jsonl; None for one that is no record."""
    try:
        record = json.loads(line)
        well_formed = isinstance(record["step"], int) and isinstance(record["kind"], str)
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
    return record if well_formed else None


def _read_config(path: Path, unreadable: list[str]) -> tuple[Record, str]:
    if not path.is_file():
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict):
        unreadable.append("config.yaml is not a YAML mapping; it is shown as it stands.")
        config = {}
    return config, text


def _read_completions(folder: Path, unreadable: list[str]) -> list[Record]:
    """Rows of the first and of the last step, those that differ in verdict and source first."""
    paths = sorted(folder.glob("*.parquet"))
    rows: list[Record] = []
    for path in dict.fromkeys([*paths[:1], *paths[-1:]]):
        try:
            rows += pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException):
            unreadable.append(f"completions/{path.name} is not a readable parquet file and was left out.")
    steps = sorted({row["step"] for row in rows if isinstance(row.get("step"), int)})
    shown: list[Record] = []
    for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
        shown += varied([row for row in rows if row.get("step") == step], COMPLETIONS_SHOWN)
    return shown


def varied(rows: list[Record], count: int) -> list[Record]:
    """`count` rows that take turns over (source, verdict), so that a rare kind is seen too."""
    kinds: dict[tuple[Any, Any], list[Record]] = {}
    for row in rows:
        kinds.setdefault((row.get("source"), row.get("verdict")), []).append(row)
    turns = [(turn, row) for kind in kinds.values() for turn, row in enumerate(kind)]
    return [row for _, row in sorted(turns, key=lambda pair: pair[0])[:count]]
