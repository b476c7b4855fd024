"""The run directory, before anything in it is used: taken, empty or whole, and of the settings that are asked for."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml

from sgopd import checkpoint
from sgopd.config import Config, UserError
from sgopd.files import LOCK, FolderLock, make_folder
from sgopd.metrics import lost_records
from sgopd.report.run import is_run, read_metrics

# What a run that was killed before its first record may have left, in an otherwise empty folder.
BEFORE_RECORDS = {LOCK, ".writable", ".config.yaml.tmp", "config.yaml", "checkpoints"}


def lock_run_dir(config: Config) -> tuple[FolderLock, list[str]]:
    """Takes the run directory, before anything in it is read, and what to say about it.

    Raises:
        UserError: another run is at work in it, it has files of something else, or it cannot be written.
    """
    run_dir = Path(config.output_dir)
    try:
        make_folder(run_dir)
        if not is_run(run_dir) and (there := sorted(path.name for path in run_dir.iterdir())):
            raise UserError(
                f"output_dir: {run_dir} has files that are no run's: {', '.join(there[:5])}{' …' * (len(there) > 5)}. "
                "Choose an empty or a new folder, or that of a run to go on with (it has a .lock and metrics.jsonl)"
            )
        lock = FolderLock(run_dir)
    except OSError as error:
        raise UserError(f"output_dir: cannot write in {run_dir}: {error.strerror}. Choose another folder") from error
    if lock.held:
        return lock, []
    return lock, [f"warning: the file system of {run_dir} has no locks: see to it that no second run is started there"]


def open_run_dir(config: Config) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, if any, and what to say about it. Changes nothing in the run directory.

    Raises:
        UserError: it cannot be written, holds a run and resume_from_checkpoint is not set, or lacks what was there; a
            setting has changed that a resumed run cannot change.
    """
    run_dir = Path(config.output_dir)
    try:
        make_folder(run_dir)
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink()
        there = {path.name for path in run_dir.iterdir()}
        empty = not (run_dir / "checkpoints").exists() or not any((run_dir / "checkpoints").iterdir())
    except OSError as error:
        raise UserError(f"output_dir: cannot write in {run_dir}: {error.strerror}. Choose another folder") from error
    used = not (there <= BEFORE_RECORDS and empty)
    if config.resume_from_checkpoint is None:
        if used:
            raise UserError(
                f"output_dir: {run_dir} already holds a run. Pass --resume_from_checkpoint auto to go on with it, or "
                "choose another folder"
            )
        return None, []
    path, said = checkpoint.find(config.resume_from_checkpoint, run_dir / "checkpoints")
    own = path is None or path.resolve().parent == (run_dir / "checkpoints").resolve()
    if not own and used:
        raise UserError(
            f"resume_from_checkpoint: {path} belongs to another run than the one in {run_dir}. To branch off from it, "
            "choose a new output_dir"
        )
    if path is None:
        if used and (what := missing_checkpoints(run_dir)):
            raise UserError(
                f"resume_from_checkpoint: {run_dir} has no checkpoint, but {what}: to start from the beginning would "
                f"overwrite that. Put {run_dir / 'checkpoints'} back from a copy; or, to start anew, choose another "
                f"output_dir or move {run_dir} away"
            )
        return None, [*said, f"no whole checkpoint in {run_dir}: starting from the beginning"]
    state = checkpoint.state_of(path)
    if own:
        check_records(run_dir, path)
    said += compare_settings(config, state, path)
    said.append(f"resuming from {path}: its weights and tokenizer, not those of model_name_or_path")
    if own and (later := [one.name for one in checkpoint.later(path)]):
        said.append(f"warning: what came after it goes: {', '.join(later)} and their metrics")
    return path, said


