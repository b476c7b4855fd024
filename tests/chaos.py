"""Breaks training runs in every way it knows, and looks whether anything was lost.

    python tests/chaos.py [--few K] [--seed S] [--only CLASS] [--output chaos.json]        (make long ONLY=chaos)

Every case is a real `sgopd train` of a few seconds, of one process or of two (gloo), that is disturbed at one stage:
start, rollout, verify, update, save, evaluate, final. Then it is resumed, and must come to the same bits as a run that
nothing disturbed: weights, optimiser, random states, the loop's state, final model, completions, and all metrics but
times. Or, where that cannot be, it must stop with a message that says what to do. And the best checkpoint so far, by
avg@k, must be there and whole at every moment.

    kill        SIGKILL, of one process or of all, before a stage or anywhere inside it
    sigterm     must save and leave with status 143; nothing is computed twice
    sigint      the same with status 130
    full        no space left (a small tmpfs where this may be mounted), or files may not grow (RLIMIT_FSIZE)
    unwritable  the run directory or a folder in it loses its write permission
    damage      each file of a checkpoint truncated, emptied, zeroed, removed, with a bit flipped; all of them; leftover
    metrics     metrics.jsonl cut short, edited, removed, or with half a line at its end
    power       the power is cut between any two operations on files: of what was not synced, each folder keeps any of
                the states it went through and each file all, a part or nothing of its content, whatever their order

Processes are forked from this one, which has imported everything and computed nothing: they start in milliseconds and
round alike. A case depends on (seed, its number) alone, and `--case N` repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARK = "SGOPD_CHAOS_RUN"  # in the environment of every process of a run
STAGES = ("start", "rollout", "verify", "update", "save", "evaluate", "final")
STEPS, SAVE_STEPS = 6, 2
PATIENCE = 600.0  # seconds until a process counts as hung
FILES = (
    "model.safetensors",
    "optimizer.pt",
    "random.pt",
    "state.json",
    "manifest.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
DAMAGES = ("truncated", "emptied", "zeroed", "removed", "flipped")


def verify(response: str, example: dict[str, Any]) -> bool:
    """The runs' verifier, so that they have a worker process."""
    return response.rsplit("\\boxed{", 1)[-1].split("}", 1)[0].strip() == str(example["answer"])


# --- cases ---


@dataclass(frozen=True)
class Case:
    kind: str
    processes: int = 1
    stage: str = ""
    how: str = ""  # what exactly is done; its meaning depends on the kind
    what: str = ""  # to what

    def __str__(self) -> str:
        words = (self.kind, self.how, self.what, self.stage, f"{self.processes} processes")
        return " ".join(word for word in words if word)


def plan() -> list[Case]:
    """Every case of the long form."""
    cases = [Case("kill", 1, stage, how) for stage in STAGES for how in ("before", "inside", "inside", "twice")]
    whose = ("main", "other", "all")
    cases += [Case("kill", 2, stage, how, who) for stage in STAGES for how in ("before", "inside") for who in whose]
    cases += [Case("sigterm", 1, stage, how) for stage in STAGES for how in ("before", "inside")]
    cases += [Case("sigterm", 2, stage, "inside", who) for stage in STAGES for who in whose]
    cases += [Case("sigint", 1, stage, "inside") for stage in STAGES]
    cases += [Case("sigint", 2, stage, "inside", "all") for stage in STAGES]
    spaces = ("0", "5000", "200000", "600000")  # bytes left: the optimiser's file has 700,000
    cases += [Case("full", 1, stage, space) for stage in STAGES for space in spaces]
    cases += [Case("full", 2, stage, "0") for stage in STAGES]
    cases += [Case("full", 1, stage, "0", "limit") for stage in STAGES]
    folders = (".", "checkpoints", "completions")
    cases += [Case("unwritable", 1, stage, "", what) for stage in STAGES for what in folders]
    cases += [Case("unwritable", 2, stage, "", ".") for stage in STAGES]
    cases += [Case("unwritable", 1, "", "file", "metrics.jsonl"), Case("unwritable", 1, "", "file", "config.yaml")]
    cases += [Case("damage", 1, "", how, f"newest {file}") for file in FILES for how in DAMAGES]
    cases += [Case("damage", 2, "", how, f"newest {file}") for file in FILES[:5] for how in ("truncated", "flipped")]
    cases += [Case("damage", 1, "", how, f"all {file}") for file in FILES[:5] for how in ("truncated", "flipped")]
    cases += [Case("damage", 1, "", how, f"named {file}") for file in FILES[:5] for how in ("removed", "flipped")]
    cases += [Case("damage", 1, "", "", what) for what in ("half-deleted", "leftover", "first-version", "config.yaml")]
    for processes in (1, 2):
        cases += [Case("metrics", processes, "", how) for how in ("cut", "edited", "removed", "half a line")]
    cases += [Case("metrics", 1, "", how) for how in ("cut", "edited") for _ in range(4)]
    cases += [Case("power", 1, "", how) for how in ("once",) * 40 + ("twice",) * 10]
    cases += [Case("power", 2, "", "once") for _ in range(10)]
    cases += [Case("second", processes, stage) for stage in STAGES for processes in (1, 2)]
    return cases


