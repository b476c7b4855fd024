"""The known failure modes of on-policy distillation, looked for in a run's numbers, in the report and while it runs.

Each check says what it found and, where something is wrong, what to do. The thresholds are rules of thumb: they
point at curves to look at, and prove nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from sgopd.report.course import Course, Record
from sgopd.report.quantities import number, points, show
from sgopd.report.run import Run, paired

TREND_STEPS = 10  # updates; a shorter run has no trend to judge
LENGTH_GROWTH = 1.5  # × the first tenth's mean length
CLIPPED_SHARE = 0.2
ENTROPY_OF_TEACHER = 0.5  # × the teacher's entropy on the same tokens
ENTROPY_OF_START = 0.2  # × the student's first tenth, where the teacher's entropy is not known
UNKNOWN_SHARE = 0.05
ENGINE_GAP = 0.05  # nats, mean per token; two engines in bfloat16 differ by about 0.01
KL_GROWTH = 1.2  # × the first tenth's mean
REPETITION_SHARE = 0.3
LEAST_WEIGHT = 0.05  # mean of the gate
WITHOUT_VERDICT = (
    "They train as plain distillation with most gates, and not at all with verified-only, failure-only and diffgate."
)


@dataclass(frozen=True)
class Check:
    """What one check came to. `advice` is empty unless something is wrong."""

    name: str
    state: Literal["warning", "fine", "not measured"]
    finding: str
    advice: str = ""


def fine(name: str, finding: str) -> Check:
    return Check(name, "fine", finding)


def warning(name: str, finding: str, advice: str) -> Check:
    return Check(name, "warning", finding, advice)


def not_measured(name: str, why: str) -> Check:
    return Check(name, "not measured", why)


def checks(run: Run) -> list[Check]:
    """All checks, warnings first."""
    course = Course.of(run)
    found = [check(course) for check in (completed, *CHECKS)]
    order = ("warning", "fine", "not measured")
    return sorted(found, key=lambda check: order.index(check.state))


class Health:
    """The checks on a run that goes on: what is wrong, said once, when it first is.

    Args:
        records: what the run has written so far; what is wrong in them already was said, and is not said again.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.course = Course()
        for record in records:
            self.course.see(record)
        self.said = {check.name for check in warnings(self.course)}

    def see(self, record: Record) -> None:
        self.course.see(record)

    def news(self) -> list[Check]:
        """Warnings that did not hold before."""
        found = [check for check in warnings(self.course) if check.name not in self.said]
        self.said |= {check.name for check in found}
        return found


def warnings(course: Course) -> list[Check]:
    """What is wrong in a run that goes on. Its first updates are too few to say."""
    if course.updates < TREND_STEPS:
        return []
    return [found for check in CHECKS if (found := check(course)).state == "warning"]


def completed(course: Course) -> Check:
    name = "End of the run"
    if course.finished:
        return fine(name, f"{course.updates} updates were recorded, and the end of the run.")
    return warning(
        name,
        f"The record stops after update {course.step}, without the end of the run.",
        "If it is not still running, continue it with resume_from_checkpoint: auto.",
    )


def accuracy(course: Course) -> Check:
    return _evaluated(
        course,
        "Accuracy",
        "avg",
        "The student got worse. Lower the learning rate, check that the teacher is better than the student on "
        "these questions, and try gate: opd to see whether the gate is the cause.",
    )


def diversity(course: Course) -> Check:
    return _evaluated(
        course,
        "Diversity",
        "pass",
        "Some answers that the student could reach by trying several times are out of its reach now. Where that "
        "matters, train for fewer updates, or try gate: protect, which never pushes down a token of a correct "
        "rollout.",
    )


def _evaluated(course: Course, name: str, which: str, advice: str) -> Check:
    """Whether avg@k or pass@k fell, and what to do then."""
    change, error, how = _gain(course, which)
    if not math.isfinite(change):
        return not_measured(name, "There is no evaluation both before and after training (eval_on_start).")
    finding = f"{which}@k changed by {points(change)} points (two standard errors{how}: {200 * error:.1f})."
    return warning(name, finding, advice) if _fell(change, error) else fine(name, finding)


def _gain(course: Course, which: str) -> tuple[float, float, str]:
    """Change of avg@k or pass@k from before to after training, its standard error, and whether that is paired."""
    records = [record if record is not None else {} for record in (course.before, course.after)]
    before, after = (number(record.get(f"eval/{which}_at_k")) for record in records)
    if (of_questions := paired(course.before, course.after, which)) is not None:
        return after - before, of_questions[1], ", paired"
    return after - before, math.hypot(*(number(record.get(f"eval/{which}_at_k_se")) for record in records)), ""


