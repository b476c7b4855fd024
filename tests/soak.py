"""Trains at the quickstart's scale for an hour and looks for what grows.

    python tests/soak.py [--minutes 60] [--output soak.json]        (make long ONLY=soak)

One real `sgopd train` runs on the quickstart's models, with everything that could leak switched on for good: teacher
rollouts in every batch, an evaluation and a checkpoint every 20 updates, and a verifier whose workers hang and die now
and then and are replaced. Meanwhile the memory, processes, descriptors and threads of the whole process tree are
sampled; the median of the last third of the samples is held against that of the first third. (Medians, since a single
sample may meet a checkpoint being written or a worker being replaced.) Then the run is asked to stop, and nothing of
it may be left: no process, no file in the folder for temporary ones.

The verdict is the exit status: 0 nothing grew and nothing is left, 1 something did or is.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import yaml

MARK = "SGOPD_SOAK_RUN"  # in the environment of every process of the run, however far it has detached itself
START_SECONDS = 180
STOP_SECONDS = 180

# quantity -> growth of its median that is still noise: (share, absolute)
ALLOWED = {
    "memory_mib": (0.03, 12.0),  # caches that fill over the first updates; an hour's leak of 100 KiB an update is 700
    "trainer_memory_mib": (0.03, 8.0),
    "processes": (0.0, 1.0),
    "descriptors": (0.0, 2.0),
    "threads": (0.0, 1.0),
}
Sample = dict[str, float]


def verify(response: str, example: dict[str, Any]) -> bool:
    """The verifier of the run, in its worker processes: dies on one response in 500, hangs on one in 4,000."""
    dice = zlib.crc32(response.encode()) % 4000
    if dice == 0:
        time.sleep(60)
    if dice % 500 == 1:
        os._exit(9)
    return response.rsplit("\\boxed{", 1)[-1].split("}", 1)[0].strip() == str(example["answer"])


def settings(folder: Path) -> dict[str, Any]:
    """The quickstart's config with what could leak switched on for the whole run."""
    import sgopd

    assets = Path(sgopd.__file__).parent / "assets" / "quickstart"
    return {
        **yaml.safe_load((assets / "quickstart.yaml").read_text()),
        "model_name_or_path": str(assets / "student"),
        "teacher_model_name_or_path": str(assets / "teacher"),
        "output_dir": str(folder / "run"),
        "verifier": "soak:verify",
        "verifier_timeout": 1.0,
        "max_steps": 1_000_000,  # more than it will come to
        "cold_start_steps": 1_000_000,
        "teacher_reliability": "all",
        "eval_on_start": False,
        "eval_teacher": False,
        "eval_dataset_size": 16,
        "eval_steps": 20,
        "save_steps": 20,
        "logging_steps": 20,
        "num_completions_to_log": 8,
    }


def start(folder: Path, mark: str) -> subprocess.Popen[bytes]:
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings(folder)))
    (folder / "tmp").mkdir()
    here = str(Path(__file__).resolve().parent)  # the workers import this file
    environment = {
        **os.environ,
        MARK: mark,
        "TMPDIR": str(folder / "tmp"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), here))),
    }
    log = (folder / "log").open("wb")
    command = [sys.executable, "-m", "sgopd", "train", str(config)]
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)


def sample(trainer: psutil.Process) -> Sample:
    """What the tree under `trainer`, itself included, holds at this moment."""
    result: Sample = {"memory_mib": 0, "processes": 0, "descriptors": trainer.num_fds()}
    result["threads"] = trainer.num_threads()
    result["trainer_memory_mib"] = trainer.memory_info().rss / 2**20
    for process in [trainer, *trainer.children(recursive=True)]:
        try:
            result["memory_mib"] += process.memory_info().rss / 2**20
            result["processes"] += 1
        except psutil.NoSuchProcess:  # a worker that was replaced meanwhile
            continue
    return result


