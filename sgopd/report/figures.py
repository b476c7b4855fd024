"""The report's figures: what each shows, in one table, and how a figure becomes inline SVG.

Colours are drawn as placeholders and replaced by CSS variables, text stays text: one SVG serves light, dark and
print, takes the page's font, and can be searched and read aloud.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from sgopd.report.quantities import last_tenth, mean, number, show, total
from sgopd.report.run import Record, Run

MAX_POINTS = 240  # a longer curve is drawn as the means of this many stretches of updates
SMOOTHED_FROM = 40  # updates; a shorter curve is drawn as it is
SIZE = (3.9, 2.15)  # inches of 72 px, before scaling to the column
TICK_CHARACTERS = 6  # of a label, for which there is room beside the axis
PLOT = (0.15, 0.12, 0.82, 0.85)  # left, bottom, width, height in it: the same in all, so that neighbours line up

# Placeholder colours (nothing else in an SVG has them) and the CSS variables that take their place.
COLORS = {
    name: f"#fe01{index:02x}" for index, name in enumerate(("blue", "orange", "green", "purple", "grey", "pink"), 16)
}
INK, GRID = "#fe0101", "#fe0102"
VARIABLES = {INK: "muted", GRID: "grid", **{color: name for name, color in COLORS.items()}}


@dataclass(frozen=True)
class Series:
    """One curve: a key of the train records."""

    key: str
    label: str
    color: str = "blue"
    dashed: bool = False


@dataclass(frozen=True)
class Figure:
    """One figure: its curves, its unit and what they mean."""

    title: str
    unit: Literal["", "nats", "%", "tokens", "tokens/s", "s", "rollouts"]
    definition: str  # trusted HTML
    series: tuple[Series, ...]
    stacked: bool = False
    shares: bool = False  # the series are counts: draw their shares of an update's sum
    log: bool = False
    unless_zero: bool = False  # nothing to see where all values are 0


@dataclass(frozen=True)
class Section:
    title: str
    note: str  # trusted HTML
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Drawing:
    """A figure as the template takes it."""

    title: str
    unit: str
    svg: Markup
    legend: list[tuple[Series, str]]  # with the mean over the last tenth of the updates
    definition: str  # trusted HTML
    stacked: bool = False


VERDICTS = (
    Series("rollout/correct", "correct", "green"),
    Series("rollout/incorrect", "incorrect", "orange"),
    Series("rollout/unknown", "unknown", "grey"),
)
CELLS = (  # the colours are the token inspector's as well
    ("correct_agree", "correct, agree", "green", False),
    ("correct_conflict", "correct, conflict", "orange", True),
    ("incorrect_agree", "incorrect, agree", "blue", False),
    ("incorrect_conflict", "incorrect, conflict", "pink", True),
)


def _cells(quantity: str) -> tuple[Series, ...]:
    return tuple(Series(f"cell/{cell}/{quantity}", label, color, dashed) for cell, label, color, dashed in CELLS)


SECTIONS = (
    Section(
        "Accuracy",
        "Is the student getting better at the task?",
        (
            Figure(
                "Rollout accuracy",
                "%",
                "Share of the student's own training rollouts that the verifier finds correct. Every update draws new "
                "prompts, so it is noisier than the evaluation, and needs no extra work.",
                (Series("rollout/accuracy", "student"),),
            ),
        ),
    ),
    Section(
        "Distillation",
        "How far is the student from the teacher, and what does the gate make of it? <i>d</i> = log π<sub>T</sub>(y) − "
        "log π<sub>S</sub>(y) is the log-ratio of the sampled token: positive where the teacher likes it better than "
        "the student does.",
        (
            Figure(
                "KL per token",
                "nats",
                "Divergence of student and teacher over the shared vocabulary, before the gate, mean over the tokens "
                "of student rollouts: reverse KL(π<sub>S</sub> ‖ π<sub>T</sub>) unless the config says otherwise. It "
                "should fall.",
                (Series("kl", "KL"),),
                log=True,
            ),
            Figure(
                "Loss",
                "nats",
                "What was minimised: gated loss per token, over student and teacher rollouts. A different gate makes a "
                "different scale: compare KL between runs, not this.",
                (Series("loss", "all rollouts"),),
            ),
            Figure(
                "Log-ratio",
                "nats",
                "Mean of <i>d</i> and of |<i>d</i>| over the student's tokens. The mean estimates −KL; a mean far "
                "from −KL says that tokens are not sampled from the policy in training.",
                (
                    Series("logratio/mean", "mean d"),
                    Series("logratio/abs_mean", "mean |d|", "purple"),
                ),
            ),
            Figure(
                "Gate weight",
                "",
                "Mean weight <i>w</i> that the gate gives a token; 1 is plain on-policy distillation. The table below "
                "has it by cell.",
                (Series("gate/mean", "mean w"),),
            ),
            Figure(
                "Agreement",
                "%",
                "Share of tokens where teacher and verdict point the same way (<i>d·v</i> &gt; tolerance). Most tokens "
                "have a <i>d</i> near 0 and a sign that is noise, so the curve weighted by |<i>d</i>| is the one to "
                "read.",
                (
                    Series("gate/agree_fraction_weighted", "weighted by |d|"),
                    Series("gate/agree_fraction", "of all tokens", "grey", True),
                ),
            ),
            Figure(
                "Four cells: share of tokens",
                "%",
                "Verdict × agreement. What is left to 100 % is neutral: <i>d</i> within the tolerance, or an unknown "
                "verdict.",
                _cells("share"),
                stacked=True,
            ),
            Figure(
                "Four cells: mean |d|",
                "nats",
                "How strongly the teacher speaks in each cell. A large value in <em>correct, conflict</em> is a "
                "teacher that argues against answers the verifier accepts.",
                _cells("logratio_abs_mean"),
                log=True,
            ),
        ),
    ),
    Section(
        "Health",
        "The usual ways for a run to go wrong show here first.",
        (
            Figure(
                "Entropy",
                "nats",
                "Mean entropy of the next-token distributions on the student's rollouts. The student should approach "
                "the teacher; falling far below it is collapse.",
                (
                    Series("entropy/student", "student"),
                    Series("entropy/teacher", "teacher", "orange"),
                ),
            ),
            Figure(
                "Completion length",
                "tokens",
                "Mean length of the student's rollouts, the end-of-sequence token included.",
                (Series("rollout/length_mean", "student"),),
            ),
            Figure(
                "Clipped and repetitive",
                "%",
                "Clipped: rollouts that ran out of tokens (max_completion_length). Repetition: share of a rollout's "
                "4-grams that it has had before.",
                (
                    Series("rollout/length_clipped", "clipped"),
                    Series("rollout/repetition", "repetition", "purple"),
                ),
            ),
            Figure(
                "Verdicts",
                "%",
                "What the verifier said of the student's rollouts. <em>Unknown</em> (a timeout, a crash, a reference "
                "answer that cannot be read) never moves the gate.",
                VERDICTS,
                stacked=True,
                shares=True,
            ),
            Figure(
                "Engine and trainer",
                "nats",
                "|log-probability while sampling − log-probability in the loss| of the same token. 0 up to rounding "
                "where the two run the same weights in the same dtype.",
                (
                    Series("engine/logprob_gap_mean", "mean"),
                    Series("engine/logprob_gap_max", "largest", "grey", True),
                ),
                log=True,
            ),
            Figure(
                "Verifier",
                "%",
                "Share of verified answers that ended otherwise than in a comparison of two answers.",
                (
                    Series("verifier/no_answer", "no answer"),
                    Series("verifier/truncated", "truncated", "orange"),
                    Series("verifier/timeout", "timeout", "purple"),
                    Series("verifier/error", "error", "green", True),
                    Series("verifier/crashed", "crashed", "grey", True),
                ),
            ),
        ),
    ),
    Section(
        "Teacher rollouts",
        "Phased teacher sampling: during the cold start a share of the slots is offered to the teacher, and what the "
        "verifier endorses enters the batch. A slot without an endorsed rollout goes back to the student.",
        (
            Figure(
                "Share and acceptance",
                "%",
                "Share: rollout slots offered to the teacher. Acceptance: offered rollouts that the verifier endorsed.",
                (
                    Series("phase/teacher_share", "share"),
                    Series("phase/acceptance", "acceptance", "green"),
                ),
                unless_zero=True,
            ),
            Figure(
                "Proposed and endorsed",
                "rollouts",
                "Teacher rollouts per update: proposed for a slot, and endorsed by the verifier.",
                (
                    Series("phase/teacher_proposed", "proposed"),
                    Series("phase/teacher_endorsed", "endorsed", "green"),
                ),
                unless_zero=True,
            ),
            Figure(
                "Loss on teacher rollouts",
                "nats",
                "Per token of endorsed teacher rollouts (teacher_rollout_loss). Kept apart from the student's, since "
                "they are not its own samples.",
                (Series("loss/teacher_rollouts", "teacher rollouts", "orange"),),
            ),
            Figure(
                "Reliability",
                "%",
                "How far the teacher is trusted where it contradicts the verdict: the share of its own rollouts on the "
                "prompt that the verifier endorsed, mean over rollouts.",
                (Series("phase/reliability", "reliability"),),
                unless_zero=True,
            ),
        ),
    ),
    Section(
        "Optimisation",
        "",
        (
            Figure("Learning rate", "", "Of AdamW, at each update.", (Series("optim/lr", "learning rate"),)),
            Figure(
                "Gradient norm",
                "",
                "Euclidean norm over all parameters, before clipping (max_grad_norm).",
                (Series("optim/grad_norm", "norm"),),
                log=True,
            ),
            Figure(
                "Clipped updates",
                "%",
                "Share of updates whose gradient was scaled down to max_grad_norm. Near 100 % the learning rate alone "
                "sets the size of a step.",
                (Series("optim/clipped_share", "clipped"),),
            ),
        ),
    ),
    Section(
        "Cost",
        "",
        (
            Figure(
                "Time per update",
                "s",
                "Wall-clock seconds of sampling, of verifying, and of the forward and backward passes with the update.",
                (
                    Series("time/rollout", "rollout", "blue"),
                    Series("time/verify", "verify", "purple"),
                    Series("time/update", "update", "green"),
                ),
                stacked=True,
            ),
            Figure(
                "Plan of the loss",
                "%",
                "Share of tokens by the plan of their loss: exact; filtered, where the gradient's products run over "
                "the entries that matter; quantized, where the logits come from integers first; blocks, on tiles of "
                "bf16 numbers.",
                (
                    Series("plan/exact", "exact", "grey"),
                    Series("plan/filtered", "filtered"),
                    Series("plan/quantized", "quantized", "green"),
                    Series("plan/blocks", "blocks", "purple"),
                ),
                stacked=True,
            ),
            Figure(
                "Kept gradient entries",
                "%",
                "Share of the gradient's entries (tokens × vocabulary) that entered its products one by one; 100 % for "
                "the exact plan.",
                (Series("plan/kept", "kept"),),
            ),
            Figure(
                "Error estimate",
                "",
                "Estimated relative error of loss and gradient, of an update's worst chunk (precision); 0 for the "
                "exact plan.",
                (Series("plan/error_estimate", "largest"),),
                unless_zero=True,
                log=True,
            ),
            Figure(
                "Throughput",
                "tokens/s",
                "Completion tokens trained on, per second of the whole update.",
                (Series("tokens_per_second", "tokens"),),
            ),
            Figure(
                "Tokens per update",
                "tokens",
                "Completion tokens that an update trained on.",
                (Series("tokens", "tokens"),),
            ),
        ),
    ),
)


def drawings(run: Run) -> list[tuple[Section, list[Drawing], list[str]]]:
    """Each section with its drawn figures, and the titles of the figures that the run has no numbers for."""
    drawn = []
    for section in SECTIONS:
        figures: list[Drawing] = []
        absent: list[str] = []
        if section.title == "Accuracy":
            figures += evaluation_drawings(run)
        for figure in section.figures:
            if measured(run, figure):
                figures.append(draw(run, figure))
            elif not figure.unless_zero:
                absent.append(figure.title)
        drawn.append((section, figures, absent))
    return drawn


def measured(run: Run, figure: Figure) -> bool:
    values = [value for series in figure.series for value in run.series(series.key) if math.isfinite(value)]
    return any(values) if figure.unless_zero else bool(values)


def draw(run: Run, figure: Figure) -> Drawing:
    """A figure over the updates of the run."""
    shown = [series for series in figure.series if run.has(series.key)]
    curves = [run.series(series.key) for series in shown]
    if figure.shares:
        curves = _shares(curves)
    legend = [(series, _in_axis_unit(last_tenth(values), figure.unit)) for series, values in zip(shown, curves)]

    def plot(axes: Axes) -> None:
        if figure.stacked:
            _stack(axes, run.steps, curves, shown)
        else:
            for series, values in zip(shown, curves):
                _line(axes, run.steps, values, series)
        finish(axes, figure.unit, [v for curve in curves for v in curve], log=figure.log, stacked=figure.stacked)

    changes = "; ".join(_change(series.label, run.steps, values, figure.unit) for series, values in zip(shown, curves))
    svg = to_svg(plot, f"{figure.title}. {changes}")
    return Drawing(figure.title, figure.unit, svg, legend, figure.definition, figure.stacked)


def average_name(record: Record) -> str:
    """avg@ the number of samples a question, which may be more than the k of pass@k."""
    return f"avg@{record.get('eval/samples', record.get('eval/k', 'k'))}"


def evaluation_drawings(run: Run) -> list[Drawing]:
    """avg@k and pass@k against the update, with standard errors; the teacher as a level to reach."""
    found = []
    for key, definition in (
        (
            "avg",
            "Held-out questions: mean accuracy over the samples of a question, then over questions. Bars and the "
            "teacher's band are ± one standard error over questions.",
        ),
        (
            "pass",
            "Held-out questions: chance that at least one of <i>k</i> samples is correct (unbiased estimator), mean "
            "over questions ± one standard error.",
        ),
    ):
        student = [r for r in run.evaluations("student") if math.isfinite(number(r.get(f"eval/{key}_at_k")))]
        if student:
            found.append(_evaluation_drawing(key, definition, student, run.teacher))
    return found


def _evaluation_drawing(key: str, definition: str, student: list[Record], teacher: Record | None) -> Drawing:
    value, error = f"eval/{key}_at_k", f"eval/{key}_at_k_se"
    name = average_name(student[-1]) if key == "avg" else f"pass@{student[-1].get('eval/k', 'k')}"
    title = f"Evaluation: {name}"
    steps, values = [r["step"] for r in student], [number(r[value]) for r in student]
    legend = [(Series(value, "student"), _in_axis_unit(values[-1], "%"))]
    level = math.nan if teacher is None else number(teacher.get(value))
    if teacher is not None and math.isfinite(level):
        legend.append((Series(value, "teacher", "orange", True), _in_axis_unit(level, "%")))

    def plot(axes: Axes) -> None:
        errors = [_or_zero(number(r.get(error))) for r in student]
        axes.errorbar(
            steps,
            values,
            errors,
            color=COLORS["blue"],
            marker="o",
            markersize=4,
            linewidth=1.8,
            elinewidth=1.2,
            capsize=0,
        )
        if teacher is not None and math.isfinite(level):
            width = _or_zero(number(teacher.get(error)))
            axes.axhspan(level - width, level + width, color=COLORS["orange"], alpha=0.18, linewidth=0)
            axes.axhline(level, color=COLORS["orange"], linewidth=1.5, linestyle=(0, (4, 2)))
        finish(axes, "%", [*values, level], log=False, stacked=False)

    description = f"{title}. {_change('student', steps, values, '%')}"
    if math.isfinite(level):
        description += f"; teacher {show(level, '%')}"
    return Drawing(title, "%", to_svg(plot, description), legend, definition)


def _shares(curves: Sequence[Sequence[float]]) -> list[list[float]]:
    """Counts as shares of their sum, update by update; NaN where there was nothing to count."""
    sums = [total(counts) for counts in zip(*curves)]
    return [[count / whole if whole else math.nan for count, whole in zip(curve, sums)] for curve in curves]


def _line(axes: Axes, steps: Sequence[int], values: Sequence[float], series: Series) -> None:
    color, style = COLORS[series.color], (0, (4, 2)) if series.dashed else "-"
    x, y = thin(steps, values)
    if sum(map(math.isfinite, y)) <= 2:  # a line needs two points, and gaps may part them
        axes.plot(x, y, color=color, linestyle="", marker="o", markersize=4)
        return
    if len(values) >= SMOOTHED_FROM:
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
        y = smooth(y)
    axes.plot(x, y, color=color, linewidth=1.8, linestyle=style)


def _stack(axes: Axes, steps: Sequence[int], curves: Sequence[Sequence[float]], shown: Sequence[Series]) -> None:
    x, thinned = thin(steps, curves[0])[0], [thin(steps, curve)[1] for curve in curves]
    layers = [[_or_zero(value) for value in (smooth(y) if len(steps) >= SMOOTHED_FROM else y)] for y in thinned]
    if len(x) == 1:  # one update has no width
        x, layers = [x[0] - 0.5, x[0] + 0.5], [layer * 2 for layer in layers]
    lower = [0.0] * len(x)
    for series, layer in zip(shown, layers):
        upper = [a + b for a, b in zip(lower, layer)]
        alpha = 0.55 if series.dashed else 0.8
        axes.fill_between(x, lower, upper, color=COLORS[series.color], alpha=alpha, linewidth=0)
        lower = upper


def finish(axes: Axes, unit: str, values: Sequence[float], *, log: bool, stacked: bool) -> None:
    """Scales, ticks and limits."""
    finite = [value for value in values if math.isfinite(value)]
    positive = [value for value in finite if value > 0]
    axes.margins(x=0.02, y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    if log and positive and len(positive) == len(finite) and max(positive) > 5 * min(positive):
        axes.set_yscale("log")
        decades = math.log10(max(positive) / min(positive))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,), numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(Ticks())
        return
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))  # at most two digits
    if unit == "%":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 6):g}"))
    else:
        axes.yaxis.set_major_formatter(Ticks())
    if stacked:
        axes.set_ylim(bottom=0)
        if unit == "%":
            axes.set_ylim(0, 1)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    elif finite and min(finite) == max(finite):  # a flat curve would get a scale of rounding noise
        width = abs(finite[0]) * 0.5 or (0.01 if unit == "%" else 1.0)
        axes.set_ylim(finite[0] - width, finite[0] + width)
    if unit == "%":
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02 * min(high, 1.02)), min(high, 1.02))  # no share is below 0


class Ticks(Formatter):
    """One notation for all labels of an axis: written out where they fit beside it, else with a power of ten."""

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        written = [f"{value:,.10g}" for value in values]
        if any("e" in text or len(text) > TICK_CHARACTERS for text in written):
            powers = [re.sub(r"(\.0)?e\+?(-?)0*", r"e\2", f"{value:.1e}") if value else "0" for value in values]
            if len(set(powers)) == len(values):  # not where it has too few digits, as for 1.00015 and 1.00020
                written = powers
        return [text.replace("-", "−") for text in written]

    def __call__(self, value: float, pos: int | None = None) -> str:
        return self.format_ticks([value])[0]


def to_svg(plot: Callable[[Axes], None], description: str) -> Markup:
    """`plot` on fresh axes, as an SVG element to put into the page."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": description,  # the same run gives the same page, byte for byte
        "font.size": 10.5,
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": GRID,
        "xtick.labelcolor": INK,
        "ytick.color": GRID,
        "ytick.labelcolor": INK,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "lines.solid_capstyle": "round",
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=SIZE)
        plot(canvas.add_axes(PLOT))
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), description)