def chosen(seed: int, few: int | None, only: str | None) -> list[tuple[int, Case]]:
    """(number, case) in the order they are run: all kinds early, so that a part of them is a sample of them."""
    numbered = [(number, case) for number, case in enumerate(plan()) if only in (None, case.kind)]
    random.Random(seed).shuffle(numbered)
    turn: dict[str, int] = defaultdict(int)
    ranked = []
    for number, case in numbered:
        turn[case.kind] += 1
        ranked.append((turn[case.kind] if few is not None else 0, number, case))
    ranked.sort(key=lambda item: item[0])
    return [(number, case) for _, number, case in ranked[:few]]


# --- a run ---


def settings(folder: Path) -> dict[str, Any]:
    import sgopd

    assets = Path(sgopd.__file__).parent / "assets" / "quickstart"
    return {
        "model_name_or_path": str(assets / "student"),
        "teacher_model_name_or_path": str(assets / "teacher"),
        "dataset_name": "task:three-sums",
        "dataset_size": 16,  # several epochs, so that what was learnt about a prompt comes back
        "output_dir": str(folder / "run"),
        "verifier": "chaos:verify",
        "verifier_workers": 1,
        "verifier_timeout": 600.0,  # this machine may be busy, and a timeout is a verdict
        "use_cpu": True,
        "num_threads": 1,
        "max_completion_length": 24,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "gate": "opdvr",
        "learning_rate": 1e-3,
        "cold_start_steps": 4,
        "teacher_reliability": "all",
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 1,
        "eval_steps": SAVE_STEPS,
        "eval_dataset_size": 8,
        "num_generations_eval": 2,
        "logging_steps": 2,
        "seed": 2,
        "resume_from_checkpoint": "auto",
    }


@dataclass
class Hooks:
    """What a process of a run does beside training."""

    stage: str = ""
    occurrence: int = 0  # the call of the stage at which it asks, over `asks`, and waits until `told`
    asks: int = -1
    told: int = -1
    confined: bool = False  # obeys permissions even where it runs as root
    counts: Path | None = None  # gets {stage: [seconds of each call]}
    power: Path | None = None  # gets the state of the disk when the power is cut …
    cut_at: int = 0  # … at this operation on files; 0 is never, and then it gets their number
    limit_files: bool = False  # at the stage no file may grow any more


