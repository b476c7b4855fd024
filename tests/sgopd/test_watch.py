"""A run while it goes on: the checks that warn in training, and the view of it in a terminal."""

from __future__ import annotations

import io
import json
import math
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from rich.console import Console
from rich.text import Text

from sgopd import checkpoint, watch
from sgopd.cli import main
from sgopd.files import FolderLock, is_taken
from sgopd.report.course import Course
from sgopd.report.quantities import last_tenth, mean


@pytest.mark.parametrize("updates", [1, 9, 25, 190, 450])
def test_a_course_in_constant_space_has_the_numbers_of_the_whole_series(updates):
    rng = random.Random(updates)
    values = [math.nan if rng.random() < 0.1 else rng.uniform(-1, 1) for _ in range(updates)]
    course = Course()
    for step, value in enumerate(values):
        course.see({"kind": "train", "step": step + 1, "kl": None if math.isnan(value) else value})
    trend, measured = course.trends["kl"], [value for value in values if not math.isnan(value)]
    if not measured:
        return
    assert trend.last == last_tenth(values)
    assert trend.first == pytest.approx(last_tenth(values[::-1]))
    assert (trend.count, trend.largest) == (len(measured), max(measured))
    assert trend.mean == pytest.approx(mean(values)) and course.updates == updates


# --- warnings while it runs ---