def _fell(change: float, error: float) -> bool:
    return change < -2 * error if math.isfinite(error) else change < 0


def length_inflation(course: Course) -> Check:
    name = "Length"
    lengths = course.trends["rollout/length_mean"]
    if not lengths.count or course.updates < TREND_STEPS:
        return _short(name, course, "rollout/length_mean")
    first, last = lengths.first, lengths.last
    clipped = course.trends["rollout/length_clipped"].last
    finding = (
        f"Mean length went from {show(first)} to {show(last, 'tokens')}; {show(clipped, '%')} were clipped at the end."
    )
    if last > LENGTH_GROWTH * first:
        return warning(
            name,
            finding,
            "The usual cause is an end-of-sequence token or a chat template that differs between student and "
            "teacher: read what the run said of them at its start, and set the same eos_token_id in both generation "
            "configs.",
        )
    if clipped > CLIPPED_SHARE:
        return warning(
            name,
            finding,
            "Many rollouts run out of tokens, and a truncated rollout counts as incorrect: raise "
            "max_completion_length, or check that the student ever writes its end-of-sequence token.",
        )
    return fine(name, finding)


def entropy_collapse(course: Course) -> Check:
    name = "Entropy"
    student = course.trends["entropy/student"]
    if not student.count or course.updates < TREND_STEPS:
        return _short(name, course, "entropy/student")
    first, last = student.first, student.last
    teacher = course.trends["entropy/teacher"].last
    finding = (
        f"The student's went from {show(first)} to {show(last, 'nats')}; the teacher's is {show(teacher, 'nats')}."
    )
    if math.isfinite(teacher):
        collapsed = last < first and last < ENTROPY_OF_TEACHER * teacher
    else:
        collapsed = last < ENTROPY_OF_START * first
    if collapsed:
        return warning(
            name,
            finding,
            "The student is surer than the teacher it learns from. Bring gate_agree back towards 1 (extrapolation "
            "sharpens), lower the learning rate, and compare pass@k with avg@k: diversity goes first.",
        )
    return fine(name, finding)


def divergence(course: Course) -> Check:
    name = "KL to the teacher"
    kl = course.trends["kl"]
    if not kl.count or course.updates < TREND_STEPS:
        return _short(name, course, "kl")
    first, last = kl.first, kl.last
    finding = f"KL to the teacher went from {show(first)} to {show(last, 'nats')} per token."
    if course.trends["reward/taught"].total > 0:  # the reward may lead where the teacher does not
        return fine(name, f"{finding} Beside a task reward it may rise: avg@k says what that was worth.")
    if last > KL_GROWTH * first:
        return warning(
            name,
            finding,
            "The student moves away from the teacher: the learning rate, or the extrapolation (gate_agree well above "
            "1), is too large. Go back to gate: opd first; if it still rises, lower the learning rate.",
        )
    return fine(name, finding)


def teacher_acceptance(course: Course) -> Check:
    name = "Teacher acceptance"
    proposed, accepted = (course.trends[f"phase/teacher_{word}"].total for word in ("proposed", "endorsed"))
    if not proposed:
        return not_measured(name, "No slot was offered to the teacher (cold_start_steps).")
    finding = f"The verifier endorsed {accepted:,.0f} of {proposed:,.0f} teacher rollouts."
    if accepted == 0:
        return warning(
            name,
            finding,
            "The cold start did nothing. Read some teacher rollouts: does it solve the task at all, end its answer in "
            "the form that the verifier reads, within max_completion_length? Is answer_column the right one?",
        )
    return fine(name, finding)


def verdict_balance(course: Course) -> Check:
    name = "Verdicts"
    if not course.has("rollout/correct"):
        return not_measured(name, "rollout/correct was not recorded.")
    if verdict_share(course, "unknown") == 1:
        return warning(
            name,
            "No rollout got a verdict.",
            f"{WITHOUT_VERDICT} Look at what the verifier returns for a few completions.",
        )
    share = verdict_share(course, "correct")
    finding = f"{show(share, '%')} of the student's rollouts were correct."
    if share == 0:
        return warning(
            name,
            finding,
            "Without one correct rollout the gate sees half of its cells. Check the verifier on a few completions by "
            "hand (`sgopd watch` shows some), use easier prompts, or start with teacher rollouts (cold_start_steps).",
        )
    return fine(name, finding)


