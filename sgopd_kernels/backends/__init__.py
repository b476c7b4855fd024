"""Backends: the primitives a plan is made of, on one kind of device. No policy lives here (see plans/).

project(hidden, weight, out)             out [n, V] fp32 = hidden @ weight.T, accurate to fp32
rows(problem, chunk, form)               statistics [n, 8] fp64; gradient in place of the student's logits
add_hidden_gradient(g, weight, out, add) out [n, H] fp32 (+)= g @ weight
add_weight_gradient(g, hidden, out, add) out [V, H] fp32 (+)= g.T @ hidden; bf16 where `rounds_sums`
"""

from __future__ import annotations

from torch import device as Device
from torch import dtype as DType
from torch import float64  # not `import torch`: that name is a submodule here

from .._checks import one_of
from .cpu import CpuBackend
from .cuda import CudaBackend
from .torch import TorchBackend
from .triton import TritonBackend

_INSTANCES: dict[str, TorchBackend] = {
    b.name: b for b in (TorchBackend(), CpuBackend(), CudaBackend(), TritonBackend())
}
NAMES = ("auto", "reference", *_INSTANCES)


def resolve(name: str, device: Device, dtype: DType) -> str:
    """The backend a call takes. "auto" chooses by device; a name that can't serve the call is an error."""
    name = one_of("backend", name, NAMES)
    if name == "auto":
        if dtype == float64:
            return "reference"
        best = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "torch")
        return best if usable(best) else "torch"
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
    if name == "triton":
        triton = _INSTANCES[name]
        assert isinstance(triton, TritonBackend)
        if not usable(name):
            raise RuntimeError(
                "backend='triton': Triton cannot be imported; install triton>=3.6 or use backend='torch'"
            )
        if device.type != "cuda" and not (device.type == "cpu" and triton.interpreted()):
            raise ValueError(
                f"backend='triton' needs tensors on cuda, got {device}; use backend='auto' (for tests, Triton's "
                "interpreter takes CPU tensors: set TRITON_INTERPRET=1 before the first import of triton)"
            )
    return name


def usable(name: str) -> bool:
    """Whether what a backend is made of is there: a native one's extension, Triton."""
    return _INSTANCES[name].available()


def get(name: str) -> TorchBackend:
    """The primitives of a resolved backend."""
    return _INSTANCES[name]