def _inline(svg: str, description: str) -> Markup:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([^"]*)"', svg)
    assert view_box is not None
    body = svg[svg.index(">") + 1 :]
    # Ids are global in a page: two figures' "axes_1" and clip paths must not meet.
    prefix = f"f{zlib.crc32(description.encode()):x}-"
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", body)
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"-?\d+\.\d{3,}", _tenth_of_a_pixel, tag[0]), body)
    body = re.sub(r"\n\s*", "\n", body)
    for placeholder, variable in VARIABLES.items():
        body = body.replace(placeholder, f"var(--{variable})")
    label = Markup.escape(description)
    return Markup(f'<svg viewBox="{view_box[1]}" role="img" aria-label="{label}">{body}')


def _tenth_of_a_pixel(coordinate: re.Match[str]) -> str:
    return f"{float(coordinate[0]):.1f}".removesuffix(".0")


def thin(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points: means over equal stretches of updates, NaN left out."""
    if len(steps) <= MAX_POINTS:
        return list(steps), list(values)
    edges = [round(index * len(steps) / MAX_POINTS) for index in range(MAX_POINTS + 1)]
    stretches = list(itertools.pairwise(edges))
    return [mean(steps[a:b]) for a, b in stretches], [mean(values[a:b]) for a, b in stretches]


def smooth(values: Sequence[float]) -> list[float]:
    """Centred means over a twentieth of the points; gaps stay."""
    half = max(1, len(values) // 40)
    return [
        mean(values[max(0, i - half) : i + half + 1]) if math.isfinite(value) else math.nan
        for i, value in enumerate(values)
    ]


def _in_axis_unit(value: float, unit: str) -> str:
    """A number beside a key, where the title has the unit already."""
    return show(value, unit).removesuffix(f"\u00a0{unit}")


def _change(label: str, steps: Sequence[int], values: Sequence[float], unit: str) -> str:
    """A curve in words, for those who cannot see it."""
    points = [(step, value) for step, value in zip(steps, values) if math.isfinite(value)]
    if not points:
        return f"{label}: not measured"
    (first, a), (last, b) = points[0], points[-1]
    if first == last:
        return f"{label}: {show(a, unit)} at step {first}"
    return f"{label}: from {show(a, unit)} at step {first} to {show(b, unit)} at step {last}"


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0
