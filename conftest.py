"""The tests and the benchmarks exercise the *installed* packages: the checkout must not shadow them.

`SGOPD_TEST_SOURCE=1 pytest` tests the source tree instead, for development after
`python setup.py build_ext --inplace`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
FROM_SOURCE = os.environ.get("SGOPD_TEST_SOURCE") == "1"

# `python -m pytest` and PYTHONPATH=. both put the checkout first; its packages lack the built extension.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
if FROM_SOURCE:
    sys.path.insert(0, str(ROOT))
sys.path += [
    str(ROOT / "tools"),
    str(ROOT / "bench"),
    str(ROOT / "evidence"),
]  # what tests and benchmarks import by name
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout: for examples and scripts that are not part of the packages."""
    return ROOT
