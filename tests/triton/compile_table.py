"""Compiles every kernel specialisation that the Triton backend launches, for devices that are not here.

    python tests/triton/compile_table.py            # the table; exit status 1 where a ceiling is broken
    python tests/triton/compile_table.py --plant    # with a planted regression, which must break one
    python tests/triton/compile_table.py --all      # all options, not only the usual ones (minutes)
    python tests/triton/compile_table.py --tokens   # how many kernels calls of any number of tokens need

A driver that only names its target stands in for the device's; the launches are the backend's own, recorded. Registers
and spills are ptxas's word, from Triton's own copy of it. Nothing runs: these are no timings.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sgopd_kernels.backends import triton as backend_module
from sgopd_kernels.backends.triton import TritonBackend
from sgopd_kernels.options import Head, Options
from sgopd_kernels.problem import Chunk, Problem

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
# Registers a thread: 256 threads at 128 leave room for two programs a multiprocessor. Shared memory: bytes.
# Spills: none, but where ptxas prefers 80 registers (a third model) or 64 (divergences that are no KL), three or four
# programs a multiprocessor, and 8 or 16 bytes on one target or the other.
SPILLS_ALLOWED = 32 if triton.__version__.startswith("3.6.") else 16
CEILINGS = {"rows_kernel": (128, 8192), "move_rows_kernel": (64, 4096), "parts_kernel": (64, 4096)}


class Driver:
    """As much of a driver as a compilation asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda


class Launch(NamedTuple):
    name: str
    kernel: Any
    arguments: dict[str, Any]


class Recorder(TritonBackend):
    """Keeps what would be launched."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Any, dict[str, Any]]] = []

    def launch(self, kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
        self.launches.append((kernel, arguments))


def problem_of(options: dict[str, Any]) -> Problem:
    """A small problem with the row stride and the operands' kinds of a large one."""
    n, v, h = 16, 48, 16
    choices = Options(
        estimator=options.get("estimator", "full"),
        divergence=options.get("divergence", "reverse-kl"),
        temperature=0.7,
    )
    every = options.get("heads", False)

    def head() -> Head:
        bias = torch.empty(v) if every else None
        return Head(torch.empty(n, h), torch.empty(v, h), bias, 1.5 if every else 1.0, 9.0 if every else None)

    def number(name: str) -> torch.Tensor | None:
        return torch.empty(n) if options.get(name) else None

    return Problem(
        choices,
        head(),
        torch.zeros(n, dtype=torch.int64),
        torch.ones(n),
        teacher=None if options.get("teacher_logprob") else head(),
        teacher_logprob=number("teacher_logprob"),
        behaviour_logprob=number("behaviour"),
        reference=head() if options.get("reference") else None,
    )


USUAL: list[dict[str, Any]] = [
    {},
    {"narrow": True},
    {"gradient": False},
    {"divergence": "forward-kl"},
    {"divergence": ("jsd", 0.3)},
    {"divergence": ("jsd", 0.3), "narrow": True},
    {"divergence": ("alpha", 0.3), "narrow": True},
    {"divergence": ("jsd", 0.3), "narrow": True, "reference": True},
    {"estimator": "sampled"},
    {"estimator": "sampled", "teacher_logprob": True, "behaviour": True},
    {"reference": True, "heads": True, "narrow": True},
]


def every() -> list[dict[str, Any]]:
    kinds: list[dict[str, Any]] = [
        *({"divergence": d} for d in ("reverse-kl", "forward-kl", ("jsd", 0.3))),
        {"estimator": "sampled"},
        *({"divergence": d, "reference": True} for d in ("reverse-kl", "forward-kl", ("jsd", 0.3))),
        {"estimator": "sampled", "reference": True},
        {"estimator": "sampled", "teacher_logprob": True},
        {"estimator": "sampled", "teacher_logprob": True, "behaviour": True},
    ]
    last: list[dict[str, Any]] = [{"gradient": False}, {}, {"narrow": True}]
    return [
        {**kind, **({"heads": True} if heads else {}), **({"forced": True} if forced else {}), **how}
        for kind, heads, forced, how in itertools.product(kinds, (False, True), (False, True), last)
    ]


