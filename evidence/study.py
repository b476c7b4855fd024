"""What is compared: the settings that all runs share, the arms, and the order in which they are run.

An arm is a line of settings on top of `SETTINGS`; its name is what the results say. Everything is paired: runs of the
same part, task, teacher, student and seed see the same prompts in the same order, and are compared with their `opd`.
docs/evidence.md has what came out, docs/evidence-protocol.md what was asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from checkpoints import STUDENTS, TEACHERS
from constructed import TASKS

BASELINE = "opd"
SETTINGS: dict[str, Any] = {
    "dataset_test_split": "test",
    "eval_dataset_size": 256,
    "num_generations": 1,
    "per_device_train_batch_size": 64,
    "verifier": "exact",
    "estimator": "full",
    "max_steps": 80,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "num_generations_eval": 16,
    "per_device_eval_batch_size": 1024,
    "num_completions_to_log": 0,
    "num_tokens_to_log": 0,
    "logging_steps": 1000,
    "save_total_limit": 1,
    "use_cpu": True,
    "num_threads": 1,
}
# A real language model (evidence/smollm2.py): what differs from SETTINGS.
REAL_SETTINGS: dict[str, Any] = {
    "dataset_name": "task:arithmetic",
    "dataset_size": 1000,
    "eval_dataset_size": 64,
    "per_device_eval_batch_size": 256,
    "max_completion_length": 32,
    "num_generations": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "verifier": "math",
    "verifier_workers": 1,
    "max_steps": 16,
    "warmup_steps": 2,
    "bf16": True,
}
REAL_PART = "real, 16 answers"  # the first seeds gave 4, and stand apart
LEARNING_RATES = {"weak": 1e-3, "early": 1e-3, "smollm2": 5e-5}
PARTS: dict[str, dict[str, Any]] = {
    "main": {},
    "phased": {"cold_start_steps": 25, "teacher_share": 0.5},
    "sampled": {"estimator": "sampled"},
    "grouped": {"num_generations": 4},  # a task reward compares the rollouts of a prompt
    "real": {**REAL_SETTINGS, "num_generations_eval": 4, "per_device_eval_batch_size": 64},
    REAL_PART: REAL_SETTINGS,
}


class Arm(NamedTuple):
    name: str
    settings: dict[str, Any]
    group: str  # "gate", "control", "sign", "constant", "learning rate", "published", "trust", "grouped"
    says: str  # what it is, in the page's words
    rate: float = 1.0  # factor on the student's learning rate


def constant(correct_conflict: float, incorrect: float) -> dict[str, Any]:
    return {"gate": "opd", "gate_agree": [1.0, incorrect], "gate_conflict": [correct_conflict, incorrect]}


def by_sign(positive: float, negative: float) -> dict[str, Any]:
    """Weights by the sign of d, whatever the verdict: d > 0 agrees with "correct" and conflicts with "incorrect"."""
    return {"gate": "opd", "gate_agree": [positive, negative], "gate_conflict": [negative, positive]}


PROBES = {"teacher_probes": 4}
REWARD = {"reward_weight": 1.0}
TRUST = {"gate": "trust", **PROBES}
PROTECTED_RANDOM = {"gate": "random", "gate_agree": 1.0, "gate_conflict": [0.0, 1.0]}
ARMS = {
    arm.name: arm
    for arm in (
        Arm("opd", {"gate": "opd"}, "gate", "plain on-policy distillation"),
        Arm("sg-opd", {"gate": "sg-opd"}, "gate", "agree 1.8"),
        Arm("opdvr", {"gate": "opdvr"}, "gate", "conflicts 0"),
        Arm("protect", {"gate": "protect"}, "gate", "conflicts 0 in correct rollouts"),
        Arm("half", {"gate": "half"}, "gate", "protect, and 0.5 on incorrect rollouts"),
        Arm("trust", TRUST, "gate", "protect, and r on incorrect rollouts, 4 probes"),
        Arm(
            "half, verdicts shuffled", {**constant(0.0, 0.5), "gate": "shuffled"}, "control", "half, verdicts of others"
        ),
        Arm("trust, r dealt", {**TRUST, "teacher_reliability_source": "dealt"}, "control", "r of another prompt"),
        Arm("incorrect 0.5", constant(1.0, 0.5), "control", "0.5 on incorrect rollouts, without protect"),
        Arm("random", {"gate": "random"}, "control", "1.8 on as many tokens as sg-opd, at random"),
        Arm("opdvr, random", {"gate": "random", "gate_agree": 1.0, "gate_conflict": 0.0}, "control", "as many dropped"),
        Arm("protect, random", PROTECTED_RANDOM, "control", "in correct rollouts, dropped at random"),
        Arm("d > 0 alone", by_sign(1.0, 0.0), "sign", "tokens of d < 0 count 0, without the verdict"),
        Arm("d < 0 alone", by_sign(0.0, 1.0), "sign", "tokens of d > 0 count 0, without the verdict"),
        Arm("trust, d > 0 alone", {**by_sign(1.0, 0.0), **TRUST}, "sign", "and r on incorrect rollouts, 4 probes"),
        Arm("opd, rate × 0.5", {"gate": "opd"}, "learning rate", "", 0.5),
        Arm("opd, rate × 0.71", {"gate": "opd"}, "learning rate", "", 0.5**0.5),
        Arm("opd, rate × 1.41", {"gate": "opd"}, "learning rate", "", 2**0.5),
        Arm("opd, rate × 2", {"gate": "opd"}, "learning rate", "", 2.0),
        Arm("opd, rate × 2.83", {"gate": "opd"}, "learning rate", "", 2**1.5),
        Arm("opd, rate × 4", {"gate": "opd"}, "learning rate", "", 4.0),
        Arm("protect, incorrect 0.75", constant(0.0, 0.75), "constant", ""),
        Arm("protect, incorrect 0.25", constant(0.0, 0.25), "constant", ""),
        Arm("protect, incorrect 0", constant(0.0, 0.0), "constant", ""),
        Arm("incorrect 0.75", constant(1.0, 0.75), "constant", ""),
        Arm("incorrect 0.25", constant(1.0, 0.25), "constant", ""),
        Arm("verified-only", {"gate": "verified-only"}, "constant", "incorrect rollouts 0, no protect"),
        Arm("failure-only", {"gate": "failure-only"}, "constant", "correct rollouts 0"),
        Arm("inverse", {"gate": "inverse"}, "control", "agree 0"),
        Arm("q-protect", {"gate": "q-protect"}, "published", "incorrect: conflicts 1 − π_T(rollout)"),
        Arm(
            "exopd",
            {"gate": "exopd", "reference_model_name_or_path": "student"},
            "published",
            "from the student's start",
        ),
        Arm("rg-opd", {"gate": "rg-opd"}, "published", "arXiv 2607.04037, whole rollouts"),
        Arm("r2-opd", {"gate": "r2-opd"}, "published", "arXiv 2609.35517, its β of 0.001"),
        Arm("r2-opd, β 1", {"gate": "r2-opd", "gate_sharpness": 1.0}, "published", ""),
        Arm("trust, 1 probe", {**TRUST, "teacher_probes": 1}, "trust", ""),
        Arm("trust, 8 probes", {**TRUST, "teacher_probes": 8}, "trust", ""),
        Arm("trust, r²", {**TRUST, "teacher_reliability_power": 2.0}, "trust", ""),
        Arm("trust, r ≥ 0.5", {**TRUST, "teacher_reliability_threshold": 0.5}, "trust", ""),
        Arm("trust, half at most", {**TRUST, "gate_agree": [1.0, 0.5], "gate_conflict": [0.0, 0.5]}, "trust", "0.5·r"),
        Arm(
            "trust, the student's r",
            {"gate": "trust", "teacher_reliability_source": "student"},
            "trust",
            "the student's own pass rate",
        ),
        Arm("opd, reward", {"gate": "opd", **REWARD}, "grouped", "and the task reward"),
        Arm("half, reward", {"gate": "half", **REWARD}, "grouped", "and the task reward"),
        Arm("reward alone", {**constant(0.0, 0.0), "gate_agree": 0.0, "gate_neutral": 0.0, **REWARD}, "grouped", ""),
        Arm("tgopd", {"gate": "tgopd", "teacher_probes": 3, **REWARD}, "grouped", "arXiv 2609.02998"),
        Arm("diffgate", {"gate": "diffgate", **REWARD}, "grouped", "arXiv 2610.04596"),
        Arm("opd, p(1 − p)", {"gate": "opd", "prompt_weight": [1, 1]}, "grouped", "PACED, arXiv 2603.11178"),
    )
}
CORE = ("opd", "sg-opd", "opdvr", "protect", "half", "trust")


def arms_of(group: str) -> tuple[str, ...]:
    return tuple(arm.name for arm in ARMS.values() if arm.group == group)


CONTROLS, SIGNS, RATES, PUBLISHED = map(arms_of, ("control", "sign", "learning rate", "published"))
GROUPED = arms_of("grouped")  # beside CORE, in that part alone
REST = tuple(name for name in ARMS if name not in (*CORE, *CONTROLS, *SIGNS, *RATES, *GROUPED))


class Cell(NamedTuple):
    """One run; its fields are what tells it from all others."""

    part: str
    task: str
    teacher: str
    student: str
    arm: str
    seed: int


REAL_TEACHERS = ("wrong", "right")
REAL_UNSEEN = 3  # seeds from here on had not been seen when the protocol said what to look for
REAL_ARMS = {"real": (*CORE, "random"), REAL_PART: (*CORE, "random", "trust, r²")}
REAL_CONTROLS = {"trust, r dealt": "trust"}  # of which arm; asked late: rows where all seeds have it
REAL = [
    Cell(REAL_PART, "arithmetic", teacher, "smollm2", arm, seed)
    for seed in range(8)
    for teacher in REAL_TEACHERS
    for arm in (*REAL_ARMS[REAL_PART], *REAL_CONTROLS)
]

# Breadth first: each wave adds arms or seeds to what is there.
WAVES: tuple[tuple[str, str, tuple[str, ...], range], ...] = (  # part, student, arms, seeds
    ("main", "weak", CORE, range(0, 3)),
    ("main", "weak", (*CONTROLS, *RATES), range(0, 2)),
    ("main", "early", CORE, range(0, 2)),
    ("main", "weak", REST, range(0, 1)),
    ("phased", "weak", CORE, range(0, 1)),
    ("sampled", "weak", CORE, range(0, 1)),
    ("grouped", "weak", (*CORE, *GROUPED), range(0, 1)),
    ("main", "weak", (*CONTROLS, *RATES), range(2, 3)),
    ("main", "early", CORE, range(2, 3)),
    ("main", "weak", REST, range(1, 3)),
    ("phased", "weak", CORE, range(1, 3)),
    ("sampled", "weak", CORE, range(1, 3)),
    ("grouped", "weak", (*CORE, *GROUPED), range(1, 3)),
    ("main", "weak", CORE, range(3, 8)),
    ("main", "weak", SIGNS, range(3, 8)),
    ("main", "early", SIGNS, range(3, 8)),
    ("main", "early", (*CORE, *CONTROLS, *RATES), range(0, 8)),
    ("main", "weak", (*CORE, *CONTROLS, *RATES, *REST), range(3, 8)),
    ("main", "weak", (BASELINE, "trust", *REST), range(8, 10)),  # REST had one seed with the first models
    ("phased", "weak", CORE, range(3, 8)),
    ("sampled", "weak", CORE, range(3, 8)),
    ("grouped", "weak", (*CORE, *GROUPED), range(3, 8)),
    ("main", "early", (*CORE, *CONTROLS, *RATES, *REST), range(0, 8)),
)


def plan() -> list[Cell]:
    """Every run of the study, in order."""

    def runs() -> Iterator[Cell]:
        for part, student, arms, seeds in WAVES:
            for seed in seeds:
                for arm in arms:
                    for teacher in TEACHERS:
                        for task in TASKS:
                            yield Cell(part, task, teacher, student, arm, seed)

    return list(dict.fromkeys(runs()))


def models_of(line: dict[str, Any]) -> tuple[str | None, str | None]:
    """Digests of the student and the teacher of a run: made elsewhere, they are others."""
    return line.get("student_sha256"), line.get("teacher_sha256")


def settings_of(cell: Cell) -> dict[str, Any]:
    """The configuration of a run, without its paths."""
    arm = ARMS[cell.arm]
    rate = LEARNING_RATES[cell.student] * arm.rate
    return {**SETTINGS, "learning_rate": rate, **PARTS[cell.part], **arm.settings, "seed": cell.seed}


assert {student for _, student, _, _ in WAVES} == set(STUDENTS)
