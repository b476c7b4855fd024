"""Runs the study and keeps a line of JSON a run; what is there already is not run again.

    python evidence/run_study.py [--output runs/evidence/results.jsonl] [--workers 2] [--minutes 60]
    python evidence/run_study.py --arms opd half --tasks sums --teachers wrong --parts main --seeds 0 1 2
    python evidence/run_study.py --smoke FOLDER

`make evidence` makes the models first, where they are missing (evidence/checkpoints.py), runs everything there is in
evidence/study.py (hours), and makes the page. It may be killed at any time: a run that has not ended leaves nothing,
and the next start goes on with it. Each worker is a process of one thread and takes the next run of the plan.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import checkpoints
import study
from constructed import TASKS, questions
from study import ARMS, PARTS, Cell

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "evidence" / "results.jsonl"
OUTPUTS = ("evidence/results.jsonl", "evidence/real.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="one line a run (default: evidence/results.jsonl)")
    parser.add_argument("--models", type=Path, default=Path("runs/evidence/models"), help="of evidence/checkpoints.py")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="start no run after so many")
    for field, choices in (
        ("part", PARTS),
        ("task", TASKS),
        ("teacher", checkpoints.TEACHERS),
        ("student", checkpoints.STUDENTS),
        ("arm", ARMS),
    ):
        parser.add_argument(f"--{field}s", nargs="+", choices=choices, metavar=field.upper(), help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these")
    parser.add_argument("--real", action="store_true", help="the real language model, into real.jsonl instead")
    parser.add_argument("--dry", action="store_true", help="print how many runs are there, and how many are to do")
    parser.add_argument("--smoke", type=Path, metavar="FOLDER", help="everything once, with models that know nothing")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers and temporary files go with it
    if arguments.smoke:
        smoke(arguments.smoke)
        return
    output = arguments.output or RESULTS.with_name("real.jsonl" if arguments.real else "results.jsonl")
    chosen = [
        cell
        for cell in (study.REAL if arguments.real else study.plan())
        if all(
            (only := getattr(arguments, f"{field}s")) is None or getattr(cell, field) in only for field in cell._fields
        )
    ]
    if arguments.dry:
        done = len(set(chosen) & {cell_of(line) for line in read(output)})
        print(f"{done} of {len(chosen)} runs are in {output}")
        return
    stop_at = None if arguments.minutes is None else time.time() + 60 * arguments.minutes
    run(chosen, output, arguments.models, arguments.workers, stop_at)


def run(
    cells: Sequence[Cell],
    output: Path,
    model_folder: Path,
    workers: int,
    stop_at: float | None = None,
    changes: dict[str, Any] | None = None,
) -> None:
    """Runs what is not in `output` yet, in order, and appends each as it ends.

    `workers` 0 runs them in this process. `changes` go over every setting.
    """
    there = read(output)
    done = {cell_of(line) for line in there}
    todo = [cell for cell in cells if cell not in done]
    commit = describe_commit()
    made: dict[str, dict[str, Any]] = {}
    for task in {cell.task for cell in todo}:
        if not (facts := model_folder / task / "models.json").is_file():
            raise SystemExit(
                f"{model_folder / task} has no models: python evidence/checkpoints.py --output {model_folder}"
            )
        made[task] = json.loads(facts.read_text())
    # A seed's arms are compared with each other, so they all have the models with which its first one ran.
    theirs = {cell_of(line)._replace(arm=""): study.models_of(line) for line in there}
    ours = {cell: study.models_of(digests_of(cell, made[cell.task])) for cell in todo}
    todo = [cell for cell in todo if theirs.get(cell._replace(arm=""), ours[cell]) == ours[cell]]
    if left := len(ours) - len(todo):
        print(f"{left} runs are of seeds that began with other models than those of {model_folder}: left out")
    with tempfile.TemporaryDirectory(prefix="evidence-") as folder:
        work = [(cell, model_folder, Path(folder), commit, changes or {}) for cell in todo]
        offered = itertools.takewhile(lambda _: stop_at is None or time.time() < stop_at, work)
        with open(output, "a", encoding="utf-8") as file:
            for number, line in enumerate(results_of(offered, workers), 1):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                print(f"{number}/{len(todo)} {' '.join(map(str, cell_of(line)))}: {line['avg']:.1%}", flush=True)


def results_of(items: Iterator[Any], workers: int) -> Iterator[dict[str, Any]]:
    """Lines as runs end. No more are handed out than there are workers, so that a deadline holds."""
    if not workers:
        yield from itertools.starmap(one_run, items)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        under_way = {pool.submit(one_run, *item) for item in itertools.islice(items, workers)}
        try:
            while under_way:
                ended, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield future.result()
                    under_way |= {pool.submit(one_run, *item) for item in itertools.islice(items, 1)}
        except BaseException:  # SIGTERM, which a trainer would take for itself, and then end well
            for process in multiprocessing.active_children():
                process.kill()
            raise


def one_run(
    cell: Cell, model_folder: Path, folder: Path, commit: dict[str, Any], changes: dict[str, Any]
) -> dict[str, Any]:
    """Trains and evaluates; returns the line of the results."""
    from transformers.utils import logging

    from sgopd.config import Config
    from sgopd.trainer import Trainer

    logging.disable_progress_bar()
    began = time.perf_counter()
    facts = json.loads((model_folder / cell.task / "models.json").read_text())
    settings = study.settings_of(cell) | changes
    named = {"model_name_or_path": cell.student, "teacher_model_name_or_path": cell.teacher}
    if "reference_model_name_or_path" in settings:
        named["reference_model_name_or_path"] = cell.student  # as it starts
    given = settings | {setting: str(model_folder / cell.task / name) for setting, name in named.items()}
    if cell.task in TASKS:
        given = constructed(folder, cell.task, settings) | given
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as output:
        config = Config(**given, output_dir=str(Path(output) / "run"))
        trainer = Trainer(config, say=lambda line: None, on_record=records.append)
        try:
            trainer.loop()
        finally:
            trainer.close()
        if trainer.stopped_by is not None:  # the trainer takes signals for itself, and would end well
            sys.exit(128 + trainer.stopped_by)
    (evaluation,) = (record for record in records if record["kind"] == "eval")
    updates = [record for record in records if record["kind"] == "train"]
    late = updates[-max(1, len(updates) // 10) :]
    return {
        **cell._asdict(),
        "settings": settings | {"max_completion_length": config.max_completion_length},
        **commit,
        **digests_of(cell, facts),
        "avg": evaluation["eval/avg_at_k"],
        "pass": evaluation["eval/pass_at_k"],
        "by_kind": by_kind(evaluation["eval/correct"], evaluation["eval/samples"], facts[cell.teacher]),
        "correct": "".join(checkpoints.DIGITS[count] for count in evaluation["eval/correct"]),
        "tokens": evaluation["eval/length_mean"],
        "late": {
            name: sum(one.get(name, 0.0) for one in late) / len(late) for name in ("rollout/accuracy", "gate/mean")
        },
        "skipped": updates[-1]["optim/skipped"],
        "seconds": round(time.perf_counter() - began, 1),
    }


def digests_of(cell: Cell, facts: dict[str, Any]) -> dict[str, str]:
    return {f"{role}_sha256": facts[getattr(cell, role)]["weights_sha256"] for role in ("student", "teacher")}


def by_kind(correct: Sequence[int], samples: int, teacher: dict[str, Any]) -> dict[str, Any]:
    """Questions, avg@k and pass@k where the teacher is right (in half of its own answers or more), and elsewhere."""
    result = {}
    for name, right in (("teacher right", True), ("teacher wrong", False)):
        halves = [2 * count >= teacher["samples"] for count in teacher["correct"]]
        counts = [own for own, half in zip(correct, halves) if half == right]
        result[name] = {
            "questions": len(counts),
            "avg": sum(counts) / len(counts) / samples if counts else None,
            "pass": sum(map(bool, counts)) / len(counts) if counts else None,
        }
    return result


def constructed(folder: Path, task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that name a constructed task's data."""
    return {
        "dataset_name": str(data(folder, task, "train", settings)),
        "eval_dataset_name": str(data(folder, task, "test", settings)),
        "max_completion_length": TASKS[task].max_completion_length,
    }