def install(hooks: Hooks, root: Path) -> None:
    """Wraps the stages of the loop in this process."""
    import sgopd.samplers.plain
    import sgopd.trainer
    from sgopd.verifier import VerifierPool

    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}

    def wrap(owner: Any, name: str, stage: str) -> None:
        original = getattr(owner, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            seconds[stage].append(0.0)
            call = len(seconds[stage])
            if hooks.stage == stage and hooks.occurrence == call:
                os.write(hooks.asks, b"?")
                os.read(hooks.told, 1)
                if hooks.limit_files:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            try:
                return original(*arguments, **options)
            finally:
                seconds[stage][call - 1] = time.perf_counter() - began
                if hooks.counts is not None:
                    hooks.counts.write_text(json.dumps(seconds))

        setattr(owner, name, wrapper)

    trainer = sgopd.trainer.Trainer
    wrap(trainer, "start_writing", "start")
    wrap(sgopd.samplers.plain, "generate", "rollout")
    wrap(VerifierPool, "verify", "verify")
    wrap(trainer, "update", "update")
    wrap(trainer, "save", "save")
    wrap(sgopd.trainer, "evaluate", "evaluate")
    wrap(trainer, "save_final", "final")
    if hooks.stage != "final":  # drawing takes longer than training
        sgopd.trainer.write_report = lambda run_dir: None
    if hooks.confined:
        drop_override()
    if hooks.power is not None:
        Disk(root, hooks.power, hooks.cut_at).install()


def drop_override() -> None:
    """Gives up root's right to write where permissions forbid it (CAP_DAC_OVERRIDE)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, data) == 0:
        for word in (0, 1, 2):  # effective, permitted, inheritable
            data[word] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
        libc.capset(header, data)


class Running:
    """The processes of one run."""

    def __init__(self, folder: Path, processes: int, hooks: Hooks | None = None, rank: int = 0, *flags: str) -> None:
        """Starts it; the process of `rank` gets the hooks."""
        self.folder = folder
        self.status: list[int | None] = [None] * processes
        self.output = bytearray()
        hooks = hooks or Hooks()
        self.asked, hooks.asks = os.pipe()
        hooks.told, self.tell = os.pipe()
        self.log, log = os.pipe()
        os.set_blocking(self.log, False)
        port = free_port() if processes > 1 else 0
        self.pids = []
        for number in range(processes):
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                self._be(number, processes, port, hooks if number == rank else Hooks(counts=None), log, flags)
            self.pids.append(pid)
        for handle in (hooks.asks, hooks.told, log):
            os.close(handle)

    def _be(self, rank: int, processes: int, port: int, hooks: Hooks, log: int, flags: Sequence[str]) -> None:
        """Is one of the processes: never returns."""
        status = 70
        try:
            os.dup2(log, 1)
            os.dup2(log, 2)
            for handle in (log, self.log, self.asked, self.tell):
                os.close(handle)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ[MARK] = self.folder.name
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
                os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
                os.environ["MASTER_PORT"] = str(port)
            from sgopd.cli import main

            install(hooks, self.folder)
            status = main(["train", str(self.folder / "config.yaml"), *flags])
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(status)

    def at_stage(self) -> bool:
        """Waits until the hooked process asks; False if it ended before."""
        select.select([self.asked], [], [], PATIENCE)
        return os.read(self.asked, 1) == b"?"

    def go_on(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self.tell, b"!")

    def signal(self, number: int, ranks: Sequence[int]) -> None:
        for rank in ranks:
            if not self._ended(rank):
                os.kill(self.pids[rank], number)

    def _ended(self, rank: int) -> bool:
        if self.status[rank] is None:
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if pid:
                self.status[rank] = os.waitstatus_to_exitcode(status)
        return self.status[rank] is not None

    def wait(self) -> list[int]:
        """The exit statuses, by rank.

        Raises:
            Lost: a process goes on without end. It is killed.
        """
        deadline = time.monotonic() + PATIENCE
        while not all([self._ended(rank) for rank in range(len(self.pids))]):
            self._read()
            time.sleep(0.003)
            if time.monotonic() > deadline:
                hung = [rank for rank in range(len(self.pids)) if not self._ended(rank)]
                self.signal(signal.SIGKILL, hung)
                for rank in hung:
                    os.waitpid(self.pids[rank], 0)
                raise Lost(f"processes {hung} did not end within {PATIENCE:g} s:\n{self.text()[-2000:]}")
        self._read()
        for handle in (self.asked, self.tell, self.log):
            os.close(handle)
        return [status for status in self.status if status is not None]

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.log, 65_536):
                self.output += data

    def text(self) -> str:
        return self.output.decode(errors="replace")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# --- what a power cut leaves ---


class Disk:
    """Follows a tree as a disk sees it: what is certain to be there after a power cut, and what may be.

    A folder's entries are certain as of its last fsync; after a cut it has those, or any later set it went through (a
    rename is one step). A file's content is certain as of its own last fsync; else all, part or nothing of it is there.
    Inodes are kept open, so that their numbers are not used again.
    """

    def __init__(self, root: Path, output: Path, cut_at: int) -> None:
        self.root, self.output, self.cut_at = root, output, cut_at
        self.operations = 0
        self.handles: dict[int, int] = {}
        self.folders: dict[int, list[dict[str, int]]] = {}  # inode -> its entries' history since the last fsync
        self.contents: dict[int, bytes] = {}  # inode -> content at the last fsync
        self.saved = 0  # step of the last checkpoint that the loop was told is saved
        self._fsync = os.fsync
        self.look()
        # What there was before is certain: it was read from the disk, also after a cut, and no later cut undoes that.
        for inode, handle in list(self.handles.items()):
            if inode in self.folders:
                self.folders[inode] = self.folders[inode][-1:]
            else:
                self.contents[inode] = content(handle)

    def install(self) -> None:
        import sgopd.trainer

        def wrap(owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def wrapper(*arguments: Any, **options: Any) -> Any:
                self.tick()
                result = original(*arguments, **options)
                self.tick()
                return result

            setattr(owner, name, wrapper)

        os.fsync = self.fsync
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "ftruncate"):
            wrap(os, name)
        wrap(sgopd.trainer.MetricsFile, "write")
        wrap(sgopd.trainer.MetricsFile, "__init__")
        wrap(sgopd.trainer, "write_completions")
        original = sgopd.trainer.Trainer.save_checkpoint

        def save_checkpoint(trainer: Any, *arguments: Any) -> None:
            original(trainer, *arguments)
            self.saved = trainer.state.step
            self.tick()

        sgopd.trainer.Trainer.save_checkpoint = save_checkpoint  # type: ignore[method-assign]

    def fsync(self, handle: int) -> None:
        self.tick()
        inode = os.fstat(handle).st_ino
        if inode in self.folders:
            self.folders[inode] = [listing(handle)]
        else:
            self.contents[inode] = content(handle)
        self.tick()

    def look(self) -> None:
        """Takes note of every folder's present entries."""
        waiting = [self.root]
        while waiting:
            path = waiting.pop()
            handle = self.hold(path)
            if handle is None:
                continue
            entries = listing(handle)
            history = self.folders.setdefault(os.fstat(handle).st_ino, [{}] if path != self.root else [entries])
            if history[-1] != entries:
                history.append(entries)
            for entry in os.scandir(handle):
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path / entry.name)
                elif entry.inode() not in self.handles:
                    self.hold(path / entry.name)

    def hold(self, path: Path) -> int | None:
        try:
            inode = os.stat(path).st_ino
            if inode not in self.handles:
                self.handles[inode] = os.open(path, os.O_RDONLY)
            return self.handles[inode]
        except FileNotFoundError:
            return None

    def tick(self) -> None:
        self.operations += 1
        self.look()
        if self.operations == self.cut_at:
            self.write()
            os.kill(os.getpid(), signal.SIGKILL)
        if not self.cut_at:
            self.output.write_text(str(self.operations))

    def write(self) -> None:
        files = {
            inode: (self.contents.get(inode), content(handle))
            for inode, handle in self.handles.items()
            if inode not in self.folders
        }
        root = os.stat(self.root).st_ino
        state = {"root": root, "folders": self.folders, "files": files, "saved": self.saved}
        self.output.write_bytes(pickle.dumps(state))


