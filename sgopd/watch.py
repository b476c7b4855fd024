"""A run in a terminal: of this process (`sgopd train`), of another one, or a finished one (`sgopd watch RUN_DIR`).

Everything is read from the records of metrics.jsonl and from completions/, so that both ways show the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sgopd.config import Config, UserError, read_yaml
from sgopd.files import is_taken
from sgopd.report.checks import warnings
from sgopd.report.course import Course, Record
from sgopd.report.quantities import number
from sgopd.report.run import parse_record, read_metrics, varied

RECENT = 20  # updates that accuracy, speed and the time left are taken over
POINTS = 256  # of a spark line, at most
FRESH = 60.0  # seconds since its last record in which a run counts as alive where its lock cannot be asked
ROLLOUTS = 4  # shown
CURVES = (  # name, label, how it is written
    ("rollout/accuracy", "accuracy", "{:.1%}"),
    ("kl", "KL", "{:.3f}"),
    ("rollout/length_mean", "tokens an answer", "{:.1f}"),
)
STAGES = (("rollout", "sampling"), ("verify", "verifier"), ("update", "update"))
VERDICTS = {1: ("✓", "green"), -1: ("✗", "red")}


class Spark:
    """A curve in one line, in constant space: neighbours become their mean once there are too many."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self._each = 1  # values in a point
        self._open: list[float] = []  # those of the one that is not complete

    def add(self, value: float) -> None:
        self._open.append(value)
        if len(self._open) < self._each:
            return
        self.points.append(sum(self._open) / self._each)
        self._open = []
        if len(self.points) == POINTS:
            self.points = means(self.points, POINTS // 2)
            self._each *= 2

    def text(self, width: int) -> str:
        points = self.points if len(self.points) <= width else means(self.points, width)
        low, high = min(points, default=0.0), max(points, default=0.0)
        levels = "▁▂▃▄▅▆▇█"
        return "".join(levels[int((point - low) / ((high - low) or 1.0) * (len(levels) - 1) + 0.5)] for point in points)


def means(values: list[float], count: int) -> list[float]:
    """`count` means of neighbours, of at least as many values."""
    bounds = [round(i * len(values) / count) for i in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]


class View:
    """What is known of a run, drawn by rich.

    Args:
        run_dir: where completions/ is.
        settings: the run's config.
    """

    def __init__(self, run_dir: Path, settings: Record) -> None:
        self.run_dir, self.settings = run_dir, settings
        self.course = Course()
        self.course.settings = settings
        self.curves = {name: Spark() for name, _, _ in CURVES}
        self.recent: deque[Record] = deque(maxlen=RECENT)
        self.state = ""
        self.shown: tuple[str | None, list[Record]] = (None, [])
        self.lock = threading.Lock()  # records come in one thread, rich draws in another

    def see(self, record: Record) -> None:
        with self.lock:
            self.course.see(record)
            if record["kind"] == "train":
                self.recent.append(record)
                for name, spark in self.curves.items():
                    if math.isfinite(value := number(record.get(name))):
                        spark.add(value)

    def mean(self, name: str) -> float:
        """Over the last updates; NaN if it was not measured in them."""
        values = [value for record in self.recent if math.isfinite(value := number(record.get(name)))]
        return sum(values) / len(values) if values else math.nan

    def speed(self, *stages: str) -> float:
        """Tokens a second in the last updates, in these stages together."""
        seconds = sum(number(record.get(f"time/{stage}", 0.0)) for record in self.recent for stage in stages)
        return sum(number(record.get("tokens")) for record in self.recent) / seconds if seconds else math.nan

    def time_left(self) -> str:
        """By the time of the last updates; evaluations and saving are not in it."""
        if not self.recent or self.course.finished:
            return ""
        seconds = sum(number(value) for record in self.recent for name, value in record.items() if name[:5] == "time/")
        left = seconds / len(self.recent) * (self.settings["max_steps"] - self.course.step)
        return f"about {duration(left)} left"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self.lock:
            return list(self.parts(options.max_width))

    def parts(self, width: int) -> Iterator[Table | Text]:
        yield self.head()
        if self.recent:
            yield from self.curve_lines(width)
            yield line(
                f"{count(self.speed('rollout', 'verify', 'update'))} tokens a second: "
                + ", ".join(f"{label} {count(self.speed(stage))}" for stage, label in STAGES)
            )
        for who, record in self.evaluations():
            yield line(f"{who}: {scores_of(record)}")
        for check in warnings(self.course):
            yield Text(f"⚠ {check.name}: {check.finding} {check.advice}", style="yellow")
        yield from self.rollout_lines()

    def head(self) -> Table:
        """Name, progress, what is going on."""
        step, last = self.course.step, self.settings["max_steps"]
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        numbers = f"{step}/{last}"
        share = number(self.recent[-1].get("phase/teacher_share")) if self.recent else math.nan
        begun = "" if self.recent or self.state else "before the first update"
        said = [f"teacher {share:.0%}" if share > 0 else "", self.time_left(), self.state, begun]
        grid.add_row(
            Text(f"{printable(self.run_dir.name)}  {numbers}", style="bold"),
            ProgressBar(total=last, completed=step),
            Text("  ".join(filter(None, said))),
        )
        return grid

    def curve_lines(self, width: int) -> Iterator[Text]:
        labels = max(len(label) for _, label, _ in CURVES)
        for name, label, written in CURVES:
            if math.isfinite(value := self.mean(name)):
                start = f"{label:<{labels}} {written.format(value):>8}  "
                yield line(start + self.curves[name].text(max(0, width - len(start))))

    def evaluations(self) -> list[tuple[str, Record]]:
        rows = (("student, step 0", self.course.before), ("teacher", self.course.teacher))
        after = self.course.after
        found = [(who, record) for who, record in rows if record is not None]
        return found if after is None else [*found, (f"student, step {after['step']}", after)]

    def rollout_lines(self) -> Iterator[Text]:
        """Some rollouts of the last step kept, a line each."""
        folder = self.run_dir / "completions"
        names = os.listdir(folder) if folder.is_dir() else []
        newest = max((name for name in names if name.startswith("step-")), default=None)
        if newest is not None and newest != self.shown[0]:
            wanted = ["step", "prompt", "completion", "verdict", "reason", "source"]
            try:
                rows = pyarrow.parquet.read_table(folder / newest, columns=wanted).to_pylist()
            except (OSError, pyarrow.ArrowException):  # a resumed run may just have removed it
                rows = []
            self.shown = (newest, varied(rows, ROLLOUTS))
        for index, row in enumerate(self.shown[1]):
            if index == 0:
                yield Text(f"rollouts of step {row['step']}", style="dim")
            mark, style = VERDICTS.get(row["verdict"], ("?", "yellow"))
            text = Text(f"{mark} {row['reason']:<10} ", style=style, no_wrap=True, overflow="ellipsis")
            text.append(f"{tail(row['prompt'], 24)} ", style="dim")
            text.append(tail(row["completion"], 400), style="default")
            yield text


def line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def tail(text: str, length: int) -> str:
    """The end of a text, where the answer is, in one line."""
    text = printable(" ".join(text[-4 * length :].split()))
    return text if len(text) <= length else "…" + text[1 - length :]


def printable(text: str) -> str:
    """Text of a model: what could move the cursor or turn the direction of writing is shown as a box."""
    return "".join(character if character.isprintable() else "□" for character in text)


def scores_of(record: Record) -> str:
    average, passing = f"avg@{record.get('eval/samples', 'k')}", f"pass@{record.get('eval/k', 'k')}"
    return f"{average} {score(record, 'avg')}, {passing} {score(record, 'pass')}"


def score(record: Record, which: str) -> str:
    """A percentage with its standard error."""
    value, error = (number(record.get(f"eval/{which}_at_k{suffix}")) for suffix in ("", "_se"))
    if math.isnan(value):  # there was no verdict
        return "–"
    return f"{100 * value:.1f} %" if math.isnan(error) else f"{100 * value:.1f} ± {100 * error:.1f} %"


def count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


class Display:
    """A run of this process on the console: the view of `sgopd watch` on a terminal, lines elsewhere."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.view = View(Path(config.output_dir), dataclasses.asdict(config))
        self.console = Console()
        self.live = self.console.is_terminal and os.environ.get("RANK", "0") == "0"

    def start(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """From now on the view is drawn. `step`: where the run goes on."""
        metrics = self.view.run_dir / "metrics.jsonl"
        for record in read_metrics(metrics)[0] if step and metrics.is_file() else []:  # it may go on from another's
            if record["step"] <= step:  # those after the checkpoint are about to go
                self.view.see(record)
        if not self.live:
            return contextlib.nullcontext()
        return Live(self.view, console=self.console, refresh_per_second=2, vertical_overflow="crop")

    def say(self, line: str) -> None:
        style = "yellow" if line.startswith("warning") else None
        self.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    def record(self, record: Record) -> None:
        self.view.see(record)
        if self.live:
            return
        if record["kind"] == "eval":
            whose = record["model"] if record["model"] == "teacher" else f"student, step {record['step']}"
            self.say(f"{whose}: {scores_of(record)}")
        step, last = record["step"], self.config.max_steps
        if record["kind"] == "train" and (step in (1, last) or step % self.config.logging_steps == 0):
            accuracy, kl = self.view.mean("rollout/accuracy"), record.get("kl")
            numbers = f"accuracy {accuracy:.1%}  " if accuracy == accuracy else ""
            numbers += f"KL {kl:.3f}  " if kl is not None else ""
            if share := record.get("phase/teacher_share"):  # of a batch of rollouts: later updates on it have none
                numbers += f"teacher {share:.0%}  "
            self.say(
                f"step {step}/{last}  {numbers}loss {record['loss']:.4f}  {record['tokens_per_second']:.0f} tokens/s"
            )


class Records:
    """New records of a metrics.jsonl that another process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self._rest = b""

    def new(self) -> list[Record] | None:
        """Those since the last call; None if the file was cut, as a resumed run does: then all come again."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            if self.path.stat().st_size < self.position:
                self.position, self._rest = 0, b""
                return None
            file.seek(self.position)
            data = file.read()
        self.position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        records = (parse_record(line.decode(errors="replace")) for line in lines)
        return [record for record in records if record is not None]


def watch(run_dir: Path, console: Console, pause: Callable[[float], None] = time.sleep) -> None:
    """Draws the run until it ends. Where the output is no terminal, once.

    Raises:
        UserError: `run_dir` is no run directory.
    """
    metrics = run_dir / "metrics.jsonl"
    if not (run_dir / "config.yaml").is_file() or not (metrics.is_file() or is_taken(run_dir)):
        raise UserError(
            f"{run_dir} is no run directory, which has config.yaml and metrics.jsonl: name the output_dir of a run"
        )
    settings = read_yaml(run_dir / "config.yaml")
    if not isinstance(settings.get("max_steps"), int):
        raise UserError(f"{run_dir / 'config.yaml'} is no run's: it has no max_steps. Name the output_dir of a run")
    records, view = Records(metrics), View(run_dir, settings)
    with Live(view, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            alive = is_taken(run_dir) or (metrics.is_file() and time.time() - metrics.stat().st_mtime < FRESH)
            new = records.new()
            if new is None:
                view = View(run_dir, {**settings, **read_yaml(run_dir / "config.yaml")})
                continue
            for record in new:
                view.see(record)
            view.state = "finished" if view.course.finished else "" if alive else "no process is at work on it"
            live.update(view, refresh=True)
            if view.course.finished or not alive or not console.is_terminal:
                return
            pause(0.5)