def data(folder: Path, task: str, split: str, settings: dict[str, Any]) -> Path:
    """A file of the task's questions: fresh ones for every update, and the study's held-out ones."""
    train_size = settings["max_steps"] * settings["per_device_train_batch_size"]
    size = settings["eval_dataset_size"] if split == "test" else train_size
    path = folder / f"{task}-{split}.jsonl"
    if not path.exists():
        whole = path.with_suffix(f".{os.getpid()}")
        whole.write_text("".join(json.dumps(row) + "\n" for row in questions(task, split, size, seed=0)))
        whole.replace(path)
    return path


def describe_commit() -> dict[str, Any]:
    """What the runs are of. "dirty" lists what differs from the commit, the results themselves left out."""
    import torch

    def git(*words: str) -> str:
        done = subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.rstrip("\n")

    changed = [line[3:] for line in git("status", "--porcelain").splitlines() if line[3:] not in OUTPUTS]
    return {"commit": git("rev-parse", "--short=12", "HEAD") or None, "dirty": changed, "torch": torch.__version__}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; one that a kill cut short is left out, and ended so that the next stands alone."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def cell_of(line: dict[str, Any]) -> Cell:
    return Cell(*(line[field] for field in Cell._fields))


def smoke(folder: Path) -> None:
    """Models of a few updates, one short run of each kind, a kill, the rest, and the page: in `folder`."""
    import study_page

    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        if not (folder / "models" / task / "models.json").is_file():
            checkpoints.make(task, folder / "models" / task, scale=0.002, asked=8)
    chosen = [Cell("main", task, "wrong", "weak", arm, 0) for task in TASKS for arm in ("opd", "half")]
    chosen += [Cell("phased", "sorting", "noisy", "weak", "opd", 0), Cell("sampled", "sums", "right", "weak", "opd", 0)]
    short = {"max_steps": 2, "per_device_train_batch_size": 16, "eval_dataset_size": 8}
    results = folder / "results.jsonl"
    run(chosen[:3], results, folder / "models", 0, changes=short)
    with open(results, "a", encoding="utf-8") as file:
        file.write('{"part": "main", "ta')  # as a kill may leave it
    run(chosen, results, folder / "models", 1, changes=short)
    (folder / study_page.FIGURE).parent.mkdir(exist_ok=True)
    for page in (study_page.PAGE, study_page.TABLES):
        shutil.copy(ROOT / "docs" / page, folder)
    checkpoints.record(folder / "models", results.with_name("models.jsonl"))
    study_page.write(results, folder)


if __name__ == "__main__":
    main()
