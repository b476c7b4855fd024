"""The study's machinery: tasks, statistics, runs that are stopped and go on, the page."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import study
from constructed import MANNERS, MISPLACED, MISREAD, TASKS, questions
from run_study import by_kind, run
from smollm2 import forgetful
from study_page import (
    Results,
    crossed,
    estimate,
    rates_told,
    real_columns,
    real_table,
    show,
    t_power,
    t_quantile,
    table,
    with_best_rate,
)


@pytest.mark.parametrize("task", TASKS)
def test_a_right_solution_is_right_and_the_splits_are_apart(task: str) -> None:
    rng = random.Random(0)
    asked = {split: questions(task, split, 300, seed=5) for split in ("train", "test")}
    assert not {row["prompt"] for row in asked["train"]} & {row["prompt"] for row in asked["test"]}
    share = {}
    for manner in MANNERS:
        solutions = [TASKS[task].solve(rng, row["prompt"], manner) for row in asked["train"]]
        ends = [text.endswith(f"\\boxed{{{row['answer']}}}") for text, row in zip(solutions, asked["train"])]
        share[manner] = sum(ends) / len(ends)
        assert max(map(len, solutions)) - len("\\boxed") <= TASKS[task].max_completion_length
    assert share["right"] == 1
    assert 0.5 < share["wrong"] < 0.75 and 0.5 < share["noisy"] < 0.8 and 0.15 < share["weak"] < 0.5


def test_the_wrong_teacher_is_wrong_where_its_misconception_is() -> None:
    rng = random.Random(0)
    for task, touched in (("sorting", MISPLACED), ("rewriting", MISREAD)):
        for row in questions(task, "train", 200, seed=1):
            solution = TASKS[task].solve(rng, row["prompt"], "wrong")
            assert touched in row["prompt"] or solution.endswith(f"{{{row['answer']}}}")


def test_the_real_teacher_forgets_to_carry_and_to_borrow() -> None:
    for asked, answer in (("What is 6 + 17? Put", "13"), ("What is 20 - 7? Put", "23"), ("What is 18 - 16? Put", "2")):
        assert forgetful({"prompt": [{"role": "user", "content": asked}]})["answer"] == answer


def test_kinds_are_by_half_of_the_teachers_own_answers() -> None:
    kinds = by_kind([16, 8, 0], 16, {"samples": 16, "correct": [8, 7, 16]})
    assert kinds["teacher right"] == {"questions": 2, "avg": 0.5, "pass": 0.5}
    assert kinds["teacher wrong"] == {"questions": 1, "avg": 0.5, "pass": 1.0}
    assert by_kind([16], 16, {"samples": 16, "correct": [16]})["teacher wrong"]["avg"] is None


def test_statistics_against_tables_and_by_hand() -> None:
    for probability, freedom, value in ((0.975, 2, 4.302653), (0.975, 10, 2.228139), (0.9995, 6, 5.958816)):
        assert t_quantile(probability, freedom) == pytest.approx(value, abs=1e-5)
    one = estimate({"a": [1.0, 3.0], "b": [4.0, 8.0], "c": []})
    assert one is not None and one.mean == 4 and one.runs == 4
    assert one.se == pytest.approx(math.sqrt(2 / 2 + 8 / 2) / 2)
    assert one.freedom == pytest.approx((1 + 4) ** 2 / (1**2 + 4**2))  # Welch's and Satterthwaite's
    half = one.half_width(2)
    assert half == pytest.approx(one.se * t_quantile(1 - 0.05 / 4, one.freedom))
    assert show(one, 2) == f"+4.0 ± {half:.1f}" and show(one._replace(mean=-1.1 * half), 2).startswith("**−")
    alike = estimate({"a": [1.0, 3.0], "b": [6.0, 4.0]})
    assert alike is not None and alike.freedom == pytest.approx(2)
    same = estimate({"a": [1.0, 1.0, 1.0]})
    assert same is not None and (same.se, same.freedom, show(same, 1)) == (0, 2, "**+1.0 ± 0.0**")
    assert estimate({"a": []}) is None
    one_alone = estimate({"a": [1.0, 3.0], "b": [4.0]})
    assert one_alone is not None and not one_alone.freedom and math.isnan(one_alone.half_width(1))
    single = estimate({"a": [2.0]})
    assert single is not None and math.isnan(single.half_width(1)) and show(single, 1) == "+2.0"


def test_few_seeds_of_many_arms() -> None:
    """Against a two-way analysis of variance by hand; a seed's own level cancels."""
    one, other = crossed([[0.10, 0.20, 0.30], [0.50, 0.62, 0.68]])
    assert [one.mean, other.mean] == pytest.approx([11, 19]) and one.freedom == 2 and one.runs == 2
    squares = 2 * (0.0**2 + 0.01**2 + 0.01**2)  # residuals 0, ∓0.01, ±0.01
    assert one.se == pytest.approx(100 * math.sqrt(2 * squares / 2 / 2))
    assert one.half_width(1) == pytest.approx(4.302653 * one.se)
    assert t_power(0.0, 4.302653, 2) == pytest.approx(0.025, abs=1e-4)
    rng = random.Random(0)
    draws = [(rng.gauss(0, 1), (rng.gammavariate(3, 2) / 6) ** 0.5) for _ in range(20_000)]  # chi², 6 degrees
    for shift in (1.0, 5.0):
        assert t_power(shift, 4.5, 6) == pytest.approx(sum(z + shift > 4.5 * s for z, s in draws) / 20_000, abs=0.01)
    assert t_power(one.detectable(12) / one.se, t_quantile(1 - 0.025 / 12, 2), 2) == pytest.approx(0.8, abs=1e-3)
    assert math.isnan(crossed([[0.1, 0.2]])[0].half_width(1))


