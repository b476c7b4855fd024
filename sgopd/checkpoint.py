"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder that `from_pretrained` loads, with the optimiser, the random states and the loop's own state
beside the weights. It is written under another name, synced and renamed, so a folder with the right name is whole;
its manifest (sizes and SHA-256 sums) tells when it no longer is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sgopd.config import UserError

MANIFEST = "manifest.json"
STATE = "state.json"
OPTIMIZER = "optimizer.pt"
RANDOM = "random.pt"


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` (replacing it) once it is complete and on the disk.

    Raises:
        UserError: it cannot be written; nothing of it is left, and what was there before stays.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        sync(target.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write {target}: {error}. Free some space or choose another output_dir") from error


def sync(path: Path) -> None:
    """Waits until a file's, or a folder's, content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(
    folder: Path,
    step: int,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: dict[str, Any],
    random_states: list[dict[str, Any]],
    state: dict[str, Any],
) -> Path:
    """Writes the checkpoint of `step` under `folder` and returns its path.

    Args:
        optimizer: state dicts of tensors and plain values.
        random_states: `random_state()` of every process, by rank.
        state: JSON-ready; state["metric"] (higher is better, or None) decides which checkpoint is the best.
    """
    target = folder / f"step-{step:06d}"
    with new_folder(target) as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        torch.save(optimizer, path / OPTIMIZER)
        torch.save(random_states, path / RANDOM)
        (path / STATE).write_text(json.dumps(state))
        files = {
            str(file.relative_to(path)): {"size": file.stat().st_size, "sha256": digest(file)}
            for file in sorted(path.rglob("*"))
            if file.is_file()
        }
        (path / MANIFEST).write_text(json.dumps(files, indent=1))
    return target


def digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def saved(folder: Path) -> list[Path]:
    """Checkpoints under `folder`, oldest first, whole or not."""
    return sorted(folder.glob("step-*"), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def later(path: Path) -> list[Path]:
    """The checkpoints beside this one of later steps, whole or not."""
    return [one for one in saved(path.parent) if step_of(one) > step_of(path)]


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != expected["size"]:
            return f"{name} has {size:,} bytes instead of {expected['size']:,}"
        if digest(file) != expected["sha256"]:
            return f"the content of {name} has changed (SHA-256)"
    return None


def find(resume_from: str, folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and what to tell the user about those that were passed over.

    "auto" takes the newest whole one under `folder`, or None where there is none.

    Raises:
        UserError: a checkpoint asked for by name is missing or damaged.
    """
    if resume_from != "auto":
        path = Path(resume_from)
        if not path.is_dir():
            there = ", ".join(str(one) for one in saved(folder)) or "none"
            raise UserError(f"resume_from_checkpoint: there is no folder {path}. Checkpoints of this run: {there}")
        if problem := fault(path):
            raise UserError(
                f"resume_from_checkpoint: {path} is damaged: {problem}. Use another one, or auto for the newest that "
                "is whole"
            )
        return path, []
    skipped: list[str] = []
    for path in reversed(saved(folder)):
        if not (problem := fault(path)):
            return path, skipped
        skipped.append(f"warning: skipped the checkpoint {path}: {problem}")
    return None, skipped


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """(state, optimizer, random_states) of a whole checkpoint; its weights are from_pretrained's to load.

    Raises:
        UserError: a file holds something else than tensors and plain values (such as code), or cannot be read.
    """
    try:
        state = json.loads((path / STATE).read_text())
        optimizer, random_states = (
            torch.load(path / name, map_location="cpu", weights_only=True) for name in (OPTIMIZER, RANDOM)
        )
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"resume_from_checkpoint: {path} was not written by this program, though its {MANIFEST} fits: "
            f"{str(error).splitlines()[0]}. Nothing in it was executed; use a checkpoint of your own"
        ) from error
    return state, optimizer, random_states


def prune(folder: Path, keep: int | None) -> None:
    """Deletes all but the newest `keep` checkpoints and the best one (None keeps all), and what killed runs left."""
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    if keep is None:
        return
    paths = saved(folder)
    measured = {path: metric for path in paths if (metric := metric_of(path)) is not None}
    best = max(measured, key=lambda path: measured[path], default=None)
    for path in paths[:-keep]:
        if path != best:
            shutil.rmtree(path)


def metric_of(path: Path) -> float | None:
    """The evaluation result a checkpoint was saved with, if any."""
    try:
        return json.loads((path / STATE).read_text())["metric"]
    except (OSError, ValueError):
        return None


def random_state() -> dict[str, Any]:
    """This process's global random states, as tensors and plain values."""
    numpy = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": torch.from_numpy(numpy["state"]["key"].astype("int64"))}},
    }


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    numpy = state["numpy"]
    key = numpy["state"]["key"].numpy().astype("uint32")
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
