"""The native CUDA backend: csrc/cuda/rows.cu on the current stream.

Built where nvcc is found. It compiles for sm_80, sm_90, sm_100 and sm_120; no device has run it yet, so that
"auto" does not choose it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from .native import NativeBackend

_module: ModuleType | None
try:
    from .. import _cuda as _module  # type: ignore[attr-defined,no-redef,unused-ignore]
except ImportError:  # built without nvcc; asking for the backend by name says so
    _module = None


class CudaBackend(NativeBackend):
    name = "cuda"
    module = _module

    def launch(self) -> dict[str, Any]:
        return {"stream": torch.cuda.current_stream().cuda_stream}