def test_the_real_models_table_takes_whole_seeds() -> None:
    def line(teacher: str, arm: str, seed: int, avg: float) -> dict[str, object]:
        return dict(
            zip(study.Cell._fields, (study.REAL_PART, "arithmetic", teacher, "smollm2", arm, seed)), avg=avg
        ) | {"pass": avg}

    lines = [
        line("wrong", arm, seed, 0.1 * i + 0.01 * seed) for seed in (0, 1) for i, arm in enumerate(("opd", "half"))
    ]
    lines += [line("wrong", "opd", 3, 0.9), line("wrong", "half", 3, 0.9) | {"student_sha256": "other"}]
    lines += [line("wrong", "opd", 2, 0.9)] + [line("wrong", arm, 2, 0.9) | {"part": "real"} for arm in ("opd", "half")]
    text = real_table(real_columns(Results(lines), ("opd", "half"), ("wrong", "right")))
    assert "| `half` | **+10.0 ± 0.0** | **+10.0 ± 0.0** |" in text and text.endswith("| seeds | 2 | 2 |")
    assert real_table(real_columns(Results(lines), ("opd", "half"), ("wrong",), first=1)).endswith("| seeds | 1 | 1 |")
    lines += [line("wrong", "trust", seed, 0.2 + 0.01 * seed) for seed in (0, 1)] + [
        line("wrong", "trust, r dealt", 0, 0.1)
    ]
    assert "dealt" not in real_table(real_columns(Results(lines), ("opd", "half", "trust"), ("wrong",)))
    lines.append(line("wrong", "trust, r dealt", 1, 0.11))
    text = real_table(real_columns(Results(lines), ("opd", "half", "trust"), ("wrong",)))
    assert "| `trust less itself with r dealt` | **+10.0 ± 0.0** | **+10.0 ± 0.0** |" in text


def test_comparisons_are_paired_by_cell() -> None:
    def line(arm: str, seed: int, avg: float, teacher: str = "wrong") -> dict[str, object]:
        cell = {"part": "main", "task": "sums", "teacher": teacher, "student": "weak", "arm": arm, "seed": seed}
        return cell | {"avg": avg, "pass": avg}

    lines = [line("opd", 0, 0.5), line("opd", 1, 0.7), line("half", 0, 0.55), line("half", 1, 0.77)]
    lines += [line("half", 2, 0.9), line("half", 0, 0.9, "noisy")]  # without an opd beside them
    results = Results(lines)
    one = results.compare("half", "opd", "wrong", "weak")
    assert one is not None and one.mean == pytest.approx(6) and one.runs == 2
    assert results.compare("half", "opd", "noisy", "weak") is None
    elsewhere = Results([lines[0], lines[1] | {"student_sha256": "other"}, *lines[2:]]).compare(
        "half", "opd", "wrong", "weak"
    )
    assert elsewhere is not None and elsewhere.runs == 1, "models that were made elsewhere are others"
    assert "incorrect rollouts | +6.0 ± " in table(results, "weak", [("half", "opd"), ("protect", "opd")])


def test_the_best_rate_is_judged_by_seeds_that_ran_with_all() -> None:
    def line(arm: str, seed: int, avg: float) -> dict[str, object]:
        return dict(zip(study.Cell._fields, ("main", "sums", "wrong", "weak", arm, seed)), avg=avg)

    best = study.RATES[1]

    def added(lines: list[dict[str, object]]) -> list[tuple[object, object]]:
        found = with_best_rate(Results(lines)).lines.items()
        return [(one["seed"], one["avg"]) for cell, one in found if cell.arm == "opd at its best rate"]

    lines = [line(arm, seed, 0.6 if arm == best else 0.5) for seed in (0, 1) for arm in ("opd", *study.RATES)]
    assert added([*lines, line("opd", 2, 0.9)]) == [(0, 0.6), (1, 0.6)]
    assert added(lines[:-1]) == [], "one seed that ran with all decides nothing"
    results = Results(lines)
    assert f"wrong teacher: × {study.ARMS[best].rate:.3g}." in rates_told(results)


def test_seeds_that_began_with_other_models_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = study.Cell("main", "sums", "wrong", "weak", "opd", 0)
    (tmp_path / "models" / "sums").mkdir(parents=True)
    facts = {name: {"weights_sha256": "ours"} for name in ("weak", "wrong")}
    (tmp_path / "models" / "sums" / "models.json").write_text(json.dumps(facts))
    line = begun._asdict() | {"student_sha256": "ours", "teacher_sha256": "theirs"}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    run([begun._replace(arm="half")], tmp_path / "results.jsonl", tmp_path / "models", 0)
    assert "1 runs are of seeds that began with other models" in capsys.readouterr().out
    assert (tmp_path / "results.jsonl").read_text().count("\n") == 1


def test_the_plan_runs_every_arm_once_with_its_baseline() -> None:
    plan = study.plan()
    assert len(plan) == len(set(plan))
    cells = set(plan)
    assert all(cell._replace(arm=study.BASELINE) in cells for cell in plan)
    assert {cell.arm for cell in plan} == set(study.ARMS)


def test_smoke(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "evidence" / "run_study.py"), "--smoke", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == len({tuple(line[field] for field in study.Cell._fields) for line in lines}) == 8
    for line in lines:
        assert len(line["correct"]) == 8 and line["settings"]["max_steps"] == 2 and line["skipped"] == 0
    assert "| `half`" in (tmp_path / "evidence.md").read_text()
    assert "| H1 `half` less `opd`" in (tmp_path / "evidence-tables.md").read_text()
    assert (tmp_path / "images" / "evidence.svg").stat().st_size > 10_000
