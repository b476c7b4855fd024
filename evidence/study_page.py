"""The study's tables and figure, from the results alone: docs/evidence.md, docs/evidence-tables.md.

    python evidence/study_page.py [--results evidence/results.jsonl] [--docs docs]

Everything is a difference between two arms of the same part, task, teacher, student and seed, in points. A comparison
is the mean over tasks of the mean over seeds. Its variance is that between seeds within each task, so an interval is
about these tasks, their questions and checkpoints, and says nothing of others; degrees of freedom are Welch's and
Satterthwaite's, since one task often varies far more than the others. Intervals are 95 %, simultaneous within a table
(Bonferroni, Student's t); p-values are Holm's within the table.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mpmath  # sympy's
from checkpoints import STUDENTS
from constructed import TASKS
from study import (
    ARMS,
    BASELINE,
    CONTROLS,
    CORE,
    GROUPED,
    PARTS,
    PUBLISHED,
    RATES,
    REAL_ARMS,
    REAL_CONTROLS,
    REAL_PART,
    REAL_TEACHERS,
    REAL_UNSEEN,
    SETTINGS,
    SIGNS,
    Cell,
    arms_of,
    models_of,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
import page as pages  # noqa: E402 (tools/page.py)

TEACHERS = {"wrong": "systematically wrong teacher", "noisy": "noisy teacher", "right": "nearly perfect teacher"}
NONE = "No runs yet."
PAGE, TABLES, FIGURE = "evidence.md", "evidence-tables.md", "images/evidence.svg"
ON_PAGE = ("figure", "gates", "published", "real")  # all else is on TABLES

Line = dict[str, Any]
Measure = Callable[[Line], float | None]


def avg(line: Line) -> float:
    return line["avg"]


def passed(line: Line) -> float:
    return line["pass"]


def on(kind: str) -> Measure:
    return lambda line: line["by_kind"][kind]["avg"]


class Estimate(NamedTuple):
    """A paired difference in points."""

    mean: float
    se: float  # NaN without degrees of freedom
    freedom: float  # 0 unless every task has two seeds
    by_task: dict[str, float]
    runs: int

    def half_width(self, comparisons: int) -> float:
        """Of the 95 % interval that holds for that many comparisons at once."""
        return self.se * t_quantile(1 - 0.025 / comparisons, self.freedom) if self.freedom else math.nan

    def detectable(self, comparisons: int) -> float:
        """The effect that such an interval shows not to be 0 four times in five, were the noise as large as `se`."""
        if not self.freedom:
            return math.nan
        critical = t_quantile(1 - 0.025 / comparisons, self.freedom)
        low, high = 0.0, 2 * critical + 4
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if t_power(middle, critical, self.freedom) > 0.8 else (middle, high)
        return self.se * high


# --- statistics ---


def estimate(differences: dict[str, list[float]]) -> Estimate | None:
    """From each task's paired differences, one a seed. None without any.

    A task with one seed says nothing of its spread, and another task's is no stand-in: then there is no interval.
    """
    tasks = {task: values for task, values in differences.items() if values}
    if not tasks:
        return None
    means = {task: sum(values) / len(values) for task, values in tasks.items()}
    se, freedom = math.nan, 0.0
    if all(len(values) > 1 for values in tasks.values()):
        seeds = [len(values) for values in tasks.values()]
        squares = [sum((value - means[task]) ** 2 for value in values) for task, values in tasks.items()]
        variances = [square / (n - 1) / n for square, n in zip(squares, seeds)]  # of each task's mean
        se = math.sqrt(sum(variances)) / len(tasks)
        doubt = sum(variance**2 / (n - 1) for variance, n in zip(variances, seeds))
        freedom = sum(variances) ** 2 / doubt if doubt else sum(seeds) - len(seeds)
    return Estimate(sum(means.values()) / len(means), se, freedom, means, sum(map(len, tasks.values())))


def t_tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's t, t >= 0: half the incomplete beta I_x(f / 2, 1 / 2), x = f / (f + t²)."""
    return 0.5 * float(mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True))


