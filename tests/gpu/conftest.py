"""Tests that need a CUDA device; each module is skipped elsewhere, with the reason.

`SGOPD_GPU_DRY_RUN=1` runs them on the CPU (tools/gpu_suite.py --dry-run): the same lines but those of `Device`, so
that the first run on a device cannot fail on a typo. What only a device has (its memory count, graphs, streams,
synchronisation) is behind `Device` and means nothing there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

DRY = os.environ.get("SGOPD_GPU_DRY_RUN") == "1"
DRY_TOKENS = 12
ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    """A file of the checkout as a module: importlib mode has no sibling imports."""
    name = "gpu_" + path.replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{path}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


if DRY:
    load("tests/triton/interpreter")  # before anything imports Triton: bf16 products, and a tenth of the time


class Device:
    """The lines that only a device can run, and what stands in for them on the CPU."""

    name = "cpu" if DRY else "cuda"
    dry = DRY

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def peak(self, work: Callable[[], Any]) -> int:
        """Bytes allocated above those before, at the worst moment; what `work` returns is alive and counts."""
        if self.dry:
            work()
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def synchronisations(self, work: Callable[[], Any]) -> int:
        """How often the host waits for the device."""
        if self.dry:
            work()
            return 0
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(w.message) for w in caught)

    def captured(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """`work` as a CUDA graph: each call replays it and returns the tensors it writes to."""
        if self.dry:
            return work
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compilation, cuBLAS handles
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            written = work()

        def replay() -> Any:
            graph.replay()
            torch.cuda.synchronize()
            return written

        return replay

    @contextlib.contextmanager
    def busy_stream(self) -> Iterator[None]:
        """A side stream with tens of milliseconds of work queued: what doesn't wait for it reads too early."""
        if self.dry:
            yield
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            yield
        torch.cuda.current_stream().wait_stream(side)


@pytest.fixture(scope="session")
def device() -> Device:
    return Device()


@pytest.fixture(params=["triton", "cuda", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    from sgopd_kernels import backends

    name = request.param
    if name not in backends.NAMES:
        pytest.skip(f"there is no backend {name!r}")
    if name == "cuda" and (DRY or not backends.usable("cuda")):
        pytest.skip("the CUDA extension is not built: no nvcc when the package was installed, or no device")
    return name


@pytest.fixture(scope="session")
def kit() -> Any:
    """tests/kernels' functions, with calls on the device and their results back on the CPU, beside the oracle."""
    kernels = load("tests/kernels/conftest")

    class Kit:
        oracle, relative = staticmethod(kernels.oracle), staticmethod(kernels.relative)

        @staticmethod
        def make_inputs(n: int = 200, **options: Any) -> Any:
            """Fewer tokens in a dry run: Triton's interpreter takes tens of milliseconds for each."""
            return kernels.make_inputs(n=min(n, DRY_TOKENS) if DRY else n, **options)

        @staticmethod
        def on_device(inputs: Any) -> Any:
            return replace(inputs, **{k: t.to(Device.name) for k, t in inputs.__dict__.items()})

        @classmethod
        def call(cls, inputs: Any, **options: Any) -> tuple[Any, ...]:
            found = kernels.call(cls.on_device(inputs), **{"precision": "exact", **options})
            stats = found[3]
            tensors = {k: t.cpu() for k, t in stats.__dict__.items() if isinstance(t, torch.Tensor)}
            return (*(t.cpu() for t in found[:3]), replace(stats, **tensors))

        @classmethod
        def per_token(cls, inputs: Any, **options: Any) -> Any:
            return kernels.per_token(cls.on_device(inputs), **{"precision": "exact", **options}).cpu()

    return Kit


@pytest.fixture(scope="session")
def parity() -> ModuleType:
    """tests/kernels/test_parity.py: its cases and checks take any kit."""
    return load("tests/kernels/test_parity")


@pytest.fixture(scope="session")
def options() -> ModuleType:
    table = load("tools/errors")
    if DRY:
        table.N = DRY_TOKENS  # type: ignore[attr-defined]
    return table