def launches(options: dict[str, Any]) -> list[Launch]:
    problem = problem_of(options)
    n, v = problem.token_ids.numel(), problem.vocabulary
    recorder = Recorder()
    rows, weights = torch.arange(n), torch.ones(3, n, dtype=torch.float64)
    forced = torch.zeros(n, dtype=torch.int8) if options.get("forced") else None
    logits = [torch.empty(n, v) for _ in range(3)]
    chunk = Chunk(
        rows,
        problem.student.hidden,
        logits[0],
        None if problem.teacher is None else logits[1],
        None if problem.reference is None else logits[2],
        weights,
        forced,
        torch.ones(n, dtype=torch.float64),
    )
    form = torch.float16 if options.get("narrow") else torch.float32
    chunk.top = torch.ones(())
    recorder.rows(problem, chunk, form if options.get("gradient", True) else None)
    if not options:
        recorder.move_rows(logits[0], rows[:2], rows[2:4])
        recorder.parts(problem.student.weight, torch.ones(()), (1, 0, 0))
    name = ", ".join(f"{k}" if x is True else f"{k}={x}" for k, x in options.items()) or "default"
    return [Launch(name, kernel, arguments) for kernel, arguments in recorder.launches]


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def usage(compiled: Any) -> tuple[int, int]:
    """(registers, bytes of spills and local memory) of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
    words = done.stdout.replace(":", " ").split()
    return int(words[words.index("REG") + 1]), int(words[words.index("LOCAL") + 1]) + int(
        words[words.index("STACK") + 1]
    )


def compiled(launch: Launch, capability: int) -> Any:
    driver.set_active(Driver(capability))
    launch.kernel.device_caches.clear()
    return launch.kernel.warmup(grid=(1,), **launch.arguments)


def kernels_for_any_number_of_tokens() -> int:
    """One: the count is no constant of the kernel, nor is where a chunk's tokens begin in the call's."""
    driver.set_active(Driver(90))
    seen = set()
    for tokens, first in itertools.product((1, 2, 16, 24, 4096, 4097), (0, 1, 128)):
        [launch] = launches({"divergence": "forward-kl"})
        problem = {k: launch.arguments[k] for k in ("rows", "weights", "row_scale")}
        for name, tensor in problem.items():
            launch.arguments[name] = torch.cat([tensor.reshape(-1)] * 20)[first:]
        launch.arguments["weights_stride"] = tokens
        launch.kernel.device_caches.clear()
        result = launch.kernel.warmup(grid=(1,), **launch.arguments)
        seen.add(result.hash)
    return len(seen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every combination of options")
    parser.add_argument("--plant", action="store_true", help="a regression: a block too large for its registers")
    parser.add_argument("--tokens", action="store_true", help="kernels that calls of any number of tokens need")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    chosen = parser.parse_args()
    if chosen.plant:
        backend_module.BLOCK = 16384
    if chosen.tokens:
        print(count := kernels_for_any_number_of_tokens())
        return int(count != 1)
    broken = 0
    print("| kernel | options | target | registers | spills, bytes | shared, bytes | |\n|---|---|---|---|---|---|---|")
    for options in [USUAL[0]] if chosen.plant else every() if chosen.all else USUAL:
        for launch, target in itertools.product(launches(options), chosen.targets):
            result = compiled(launch, TARGETS[target])
            name = launch.kernel.__name__
            registers, spills = usage(result)
            most_registers, most_shared = CEILINGS[name]
            shared = result.metadata.shared
            crowded = launch.arguments.get("reference") is not None or launch.arguments.get("DIVERGENCE", 0) > 1
            most_spills = SPILLS_ALLOWED if crowded else 0
            over = registers > most_registers or spills > most_spills or shared > most_shared
            broken += over
            cells = (name, launch.name, target, registers, spills, shared, "OVER" if over else "")
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
