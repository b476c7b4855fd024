"""CUDA's row pass (csrc/cuda/rows.cuh) on the CPU, a thread for each of the device's, against float64.

What a device's compiler and its rounding of exp do is invisible here. A missing barrier is not: in `make test` threads
are fibers that run in one order and in the other; in `make long ONLY=sanitize` they are threads, under ThreadSanitizer
and AddressSanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgopd_kernels import Options
from sgopd_kernels.backends import get
from sgopd_kernels.options import DIVERGENCES, Head
from sgopd_kernels.problem import Chunk, Problem

SOURCES = Path(__file__).resolve().parents[1] / "cuda_host"
V, ROWS = 701, 3
LONG = os.environ.get("SGOPD_CUDA_HOST")  # what -fsanitize= is given

# "heads": bias, scale and softcap; "masked": columns at -inf; "words": log-probabilities in the teacher's place;
# "offset": of all logits, so large that fp32 has them equal.
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "near": {"near": 3e-2},
    "nearer": {"near": 1e-3},
    "masked": {"masked": True},
    "heads": {"heads": True, "temperature": 0.7},
    "forced": {"forced": True},
    "reference": {"reference": True, "masked": True},
    "sampled": {"estimator": "sampled"},
    "sampled, words": {"estimator": "sampled", "words": True},
    "sampled, reference": {"estimator": "sampled", "reference": True},
    "offset": {"estimator": "sampled", "words": True, "offset": 2.0**53},
    "offset, pair": {"offset": 2.0**53},
    **{
        f"{name}{f', near {near:g}' if near else ''}": {"divergence": form, "near": near, "masked": near is None}
        for form in ("forward-kl", ("jsd", 0.3), ("skew-reverse-kl", 0.1), ("skew-forward-kl", 0.4), ("alpha", 0.6))
        for name in [form if isinstance(form, str) else form[0]]
        for near in (None, 3e-2, 1e-3)
    },
}


@pytest.fixture(scope="session")
def program() -> Iterator[Path]:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        options = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        options += [f"-fsanitize={LONG}", "-DDEVICE_THREADS", "-pthread"] if LONG else []
        command = ["g++", *options, str(SOURCES / "main.cpp"), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        yield path


def problem_of(case: dict[str, Any], seed: int = 0) -> tuple[Problem, Chunk]:
    """A chunk of projections in fp32, and the call that it belongs to."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def head(scale: float) -> Head:
        operands = torch.empty(ROWS, 1), torch.empty(V, 1)
        return Head(*operands, randn(V), scale, 9.0) if case.get("heads") else Head(*operands)

    z = 3 * randn(ROWS, V)
    t = z + case["near"] * randn(ROWS, V) if case.get("near") else 3 * randn(ROWS, V)
    r = 3 * randn(ROWS, V)
    z, t = z + case.get("offset", 0), t + case.get("offset", 0)
    ids = torch.randint(0, V // 2, (ROWS,), generator=g)
    if case.get("masked"):  # whole fours of columns, parts of one; the student alone in the first row
        if case.get("divergence") != "forward-kl":  # infinite there
            z[0, V // 2 + 5 : V // 2 + 90] = -torch.inf
        t[1:, -7:] = -torch.inf
        r[2, -9:] = -torch.inf
    words = case.get("words", False)
    options = {k: case[k] for k in ("divergence", "estimator", "temperature") if k in case}
    problem = Problem(
        Options(**options),
        head(1.5),
        ids,
        torch.tensor([1.0, -1.0, 0.0]),
        teacher=None if words else head(0.7),
        teacher_logprob=-5 * torch.rand(ROWS, generator=g) if words else None,
        behaviour_logprob=-5 * torch.rand(ROWS, generator=g) if words else None,
        reference=head(1.2) if case.get("reference") else None,
    )
    weights = torch.tensor([[1.8] * ROWS, [1.0, 0.5, 0.0], [1.0, 1.0, 0.6]], dtype=torch.float64)
    forced = torch.tensor([1, 0, -1], dtype=torch.int8) if case.get("forced") else None
    scale = torch.rand(ROWS, generator=g) + 0.1
    return problem, Chunk(
        torch.arange(ROWS),
        problem.student.hidden,
        z,
        None if words else t,
        r if problem.reference else None,
        weights,
        forced,
        scale,
    )


def on_threads(
    program: Path, folder: Path, problem: Problem, chunk: Chunk, blocks: int, stride: int, *order: str
) -> tuple[Tensor, Tensor]:
    """(statistics, gradient) by the device's code."""
    options, (divergence, parameter) = problem.options, problem.divergence
    heads = [problem.student, problem.teacher, problem.reference]

    def rows(z: Tensor | None) -> Tensor:
        return torch.empty(0) if z is None else torch.nn.functional.pad(z, (0, stride - V), value=torch.nan)

    def given(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(0) if tensor is None else tensor.to(dtype)

    kind = list(DIVERGENCES).index(divergence)
    whole = torch.tensor([ROWS, V, stride, options.estimator == "sampled", kind])
    real = [parameter, problem.gate.tolerance, options.ratio_clip, options.temperature]
    for h in heads:
        real += [1.0, 0.0] if h is None else [h.logit_scale, h.softcap or 0.0]
    arrays = [
        whole,
        torch.tensor(real, dtype=torch.float64),
        *(rows(z) for z in (chunk.z_student, chunk.z_teacher, chunk.z_reference)),
        *(given(None if h is None else h.bias) for h in heads),
        problem.token_ids,
        problem.verdict,
        chunk.weights,
        given(chunk.forced, torch.int8),
        chunk.scale,
        given(problem.teacher_logprob),
        given(problem.behaviour_logprob),
    ]
    path = folder / "arguments"
    with path.open("wb") as file:
        for array in arrays:
            file.write(torch.tensor([array.numel()]).numpy().tobytes() + array.contiguous().numpy().tobytes())
    # A report ends the program; leaks and stacks of 256 threads are of no interest.
    options_of = {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66", "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [str(program), str(path), str(blocks), *order], env={**os.environ, **options_of}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    out = (folder / "arguments.out").read_bytes()
    stats = torch.frombuffer(bytearray(out[: ROWS * 8 * 8]), dtype=torch.float64).view(ROWS, 8)
    z = torch.frombuffer(bytearray(out[ROWS * 8 * 8 :]), dtype=torch.float32).view(ROWS, stride)
    assert z[:, V:].isnan().all(), "written beyond the row"
    return stats, z[:, :V]


# blocks of the cluster (0: the kernel of one block), elements from row to row: whole 16 bytes, or not
@pytest.mark.parametrize("blocks, stride", [(0, 704), (4, 703), *([(2, 704)] if LONG else [])])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(program: Path, tmp_path: Path, kit: Any, case: str, blocks: int, stride: int) -> None:
    problem, chunk = problem_of(CASES[case], seed=len(case))
    stats, gradient = on_threads(program, tmp_path, problem, chunk, blocks, stride)
    if not LONG:
        again = on_threads(program, tmp_path, problem, chunk, blocks, stride, "descending")
        assert torch.equal(again[0].nan_to_num(7.0), stats.nan_to_num(7.0)) and torch.equal(again[1], gradient)
    expected = get("torch").rows(problem, chunk, torch.float32)  # overwrites the projections
    assert torch.equal(stats.isnan(), expected.isnan()) and torch.equal(stats.isinf(), expected.isinf())
    finite, near = expected.isfinite(), CASES[case].get("near")
    assert kit.relative(stats[finite], expected[finite]) <= 1e-6
    # A divergence near 0 is known as well as the log-sum-exps that it is a difference of.
    value = finite[:, :2]
    assert kit.relative(stats[:, :2][value], expected[:, :2][value]) <= (1e-5 if near else 1e-6)
    assert kit.relative(gradient, chunk.z_student) <= (1e-7 / near if near else 0) + 2e-6
