"""Several runs on one page: curves over each other, final figures and their paired differences, what was set otherwise.

Runs whose configurations differ in nothing but the seed (and in what is no part of a run: IGNORED) are one
configuration, drawn as the mean of its seeds in the band from the least to the greatest.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes

from sgopd.config import Config, UserError
from sgopd.report.checks import completed
from sgopd.report.course import Course
from sgopd.report.figures import (
    COLORS,
    SECTIONS,
    SMOOTHED_FROM,
    Drawing,
    Figure,
    Section,
    Series,
    average_name,
    finish,
    smooth,
    thin,
    to_svg,
)
from sgopd.report.quantities import last_tenth, mean, number, points, show
from sgopd.report.run import Record, Run, question_rates
from sgopd.scores import change, mean_and_se

IGNORED = frozenset(
    {"seed", "run_name", "report_to", "num_completions_to_log", "num_tokens_to_log", "save_steps", "save_total_limit"}
    | {setting.name for setting in dataclasses.fields(Config) if setting.metadata["resume"] == "launch"}
)
STYLES = [
    (color, dashed) for dashed in (False, True) for color in COLORS
]  # of as many configurations as can be told apart
NAME_CHARACTERS = 40
NORMAL_95 = 1.96  # standard errors on each side of a mean


@dataclass
class Group:
    """The runs of one configuration."""

    runs: list[Run]
    style: Series  # its name and colour
    settings: dict[str, Any] = field(default_factory=dict)

    def final(self, which: str) -> list[float]:
        """avg@k or pass@k of each run's last evaluation after training."""
        values = [number((run.after or {}).get(f"eval/{which}_at_k")) for run in self.runs]
        return [value for value in values if math.isfinite(value)]

    def seeds(self) -> dict[Any, Record]:
        """The last evaluation of each seed."""
        return {run.config.get("seed"): run.after for run in self.runs if run.after is not None}


@dataclass(frozen=True)
class Row:
    """A configuration in the table of final figures, as text: of avg@k and of pass@k, value and difference."""

    style: Series
    runs: str
    values: tuple[str, str]
    differences: tuple[tuple[str, str], tuple[str, str]]  # difference with its interval; how sure that is
    length: str
    incomplete: bool  # a run of it did not write its end


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Configurations in the order of their first runs.

    Raises:
        UserError: there are more than can be told apart, or a seed is there twice.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        settings = {name: value for name, value in run.config.items() if name not in IGNORED}
        found.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(run)
    if len(found) > len(STYLES):
        raise UserError(f"report: got runs of {len(found)} configurations, expected at most {len(STYLES)}. Name fewer")
    for members in found.values():
        check_seeds(members)
    differing = differences(list(found.values()))
    groups = []
    for members, (color, dashed) in zip(found.values(), STYLES):
        settings = {name: members[0].config.get(name) for name in differing}
        name = ", ".join(f"{key} {value}" for key, value in settings.items())
        if not name or len(name) > NAME_CHARACTERS:
            name = members[0].name if len(members) == 1 else f"{members[0].name} and {len(members) - 1} more"
        groups.append(Group(members, Series("", name, color, dashed), settings))
    return groups


def check_seeds(runs: Sequence[Run]) -> None:
    """Refuses runs of one configuration with the same seed: as two seeds they would make chance look small."""
    first: dict[Any, Run] = {}
    for run in runs:
        seed = run.config.get("seed")
        if seed is not None and seed in first:
            raise UserError(
                f"report: got two runs of one configuration with seed {seed}, {first[seed].folder} and {run.folder}, "
                "expected each seed once, since runs of one configuration are averaged over seeds. Name one of them"
            )
        first[seed] = run


