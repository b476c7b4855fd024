"""report.html: one self-contained page about a run, made from its run directory. It reads without scripts as well."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sgopd.config import UserError
from sgopd.files import new_file
from sgopd.report import compare
from sgopd.report.checks import checks
from sgopd.report.figures import CELLS, SMOOTHED_FROM, average_name, drawings
from sgopd.report.inspector import TEXT_SHOWN, Packed, cut, pack
from sgopd.report.quantities import last_tenth, number, points, show, total
from sgopd.report.run import Record, Run, paired, read_run

__all__ = ["write_comparison", "write_report"]

MARK, COMPARISON = "SG-OPD run report", "SG-OPD comparison of runs"  # in the title of every page
HERE = Path(__file__).parent
SCRIPT = (HERE / "inspector.js").read_text(encoding="utf-8")
# The page's one script, by its hash, and no text that becomes markup in it.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` into a run directory and returns its path.

    Reads metrics.jsonl and, where they exist, config.yaml and completions/*.parquet. The page depends on these
    files alone: writing it twice gives the same bytes. A run that is still going, was killed, or measured only a part
    gives a page with gaps.

    Raises:
        FileNotFoundError: there is no metrics.jsonl of a run in `run_dir`.
        UserError: the page cannot be written, or another one has its name.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    target = run_dir / "report.html"
    write_page(target, MARK, render(run, pack(run_dir / "completions", run.unreadable)))
    return target


def write_comparison(run_dirs: Sequence[str | Path], target: str | Path) -> Path:
    """Writes a page that compares runs, and returns its path.

    Raises:
        FileNotFoundError: one of `run_dirs` has no metrics.jsonl of a run.
        UserError: too many configurations, a seed that is there twice, the page cannot be written, or another one has
            its name.
    """
    target, runs = Path(target), [read_run(Path(run_dir)) for run_dir in run_dirs]
    groups = compare.grouped(runs)
    last = next((run.after for run in runs if run.after is not None), {})
    page = template("comparison.html.jinja").render(
        policy=POLICY,
        names=[run.name for run in runs],
        groups=groups,
        rows=compare.rows(groups),
        cautions=compare.cautions(groups),
        differing=list(groups[0].settings),
        sections=compare.drawings(groups),
        average_name=average_name(last),
        passing_name=f"pass@{last.get('eval/k', 'k')}",
        unreadable=[f"{run.name}: {sentence}" for run in runs for sentence in run.unreadable],
    )
    write_page(target, COMPARISON, page)
    return target


def write_page(target: Path, mark: str, page: str) -> None:
    """Writes a page of ours, but not over one of someone else."""
    if target.exists() and mark not in target.read_text(encoding="utf-8", errors="replace"):
        what = "report of a run" if mark == MARK else "comparison of runs"
        raise UserError(
            f"{target} is no {what}, and would be overwritten: move it away, then `sgopd report`"
            + (", or choose another --output" if mark == COMPARISON else "")
        )
    with new_file(target) as path:  # a reader never sees half a page
        path.write_text(page, encoding="utf-8", errors="replace")


def template(name: str) -> jinja2.Template:
    """Every text of a run is escaped; only figures and definitions are markup."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)


def render(run: Run, rollouts: Packed | None) -> str:
    """The page of one run."""
    return template("report.html.jinja").render(
        run=run,
        rollouts=rollouts,
        script=Markup(SCRIPT),
        policy=POLICY,
        facts=facts(run),
        headline=headline(run),
        results=results(run),
        changes=changes(run),
        **result_names(run),
        checks=checks(run),
        findings=findings(run),
        sections=[(section, Markup(section.note), drawn, absent) for section, drawn, absent in drawings(run)],
        cells=cells(run),
        completions=[shown_completion(row) for row in run.completions],
        smoothed=len(run.train) >= SMOOTHED_FROM,
    )


@dataclass(frozen=True)
class Score:
    """One quantity of the results table, as text and as a share of the bar."""

    text: str
    error: str
    share: float  # in [0, 1]


@dataclass(frozen=True)
class Result:
    """One row of the results table."""

    who: str
    average: Score
    passing: Score
    length: str


def facts(run: Run) -> list[tuple[str, str]]:
    """What was run, in a line."""
    config = run.config
    named = [
        ("student", _model_name(config.get("model_name_or_path"))),
        ("teacher", _model_name(config.get("teacher_model_name_or_path"))),
        ("data", config.get("dataset_name")),
        ("gate", config.get("gate")),
        ("estimator", config.get("estimator")),
        ("divergence", config.get("divergence")),
        ("parameters", _count(run.start.get("parameters"))),
        ("device", run.start.get("device")),
        ("updates", f"{len(run.train):,}" if run.train else None),
        ("tokens", _count(total(run.series("tokens")))),
        ("time", _duration(run)),
    ]
    return [(name, str(value)) for name, value in named if value]