def listing(handle: int) -> dict[str, int]:
    with os.scandir(handle) as entries:
        return {entry.name: entry.inode() for entry in entries}


def content(handle: int) -> bytes:
    return Path(f"/proc/self/fd/{handle}").read_bytes()


def after_the_cut(state: dict[str, Any], target: Path, rng: random.Random) -> None:
    """Makes of `target` one of the trees that the disk may hold.

    What is drawn, and how often, depends on neither the order of a folder's entries nor the lengths of files, which
    change with the file system and the clock: a case repeats.
    """

    def between(least: int, most: int) -> int:
        return least + int(rng.random() * (most - least + 1))

    def build(inode: int, path: Path) -> None:
        if inode in state["folders"]:
            path.mkdir()
            for name, entry in sorted(rng.choice(state["folders"][inode]).items()):
                build(entry, path / name)
            return
        certain, latest = state["files"].get(inode, (None, b""))
        if certain is None:  # never synced: nothing, a part, zeros in place of a part, or all
            part = between(0, len(latest))
            data = rng.choice([b"", latest[:part], latest[:part] + bytes(len(latest) - part), latest])
        elif latest.startswith(certain):  # appended to since
            part = between(len(certain), len(latest))
            data = rng.choice([certain, latest[:part], latest[:part] + bytes(len(latest) - part), latest])
        else:
            data = rng.choice([certain, latest])
        path.write_bytes(data)

    shutil.rmtree(target)
    build(state["root"], target)


# --- what a run must look like ---


