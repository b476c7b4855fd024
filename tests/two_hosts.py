"""A run on two hosts: two network namespaces with a cable between them, torchrun in each. Needs root and iproute2.

    python tests/two_hosts.py        # minutes

The student in shards over one process a host. The end must have the bits of the same run on two processes of one host;
with one host's processes killed in the middle, the other one must say so and end, and the run go on to the same bits.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

SETTINGS = {"max_steps": 6, "save_steps": 2, "cold_start_steps": 2, "eval_dataset_size": 6, "num_generations_eval": 2}
SETTINGS |= {"per_device_train_batch_size": 16, "dataset_size": 200, "fsdp": True, "save_total_limit": 9}
HOSTS = ("sgopd-a", "sgopd-b")
PORT = 29_531


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Two namespaces, 10.77.0.1 and 10.77.0.2."""
    for host in HOSTS:
        ip("netns", "add", host)
    try:
        ip("link", "add", "cable", "netns", HOSTS[0], "type", "veth", "peer", "name", "cable", "netns", HOSTS[1])
        for number, host in enumerate(HOSTS, 1):
            ip("-n", host, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", host, "link", "set", link, "up")
        yield
    finally:
        for host in HOSTS:
            ip("netns", "delete", host)


def start(folder: Path, name: str, where: Sequence[str], *flags: str) -> list[subprocess.Popen[str]]:
    """torchrun on each host, or one with two processes where no host is named."""
    command = [sys.executable, "-m", "torch.distributed.run", "--max_restarts", "0"]
    words = ["-m", "sgopd", "quickstart", "--output_dir", name, *flags]
    for key, value in SETTINGS.items():
        words += [f"--{key}", str(value).lower()]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    started = []
    for number, host in enumerate(where):
        rendezvous = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(number)]
        rendezvous += ["--master_addr", "10.77.0.1", "--master_port", str(PORT)]
        prefix = ["ip", "netns", "exec", host]
        started.append(
            popen([*prefix, *command, *rendezvous, *words], folder, {**environment, "GLOO_SOCKET_IFNAME": "cable"})
        )
    return started or [popen([*command, "--standalone", "--nproc_per_node", "2", *words], folder, environment)]


def popen(command: Sequence[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(started: Sequence[subprocess.Popen[str]], expected: int = 0) -> str:
    said = "".join(process.communicate(timeout=300)[0] for process in started)
    status = [process.returncode for process in started]
    assert all((one != 0) == (expected != 0) for one in status), f"{status}:\n{said[-4000:]}"
    return said


def main() -> None:
    with tempfile.TemporaryDirectory() as name, network():
        folder = Path(name)

        def final(run: str) -> bytes:
            return (folder / run / "final" / "model.safetensors").read_bytes()

        finish(start(folder, "one-host", ()))
        finish(start(folder, "two-hosts", HOSTS))
        print("the same bits as on one host:", same := final("two-hosts") == final("one-host"))
        killed = start(folder, "killed", HOSTS)
        while not (folder / "killed" / "checkpoints" / "step-000002").exists():
            time.sleep(0.01)
        there = subprocess.run(["ip", "netns", "pids", HOSTS[1]], check=True, capture_output=True, text=True)
        for pid in map(int, there.stdout.split()):
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        said = finish(killed, expected=1)
        print(f"the other host ended {time.monotonic() - began:.0f} s after the first was killed")
        named = "lost another process of this run" in said or "stopped after" in said
        print("it said why:", named)
        finish(start(folder, "killed", HOSTS, "--resume_from_checkpoint", "auto"))
        print("gone on to the same bits:", again := final("killed") == final("one-host"))
    sys.exit(not (same and named and again))


if __name__ == "__main__":
    main()
