"""The native CPU backend: csrc/cpu/rows.cpp, for the best instruction set of the processor, on torch's threads."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from .native import NativeBackend

_module: ModuleType | None
try:
    from .. import _cpu as _module  # type: ignore[attr-defined,no-redef,unused-ignore]
except ImportError:  # a source tree that was not built; asking for the backend by name says so
    _module = None


class CpuBackend(NativeBackend):
    name = "cpu"
    module = _module
    isa = ""  # "": the best one

    def launch(self) -> dict[str, Any]:
        return {"threads": torch.get_num_threads(), "isa": self.isa}

    def instruction_sets(self) -> list[str]:
        """Of the build and this processor, best first; the first one is used."""
        return [] if self.module is None else list(self.module.available())