def growth(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Each quantity's medians over the first and the last third of the samples, and whether it grew by more than noise.

    Raises:
        ValueError: too few samples to tell.
    """
    third = len(samples) // 3
    if third < 5:
        raise ValueError(f"{len(samples)} samples are too few to tell: 15 or more are needed; raise --minutes")
    result = {}
    for name, (share, absolute) in ALLOWED.items():
        values = [one[name] for one in samples]
        first, last = median(values[:third]), median(values[-third:])
        grew = last - first > max(share * first, absolute)
        result[name] = {"first": first, "last": last, "largest": max(values), "grew": grew}
    return result


def left_behind(mark: str) -> list[str]:
    """Processes of the run that are still there, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
        except psutil.Error:
            continue
    return found


def temporary_files(folder: Path) -> list[str]:
    """What is in the folder for temporary files but torch's own cache: one folder a user, empty here."""
    found = [path for path in folder.rglob("*") if not path.name.startswith("torchinductor_")]
    return [str(path.relative_to(folder)) for path in found]


def updates(folder: Path) -> int:
    try:
        return (folder / "run" / "metrics.jsonl").read_bytes().count(b'"kind": "train"')
    except FileNotFoundError:
        return 0


def soak(folder: Path, minutes: float) -> dict[str, Any]:
    """Runs it in `folder` for `minutes` from the third update on, and returns the summary."""
    mark = uuid.uuid4().hex
    process = start(folder, mark)
    trainer = psutil.Process(process.pid)
    samples: list[Sample] = []
    try:
        deadline = time.monotonic() + START_SECONDS
        while updates(folder) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        pause = max(0.1, minutes / 20)  # seconds: 1,200 samples in a long run
        end = time.monotonic() + 60 * minutes
        while process.poll() is None and time.monotonic() < end:
            samples.append(sample(trainer))
            time.sleep(pause)
        early = process.poll()
        process.send_signal(signal.SIGTERM)
        status = process.wait(STOP_SECONDS)
    finally:
        process.kill()
        process.wait()
    time.sleep(1.0)  # the kernel kills the workers of a dead trainer; give it a moment
    if early is not None:
        tail = (folder / "log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"the run ended by itself with status {early}, before its time:\n{tail}")

    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    graded = sum(record[f"rollout/{word}"] for record in train for word in ("correct", "incorrect", "unknown"))
    quantities = growth(samples)
    summary = {
        "minutes": minutes,
        "updates": len(train),
        "evaluations": sum(record["kind"] == "eval" for record in records),
        "rollouts": int(graded + sum(record["phase/teacher_rollouts"] for record in train)),
        "workers_died": mean(train, "verifier/crashed"),
        "workers_hung": mean(train, "verifier/timeout"),
        "samples": len(samples),
        "quantities": quantities,
        "exit_status": status,
        "orphans": left_behind(mark),
        "temporary_files": temporary_files(folder / "tmp"),
    }
    summary["faults"] = faults(summary)
    return summary


def mean(records: Sequence[dict[str, Any]], name: str) -> float:
    """The mean share over updates, which shows that workers were replaced at all."""
    return sum(record[name] for record in records) / max(len(records), 1)


def faults(summary: dict[str, Any]) -> list[str]:
    """What a summary holds against the run, in sentences; none is the verdict "flat"."""
    found = [
        f"{name} grew from {values['first']:.1f} to {values['last']:.1f} (medians of the first and last third)"
        for name, values in summary["quantities"].items()
        if values["grew"]
    ]
    if summary["exit_status"] != 128 + signal.SIGTERM:
        found.append(f"after SIGTERM it ended with status {summary['exit_status']}, expected {128 + signal.SIGTERM}")
    found += [f"left a process behind: {process}" for process in summary["orphans"]]
    found += [f"left a temporary file behind: {file}" for file in summary["temporary_files"]]
    if not summary["workers_died"]:
        found.append("no verifier worker was ever replaced: the run did not exercise what it is for")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long to watch it (default: 60)")
    parser.add_argument("--output", type=Path, help="JSON file for the summary; printed in any case")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="sgopd-soak-") as folder:
        summary = soak(Path(folder), options.minutes)
    text = json.dumps(summary, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")
    print("soak: " + ("; ".join(summary["faults"]) or "nothing grew, nothing is left behind"))
    return 1 if summary["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