def unknown_verdicts(course: Course) -> Check:
    name = "Unknown verdicts"
    if not course.has("rollout/unknown"):
        return not_measured(name, "rollout/unknown was not recorded.")
    unknown = verdict_share(course, "unknown")
    finding = f"{show(unknown, '%')} of the student's rollouts got no verdict."
    if unknown > UNKNOWN_SHARE:
        faults = {fault: course.trends[f"verifier/{fault}"].mean for fault in ("timeout", "error", "crashed")}
        known = {fault: share for fault, share in faults.items() if share > 0}
        cause = f" Most often: {max(known, key=known.__getitem__)}." if known else ""
        return warning(
            name,
            finding + cause,
            f"{WITHOUT_VERDICT} Raise verifier_timeout for timeouts, "
            "verifier_memory_mb for crashes; reference answers that cannot be read were listed when the data was "
            "loaded.",
        )
    return fine(name, finding)


def weights(course: Course) -> Check:
    name = "Weights"
    if not course.has("gate/mean"):
        return not_measured(name, "gate/mean was not recorded.")
    mean = course.trends["gate/mean"].last
    finding = f"A token weighs {show(mean)} at the end, in the mean."
    taught = course.trends["reward/taught"].last
    if taught > 0:
        return fine(name, f"{finding} The task reward teaches {show(taught, '%')} of the rollouts beside that.")
    if beside := [one for one in ("prompt_weight", "position_half_life") if course.settings.get(one) is not None]:
        return not_measured(
            name, f"{finding} How much of that is the gate is not known: {' and '.join(beside)} weighs."
        )
    if mean < LEAST_WEIGHT:
        return warning(
            name,
            finding,
            "Nearly nothing is learned. With gate: trust it means that the verifier endorses next to none of the "
            "teacher's rollouts (phase/reliability): read some, and take gate: half or protect, or another teacher.",
        )
    return fine(name, finding)


def engine_gap(course: Course) -> Check:
    name = "Engine and trainer"
    if not course.has("engine/logprob_gap_mean"):
        return not_measured(name, "engine/logprob_gap_mean was not recorded.")
    gap = course.trends["engine/logprob_gap_mean"].largest
    finding = f"Their log-probabilities differ by {show(gap, 'nats')} per token at most (mean of an update)."
    if gap > ENGINE_GAP:
        return warning(
            name,
            finding,
            "Rollouts are not sampled from the policy in training: use one dtype in both engines (float32 to find "
            "out), leave top_k and top_p off, and check that the weights are handed over after every update.",
        )
    return fine(name, finding)


def repetition(course: Course) -> Check:
    name = "Repetition"
    if not course.has("rollout/repetition"):
        return not_measured(name, "rollout/repetition was not recorded.")
    share = course.trends["rollout/repetition"].last
    finding = f"{show(share, '%')} of the 4-grams in a rollout repeat earlier ones at the end."
    if share > REPETITION_SHARE:
        return warning(
            name,
            finding,
            "Read the completions below: a loop that the teacher continues with confidence has a small KL, so "
            "distillation will not cure it. Lower max_completion_length, or raise the temperature of sampling.",
        )
    return fine(name, finding)


def skipped_updates(course: Course) -> Check:
    name = "Skipped updates"
    if not course.has("optim/skipped"):
        return not_measured(name, "optim/skipped was not recorded.")
    skipped = course.trends["optim/skipped"].largest  # counted since the start
    finding = f"{skipped:,.0f} of {course.updates:,} updates were skipped."
    if skipped:
        return warning(
            name,
            finding,
            "Their loss or gradient was not finite. Try dtype: float32, a smaller learning rate, a smaller gate_agree; "
            "if it happens at the first update, look for NaN in the checkpoints.",
        )
    return fine(name, finding)


def verdict_share(course: Course, verdict: str) -> float:
    """Share of the student's rollouts with this verdict, over the whole run."""
    counts = {word: course.trends[f"rollout/{word}"].total for word in ("correct", "incorrect", "unknown")}
    return counts[verdict] / (sum(counts.values()) or math.nan)


CHECKS: tuple[Callable[[Course], Check], ...] = (
    accuracy,
    diversity,
    divergence,
    length_inflation,
    entropy_collapse,
    teacher_acceptance,
    verdict_balance,
    unknown_verdicts,
    weights,
    engine_gap,
    repetition,
    skipped_updates,
)


def _short(name: str, course: Course, key: str) -> Check:
    if not course.has(key):
        return not_measured(name, f"{key} was not recorded.")
    return not_measured(name, f"A run of fewer than {TREND_STEPS} updates has no trend.")
