"""The native CUDA backend: csrc/cuda/rows.cu on the current stream.

Built where nvcc is found. It compiles for sm_80, sm_90, sm_100 and sm_120; no device has run it yet, so that
"auto" does not choose it.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import _extension
from .native import NativeBackend


class CudaBackend(NativeBackend):
    name = "cuda"
    module = _extension.CUDA

    def launch(self) -> dict[str, Any]:
        return {"stream": torch.cuda.current_stream().cuda_stream}