class Lost(Exception):
    """Something was lost: the run cannot go on, or not to the same end."""


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock or on how the run was started."""
    result = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in record.items() if not k.startswith("time/") and k != "tokens_per_second"}
        for record in result
        if record["kind"] != "config"
    ]


def metrics_by_step(run: Path) -> dict[int, float]:
    """avg@k at each saved step of a whole run."""
    evaluations = [record for record in records(run) if record["kind"] == "eval"]
    return {record["step"]: record["eval/avg_at_k"] for record in evaluations if record["step"] % SAVE_STEPS == 0}


def same(ours: Any, theirs: Any) -> bool:
    import torch

    if isinstance(theirs, torch.Tensor):
        return isinstance(ours, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


def check_same(run: Path, reference: Path) -> None:
    """Raises Lost for the first difference."""
    import pyarrow.parquet
    import torch

    from sgopd import checkpoint

    def expect(name: str, equal: bool) -> None:
        if not equal:
            raise Lost(f"differs from the undisturbed run: {name}")

    expect("metrics.jsonl", records(run) == records(reference))
    names = {path.name for path in (reference / "final").iterdir()}
    expect("files in final/", {path.name for path in (run / "final").iterdir()} == names)
    for name in names:
        expect(f"final/{name}", (run / "final" / name).read_bytes() == (reference / "final" / name).read_bytes())
    kept = checkpoint.saved(reference / "checkpoints")
    there = {path.name for path in checkpoint.saved(run / "checkpoints")}
    expect("checkpoints that are kept", {path.name for path in kept} <= there)
    for theirs in kept:
        ours = run / "checkpoints" / theirs.name
        expect(f"{theirs.name}: {checkpoint.fault(ours)}", checkpoint.fault(ours) is None)
        weights = (path / "model.safetensors" for path in (ours, theirs))
        expect(f"{theirs.name}/model.safetensors", len({path.read_bytes() for path in weights}) == 1)
        for name in ("optimizer.pt", "random.pt"):
            values = [torch.load(path / name, weights_only=True) for path in (ours, theirs)]
            expect(f"{theirs.name}/{name}", same(*values))
        states = [json.loads((path / "state.json").read_text()) for path in (ours, theirs)]
        for state in states:  # times are part of the file
            state.pop("metrics_position"), state.pop("metrics_sha256")
        expect(f"{theirs.name}/state.json", states[0] == states[1])
    files = {path.name for path in (reference / "completions").iterdir()}
    expect("files in completions/", {path.name for path in (run / "completions").iterdir()} == files)
    for name in files:
        tables = [pyarrow.parquet.read_table(path / "completions" / name).to_pylist() for path in (run, reference)]
        expect(f"completions/{name}", tables[0] == tables[1])
    left = [str(path.relative_to(run)) for path in run.rglob(".*") if path != run / ".lock"]
    expect(f"left-over files {left}", not left)


def check_best(run: Path, reference: Path, least: int = 0, except_for: Path | None = None) -> None:
    """Raises Lost unless the newest checkpoint is of `least` or later, and the best up to it is there and whole."""
    from sgopd import checkpoint

    whole = [path for path in checkpoint.saved(run / "checkpoints") if checkpoint.fault(path) is None]
    newest = max(map(checkpoint.step_of, whole), default=0)
    if newest < least:
        raise Lost(f"the checkpoint of step {least} was saved, and the newest that is whole is of step {newest}")
    measured = {step: metric for step, metric in metrics_by_step(reference).items() if step < newest}
    if any(checkpoint.metric_of(path) is not None for path in whole if checkpoint.step_of(path) == newest):
        measured[newest] = metrics_by_step(reference)[newest]
    best = max(measured, key=lambda step: measured[step], default=None)
    if best is not None and best not in map(checkpoint.step_of, whole):
        raise Lost(f"the best checkpoint, of step {best}, is gone: there are {[path.name for path in whole]}")


# --- the campaign ---


@dataclass
class Campaign:
    folder: Path
    seed: int
    references: dict[int, Path] = field(default_factory=dict)  # processes -> an undisturbed run
    seconds: dict[int, dict[str, list[float]]] = field(default_factory=dict)  # … and its stages
    partial: dict[int, Path] = field(default_factory=dict)  # processes -> a run that was stopped after 5 updates
    operations: dict[int, int] = field(default_factory=dict)  # processes -> operations on files of a run

    def new(self, name: str) -> Path:
        import yaml

        folder = self.folder / f"{name}-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(settings(folder)))
        return folder

    def reference(self, processes: int) -> Path:
        if processes not in self.references:
            folder = self.new("reference")
            finish(folder, processes, Hooks(counts=folder / "seconds.json"))
            self.seconds[processes] = json.loads((folder / "seconds.json").read_text())
            steps = metrics_by_step(folder / "run")
            best = max(steps, key=lambda step: steps[step])
            assert best < STEPS, f"the last checkpoint is the best one, which proves nothing: {steps}"
            self.references[processes] = folder / "run"
        return self.references[processes]

    def copy_of_partial(self, processes: int) -> Path:
        """A folder with a run that SIGTERM ended after 5 of 6 updates."""
        if processes not in self.partial:
            folder = self.new("partial")
            running = Running(folder, processes, Hooks("update", 5))
            assert running.at_stage()
            running.signal(signal.SIGTERM, range(processes))
            running.go_on()
            assert running.wait() == [143] * processes, running.text()
            self.partial[processes] = folder / "run"
        folder = self.new("case")
        shutil.copytree(self.partial[processes], folder / "run")
        return folder

    def run(self, number: int, case: Case) -> str:
        """Tries one case. Returns how it ended: "resumed", or "stopped" with a message.

        Raises:
            Lost: anything else.
        """
        rng = random.Random(f"{self.seed} {number}")
        self.reference(case.processes)
        with contextlib.ExitStack() as stack:
            return KINDS[case.kind](self, case, rng, stack)

    def end(self, folder: Path, case: Case, *flags: str) -> None:
        """The run goes on to its end, which must be the undisturbed run's, and leaves no process behind."""
        finish(folder, case.processes, None, *flags)
        check_same(folder / "run", self.references[case.processes])
        check_best(folder / "run", self.references[case.processes])
        if left := left_behind(folder.name):
            raise Lost(f"left processes behind: {left}")
        shutil.rmtree(folder)


def finish(folder: Path, processes: int, hooks: Hooks | None, *flags: str) -> str:
    running = Running(folder, processes, hooks, 0, *flags)
    status = running.wait()
    if status != [0] * processes:
        raise Lost(f"ended with {status}:\n{running.text()[-3000:]}")
    return running.text()


def left_behind(mark: str) -> list[int]:
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def check_stopped(status: list[int], text: str, *words: str) -> None:
    """Raises Lost unless the run ended with status 1 and a message with these words, and not by accident."""
    if status[0] != 1 or any(code != 1 for code in status) or "Traceback" in text:
        raise Lost(f"ended with {status}, expected 1 and a message:\n{text[-3000:]}")
    for word in words:
        if word not in text:
            raise Lost(f"the message lacks {word!r}:\n{text[-3000:]}")


