"""The Triton backend without a GPU: interpreted runs and compilations, each in a process of its own.

Triton decides at its first import whether kernels are interpreted or compiled.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sgopd_kernels import gated_kl_loss

HERE = Path(__file__).resolve().parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install triton)"
)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import sgopd_kernels

    where = str(Path(sgopd_kernels.__file__).parents[1])  # the package under test, installed or not
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = {"PYTHONPATH": where} if os.environ.get("SGOPD_TEST_SOURCE") == "1" else {}
    return subprocess.run(
        [sys.executable, *command], env={**inherited, **paths, **environment}, capture_output=True, text=True
    )


@needs_triton
def test_interpreted() -> None:
    arguments = [
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning",
        "--import-mode=importlib",
        str(HERE / "interpreted.py"),
    ]
    done = run("-m", "pytest", *arguments, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-6000:]


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton carries ptxas on Linux only")
def test_compiles_within_its_ceilings() -> None:
    done = run(str(HERE / "compile_table.py"))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if "_kernel" in line]
    assert {line.split("|")[3].strip() for line in rows} == {"sm_80", "sm_90", "sm_100"}


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton carries ptxas on Linux only")
def test_a_planted_regression_breaks_a_ceiling() -> None:
    done = run(str(HERE / "compile_table.py"), "--plant", "--targets", "sm_90")
    assert done.returncode == 1 and "OVER" in done.stdout, done.stdout + done.stderr[-3000:]


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton carries ptxas on Linux only")
def test_no_number_of_tokens_needs_a_kernel_of_its_own() -> None:
    """A compilation takes 2 to 3 seconds, in the middle of a run."""
    done = run(str(HERE / "compile_table.py"), "--tokens")
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stdout + done.stderr[-3000:]


@needs_triton
def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    operands = torch.randn(4, 8), torch.randn(20, 8), torch.randn(4, 8), torch.randn(20, 8)
    with pytest.raises(ValueError, match=r"backend='triton' needs tensors on cuda, got cpu.*TRITON_INTERPRET"):
        gated_kl_loss(*operands, torch.arange(4), 1, backend="triton")


def test_auto_takes_triton_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from sgopd_kernels import backends

    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(backends, "usable", lambda name: True)
    assert backends.resolve("auto", cuda, torch.bfloat16) == "triton"
    assert backends.resolve("auto", cuda, torch.float64) == "reference"
    monkeypatch.setattr(backends, "usable", lambda name: False)
    assert backends.resolve("auto", cuda, torch.bfloat16) == "torch"