@functools.cache
def t_quantile(probability: float, freedom: float) -> float:
    """t with P(T <= t) = probability >= 0.5, by bisection."""
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > 1 - probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > 1 - probability else (low, middle)
    return high


def crossed(values: Sequence[Sequence[float]]) -> list[Estimate]:
    """Each other arm less the first, of values[seed][arm].

    What neither the seed nor the arm explains is the noise of all arms alike, so that few seeds are enough to know it:
    (arms - 1) (seeds - 1) degrees of freedom.
    """
    S, A = len(values), len(values[0])
    of_arm = [sum(row[a] for row in values) / S for a in range(A)]
    of_seed = [sum(row) / A for row in values]
    whole = sum(of_seed) / S
    squares = sum((values[s][a] - of_arm[a] - of_seed[s] + whole) ** 2 for s in range(S) for a in range(A))
    freedom = (A - 1) * (S - 1)
    se = math.sqrt(2 * squares / freedom / S) if freedom else math.nan
    return [Estimate(100 * (mean - of_arm[0]), 100 * se, freedom, {}, S) for mean in of_arm[1:]]


def t_power(shift: float, critical: float, freedom: float) -> float:
    """P(T > critical) of Student's noncentral t: over the estimate's share s of the noise, Φ(shift − critical s)."""

    def density(s: float) -> float:  # of the square root of chi² over its degrees of freedom
        log = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
        return math.exp(log + (freedom - 1) * math.log(s) - freedom * s * s / 2)

    points = [(i + 0.5) / 200 for i in range(1000)]  # to 5; beyond there is nothing
    return sum(density(s) * 0.5 * math.erfc((critical * s - shift) / math.sqrt(2)) for s in points) / 200


# --- comparisons ---


