"""The native CUDA backend: csrc/cuda/rows.cu on the current stream, between the products of tensor_cores.py.

Built where nvcc is found. It compiles for sm_80, sm_90, sm_100 and sm_120; no device has run it yet, so that
"auto" does not choose it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _extension
from .native import NativeBackend
from .tensor_cores import TensorCoreBackend

MOVED_ROWS = 64  # copied at once


class CudaBackend(TensorCoreBackend, NativeBackend):
    name = "cuda"
    module = _extension.CUDA
    # "block": a block a token, which reads its logits two or three times. "cluster": a cluster, which reads them once
    # (sm_90 and newer). The faster by arithmetic, but no device has said so.
    isa = "block"

    def move_rows(self, z: Tensor, to: Tensor, origin: Tensor) -> None:
        for rows, source in zip(to.split(MOVED_ROWS), origin.split(MOVED_ROWS)):
            z.index_copy_(0, rows, z.index_select(0, source))

    def runs_on(self) -> dict[str, Any]:
        return {"stream": torch.cuda.current_stream().cuda_stream, "isa": self.isa}
