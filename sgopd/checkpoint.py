"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder that `from_pretrained` loads, with the optimiser, the random states and the loop's own state
beside the weights. It is written under another name, synced and renamed, so a folder with the right name is whole;
its manifest (sizes and SHA-256 sums) tells when it no longer is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import pickle
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sgopd.config import UserError
from sgopd.files import new_folder, remove_folder, remove_leftovers, writing
from sgopd.lora import save_student
from sgopd.phases import Phases
from sgopd.processes import Processes

MANIFEST = "manifest.json"
STATE = "state.json"
OPTIMIZER = "optimizer.pt"
RANDOM = "random.pt"


@dataclass
class RunState:
    """Where a run stands: what a checkpoint has of it beside weights, optimiser and random states."""

    phases: Phases
    step: int = 0  # updates made
    position: int = 0  # prompts taken, over all processes
    skipped: int = 0  # updates left out for a non-finite loss or gradient
    evaluated_at: int | None = None  # step of the student's last evaluation …
    metric: float | None = None  # … and its avg@k
    metrics_position: int = 0  # length of metrics.jsonl, in bytes …
    metrics_sha256: str = ""  # … and its sum
    saved_at: int | None = None  # step of the last checkpoint

    def to_json(self) -> dict[str, Any]:
        """state["metric"] (higher is better, or None) decides which checkpoint is the best."""
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del state["saved_at"]  # it will be this one
        state["phases"] = self.phases.state_dict()
        state["metric"] = self.metric if self.evaluated_at == self.step else None
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """From a checkpoint's state, which may have further keys."""
        self.step = self.saved_at = state["step"]
        self.position, self.skipped = state["position"], state["skipped"]
        self.phases.load_state_dict(state["phases"])
        self.evaluated_at, self.metric = state["evaluated_at"], state["metric"]
        self.metrics_position = state["metrics_position"]


def save(
    folder: Path,
    step: int,
    *,
    processes: Processes,
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    optimizer: Callable[[Path], dict[str, Any]],
    random_states: list[dict[str, Any]],
    state: dict[str, Any],
) -> Path:
    """Writes the checkpoint of `step` under `folder` and returns its path. Called by all processes at once.

    Args:
        weights: of `model`, whole on the main process.
        optimizer: writes what it keeps in shards into a folder, and gives the main process the rest: state dicts of
            tensors and plain values.
        random_states: `random_state()` of every process, by rank.
        state: JSON-ready.
    """
    target = folder / f"step-{step:06d}"
    with contextlib.ExitStack() as stack:  # on the main process; the others fill the folder with it
        path = processes.on_main(lambda: stack.enter_context(new_folder(target)))
        parts = optimizer(path)

        def finish() -> None:
            with writing(target):
                save_student(model, tokenizer, path, weights)
                save_tensors(parts, path / OPTIMIZER)
                save_tensors(random_states, path / RANDOM)
                (path / STATE).write_text(json.dumps(state))
                files = {
                    str(file.relative_to(path)): {"size": file.stat().st_size, "sha256": digest(file)}
                    for file in sorted(path.rglob("*"))
                    if file.is_file()
                }
                (path / MANIFEST).write_text(json.dumps(files, indent=1))
            stack.close()

        processes.on_main(finish)
    return target


def save_tensors(value: Any, path: Path) -> None:
    """torch.save, with the OSError of a full disk (torch's own message has a position in the file, not the reason)."""
    with path.open("wb") as file:
        writer = _Writer(file)
        try:
            torch.save(value, writer)  # type: ignore[arg-type,unused-ignore]
        except RuntimeError:
            if writer.error is not None:
                raise writer.error from None
            raise


class _Writer:
    """A file that remembers what went wrong with it."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the sums of every row's and column's bits: the same on every device, and fast where models are large.

    The bits are those of the weights in bfloat16, so that they do not depend on the dtype that the model is held in.
    """
    sha = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        bits = torch.atleast_2d(weight.detach().bfloat16().view(torch.int16)).flatten(1)
        sha.update(repr((name, tuple(weight.shape))).encode())
        for dim in (0, 1):
            sha.update(bits.sum(dim, dtype=torch.int64).cpu().numpy().tobytes())
    return sha.hexdigest()


def saved(folder: Path) -> list[Path]:
    """Checkpoints under `folder`, oldest first, whole or not."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdecimal()), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def later(path: Path) -> list[Path]:
    """The checkpoints beside this one of later steps, whole or not."""
    return [one for one in saved(path.parent) if step_of(one) > step_of(path)]


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = {
            name: (int(facts["size"]), str(facts["sha256"]))
            for name, facts in json.loads((path / MANIFEST).read_text()).items()
        }
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for pattern in ("*.safetensors", STATE, OPTIMIZER, RANDOM):
        if not fnmatch.filter(files, pattern):
            return f"its {MANIFEST} has no {pattern}"
    for name, (expected, sha256) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != expected:
            return f"{name} has {size:,} bytes instead of {expected:,}"
        if digest(file) != sha256:
            return f"the content of {name} has changed (SHA-256)"
    return None


def find(resume_from: str, folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and what to tell the user about those that were passed over.

    "auto" takes the newest whole one under `folder`, or None where there are none at all.

    Raises:
        UserError: a checkpoint asked for by name is missing or damaged; all are damaged; one cannot be read.
    """
    try:
        return find_whole(resume_from, folder)
    except OSError as error:  # permissions, a failing disk: not a reason to go on without it
        raise UserError(
            f"resume_from_checkpoint: cannot read {error.filename}: {error.strerror}. Put that right, or name another "
            "checkpoint"
        ) from error


def find_whole(resume_from: str, folder: Path) -> tuple[Path | None, list[str]]:
    """`find`, with any OSError as it comes."""
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
    if skipped:  # to start anew would delete what may still be of use
        problems = "; ".join(line.removeprefix("warning: skipped the checkpoint ") for line in skipped)
        raise UserError(
            f"resume_from_checkpoint: no checkpoint of this run is whole: {problems}. Put one back from a copy; or "
            f"move {folder} away to start from the beginning; or start a new run with one of them as "
            "model_name_or_path, if its weights are whole"
        )
    return None, []


def state_of(path: Path) -> dict[str, Any]:
    """The loop's own state, as it was given to `save`."""
    return json.loads((path / STATE).read_text())


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """(state, optimizer, random_states) of a whole checkpoint; its weights are from_pretrained's to load.

    Raises:
        UserError: a file holds something else than tensors and plain values (such as code), or cannot be read.
    """
    try:
        state = state_of(path)
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
    remove_leftovers(folder)
    if keep is None:
        return
    paths = saved(folder)
    measured = {path: metric for path in paths if (metric := metric_of(path)) is not None}
    best = max(measured, key=lambda path: measured[path], default=None)
    for path in paths[:-keep]:
        if path != best and not is_doubtful(path):
            remove_folder(path)


def metric_of(path: Path) -> float | None:
    """The evaluation result a checkpoint was saved with, if any that can be trusted."""
    try:
        return None if is_doubtful(path) else json.loads((path / STATE).read_text())["metric"]
    except FileNotFoundError:
        return None


def is_doubtful(path: Path) -> bool:
    """Whether a checkpoint's state is damaged: then it may be the best one, or only seem to be."""
    try:
        expected = json.loads((path / MANIFEST).read_text())[STATE]["sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        expected = None
    try:
        json.loads((path / STATE).read_text())["metric"]
        return expected is not None and digest(path / STATE) != expected
    except FileNotFoundError:  # half deleted
        return False
    except (OSError, ValueError, LookupError, TypeError):
        return True


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