def missing_checkpoints(run_dir: Path) -> str | None:
    """What tells that a run directory without a checkpoint had one, or None: a run may be killed before its first."""
    if not (run_dir / "metrics.jsonl").is_file():
        there = sorted({path.name for path in run_dir.iterdir()} - BEFORE_RECORDS)
        return f"{', '.join(there) or 'unfinished checkpoints'} without metrics.jsonl"
    records, _ = read_metrics(run_dir / "metrics.jsonl")
    step = max((record["step"] for record in records if record["kind"] == "train"), default=0)
    if any(record["kind"] == "end" for record in records):
        return f"metrics.jsonl has a finished run of {step} updates"
    save_steps = next((record.get("save_steps") for record in records if record["kind"] == "config"), None)
    if step and (not (run_dir / "checkpoints").exists() or (save_steps and step > save_steps)):
        return f"metrics.jsonl has {step} updates"
    return None


def compare_settings(config: Config, state: dict[str, Any], path: Path) -> list[str]:
    """What to say of settings that are not those of the checkpoint's run.

    Raises:
        UserError: a resumed run cannot change one of them.
    """
    if state["step"] > config.max_steps:
        raise UserError(
            f"max_steps: got {config.max_steps}, but {path} has {state['step']} updates behind it. Raise max_steps, or "
            "resume from an earlier checkpoint"
        )
    if "config" not in state:
        return [f"warning: {path} is of an earlier version: which settings, data and models it had is not known"]
    before, said, refused = yaml.safe_load(state["config"]), [], []
    for field in dataclasses.fields(config):
        name, kind = field.name, field.metadata["resume"]
        if name not in before or kind == "launch":
            continue
        was, now = before[name], getattr(config, name)
        if was == now or (
            isinstance(was, str) and isinstance(now, str) and os.path.realpath(was) == os.path.realpath(now)
        ):
            continue
        if kind == "fixed":
            refused.append(f"{name} was {was!r} and is {now!r}")
        else:
            said.append(f"warning: {name} was {was!r} and is {now!r} from here on")
    if refused:
        raise UserError(
            f"resume_from_checkpoint: a resumed run cannot change this: {'; '.join(refused)}. Leave it as it was; or "
            f"start a new run from the weights, with --model_name_or_path {path} and a new output_dir"
        )
    return said


def compare_contents(now: dict[str, str | None], state: dict[str, Any], path: Path) -> list[str]:
    """What to say of data and models that are not those of the checkpoint's run; `now` as in a checkpoint's state.

    Raises:
        UserError: they are the prompts, the teacher or the reference: then it would be another run.
    """
    before = state.get("contents", now)
    others = [name for name in now if now[name] != before.get(name)]
    if refused := [CONTENTS[name] for name in others if name != "questions"]:
        raise UserError(
            f"resume_from_checkpoint: {'; '.join(refused)}: not what {path} was saved with (SHA-256). Put it back as "
            f"it was; or start a new run from the weights, with --model_name_or_path {path} and a new output_dir"
        )
    if others:
        return [
            "warning: the evaluation questions are not those of before: avg@k and pass@k from here on, and which "
            "checkpoint is the best, cannot be compared with what was measured earlier"
        ]
    return []


CONTENTS = {
    "prompts": "the prompts (dataset_name and what is made of it: rows, their order, columns, template, tokens)",
    "teacher": "the weights of teacher_model_name_or_path (of several, each one's and which prompts it has)",
    "reference": "the weights of reference_model_name_or_path",
    "base": "the weights of the model that the adapters stand on (model_name_or_path, without its adapters)",
}


def check_records(run_dir: Path, path: Path) -> None:
    """Refuses to go on from a checkpoint without the records that it was saved with."""
    metrics = run_dir / "metrics.jsonl"
    if not (problem := lost_records(metrics, checkpoint.state_of(path))):
        return
    earlier = [
        one for one in reversed(checkpoint.saved(path.parent)) if checkpoint.step_of(one) < checkpoint.step_of(path)
    ]
    whole = (
        one for one in earlier if not checkpoint.fault(one) and not lost_records(metrics, checkpoint.state_of(one))
    )
    remedy = f"resume from {one}, which has them all; " if (one := next(whole, None)) else ""
    raise UserError(
        f"resume_from_checkpoint: {metrics} is not what {path} was saved with: {problem}. Put it back from a copy; "
        f"{remedy}or go on without these records in a new output_dir, with --resume_from_checkpoint {path}"
    )
