"""The native extensions' door: what crosses as an integer is checked before it is followed."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sgopd_kernels import _cpu, gated_kl_loss
from sgopd_kernels.backends import usable


def arguments(**changes: Any) -> tuple[dict[str, Any], list[torch.Tensor]]:
    z, t = torch.randn(4, 50), torch.randn(4, 50)
    ids, verdict, weights = torch.arange(4), torch.ones(4), torch.ones(3, 4, dtype=torch.float64)
    scale, stats = torch.ones(4), torch.empty(4, _cpu.COLUMNS, dtype=torch.float64)
    given = dict(
        rows=4,
        vocabulary=50,
        student=z.data_ptr(),
        student_stride=50,
        teacher=t.data_ptr(),
        teacher_stride=50,
        reference=0,
        reference_stride=0,
        student_head=(0, 1.0, 0.0),
        teacher_head=(0, 1.0, 0.0),
        reference_head=(0, 1.0, 0.0),
        token_ids=ids.data_ptr(),
        verdict=verdict.data_ptr(),
        weights=weights.data_ptr(),
        forced=0,
        row_scale=scale.data_ptr(),
        teacher_logprob=0,
        behaviour_logprob=0,
        stats=stats.data_ptr(),
        sampled=False,
        divergence=0,
        parameter=0.5,
        energy=0,
        tolerance=0.0,
        ratio_clip=1.0,
        temperature=1.0,
        gradient=True,
    )
    return {**given, **changes}, [z, t, ids, verdict, weights, scale, stats]


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(student=0), "student: null"),
        (dict(stats=0), "stats: null"),
        (dict(row_scale=0), "row_scale: null"),
        (dict(student=3), "aligned"),
        (dict(student_stride=49), "stride"),
        (dict(vocabulary=0), "student: .* 4 and 0"),
        (dict(rows=-1), "student: .* rows"),
        (dict(divergence=6), "divergence"),
        (dict(teacher=0), "sampled"),
        (dict(teacher=0, sampled=True), "teacher_logprob: null"),
        (dict(temperature=0.0), "temperature"),
        (dict(isa="sse9"), "isa"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], match: str) -> None:
    given, held = arguments(**changes)
    with pytest.raises(ValueError, match=match):
        _cpu.rows(**given)
    assert held


def test_token_ids_are_checked_again_at_the_door() -> None:
    given, held = arguments()
    held[2][1] = 50
    with pytest.raises(IndexError, match="token_ids"):
        _cpu.rows(**given)
    held[2][1] = 49
    _cpu.rows(**given)
    assert abs(float(held[0].sum())) < 1e-5  # a gradient's rows sum to 0


def test_threads_of_python_may_call_at_once(kit: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    inputs = kit.make_inputs(n=150, v=2000)
    expected = gated_kl_loss(*inputs.args(), backend="cpu")
    with ThreadPoolExecutor(8) as pool:
        for loss in pool.map(lambda _: gated_kl_loss(*inputs.args(), backend="cpu"), range(32)):
            assert torch.equal(loss, expected)


NO_MEMORY = r"""
#include "parallel.h"

#include <cstdio>
#include <cstdlib>
#include <new>

static int threads = 1;  // that there is memory for; the list of two takes 16 bytes
void* operator new(std::size_t size) {
  if (size > 16 && threads-- <= 0) throw std::bad_alloc();
  return std::malloc(size);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

int main() {
  std::atomic<int> done{0};
  sgopd::parallel(5, 3, [&](int64_t) { ++done; });
  std::printf("%d", done.load());
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_where_memory_ends_the_threads_there_are_do_all_tasks(tmp_path: Path) -> None:
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(NO_MEMORY)
    folder = Path(__file__).resolve().parents[2] / "csrc/cpu"
    subprocess.run(["g++", "-std=c++17", "-pthread", f"-I{folder}", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "5"), done.stderr


def test_cuda_extension_is_built_where_nvcc_is_and_refuses_without_a_device(kit: Any) -> None:
    inputs = kit.make_inputs(n=4, v=20, hs=8)
    with pytest.raises(ValueError, match="backend='cuda' needs tensors on cuda"):
        gated_kl_loss(*inputs.args(), backend="cuda")
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on the PATH: the CUDA extension is not built")
    assert usable("cuda")
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is present: the refusal is of machines without one")
    from sgopd_kernels import _cuda

    given, held = arguments()
    for isa in ({}, {"isa": "block"}, {"isa": "cluster"}):
        with pytest.raises(RuntimeError, match="CUDA row pass"):
            _cuda.rows(**given, **isa)
    with pytest.raises(ValueError, match="isa: expected 'block' or 'cluster'"):
        _cuda.rows(**given, isa="sse9")
    assert held


@pytest.mark.skipif(len(_cpu.available()) == 1, reason="nothing wider than the base instruction set to compare with")
@pytest.mark.parametrize("divergence", ["reverse-kl", "forward-kl"])
def test_no_loop_of_the_row_pass_is_scalar(divergence: str) -> None:
    """The numbers are the same where the compiler gives a loop up: only the time tells."""
    n, v = 4, 16_384
    z = 3 * torch.randn(n, v)
    near, far = z + 1e-3 * torch.randn(n, v), z + torch.randn(n, v)  # near: the second-order sum as well
    work = z.clone()
    cases = {"near": (near, _cpu.available()[0]), "far": (far, _cpu.available()[0]), "far, base": (far, "base")}
    seconds = dict.fromkeys(cases, float("inf"))
    for _ in range(20):
        for name, (t, isa) in cases.items():
            work.copy_(z)
            given, held = arguments(
                vocabulary=v,
                student=work.data_ptr(),
                student_stride=v,
                teacher=t.data_ptr(),
                teacher_stride=v,
                divergence=["reverse-kl", "forward-kl"].index(divergence),
            )
            start = time.perf_counter()
            _cpu.rows(**given, isa=isa)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
            del held
    print({name: round(s * 1e3, 3) for name, s in seconds.items()})
    assert seconds["far, base"] > 1.3 * seconds["far"]
    assert seconds["near"] < 2.4 * seconds["far"]
