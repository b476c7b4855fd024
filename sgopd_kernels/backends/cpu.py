"""The native CPU backend: csrc/cpu/rows.cpp, for the best instruction set of the processor, on torch's threads."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

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

    def project(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        """bf16 operands through csrc/cpu/project_bf16.cpp where the processor can: fp32 results without fp32 copies."""
        both = hidden.dtype == weight.dtype == torch.bfloat16 and hidden.stride(1) == weight.stride(1) == 1
        if not both or self.module is None or not self.module.has_bf16():
            super().project(hidden, weight, out)
            return
        (n, h), v = hidden.shape, weight.shape[0]
        self.module.project_bf16(
            hidden=hidden.data_ptr(),
            n=n,
            hidden_stride=hidden.stride(0),
            weight=weight.data_ptr(),
            v=v,
            weight_stride=weight.stride(0),
            h=h,
            out=out.data_ptr(),
            out_stride=out.stride(0),
            threads=torch.get_num_threads(),
        )

    def instruction_sets(self) -> list[str]:
        """Of the build and this processor, best first; the first one is used."""
        return [] if self.module is None else list(self.module.available())