def findings(run: Run) -> tuple[list[str], list[str]]:
    """What the run said before its first rollout: what asks for action, and the rest."""
    said = run.start.get("findings")
    lines = [str(line) for line in said] if isinstance(said, list) else []
    mark = "warning: "
    return [line.removeprefix(mark) for line in lines if line.startswith(mark)], [
        line for line in lines if not line.startswith(mark)
    ]


def headline(run: Run) -> str:
    """What came out, in a sentence."""
    before, after, teacher = run.before, run.after, run.teacher
    if before is None or after is None:
        accuracy = run.series("rollout/accuracy")
        if not any(map(math.isfinite, accuracy)):
            return "No accuracy was measured in this run."
        at_the_end = show(last_tenth(accuracy), "%")
        return f"Rollout accuracy was {at_the_end} at the end. The student was not evaluated both before and after."
    a, b = number(before["eval/avg_at_k"]), number(after["eval/avg_at_k"])
    moved = "rose" if b > a else "fell" if b < a else "stayed"
    text = f"{average_name(after)} {moved} from {show(a, '%')} to {show(b, '%')} in {after['step']:,} updates"
    if teacher is not None:
        text += f"; the teacher has {show(number(teacher['eval/avg_at_k']), '%')}"
    return text + "."


def results(run: Run) -> list[Result]:
    """The student before and after, and the teacher: whichever were evaluated."""
    who = (("Student, before", run.before), ("Student, after", run.after), ("Teacher", run.teacher))
    return [
        Result(name, _score(record, "avg"), _score(record, "pass"), show(number(record.get("eval/length_mean"))))
        for name, record in who
        if record is not None
    ]


def changes(run: Run) -> list[tuple[str, str, str]]:
    """(what, of avg@k, of pass@k) in points, paired per question: what training did, and what the teacher has left."""
    rows = (("Change of the student", run.before, run.after), ("Teacher − student after", run.after, run.teacher))
    found = []
    for name, before, after in rows:
        average, passing = paired(before, after, "avg"), paired(before, after, "pass")
        if average is not None:
            found.append((name, points(*average), points(*passing) if passing is not None else "–"))
    return found


def result_names(run: Run) -> dict[str, str]:
    """Names of the columns of the results table, and how many questions it is over."""
    evaluations = [*run.evaluations("student"), *run.evaluations("teacher")]
    last = evaluations[-1] if evaluations else {}
    return {
        "average_name": average_name(last),
        "passing_name": f"pass@{last.get('eval/k', 'k')}",
        "questions": str(last.get("eval/questions", "the")),
    }


def cells(run: Run) -> list[tuple[str, list[str]]]:
    """The four cells at the end of the run: share of tokens, mean d, mean |d|, mean w."""
    rows = []
    for cell, label, _, _ in CELLS:
        values = [
            show(last_tenth(run.series(f"cell/{cell}/{quantity}")), unit)
            for quantity, unit in (("share", "%"), ("logratio_mean", ""), ("logratio_abs_mean", ""), ("gate_mean", ""))
        ]
        rows.append((label, values))
    return rows if run.has("cell/correct_agree/share") else []


def shown_completion(row: Record) -> dict[str, Any]:
    """A row of completions/*.parquet as the template takes it: text only, cut to a readable length."""
    verdict = {1: "correct", -1: "incorrect"}.get(row.get("verdict", 0), "unknown")
    return {
        "step": row.get("step"),
        "source": row.get("source") or "student",
        "verdict": verdict,
        "reason": row.get("reason") or "",
        "answer": _text(row.get("answer")),
        "prompt": _text(row.get("prompt")),
        "completion": _text(row.get("completion")),
    }


def _text(value: Any) -> str:
    if isinstance(value, list):  # a conversation
        value = "\n".join(f"[{m.get('role')}] {m.get('content')}" for m in value if isinstance(m, dict))
    return cut("" if value is None else str(value), TEXT_SHOWN)


def _score(record: Record, which: str) -> Score:
    value, error = number(record.get(f"eval/{which}_at_k")), number(record.get(f"eval/{which}_at_k_se"))
    text, deviation = (show(x, "%").removesuffix("\u00a0%") for x in (value, error))  # the column's head has the unit
    return Score(text, deviation, value if math.isfinite(value) else 0.0)


def _model_name(path: Any) -> str | None:
    if isinstance(path, dict):  # several teachers
        return ", ".join(f"{name}: {_model_name(one)}" for name, one in path.items())
    return Path(str(path)).name if path else None


def _count(value: Any) -> str | None:
    count = number(value)
    return f"{count:,.0f}" if count > 0 else None


def _duration(run: Run) -> str | None:
    parts = ("time/rollout", "time/verify", "time/update")
    seconds = sum(total(run.series(part)) for part in parts)
    if not seconds:
        return None
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
