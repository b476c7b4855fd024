"""The trainer under the real Ray Train, on two workers of this CPU, beside the same run under torchrun.

    python tests/real_ray.py        # `make long ONLY=ray` prepares the environment; three minutes on two cores

Losses must be within 2e-7 of each other. Then one of Ray's workers is killed: the run must go on by itself, and end
with the weights of the run that nothing stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

import sgopd

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = Path(sgopd.__file__).parent / "assets" / "quickstart"
SETTINGS = {
    "model_name_or_path": QUICKSTART / "student",
    "teacher_model_name_or_path": QUICKSTART / "teacher",
    "max_steps": 6,
    "save_steps": 2,
    "cold_start_steps": 2,
    "eval_dataset_size": 6,
    "num_generations_eval": 2,
    "per_device_train_batch_size": 16,
    "dataset_size": 200,
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sgopd", "train"]
RAY = [str(ROOT / "examples" / "ray_train.py"), "--workers", "2"]


def run(launcher: list[str], output: Path) -> None:
    flags = [word for key, value in (SETTINGS | {"output_dir": output}).items() for word in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    # Its workers are of the lowest priority by default, which on a busy machine starves them beyond its timeouts.
    environment |= {"RAY_worker_niceness": "0", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, *launcher, str(QUICKSTART / "quickstart.yaml"), *flags]
    with (output.parent / f"{output.name}.log").open("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(900)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # Ray's own processes end with the one that started them
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(launcher)} ended with {process.returncode}:\n{log.read()[-5000:]}")


def losses(output: Path) -> list[float]:
    records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


def kill_a_worker(output: Path, killed: list[int]) -> None:
    """Once there is a checkpoint: one of the processes that Ray started for this run."""
    while not (output / "checkpoints" / "step-000002").exists():
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)
                return killed.append(process.pid)


def main() -> None:
    failed = 0

    def check(what: str, value: float, limit: float) -> None:
        nonlocal failed
        failed += not value <= limit
        print(f"{'ok' if value <= limit else 'FAILED':>6}  {what}: {value:.2g} (at most {limit:g})", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def differ(a: str, b: str) -> bool:
            return len({(folder / run / "final" / "model.safetensors").read_bytes() for run in (a, b)}) > 1

        run(TORCHRUN, folder / "torchrun")
        run(RAY, folder / "ray")
        pairs = zip(losses(folder / "ray"), losses(folder / "torchrun"), strict=True)
        check("losses of six updates, Ray Train beside torchrun", max(abs(a - b) for a, b in pairs), 2e-7)
        check("weights that are not the same bits", differ("ray", "torchrun"), 0)
        killed: list[int] = []
        watcher = threading.Thread(target=kill_a_worker, args=(folder / "killed", killed), daemon=True)
        watcher.start()
        run(RAY, folder / "killed")
        check("a worker killed after update 2: none was found", not killed, 0)
        check("… weights that are not those of the run that nothing stopped", differ("killed", "ray"), 0)
    sys.exit(failed)


if __name__ == "__main__":
    main()
