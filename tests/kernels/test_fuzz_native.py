"""The short form of tests/fuzz_native.py: fixed seeds, a few seconds. `make long ONLY=fuzz` runs new ones."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def fuzz(root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("fuzz_native", root / "tests" / "fuzz_native.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_fixed_seeds(fuzz: Any) -> None:
    counts = fuzz.run(0, 400, float("inf"), None)
    assert sum(counts.values()) == 400
    for kind in fuzz.CASES:
        assert counts[kind] > 20 and counts[f"{kind}, wrong"] > 10


# What the fuzzer found, each by the seed that showed it.
FOUND = {
    1813: "fp32 squares of what extract_top left ran under",
    653: "... and over",
    100842: "a NaN in an early block was lost from the quantized log-sum-exp",
    1979: "JSD in torch operations was NaN where the student is masked and the teacher is not",
    1378: "a softcap turned a masked column into an ordinary one in torch operations",
    160: "a large common offset took the digits of a log-probability",
    102110: "... and of the JSD",
    36: "a width of -1 was taken",
    1795545753438: "a forward KL below 0.05 nats lost a column that is beyond fp32 for the student alone",
    1795546062635: "the judge: without a loss the gradient may be 0 or NaN where p is 0",
    1795548503563: "... and a reference's NaN in such a column need not be in it",
    1795554752492: "... nor, where the teacher masks the column, in the loss",
    1795722074797: "the judge: a processor's bf16 products take a denormal operand as 0",
}


@pytest.mark.parametrize("seed", FOUND)
def test_what_was_found(fuzz: Any, seed: int) -> None:
    fuzz.one(seed)