def differences(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Settings that are not the same in all configurations, in the order of config.yaml."""
    configs = [members[0].config for members in groups]
    names = dict.fromkeys(name for config in configs for name in config if name not in IGNORED)
    return [name for name in names if any(config.get(name) != configs[0].get(name) for config in configs)]


# --- final figures ---


def rows(groups: Sequence[Group]) -> list[Row]:
    """The table; differences are from the first configuration."""
    found = []
    for group in groups:
        seeds = ", ".join(str(run.config.get("seed", "–")) for run in group.runs)
        compared = [("–", "") if group is groups[0] else difference(groups[0], group, which) for which in WHICH]
        lengths = [number((run.after or {}).get("eval/length_mean")) for run in group.runs]
        found.append(
            Row(
                group.style,
                f"{len(group.runs)} (seed {seeds})" if len(group.runs) == 1 else f"{len(group.runs)} (seeds {seeds})",
                (value(group, "avg"), value(group, "pass")),
                (compared[0], compared[1]),
                show(mean(lengths)),
                not all(run.finished for run in group.runs),
            )
        )
    return found


def cautions(groups: Sequence[Group]) -> list[str]:
    """Figures that are not those of a run's end, or not of the same update."""
    runs = [run for group in groups for run in group.runs]
    found = [f"{run.folder}: {completed(Course.of(run)).finding}" for run in runs if not run.finished]
    steps = {run.folder: run.after["step"] if run.after is not None else None for run in runs}
    if len(set(steps.values())) > 1:
        of = ", ".join(f"{folder} {'none' if step is None else f'update {step}'}" for folder, step in steps.items())
        found.append(f"The last evaluations are not of the same update: {of}.")
    return found


WHICH = ("avg", "pass")


def value(group: Group, which: str) -> str:
    """The mean over seeds with its standard error, or that of the only run over questions."""
    finals = group.final(which)
    if not finals:
        return "–"
    average, error = mean_and_se(finals)
    if len(finals) == 1:
        [error] = [number(run.after.get(f"eval/{which}_at_k_se")) for run in group.runs if run.after is not None][:1]
    return points(average, error).removeprefix("+")


def difference(base: Group, other: Group, which: str) -> tuple[str, str]:
    """`other` − `base` in points with its 95 % interval over questions, and what it rests on."""
    theirs, ours = base.seeds(), other.seeds()
    common = [seed for seed in theirs if seed in ours]
    before = [theirs[seed] for seed in common] or list(theirs.values())
    after = [ours[seed] for seed in common] or list(ours.values())
    rates = [question_rates(record) for record in (*before, *after)]
    same = {(r.get("eval/questions_sha256"), r.get("eval/k") if which == "pass" else 0) for r in (*before, *after)}
    if not before or not after:
        return "–", ""
    if len(same) > 1 or any(rate is None for rate in rates):
        gain = mean(other.final(which)) - mean(base.final(which))
        return points(gain), "not paired: other questions, or a run of an older version"
    by_run = [rate[which] for rate in rates if rate is not None]
    gain, error = change(*(average(part) for part in (by_run[: len(before)], by_run[len(before) :])))
    low, high = gain - NORMAL_95 * error, gain + NORMAL_95 * error
    text = f"{points(gain)} [{points(low)}, {points(high)}]" if math.isfinite(error) else points(gain)
    how = f"paired, {len(by_run[0])} questions"
    if len(common) > 1:
        gains = [change(a, b)[0] for a, b in zip(by_run[: len(before)], by_run[len(before) :])]
        how += f"; ± {100 * mean_and_se(gains)[1]:.1f} over {len(common)} seeds"
    return text, how


def average(rates: Sequence[Sequence[float]]) -> list[float]:
    """Of each question, over runs."""
    return [sum(values) / len(values) for values in zip(*rates)]


# --- curves ---


def drawings(groups: Sequence[Group]) -> list[tuple[Section, list[Drawing]]]:
    """The first curve of every figure that has lines, and the evaluations, of all configurations."""
    found = []
    for section in SECTIONS:
        figures = [figure for figure in section.figures if not figure.stacked]
        drawn = [drawing for figure in figures if (drawing := draw(groups, figure)) is not None]
        if section.title == "Accuracy":
            drawn = [drawing for which in WHICH if (drawing := draw_evaluations(groups, which)) is not None] + drawn
        if drawn:
            found.append((section, drawn))
    return found


Points = dict[int, list[float]]  # the values of a group's runs at each step


def draw(groups: Sequence[Group], figure: Figure) -> Drawing | None:
    series = figure.series[0]
    curves: list[Points] = []
    for group in groups:
        curve: Points = {}
        for run in group.runs:
            for step, measured in zip(run.steps, run.series(series.key)):
                if math.isfinite(measured):
                    curve.setdefault(step, []).append(measured)
        curves.append(curve)
    title = figure.title if len(figure.series) == 1 else f"{figure.title}: {series.label}"
    if figure.unless_zero and not any(value for curve in curves for values in curve.values() for value in values):
        return None
    return together(title, figure.unit, figure.definition, groups, curves, figure.log)


def draw_evaluations(groups: Sequence[Group], which: str) -> Drawing | None:
    curves: list[Points] = []
    for group in groups:
        curve: Points = {}
        for run in group.runs:
            for record in run.evaluations("student"):
                if math.isfinite(accuracy := number(record.get(f"eval/{which}_at_k"))):
                    curve.setdefault(record["step"], []).append(accuracy)
        curves.append(curve)
    last = next((run.after for group in groups for run in group.runs if run.after is not None), {})
    name = average_name(last) if which == "avg" else f"pass@{last.get('eval/k', 'k')}"
    return together(f"Evaluation: {name}", "%", "Held-out questions, student.", groups, curves, log=False)


def together(
    title: str, unit: str, definition: str, groups: Sequence[Group], curves: Sequence[Points], log: bool
) -> Drawing | None:
    """A figure of all configurations; None where none has anything to show."""
    shown = [(group, dict(sorted(curve.items()))) for group, curve in zip(groups, curves) if curve]
    if not shown:
        return None
    everything = [value for _, curve in shown for values in curve.values() for value in values]

    def plot(axes: Axes) -> None:
        for group, curve in shown:
            steps, color = list(curve), COLORS[group.style.color]
            means, lows, highs = (thin(steps, [pick(values) for values in curve.values()]) for pick in (mean, min, max))
            lines = [smooth(y) if len(steps) >= SMOOTHED_FROM else y for _, y in (means, lows, highs)]
            few = {"marker": "o", "markersize": 3} if len(steps) <= 12 else {}
            style = (0, (4, 2)) if group.style.dashed else "-"
            axes.plot(means[0], lines[0], color=color, linewidth=1.6, linestyle=style, **few)
            if len(group.runs) > 1:
                axes.fill_between(means[0], lines[1], lines[2], color=color, alpha=0.18, linewidth=0)
        finish(axes, unit, everything, log=log, stacked=False)

    legend = []
    for group, curve in shown:
        legend.append((group.style, show(last_tenth([mean(values) for values in curve.values()]), unit)))
    description = f"{title}. At the end: " + "; ".join(f"{style.label}: {text}" for style, text in legend)
    suffix = f"\u00a0{unit}"
    return Drawing(
        title,
        unit,
        to_svg(plot, description),
        [(style, text.removesuffix(suffix)) for style, text in legend],
        definition,
    )