def at_random(campaign: Campaign, case: Case, rng: random.Random) -> tuple[Hooks, int, float]:
    """Hooks for one of the stage's calls, the rank that gets them, and how long that call takes."""
    rank = 1 if case.what == "other" and case.stage not in ("start", "final") else 0
    took = campaign.seconds[case.processes][case.stage]
    call = rng.randrange(len(took))
    return Hooks(case.stage, call + 1), rank, took[call]


def interrupt(campaign: Campaign, case: Case, rng: random.Random, folder: Path, number: int) -> tuple[list[int], str]:
    """Sends a signal at the case's stage and waits for the end: statuses, and what was said."""
    hooks, rank, seconds = at_random(campaign, case, rng)
    running = Running(folder, case.processes, hooks, rank)
    running.at_stage()
    ranks = {"main": [0], "other": [1]}.get(case.what, range(case.processes))
    if case.how != "before":
        running.go_on()
        time.sleep(rng.uniform(0, 1.2 * seconds))
    running.signal(number, ranks)
    running.go_on()
    return running.wait(), running.text()


def kill(campaign: Campaign, case: Case, rng: random.Random, stack: contextlib.ExitStack) -> str:
    folder = campaign.new("case")
    for _ in range(2 if case.how == "twice" else 1):
        status, text = interrupt(campaign, case, rng, folder, signal.SIGKILL)
        survivors = [code for code in status if code not in (-signal.SIGKILL, 0)]
        if case.processes > 1 and survivors:
            check_stopped(survivors, text, "lost another process of this run", "--resume_from_checkpoint auto")
        check_best(folder / "run", campaign.references[case.processes])
    campaign.end(folder, case)
    return "resumed"


def stop(campaign: Campaign, case: Case, rng: random.Random, stack: contextlib.ExitStack) -> str:
    from sgopd import checkpoint

    folder = campaign.new("case")
    number = signal.SIGTERM if case.kind == "sigterm" else signal.SIGINT
    status, text = interrupt(campaign, case, rng, folder, number)
    in_time = [128 + number] * case.processes
    # Where everything is saved and the loop has ended, the signal has its usual effect.
    too_late = case.stage in ("save", "evaluate", "final") and {*status} <= {0, -number, 130, 1}
    if status == in_time and not (case.stage == "final" and "stopped after" not in text):
        newest = checkpoint.saved(folder / "run" / "checkpoints")[-1]
        state = json.loads((newest / "state.json").read_text())
        if checkpoint.fault(newest) or state["metrics_position"] != (folder / "run" / "metrics.jsonl").stat().st_size:
            raise Lost(f"not everything was saved: {newest}")
        if "and saved. To go on" not in text or "Traceback" in text:
            raise Lost(f"did not say how to go on:\n{text[-2000:]}")
    elif not too_late:
        raise Lost(f"ended with {status}, expected {in_time}:\n{text[-3000:]}")
    check_best(folder / "run", campaign.references[case.processes])
    campaign.end(folder, case)
    return "resumed"


def full(campaign: Campaign, case: Case, rng: random.Random, stack: contextlib.ExitStack) -> str:
    folder = campaign.new("case")
    run, ballast = folder / "run", folder / "run" / "ballast"
    run.mkdir()
    mounted = case.what != "limit" and mount(run, stack)
    hooks, rank, _ = at_random(campaign, case, rng)
    hooks.limit_files = not mounted
    running = Running(folder, case.processes, hooks, rank)
    running.at_stage()
    if mounted:
        space = os.statvfs(run).f_bavail * os.statvfs(run).f_frsize
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(space - int(case.how), 1))
    running.go_on()
    status = running.wait()
    ended = "resumed"  # there was room enough
    if status != [0] * case.processes:
        check_stopped(status, running.text(), "cannot write", "Free some space")
        ended = "stopped"
    if mounted:
        ballast.unlink()
    check_best(run, campaign.references[case.processes])
    finish(folder, case.processes, None)
    check_same(run, campaign.references[case.processes])
    return ended