def test_a_run_warns_once_in_time_and_stops_if_it_is_told_to(settings, tiny, tmp_path, capsys):
    """Untrained models: no rollout is correct, which the checks say at the first logging step they may speak."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(max_steps=15, logging_steps=3, learning_rate=1e-6)))
    run = tmp_path / "run"
    assert main(["train", str(path), "--stop_on_warning"]) == 1
    said = capsys.readouterr()
    warned = [
        line for line in said.out.splitlines() if line.startswith("warning: Verdicts: 0.0\u00a0% of the student's")
    ]
    assert len(warned) == 1 and "Without one correct rollout the gate sees half of its cells" in warned[0]
    assert said.out.index("step 12/15") > said.out.index("step 9/15") and "step 15/15" not in said.out
    assert "sgopd: error: stopped at step 12, and saved (stop_on_warning): Length, Verdicts" in said.err
    assert checkpoint.step_of(checkpoint.saved(run / "checkpoints")[-1]) == 12

    # What was warned of stops a run once.
    assert main(["train", str(path), "--stop_on_warning", "--resume_from_checkpoint=auto", "--logging_steps=1"]) == 0
    said = capsys.readouterr().out
    assert "step 15/15" in said and "warning: Verdicts" not in said
    assert "Without one correct rollout" in (run / "report.html").read_text(encoding="utf-8")


def test_a_logged_update_inside_a_batch_is_looked_at_when_the_batch_is_done(trainer, monkeypatch):
    seen = []
    monkeypatch.setattr("sgopd.trainer.write_report", lambda run_dir: None)
    one = trainer(num_iterations=3, logging_steps=5, max_steps=12)
    monkeypatch.setattr(one, "check_health", lambda: seen.append(one.state.step))
    one.train()
    assert seen == [6, 12], "for updates 5 and 10"


# --- the view ---


def update(step: int, **numbers: Any) -> dict[str, Any]:
    measured = {"rollout/accuracy": step / 100, "kl": 1 / step, "rollout/length_mean": 12.0, "tokens": 1000}
    times = {"time/rollout": 0.5, "time/verify": 0.1, "time/update": 1.4}
    return {"kind": "train", "step": step, **measured, **times, **numbers}


EVALUATION = {"eval/samples": 16, "eval/k": 16, "eval/avg_at_k": 0.25, "eval/avg_at_k_se": 0.01}
EVALUATION |= {"eval/pass_at_k": 0.5, "eval/pass_at_k_se": None}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "completions").mkdir()
    (tmp_path / "config.yaml").write_text("max_steps: 60\n")
    write(tmp_path, {"kind": "eval", "model": "student", "step": 0, **EVALUATION}, *map(update, range(1, 21)))
    return tmp_path


def write(run: Path, *records: dict[str, Any]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=40)


def plain(console: Console) -> str:
    return console.file.getvalue()


def test_the_view_of_a_run_that_another_process_makes(run):
    """Followed record by record, through a half line and a file that a resumed run has cut, until it ends."""
    console, turns = terminal(), iter(range(9))

    def happens(seconds: float) -> None:
        turn = next(turns)
        if turn == 0:
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(update(21))[:30])
        elif turn == 1:
            lines = (run / "metrics.jsonl").read_text().splitlines()[:11]  # a resumed run drops what came later
            (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
        elif turn == 2:
            write(run, *(update(step, **{"entropy/student": 0.5 / step**2}) for step in range(11, 61)))
        else:
            write(run, {"kind": "end", "step": 60})

    watch.watch(run, console, happens)
    pictures = plain(console).split("tokens a second")
    assert "20/60" in pictures[0] and "10/60" in "".join(pictures) and "60/60" in pictures[-2]
    assert "about 80 s left" in pictures[0], "40 updates of 2 seconds"
    assert "finished" in pictures[-2] and "left" not in pictures[-2]
    assert "accuracy            10.5%  ▁" in pictures[0] and "█" in pictures[0]
    assert "500\x1b" not in pictures[1] and pictures[1].lstrip().startswith(
        ": sampling 2,000, verifier 10,000, update 714"
    )
    assert "student, step 0: avg@16 25.0 ± 1.0 %, pass@16 50.0 %" in pictures[1]
    assert "⚠ Entropy" in pictures[-1] and "⚠" not in pictures[1]


def test_what_a_model_wrote_moves_no_cursor_and_tiny_terminals_hold(run):
    bad = "\x1b[2J\x1b]0;title\x07 [red]x[/red] \u202egnp.exe \\boxed{7}"
    rows = [
        {"step": 20, "prompt": bad, "completion": bad * 2000, "verdict": v, "reason": "r", "source": "student"}
        for v in (1, -1, 0)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), run / "completions" / "step-000020.parquet")
    write(run, {"kind": "end", "step": 60})
    for width in (100, 30):
        console = terminal(width)
        watch.watch(run, console)
        text = plain(console)
        assert "\x1b[2J" not in text and "\x1b]0" not in text and "\u202e" not in text and "rollouts of step 20" in text
        assert all(mark in text for mark in "✓✗?")
        assert width == 30 or ("[red]x[/red]" in text and "boxed{7}" in text)


def test_watch_through_the_command(run, capsys):
    write(run, {"kind": "end", "step": 60})
    assert main(["watch", str(run)]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["watch", str(run / "completions")]) == 1
    assert "is no run directory" in capsys.readouterr().err
    (run / "config.yaml").write_text("model_name_or_path: x\n")
    assert main(["watch", str(run)]) == 1
    assert "it has no max_steps" in capsys.readouterr().err
    (run / "config.yaml").write_text("max_steps: 60\n")
    assert main(["watch", str(run), "--gate", "opd"]) == 1
    assert "unknown argument '--gate'" in capsys.readouterr().err


def test_a_run_without_a_process_is_shown_once_and_says_so(run, monkeypatch):
    console = terminal()
    monkeypatch.setattr(watch, "FRESH", 0.0)
    watch.watch(run, console, lambda seconds: pytest.fail("nothing will come"))
    assert "no process is at work on it" in plain(console)


def test_a_lock_is_seen_from_another_process_and_not_taken(tmp_path):
    code = "import sys; from pathlib import Path; from sgopd.files import FolderLock\n"
    code += "lock = FolderLock(Path(sys.argv[1])); print('has it', flush=True); sys.stdin.read()"
    assert not is_taken(tmp_path)
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=-1, stdout=-1, text=True)
    try:
        assert other.stdout.readline() == "has it\n"
        assert is_taken(tmp_path)
    finally:
        other.communicate("")
    assert not is_taken(tmp_path)
    FolderLock(tmp_path).release()


def test_training_on_a_terminal_is_this_view(settings, tiny, tmp_path, monkeypatch):
    console = terminal()
    monkeypatch.setattr(watch, "Console", lambda: console)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings()))
    assert main(["train", str(path), "--max_steps", "2", "--save_steps", "2"]) == 0
    assert main(["train", str(path), "--resume_from_checkpoint", "auto"]) == 0
    text = plain(console)
    assert "run  2/2" in text and "run  4/4" in text and "rollouts of step 4" in text and "✗" in text
    assert "step 1/" not in text, "no lines beside the view"


def test_a_record_that_comes_while_it_is_drawn_waits(run, monkeypatch):
    """rich draws in a thread of its own: what it iterates over must not change."""
    view = watch.View(run, {"max_steps": 60})
    other = threading.Thread(target=view.see, args=[update(1)])

    def while_drawn():
        other.start()
        other.join(0.2)
        yield Text("waits" if other.is_alive() and not view.recent else "changed while it was drawn")

    monkeypatch.setattr(view, "rollout_lines", while_drawn)
    console = terminal()
    console.print(view)
    other.join(10)
    assert "waits" in plain(console) and len(view.recent) == 1


def test_a_spark_line_is_bounded_and_keeps_its_shape():
    spark = watch.Spark()
    for step in range(100_000):
        spark.add(float(step))
    assert len(spark.points) < watch.POINTS
    line = spark.text(40)
    assert len(line) == 40 and line[0] == "▁" and line[-1] == "█" and list(line) == sorted(line)
    flat = watch.Spark()
    flat.add(3.0)
    assert flat.text(40) == "▁" and watch.Spark().text(40) == ""
