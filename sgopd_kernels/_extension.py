"""The native extensions; None where one was not built, which asking for its backend by name says.

A file that is there and does not load is an error, not a missing extension.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def _load(name: str) -> ModuleType | None:
    full = f"{__package__}.{name}"
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            raise
        return None


CPU = _load("_cpu")
CUDA = _load("_cuda")  # built where nvcc is
