"""The exact plan at the target shape, on meta tensors: shapes without values, so that nothing is computed.

A read of a value, which on a device would make the host wait, is an error for them. (Fake tensors on "cuda" would say
the same, but indexing them needs a torch that is built with CUDA.)
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sgopd_kernels import Gate, Options, driver
from sgopd_kernels.backends.triton import TritonBackend
from sgopd_kernels.options import Head
from sgopd_kernels.plans.base import NeedsGrad
from sgopd_kernels.problem import Problem

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

N, V, HS, HT = 8192, 151_936, 2048, 4096
LOGITS = 4 * V  # bytes a token and model


class Recorder(TritonBackend):
    """Keeps what would be launched."""

    def __init__(self, capture: bool) -> None:
        self.launches: list[str] = []
        self.capture = capture

    def capturing(self, device: torch.device) -> bool:
        return self.capture

    def launch(self, kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
        self.launches.append(kernel.__name__)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        assert a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32
        assert a.shape[1] == b.shape[0] and out.shape == (a.shape[0], b.shape[1])
        # cuBLAS's fast kernels want rows of 16 bytes
        assert all(t.stride(0) * t.element_size() % 16 == 0 or t.stride(1) != 1 for t in (a, b, out))
        self.launches.append("product")


class Memory(TorchDispatchMode):
    """Bytes alive and their peak, the largest tensor made, and how many operations ran."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.alive: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in inputs}
        self.peak = self.largest = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
                    self.largest = max(self.largest, storage.nbytes())
                    self.peak = max(self.peak, sum(self.alive.values()))
        return result


def run(
    options: Options, needs_grad: NeedsGrad, capture: bool = True, **heads: Any
) -> tuple[Recorder, Memory, driver.Result]:
    inputs: list[Tensor] = []

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        inputs.append(torch.empty(*shape, dtype=dtype, device="meta"))
        return inputs[-1]

    backend = Recorder(capture)
    problem = Problem(
        options,
        Head(empty(N, HS), empty(V, HS)),
        empty(N, dtype=torch.int64),
        empty(N, dtype=torch.float32),
        teacher=Head(empty(N, HT), empty(V, HT)),
    )
    scale = empty(N, dtype=torch.float64)
    with Memory(inputs) as memory:
        result = driver.run(problem, backend, scale, needs_grad)
    return backend, memory, result


BOTH = NeedsGrad(hidden=True, weight=True)


def test_launches_and_memory_of_the_default() -> None:
    backend, memory, result = run(Options(), BOTH)
    chunks = backend.launches.count("rows_kernel")
    assert chunks == 5  # of 1,664 tokens: few enough that accumulating dW does not decide
    assert backend.launches == ["product", "product", "rows_kernel", "product", "product"] * chunks
    assert memory.operations <= 60 * chunks + 60  # small ones: gathers of a chunk's rows, the gate's weights
    # The largest tensor: the weight's gradient in fp32, or one model's logits of a chunk. Nothing is near [N, V].
    assert memory.largest == max(LOGITS * 1664, 4 * V * HS) < 4 * N * V / 3
    assert result.weight is not None and result.hidden is not None
    # Above inputs: the workspace, the hidden gradient, the weight's in fp32, which is rounded when the logits are gone.
    gradients = 4 * V * HS + 2 * N * HS
    assert memory.peak - gradients <= TritonBackend.default_workspace + 64 * N * 8
    assert memory.peak - gradients >= 2 * LOGITS * 1664, "the workspace is used"


def test_exact_splits_the_gradient() -> None:
    backend, memory, _ = run(Options(precision="exact"), BOTH)
    tiles = -(-V // 8192)
    chunk = ["product", "product", "rows_kernel", *["product"] * (2 * 2 * tiles)]
    assert backend.launches == chunk * backend.launches.count("rows_kernel")
    assert memory.peak - (4 + 2) * V * HS - 2 * N * HS <= TritonBackend.default_workspace + 64 * N * 8


def test_without_gradients() -> None:
    backend, memory, _ = run(Options(precision="exact"), NeedsGrad())
    assert backend.launches == ["product", "product", "rows_kernel"] * backend.launches.count("rows_kernel")
    assert memory.peak <= TritonBackend.default_workspace + 64 * N * 8


@pytest.mark.parametrize("workspace", [512 * 2**20, 2**30, 4 * 2**30])
def test_the_workspace_is_kept(workspace: int) -> None:
    _, memory, _ = run(Options(workspace=workspace), BOTH)
    assert memory.peak - (4 + 2) * V * HS - 2 * N * HS <= workspace + 64 * N * 8


def test_the_loop_waits_only_where_rows_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Problem, "valid_rows", lambda self: torch.arange(self.token_ids.numel(), device=self.token_ids.device)
    )
    run(Options(precision="exact"), BOTH, capture=False)
    with pytest.raises(Exception, match="meta"):  # opdvr: the count of rows that stay is read
        run(Options(gate=Gate(1.8, 0.0), precision="exact"), BOTH, capture=False)
    with pytest.raises(Exception, match="meta"):  # the filtered plan: how many columns
        run(Options(), BOTH, capture=False)
    run(Options(gate=Gate(1.8, 0.0)), BOTH, capture=True)