class Results:
    """The lines of a results file, by what tells them apart."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = {Cell(*(line[field] for field in Cell._fields)): line for line in lines}

    def compare(
        self, arm: str, base: str, teacher: str, student: str, part: str = "main", measure: Measure = avg
    ) -> Estimate | None:
        """`arm` less `base`, paired; None where no seed has both."""
        differences: dict[str, list[float]] = defaultdict(list)
        for cell, line in self.lines.items():
            if (cell.part, cell.teacher, cell.student, cell.arm) == (part, teacher, student, arm):
                other = self.lines.get(cell._replace(arm=base))
                if other is None or models_of(line) != models_of(other):
                    continue
                if (mine := measure(line)) is not None and (its := measure(other)) is not None:
                    differences[cell.task].append(100 * (mine - its))
        return estimate(differences)

    def level(self, arm: str, teacher: str, student: str, part: str, measure: Measure) -> float | None:
        """The mean over tasks of the mean over seeds, in percent."""
        found = [
            [
                100 * value
                for cell, line in self.lines.items()
                if cell[:5] == (part, task, teacher, student, arm) and (value := measure(line)) is not None
            ]
            for task in TASKS
        ]
        means = [sum(values) / len(values) for values in found if values]
        return sum(means) / len(means) if means else None


Asked = tuple[str, str]  # arm, what it is compared with


def table(
    results: Results,
    student: str,
    asked: Sequence[Asked],
    part: str = "main",
    measure: Measure = avg,
    label: Callable[[Asked], str | None] | None = None,
) -> str:
    """A row for each comparison of which there are runs, a column for each teacher."""
    rows = []
    for pair in asked:
        found = [results.compare(*pair, teacher, student, part, measure) for teacher in TEACHERS]
        if any(found):
            rows.append((pair, found))
    if not rows:
        return NONE
    every = [one for _, found in rows for one in found if one is not None]
    lines = [f"| {student} student | {' | '.join(TEACHERS.values())} | runs a cell |", "|---|---|---|---|---|"]
    for pair, found in rows:
        cells = [show(one, len(every)) for one in found]
        runs = sorted({one.runs for one in found if one is not None})
        says = ARMS[pair[0]].says if label is None else ""
        name = label(pair) if label else f"`{pair[0]}`" + (f": {says}" if says else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {'–'.join(map(str, {runs[0]: 0, runs[-1]: 0}))} |")
    return "\n".join(lines)


def show(one: Estimate | None, comparisons: int) -> str:
    """With its interval; bold where that leaves 0 out."""
    if one is None:
        return ""
    if not one.freedom:
        return signed(one.mean)
    half = one.half_width(comparisons)
    text = f"{signed(one.mean)} ± {half:.1f}"
    return f"**{text}**" if abs(one.mean) > half else text


def signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")


def against(arms: Sequence[str], base: str = BASELINE) -> list[Asked]:
    return [(arm, base) for arm in arms if arm != base]


# --- the page ---


def settings_table(models: Sequence[Line]) -> str:
    lines = [
        "| task | model | weights | parameters | k | avg@k | pass@k | questions it mostly gets wrong |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in models:
        wrong = sum(int(count, 17) < one["samples"] / 2 for count in one["correct"]) / len(one["correct"])
        whose = "teacher" if one["name"] in TEACHERS else "student"
        cells = (one["task"], f"{whose} `{one['name']}`", one["weights_sha256"][:6])
        numbers = (f"{one['parameters']:,}", one["samples"])
        shares = (f"{one['avg']:.1%}", f"{one['pass']:.1%}", f"{wrong:.0%}")
        lines.append(f"| {' | '.join(map(str, cells + numbers + shares))} |")
    return "\n".join(lines)


def levels_table(results: Results) -> str:
    """What `opd` itself came to."""
    lines = [f"| `opd`: avg@16 (pass@16) | {' | '.join(TEACHERS.values())} |", "|---|---|---|---|"]
    for part, student in dict.fromkeys((cell.part, cell.student) for cell in results.lines):
        cells = []
        for teacher in TEACHERS:
            average, passing = (results.level(BASELINE, teacher, student, part, m) for m in (avg, passed))
            cells.append("" if average is None or passing is None else f"{average:.1f} ({passing:.1f})")
        lines.append(f"| {part}, {student} student | {' | '.join(cells)} |")
    return "\n".join(lines)


def runs_table(results: Results) -> str:
    """How much was run, of what code."""
    lines = ["| part | student | arms | runs | seeds of `opd` a cell | seconds a run |", "|---|---|---|---|---|---|"]
    for part, student in dict.fromkeys((cell.part, cell.student) for cell in results.lines):
        those = {cell: line for cell, line in results.lines.items() if (cell.part, cell.student) == (part, student)}
        seeds = [
            sum(cell[1:5] == (task, teacher, student, BASELINE) for cell in those)
            for task in TASKS
            for teacher in TEACHERS
        ]
        seconds = sorted(line["seconds"] for line in those.values())[len(those) // 2]
        lines.append(
            f"| {part} | {student} | {len({cell.arm for cell in those})} | {len(those)} | {min(seeds)}–{max(seeds)} "
            f"| {seconds:.0f} |"
        )
    commits = ", ".join(sorted({str(line["commit"]) for line in results.lines.values()}))
    return "\n".join(lines) + f"\n\nCommits: {commits}."


def task_table(results: Results, student: str, arms: Sequence[str]) -> str:
    """Differences to `opd` a task: mean over seeds, without intervals."""
    lines = [f"| {student} student | {' | '.join(TEACHERS.values())} |", "|---|---|---|---|"]
    for arm in arms:
        found = [results.compare(arm, BASELINE, teacher, student) for teacher in TEACHERS]
        if any(found):
            cells = [
                ", ".join(f"{signed(one.by_task[task])}" if task in one.by_task else "–" for task in TASKS)
                if one
                else ""
                for one in found
            ]
            lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else NONE


class Column(NamedTuple):
    """One measure of the real model with one teacher."""

    teacher: str
    measure: str  # "avg" or "pass"
    samples: int
    level: float  # of `opd` itself, in percent
    differences: dict[str, Estimate]  # of each other arm to it; of an arm to its control


def real_columns(
    results: Results, arms: Sequence[str], teachers: Sequence[str], part: str = REAL_PART, first: int = 0
) -> list[Column]:
    """avg and pass with each teacher, by seeds from `first` on that all arms ran with on the same models."""
    samples = (SETTINGS | PARTS[part])["num_generations_eval"]
    columns = []
    for teacher in teachers:
        runs = {
            (cell.seed, cell.arm): line
            for cell, line in results.lines.items()
            if (cell.part, cell.teacher) == (part, teacher) and cell.seed >= first
        }
        seeds = [
            seed
            for seed in sorted({seed for seed, _ in runs})
            if all((seed, arm) in runs for arm in arms) and len({models_of(runs[seed, arm]) for arm in arms}) == 1
        ]
        shown = [*arms, *(arm for arm in REAL_CONTROLS if all((seed, arm) in runs for seed in seeds))]
        for name, measure in (("avg", avg), ("pass", passed)) if seeds else ():
            found = [[measure(runs[seed, arm]) for arm in shown] for seed in seeds]
            level = 100 * sum(row[0] for row in found) / len(found)
            differences = dict(zip(shown[1:], crossed(found)))
            for control, arm in REAL_CONTROLS.items():
                if control in differences:
                    over = differences[arm].mean - differences[control].mean
                    less = f"{arm} less itself with {control.removeprefix(f'{arm}, ')}"
                    differences[less] = differences[control]._replace(mean=over)
            columns.append(Column(teacher, name, samples, level, differences))
    return columns


def real_table(columns: Sequence[Column]) -> str:
    """`opd` itself, differences to it, and what could be seen."""
    if not columns:
        return NONE
    comparisons = compared(columns)
    names = [f"{column.teacher} teacher, {column.measure}@{column.samples}" for column in columns]
    lines = [f"|  | {' | '.join(names)} |", "|---" * (len(columns) + 1) + "|"]
    lines.append(f"| `{BASELINE}` itself | {' | '.join(f'{column.level:.1f} %' for column in columns)} |")
    for arm in columns[0].differences:
        found = [column.differences[arm] for column in columns]
        lines.append(f"| `{arm}` | {' | '.join(show(one, comparisons) for one in found)} |")
    # Of every arm the noise, and the seeds, are the same: the last one's stand for all.
    seen = [f"{one.detectable(comparisons):.1f}" if one.freedom else "" for one in found]
    lines.append(f"| effect that would be seen four times in five | {' | '.join(seen)} |")
    lines.append(f"| seeds | {' | '.join(str(one.runs) for one in found)} |")
    return "\n".join(lines)


def compared(columns: Sequence[Column]) -> int:
    return sum(len(column.differences) for column in columns)


# The questions of the protocol: the arm, and what it has to beat.
QUESTIONS: dict[Asked, str] = {
    ("half", "opd"): "H1 `half` less `opd`",
    ("half", "half, verdicts shuffled"): "H2 `half` less itself with other rollouts' verdicts",
    ("half", "incorrect 0.5"): "H3 `half` less 0.5 on incorrect rollouts without `protect`",
    ("half", "protect"): "H4 `half` less `protect`",
    ("trust", "opd"): "H5 `trust` less `opd`",
    ("trust", "half"): "H6 `trust` less `half`",
    ("trust", "trust, r dealt"): "H7 `trust` less itself with other prompts' r",
    ("half", "opd at its best rate"): "H8 `half` less `opd` at its best learning rate",
    ("trust", "opd at its best rate"): "H9 `trust` less `opd` at its best learning rate",
}
# Asked after runs had been looked at: a family of their own, so that they don't widen the others' intervals.
LATE_QUESTIONS: dict[Asked, str] = {
    ("half", "d > 0 alone"): "H10 `half` less tokens of d > 0 alone, without a verdict",
    ("trust", "d > 0 alone"): "H11 `trust` less tokens of d > 0 alone, without a verdict",
    ("trust, d > 0 alone", "d > 0 alone"): "H12 the two together less tokens of d > 0 alone",
    ("trust, d > 0 alone", "trust"): "H13 the two together less `trust`",
    ("trust", "protect, incorrect 0.25"): "H14 `trust` less `protect` with 0.25 on incorrect rollouts",
    ("trust, r²", "trust"): "H15 `trust` with r² less `trust`",
    ("trust", "r2-opd, β 1"): "H16 `trust` less `r2-opd` with β = 1",
    ("trust, r ≥ 0.5", "trust"): "H17 `trust` with r cut at a half less `trust`",
}


def best_rates(results: Results) -> dict[tuple[str, str, str], str]:
    """(part, teacher, student) -> the arm of the learning rate that did best over tasks, by seeds that ran with all.

    A task with one such seed decides nothing, as it has no interval.
    """
    whole = Results(
        [
            line
            for cell, line in results.lines.items()
            if all(cell._replace(arm=arm) in results.lines for arm in (BASELINE, *RATES))
        ]
    )
    found = {}
    for part, teacher, student in sorted({(cell.part, cell.teacher, cell.student) for cell in whole.lines}):
        paired = whole.compare(RATES[0], BASELINE, teacher, student, part)
        if paired is None or not paired.freedom:
            continue
        levels = {arm: whole.level(arm, teacher, student, part, avg) or 0.0 for arm in (BASELINE, *RATES)}
        found[part, teacher, student] = max(levels, key=lambda arm: levels[arm])
    return found


def with_best_rate(results: Results) -> Results:
    """With a further arm, `opd` at its best rate."""
    best = best_rates(results)
    added = [
        line | {"arm": "opd at its best rate"}
        for cell, line in results.lines.items()
        if best.get((cell.part, cell.teacher, cell.student)) == cell.arm
    ]
    return Results([*results.lines.values(), *added])


def rates_told(results: Results) -> str:
    """Which rates those are: one at the end of those tried may not be the best there is."""
    told = [
        f"{student} student, {TEACHERS[teacher]}: × {ARMS[arm].rate:.3g}"
        for (part, teacher, student), arm in best_rates(results).items()
        if part == "main"
    ]
    tried = ", ".join(f"{rate:.3g}" for rate in sorted(ARMS[arm].rate for arm in (BASELINE, *RATES)))
    return f"Best learning rates (tried: × {tried}): {'; '.join(told)}." if told else NONE


def write(path: Path, docs: Path) -> None:
    """Puts everything between its marks on both pages of the folder `docs`, and draws the figure."""
    plain = Results(read(path))
    results = with_best_rate(plain)
    models = read(path.with_name("models.jsonl"))
    students = [student for student in STUDENTS if any(cell.student == student for cell in results.lines)]

    def for_students(make: Callable[[str], str]) -> str:
        return "\n\n".join(text for text in map(make, students) if text != NONE) or NONE

    others = {
        "Controls, and the sign of d alone": (*CONTROLS, *SIGNS),
        "Learning rates": RATES,
        "Constants": arms_of("constant"),
        "Variants of `trust`": arms_of("trust"),
    }

    def titled(arms_of_title: dict[str, Sequence[str]], part: str = "main", measure: Measure = avg) -> str:
        """A table of each, against `opd`, under its title."""
        return "\n\n".join(
            f"{title}:\n\n"
            + for_students(lambda student, arms=arms: table(results, student, against(arms), part, measure))
            for title, arms in arms_of_title.items()
        )

    parts = {
        "figure": f"![Differences to opd, an arm a line, a teacher a panel; the real model in the last]({FIGURE})"
        if students
        else NONE,
        "models": settings_table(models),
        "runs": runs_table(plain),
        "levels": levels_table(plain),
        "gates": for_students(lambda student: table(results, student, against(CORE))),
        "gates pass": for_students(lambda student: table(results, student, against(CORE), measure=passed)),
        "gates tasks": for_students(lambda student: task_table(results, student, CORE[1:])),
        "questions": for_students(lambda student: table(results, student, list(QUESTIONS), label=QUESTIONS.get)),
        "questions pass": for_students(
            lambda student: table(results, student, list(QUESTIONS), measure=passed, label=QUESTIONS.get)
        ),
        "questions late": for_students(
            lambda student: table(results, student, list(LATE_QUESTIONS), label=LATE_QUESTIONS.get)
        ),
        "rates": rates_told(plain),
        "kinds": "\n\n".join(
            titled({f"Questions that the teacher mostly gets {kind}": CORE}, measure=on(f"teacher {kind}"))
            for kind in ("right", "wrong")
        ),
        "published": for_students(lambda student: table(results, student, against(PUBLISHED))),
        "published pass": for_students(lambda student: table(results, student, against(PUBLISHED), measure=passed)),
        "others": titled(others),
        "others pass": titled(others, measure=passed),
        "parts": "\n\n".join(
            titled({title: arms}, part)
            for part, title, arms in (
                ("phased", "With phased teacher sampling", CORE),
                ("sampled", "The sampled-token estimator", CORE),
                (
                    "grouped",
                    "16 prompts an update, four rollouts each, with and without a task reward",
                    (*CORE, *GROUPED),
                ),
            )
        ),
    }
    runs = Results(read(path.with_name("real.jsonl")))
    real = {part: real_columns(runs, arms, REAL_TEACHERS, part) for part, arms in REAL_ARMS.items()}
    unseen = real_columns(runs, REAL_ARMS[REAL_PART], REAL_TEACHERS, first=REAL_UNSEEN)
    parts |= {
        "real": real_table(real[REAL_PART]),
        "real first": real_table(real["real"]),
        "real unseen": real_table(unseen),
    }
    for name, content in parts.items():
        pages.write(docs / (PAGE if name in ON_PAGE else TABLES), name, content)
    if students:
        draw(results, students, real[REAL_PART], docs / FIGURE)


class Series(NamedTuple):
    """What a panel of the figure shows in one colour."""

    label: str
    marker: str
    colour: str
    differences: dict[str, Estimate]  # by arm
    comparisons: int  # of the family that its intervals hold for


def draw(results: Results, students: Sequence[str], real: Sequence[Column], path: Path) -> None:
    """Differences to `opd` with their intervals: an arm a line, a teacher a panel, a student a colour; the real model
    in panels of its own.

    A panel goes ten points beyond its means: wider intervals are cut, so that the others can be read.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = (*CORE[1:], "trust, r²", "r2-opd, β 1", "protect, incorrect 0.25", *CONTROLS, *SIGNS)
    arms = [arm for arm in chosen if any(cell.arm == arm for cell in results.lines)]
    panels: dict[str, list[Series]] = {title: [] for title in TEACHERS.values()}
    for student, marker, colour in zip(students, "os", ("#1f77b4", "#d95f02")):
        found = {
            teacher: {arm: one for arm in arms if (one := results.compare(arm, BASELINE, teacher, student)) is not None}
            for teacher in TEACHERS
        }
        comparisons = sum(map(len, found.values()))
        for teacher, title in TEACHERS.items():
            panels[title].append(Series(f"{student} student", marker, colour, found[teacher], comparisons))
    for column in real:
        if column.measure == "avg":
            series = Series("SmolLM2", "D", "#4d4d4d", column.differences, compared(real))
            panels[f"SmolLM2-135M, {column.teacher} teacher"] = [series]
    with plt.rc_context({"svg.hashsalt": "evidence", "font.size": 9}):
        width, height = 1 + 3 * len(panels), 0.32 * len(arms) + 1.2
        figure, axes = plt.subplots(1, len(panels), figsize=(width, height), sharey=True)
        for axis, (title, shown) in zip(axes, panels.items()):
            axis.axvline(0, color="0.6", linewidth=1)
            means = [0.0]
            for number, series in enumerate(shown):
                there = [(row, series.differences[arm]) for row, arm in enumerate(arms) if arm in series.differences]
                means += [one.mean for _, one in there]
                axis.errorbar(
                    [one.mean for _, one in there],
                    [row + 0.24 * number - 0.12 * (len(shown) - 1) for row, _ in there],
                    xerr=[one.half_width(series.comparisons) if one.freedom else 0.0 for _, one in there],
                    fmt=series.marker,
                    markersize=4,
                    elinewidth=1,
                    color=series.colour,
                    label=series.label,
                )
            axis.set_xlim(min(means) - 10, max(means) + 10)
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("avg@16 against opd, points")
            axis.grid(axis="x", alpha=0.3)
        axes[0].set_yticks(range(len(arms)), arms)
        axes[0].invert_yaxis()
        axes[len(TEACHERS) - 1].legend(fontsize=8, loc="best")
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "evidence" / "results.jsonl")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    write(arguments.results, arguments.docs)


if __name__ == "__main__":
    main()
