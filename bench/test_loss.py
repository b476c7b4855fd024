"""The loss beside its peers: forward and backward, or statistics alone.

    pytest bench/test_loss.py
    python tools/hidden_states.py --output runs/hidden      # real hidden states: what the plans are made for
    pytest bench/test_loss.py --hidden runs/hidden/high.safetensors --memory
    pytest bench/test_loss.py --hidden runs/hidden/high.safetensors --tokens 64,256,1024,4096 --memory \\
      --benchmark-json runs/tokens.json && python tools/plot_scaling.py runs/tokens.json

One thing changes at a time: distribution (usual, near: models that nearly agree, flat: nothing can be left out), size
(V 6,144, 49,152, 151,936), dtype. Errors are Frobenius, against float64 on the same operands.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import candidates as c
import psutil
import pytest
import torch

BASE = c.Case()
CASES = [
    *(replace(BASE, dtype=dtype, distribution=d) for dtype in ("float32", "bfloat16") for d in c.DISTRIBUTIONS),
    *(replace(BASE, dtype=dtype, gradients=False) for dtype in ("float32", "bfloat16")),
    replace(BASE, size="small"),
    *(replace(BASE, dtype=dtype, size="wide") for dtype in ("float32", "bfloat16")),
]
ON_CUDA = [
    *(replace(BASE, dtype="bfloat16", distribution=d, size="target", device="cuda") for d in c.DISTRIBUTIONS),
    replace(BASE, dtype="bfloat16", gradients=False, size="target", device="cuda"),
    replace(BASE, device="cuda"),
]
SMOKE = [replace(case, size="tiny") for case in CASES[:8]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    hidden, tokens, vocabulary = (metafunc.config.getoption(name) for name in ("hidden", "tokens", "vocabulary"))
    cases, smoke = [*CASES, *ON_CUDA], SMOKE
    if tokens or vocabulary:
        sizes = [[int(size) for size in (asked or "0").split(",")] for asked in (tokens, vocabulary)]
        cases, smoke = [replace(BASE, tokens=n, vocabulary=v) for n in sizes[0] for v in sizes[1]], []
    if hidden:  # a file has one size, and no flat rows
        real = [case for case in cases if case.size == "usual" and case.distribution is not c.FLAT]
        cases, smoke = [replace(case, hidden=hidden) for case in real if case.device == "cpu"], []
    tests = [pytest.param(case, id=str(case)) for case in cases]
    tests += [pytest.param(case, id=str(case), marks=pytest.mark.smoke) for case in smoke]
    metafunc.parametrize("case", tests)
    metafunc.parametrize("candidate", c.NAMES)


def prepare(case: c.Case, memory: bool) -> Callable[[str, bool], tuple[float, dict[str, Any]]]:
    if case.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tried, operands = c.for_pytest(case.device, case.size == "tiny"), case.operands()
    exact = c.truth(operands, rows=256 if case.device == "cuda" else 64)
    # Autograd over whole logits holds about seven copies of [N, V] in fp32.
    whole = 28 * len(operands.hidden) * len(operands.weight)
    room = torch.cuda.mem_get_info()[0] if case.device == "cuda" else psutil.virtual_memory().available

    def turn(name: str, look: bool) -> tuple[float, dict[str, Any]]:
        candidate = replace(tried[name], backward=case.gradients and tried[name].backward)
        if why := c.missing(candidate, case.device):
            pytest.skip(why)
        if name in ("eager", "orda-kernel") and whole > 0.7 * room:
            pytest.skip(f"{whole / 2**30:.0f} GiB of logits would not fit")
        if name == "products" and not case.gradients:
            candidate = replace(candidate, call=c.products(False, 2048 if case.device == "cuda" else 128))
        (seconds, _), loss, leaves = case.call(candidate, operands)
        if not look:
            return seconds, {}
        seen = {"peer": candidate.kind == "peer", **c.errors(candidate, loss, leaves, exact)}
        del loss, leaves
        if memory and case.size != "tiny":
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                peak = fresh.submit(case.peak, name).result()
            seen["peak MiB"] = None if peak is None else round(peak / 2**20)
        return seconds, seen | c.report(candidate, operands)

    return turn


def test_loss(case: c.Case, candidate: str, in_turn: Any, pytestconfig: pytest.Config) -> None:
    seen = in_turn(lambda: prepare(case, pytestconfig.getoption("memory")))
    if candidate == "products":
        return
    gradient = max(seen.get("dH error", 0.0), seen.get("dW error", 0.0))
    if candidate.startswith("sgopd"):
        # What the default promises; the bf16 result's own rounding is 1.7e-3. fp32 projections limit the exact plan,
        # the more the nearer the models are.
        tight = 5e-4 if case.distribution is c.NEAR else 3e-5
        fp32 = tight if "exact" in candidate else 1.5e-3
        assert gradient <= (fp32 if case.dtype == "float32" else 5e-3) and seen["loss error"] <= 1e-3
    elif case.dtype == "float32":  # else it would be a comparison with something else
        assert gradient <= 1e-2 and seen["loss error"] <= 1e-2
