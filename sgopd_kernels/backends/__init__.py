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

from .cpu import CpuBackend
from .cuda import CudaBackend
from .native import NativeBackend
from .torch import TorchBackend

_INSTANCES: dict[str, TorchBackend] = {b.name: b for b in (TorchBackend(), CpuBackend(), CudaBackend())}
NAMES = ("auto", "reference", *_INSTANCES)


def resolve(name: str, device: Device, dtype: DType) -> str:
    """The backend a call takes. "auto" chooses by device; a name that can't serve the call is an error."""
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}; got {name!r}")
    if name == "auto":
        if dtype == float64:
            return "reference"
        return "cpu" if device.type == "cpu" and usable("cpu") else "torch"
    if name != "reference" and dtype == float64:
        raise ValueError(
            f"backend={name!r} computes in float32; float64 inputs are served by backend='reference' (or 'auto')"
        )
    if name in ("cpu", "cuda"):
        if device.type != name:
            raise ValueError(f"backend={name!r} needs tensors on {name}, got {device}; use backend='auto'")
        if not usable(name):
            raise RuntimeError(
                f"backend={name!r}: the native extension sgopd_kernels._{name} is not built; install the package "
                f"(`pip install .`{', with nvcc on the PATH' if name == 'cuda' else ''}) or use backend='torch'"
            )
    return name


def usable(name: str) -> bool:
    """Whether a native backend's extension was built."""
    backend = _INSTANCES[name]
    return isinstance(backend, NativeBackend) and backend.available()


def get(name: str) -> TorchBackend:
    """The primitives of a resolved backend."""
    return _INSTANCES[name]
