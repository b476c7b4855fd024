"""Backends: the primitives a plan is made of, on one kind of device. No policy lives here (see plan.py).

project(hidden, weight, out)             out [n, V] fp32 = hidden @ weight.T, accurate to fp32
rows(problem, rows, z_s, z_t, z_r, ...)  statistics [n, 8] fp64; gradient in place of z_s
add_hidden_gradient(g, weight, out)      out [n, H] fp32 += g @ weight
add_weight_gradient(g, hidden, out)      out [V, H] fp32 += g.T @ hidden
"""

from __future__ import annotations

from torch import device as Device
from torch import dtype as DType
from torch import float64  # not `import torch`: that name is a submodule here

from . import cpu
from .cpu import CpuBackend
from .torch import TorchBackend

NAMES = ("auto", "reference", "torch", "cpu")


def resolve(name: str, device: Device, dtype: DType) -> str:
    """The backend a call takes. "auto" chooses by device; a name that can't serve the call is an error."""
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}; got {name!r}")
    if name == "auto":
        if dtype == float64:
            return "reference"
        if device.type == "cpu" and cpu.available():
            return "cpu"
        return "torch"
    if name != "reference" and dtype == float64:
        raise ValueError(
            f"backend={name!r} computes in float32; float64 inputs are served by backend='reference' (or 'auto')"
        )
    if name == "cpu":
        if device.type != "cpu":
            raise ValueError(f"backend='cpu' needs tensors on the CPU, got {device}; use backend='auto'")
        if not cpu.available():
            raise RuntimeError(
                "backend='cpu': the native extension sgopd_kernels._cpu is not built; "
                "install the package (`pip install .`) or use backend='torch'"
            )
    return name


def get(name: str) -> TorchBackend:
    """The primitives of a resolved backend ("torch" or "cpu")."""
    return _INSTANCES[name]


_INSTANCES: dict[str, TorchBackend] = {"torch": TorchBackend(), "cpu": CpuBackend()}