def mount(path: Path, stack: contextlib.ExitStack) -> bool:
    """A small file system of its own at `path`; False where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(path)]
    with contextlib.suppress(OSError):
        if subprocess.run(command, capture_output=True).returncode == 0:
            stack.callback(subprocess.run, ["umount", str(path)], check=True)
            return True
    return False


def unwritable(campaign: Campaign, case: Case, rng: random.Random, stack: contextlib.ExitStack) -> str:
    folder = campaign.copy_of_partial(1) if case.how == "file" else campaign.new("case")
    if case.how == "file":  # a run of another user, say
        target, hooks, rank = folder / "run" / case.what, Hooks(), 0
    else:
        target = folder / "run" / case.what
        hooks, rank, _ = at_random(campaign, case, rng)
    hooks.confined = True
    if case.how == "file":
        target.chmod(0o444)
        running = Running(folder, case.processes, hooks, rank)
    else:
        running = Running(folder, case.processes, hooks, rank)
        running.at_stage()
        if target.exists():
            target.chmod(0o555)
        running.go_on()
    status = running.wait()
    ended = "resumed"
    if status != [0] * case.processes:
        check_stopped(status, running.text(), "cannot write", "choose another output_dir")
        ended = "stopped"
    if target.exists():
        target.chmod(0o755 if target.is_dir() else 0o644)
    check_best(folder / "run", campaign.references[case.processes])
    campaign.end(folder, case)
    return ended


def spoil(file: Path, how: str, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if how == "removed":
        return file.unlink()
    if how == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "zeroed":
        start = rng.randrange(len(data))
        data[start:] = bytes(len(data) - start)
    else:
        del data[0 if how == "emptied" else rng.randrange(len(data)) :]
    file.write_bytes(data)


def damage(campaign: Campaign, case: Case, rng: random.Random, stack: contextlib.ExitStack) -> str:
    from sgopd import checkpoint

    folder = campaign.copy_of_partial(case.processes)
    saved = checkpoint.saved(folder / "run" / "checkpoints")
    newest = saved[-1]
    whose, _, name = case.what.partition(" ")
    before = {path: checkpoint.fault(path) for path in saved}
    assert not any(before.values()) and len(saved) >= 2
    if whose == "half-deleted":
        for file in rng.sample(sorted(newest.iterdir()), 5):
            file.unlink()
    elif whose == "leftover":
        newest.rename(newest.with_name(f".{newest.name}.tmp"))
        (folder / "run" / ".final.tmp").mkdir()
        (folder / "run" / "completions" / ".step-000006.parquet.tmp").write_bytes(b"PAR1")
    elif whose == "first-version":
        edit_state(newest, lambda state: state.pop("metrics_sha256"))
    elif whose == "config.yaml":
        spoil(folder / "run" / "config.yaml", "zeroed", rng)
    else:
        for path in saved if whose == "all" else [newest]:
            spoil(path / name, case.how, rng)
    if whose in ("all", "named"):
        flags = ["--resume_from_checkpoint", str(newest)] if whose == "named" else []
        content = sorted(str(path) for path in (folder / "run").rglob("*"))
        running = Running(folder, case.processes, None, 0, *flags)
        words = ("is damaged", "or auto") if flags else ("no checkpoint of this run is whole", "from a copy")
        check_stopped(running.wait(), running.text(), *words)
        if sorted(str(path) for path in (folder / "run").rglob("*")) != content:
            raise Lost("it stopped, and something is gone nevertheless")
        if whose == "named":
            campaign.end(folder, case)
        return "stopped"
    text = finish(folder, case.processes, None)
    if whose in ("newest", "half-deleted") and "skipped the checkpoint" not in text:
        raise Lost(f"the damage was not noticed:\n{text[-2000:]}")
    if whose == "first-version" and f"resuming from {newest}" not in text:
        raise Lost(f"a checkpoint of the first version was not resumed from:\n{text[-2000:]}")
    campaign.end(folder, case)
    return "resumed"


def edit_state(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a checkpoint's state and keeps its manifest right."""
    from sgopd import checkpoint

    state, manifest = (json.loads((path / name).read_text()) for name in ("state.json", "manifest.json"))
    change(state)
    (path / "state.json").write_text(json.dumps(state))
    file = path / "state.json"
    manifest["state.json"] = {"size": file.stat().st_size, "sha256": checkpoint.digest(file)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def metrics(campaign: Campaign, case: Case, rng: random.Random, stack: contextlib.ExitStack) -> str:
    folder = campaign.copy_of_partial(case.processes)
    path = folder / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    if case.how == "half a line":
        path.write_bytes(whole + b'{"step": 6, "kind": "train", "lo')
        campaign.end(folder, case)
        return "resumed"
    spoil(path, {"cut": "truncated", "edited": "flipped", "removed": "removed"}[case.how], rng)
    running = Running(folder, case.processes)
    check_stopped(running.wait(), running.text(), "metrics.jsonl is not what", "Put it back from a copy")
    spoilt = path.read_bytes() if path.exists() else b""
    if spoilt != {"removed": b""}.get(case.how, spoilt) or (case.how == "cut" and not whole.startswith(spoilt)):
        raise Lost("it stopped, and changed the file nevertheless")
    path.write_bytes(whole)  # the first remedy it names
    campaign.end(folder, case)
    return "stopped"


def power(campaign: Campaign, case: Case, rng: random.Random, stack: contextlib.ExitStack) -> str:
    processes = case.processes
    if processes not in campaign.operations:
        folder = campaign.new("case")
        counter = campaign.folder / f"operations-{processes}"
        finish(folder, processes, Hooks(power=counter))
        campaign.operations[processes] = int(counter.read_text())
    folder, state_file = campaign.new("case"), campaign.folder / "disk"
    for _ in range(2 if case.how == "twice" else 1):
        cut_at = rng.randrange(1, campaign.operations[processes] + 1)
        state_file.unlink(missing_ok=True)
        Running(folder, processes, Hooks(power=state_file, cut_at=cut_at)).wait()
        if not state_file.exists():  # it was done before
            break
        state = pickle.loads(state_file.read_bytes())
        after_the_cut(state, folder, rng)
        check_best(folder / "run", campaign.references[processes], least=state["saved"])
    campaign.end(folder, case)
    return "resumed"


def second(campaign: Campaign, case: Case, rng: random.Random, stack: contextlib.ExitStack) -> str:
    def there() -> list[tuple[str, int, int, bytes]]:
        paths = sorted((folder / "run").rglob("*"))
        facts = [(path, path.stat()) for path in (folder / "run", *paths)]
        return [(str(p), s.st_ino, s.st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p, s in facts]

    folder = campaign.new("case")
    hooks, rank, _ = at_random(campaign, case, rng)
    first = Running(folder, case.processes, hooks, rank)
    first.at_stage()
    before = there()
    other = Running(folder, case.processes)
    check_stopped(other.wait(), other.text(), "another run is at work", str(first.pids[0]), "another output_dir")
    if there() != before:
        raise Lost("the run that was refused changed something")
    first.go_on()
    if (status := first.wait()) != [0] * case.processes:
        raise Lost(f"the first run ended with {status}:\n{first.text()[-3000:]}")
    check_same(folder / "run", campaign.references[case.processes])
    campaign.end(folder, case)
    return "resumed"


KINDS: dict[str, Callable[[Campaign, Case, random.Random, contextlib.ExitStack], str]] = {
    "kill": kill,
    "sigterm": stop,
    "sigint": stop,
    "full": full,
    "unwritable": unwritable,
    "damage": damage,
    "metrics": metrics,
    "power": power,
    "second": second,
}


def warm_up() -> None:
    """Imports all that a run needs, and computes nothing: what is forked from here starts at once."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    import psutil  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import sgopd.cli
    import sgopd.trainer  # noqa: F401
    from sgopd.config import Config
    from sgopd.models import load_model, load_tokenizer

    torch.set_num_threads(1)
    config = Config.load(None, settings(Path("nowhere")))  # loading once fills the libraries' tables
    load_model(config.model_name_or_path, config, "model_name_or_path", "float32")
    load_tokenizer(config.model_name_or_path, config, "model_name_or_path")


def summary_of(outcomes: Sequence[tuple[int, Case, str]]) -> dict[str, Any]:
    """By kind: how many were tried, resumed, stopped with a message, lost."""
    table: dict[str, dict[str, int]] = {}
    for _, case, ended in outcomes:
        row = table.setdefault(case.kind, {"tried": 0, "survived": 0, "resumed": 0, "stopped": 0, "lost": 0})
        row["tried"] += 1
        row[ended if ended in ("resumed", "stopped") else "lost"] += 1
        row["survived"] = row["resumed"] + row["stopped"]
    failures = [
        {"case": number, "what": str(case), "lost": ended}
        for number, case, ended in outcomes
        if ended not in ("resumed", "stopped")
    ]
    return {"kinds": table, "two_processes": sum(case.processes == 2 for _, case, _ in outcomes), "failures": failures}


def progress(campaign: Campaign, cases: Sequence[tuple[int, Case]]) -> Iterator[tuple[int, Case, str]]:
    for place, (number, case) in enumerate(cases, 1):
        began = time.monotonic()
        try:
            ended = campaign.run(number, case)
        except Exception as error:
            ended = f"{type(error).__name__}: {error}"
            if not isinstance(error, Lost):
                ended += "\n" + traceback.format_exc()
        took = time.monotonic() - began
        print(f"{place}/{len(cases)}  case {number}: {case}: {ended}  ({took:.1f} s)", flush=True)
        yield number, case, ended


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, help="only so many cases, of all kinds")
    parser.add_argument("--seed", type=int, default=0, help="decides the calls, moments, bits and bytes (default: 0)")
    parser.add_argument("--only", choices=KINDS, help="only cases of one kind")
    parser.add_argument("--case", type=int, help="only this one, by its number")
    parser.add_argument("--output", type=Path, help="JSON file for the summary, kept up to date; printed in any case")
    options = parser.parse_args(arguments)
    cases = chosen(options.seed, options.few, options.only)
    if options.case is not None:
        cases = [(options.case, plan()[options.case])]
    warm_up()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="sgopd-chaos-") as folder:
        for outcome in progress(Campaign(Path(folder), options.seed), cases):
            outcomes.append(outcome)
            if options.output is not None:
                options.output.write_text(json.dumps(summary_of(outcomes), indent=1) + "\n")
    summary = summary_of(outcomes)
    print(json.dumps(summary, indent=1))
    print(f"chaos: {len(outcomes)} cases, {len(summary['failures'])} lost")
    return 1 if summary["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
