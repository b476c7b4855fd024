"""A whole call at the target shape, on meta tensors: shapes without values, so that nothing is computed.

What a call launches, in which order, on which device; what it holds; how often the host waits for a value. (Fake
tensors on "cuda" would say the same, but indexing them needs a torch that is built with CUDA.)
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sgopd_kernels import Options, driver, loss, ops
from sgopd_kernels.backends import tensor_cores
from sgopd_kernels.backends.torch import device_guard, without_autocast
from sgopd_kernels.backends.triton import TritonBackend
from sgopd_kernels.options import Head
from sgopd_kernels.plans.base import NeedsGrad
from sgopd_kernels.problem import Problem, encode

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

N, V, HS, HT = 8192, 151_936, 2048, 4096
LOGITS = 4 * V  # bytes a token and model
ROWS = 2048  # tokens a chunk
BOTH = NeedsGrad(hidden=True, weight=True)
SLACK = 64 * N * 8  # statistics, numbers of tokens


class Recorder(TritonBackend):
    """Keeps what would be launched. Products really are torch's calls: its meta functions look at shapes and types."""

    def __init__(self, capture: bool = False) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.capture = capture
        self.guarded: torch.device | None = None  # the current device

    def capturing(self, device: torch.device) -> bool:
        assert device == self.guarded
        return self.capture

    def launch(self, kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
        tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
        assert {t.device for t in tensors} == {self.guarded}, "launched while another device is the current one"
        self.launches.append(kernel.__name__)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool, factor: float = 1.0) -> None:
        assert a.device == self.guarded
        assert a.dtype == b.dtype and a.dtype.itemsize == 2 and out.dtype == torch.float32
        assert a.shape[1] == b.shape[0] and out.shape == (a.shape[0], b.shape[1])
        # cuBLAS's fast kernels want rows of 16 bytes
        assert all(t.stride(0) * t.element_size() % 16 == 0 or t.stride(1) != 1 for t in (a, b, out))
        super().multiply(a, b, out, add, factor)
        self.launches.append("+product" if add else "product")


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
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
                    self.largest = max(self.largest, storage.nbytes())
                    self.peak = max(self.peak, sum(self.alive.values()))
        return result


class Host(TorchDispatchMode):
    """Counts where the host waits for a device's value, or copies to it, and answers for the values."""

    STAY, MOVED = 1000, 300  # rows of a chunk that have a weight; those of them that fill a gap

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies: list[str] = []
        self.asserted: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(func)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        target = torch.device(kwargs.get("device") or (first.device if first is not None else "cpu"))
        if name.startswith("aten._assert_async"):
            self.asserted.append(args[1])
            return None
        if name.startswith("aten.nonzero."):
            self.waits.append(name)
            return torch.arange(args[0].numel(), device="meta").unsqueeze(1)
        if name == "aten._local_scalar_dense.default" and first.is_meta:
            self.waits.append(name)
            return 1
        if name == "aten._to_copy.default" and first.device != target:
            if first.is_meta:
                self.waits.append(name)
                return torch.tensor([self.STAY, self.MOVED])
            self.copies.append(name)
        if name.startswith("aten.copy_") and args[1].device != first.device:
            (self.waits if args[1].is_meta else self.copies).append(name)
        return func(*args, **kwargs)


@dataclass
class Call:
    backend: Recorder
    memory: Memory
    host: Host
    outputs: tuple[Tensor, ...]
    chunks: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """What is launched from one chunk's first projection to the next one's."""
        for at, name in enumerate(self.backend.launches):
            if name == "rows_kernel":
                self.chunks.append(self.backend.launches[at : at + 1])
            elif self.chunks:
                self.chunks[-1].append(name)


def run(
    options: Options,
    needs_grad: NeedsGrad = BOTH,
    capture: bool = False,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.bfloat16, torch.bfloat16),
    changes: Any = lambda problem: problem,
) -> Call:
    """The op's own body, of hidden states and heads of `dtypes`."""
    inputs: list[Tensor] = []

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        inputs.append(torch.empty(*shape, dtype=dtype, device="meta"))
        return inputs[-1]

    def head(width: int) -> Head:
        return Head(empty(N, width, dtype=dtypes[0]), empty(V, width, dtype=dtypes[1]))

    problem = Problem(options, head(HS), empty(N, dtype=torch.int64), empty(N, dtype=torch.float32), teacher=head(HT))
    problem = changes(problem)
    backend = Recorder(capture)

    @contextlib.contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        backend.guarded = device
        yield
        backend.guarded = None

    wanted = [needs_grad.hidden, needs_grad.weight, needs_grad.bias]
    leaves = (problem.student.hidden, problem.student.weight, None)
    with pytest.MonkeyPatch.context() as patch, Memory(inputs) as memory, Host() as host:
        patch.setattr(ops, "get", lambda name: backend)
        patch.setattr(driver, "device_guard", guard)
        outputs = ops.fused_loss._init_fn(*leaves, None, *encode(problem), "triton", "", wanted)
    return Call(backend, memory, host, outputs)


def above_gradients(call: Call, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes beside the hidden gradient and the weight's sum in fp32, which is rounded when the logits are gone."""
    return call.memory.peak - 4 * V * HS - dtype.itemsize * N * HS


def test_launches_and_memory_of_the_default() -> None:
    call = run(Options())
    first, later = (["product", "product", "rows_kernel", "product", dW] for dW in ("product", "+product"))
    assert call.backend.launches == first + later * (N // ROWS - 1)  # the first chunk writes dW: nothing is filled
    assert call.memory.operations <= 60 * N // ROWS + 100  # small ones: gathers of a chunk's rows, the gate's weights
    # The largest tensor: the weight's gradient in fp32, or one model's logits of a chunk. Nothing is near [N, V].
    assert call.memory.largest == max(LOGITS * ROWS, 4 * V * HS) < 4 * N * V / 3
    assert 2 * LOGITS * ROWS <= above_gradients(call) <= TritonBackend.default_workspace + SLACK


def test_exact_is_the_same_call() -> None:
    """Of bf16 heads: G in fp16 is an eighth of what rounding dH and dW to bf16 costs."""
    assert run(Options(precision="exact")).backend.launches == run(Options()).backend.launches


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_fp32_operands_are_multiplied_as_parts(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """fp32 weights under autocast are the usual case: no product of it is one in fp32, but by "exact"."""
    call = run(Options(), dtypes=dtypes)
    tiles = {h: -(-V // (24 * 2**20 // (2 * (3 if dtypes[0] == torch.float32 else 2) * h))) for h in (HS, HT)}
    assert call.chunks[0][:3] == ["rows_kernel", "product", "product"]
    forward = call.chunks[0][3:]
    assert forward == [x for h in (HS, HT) for x in ["parts_kernel", *["parts_kernel", "product"] * tiles[h]]]
    assert call.host.waits == ["aten.nonzero.default"]
    assert above_gradients(call, dtypes[0]) <= TritonBackend.default_workspace + SLACK
    exact = run(Options(precision="exact"), dtypes=dtypes)
    assert set(exact.backend.launches) == {"rows_kernel"} and exact.host.waits == call.host.waits


def test_without_gradients() -> None:
    call = run(Options(precision="exact"), NeedsGrad())
    assert call.backend.launches == ["product", "product", "rows_kernel"] * len(call.chunks)
    assert call.memory.peak <= TritonBackend.default_workspace + SLACK


@pytest.mark.parametrize("workspace", [512 * 2**20, 2**30, 4 * 2**30])
def test_the_workspace_is_kept(workspace: int) -> None:
    assert above_gradients(run(Options(workspace=workspace))) <= workspace + 2 * V * HS + SLACK


def with_every_number(problem: Problem) -> Problem:
    """Each operand that a value is read of."""
    per_token = torch.empty(N, device="meta")
    return replace(problem, reliability=per_token, token_weight=per_token, num_items=torch.empty((), device="meta"))


@pytest.mark.parametrize(
    "options, changes, a_chunk",
    [
        (Options(), lambda problem: problem, 0),
        (Options(precision="exact"), lambda problem: problem, 0),
        (Options(estimator="sampled", divergence="reverse-kl"), lambda problem: problem, 0),
        (Options(divergence=("jsd", 0.3), temperature=0.7), lambda problem: problem, 0),
        (Options(gate="opdvr"), lambda problem: problem, 1),
        (Options(gate="verified-only", precision="exact"), lambda problem: problem, 1),
        (Options(), with_every_number, 1),
    ],
)
def test_the_host_waits_as_often_as_the_pages_say(options: Options, changes: Any, a_chunk: int) -> None:
    """Once a call, for the number of tokens; once a chunk where rows may leave; never in a capture. No copies."""
    call = run(options, changes=changes)
    assert call.host.waits == ["aten.nonzero.default"] + ["aten._to_copy.default"] * a_chunk * len(call.chunks)
    assert call.host.copies == []
    captured = run(options, changes=changes, capture=True)
    assert captured.host.waits == captured.host.copies == []
    assert ("move_rows_kernel" in call.backend.launches) == (a_chunk > 0)
    assert "move_rows_kernel" not in captured.backend.launches, "which rows leave is not known in a capture"


def test_a_number_of_items_is_no_copy_to_the_device() -> None:
    copies = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_to_copy" in str(func):
                copies.append(str(func))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Log():
        assert loss._num_items(8192, torch.device("cuda", 0)).dtype == torch.float64
        assert copies == []
        torch.tensor(8192.0, dtype=torch.float64, device="cuda")
    assert copies, "this is what such a copy looks like"


def test_what_only_values_tell_is_asserted_on_the_device() -> None:
    """As many assertions as there are checks, and no wait for their outcome."""

    def top_k(problem: Problem) -> Problem:
        ids, words = torch.empty(N, 8, dtype=torch.int64, device="meta"), torch.empty(N, 8, device="meta")
        return replace(problem, teacher=None, topk_ids=ids, topk_logprob=words)

    def sampled(problem: Problem) -> Problem:
        words = torch.empty(N, device="meta")
        return replace(problem, teacher=None, teacher_logprob=words, behaviour_logprob=words)

    every = run(Options(), changes=with_every_number).host.asserted
    top = run(Options(), changes=top_k).host.asserted
    words = run(Options(estimator="sampled"), changes=sampled).host.asserted
    for asserted, expected in (
        (every, ["token_ids", "verdict", "reliability", "token_weight", "num_items"]),
        (top, ["token_ids", "verdict", "topk_ids: ids must", "topk_ids: an id stands twice", "topk_logprob"]),
        (words, ["token_ids", "verdict", "teacher_logprob", "behaviour_logprob", "behaviour_logprob: -inf"]),
    ):
        for start in expected:
            assert any(message.startswith(start) for message in asserted), (start, asserted)


def test_the_tensors_device_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Recorder` asserts it at every launch and product; this is the guard itself."""
    assert isinstance(device_guard(torch.device("cuda", 1)), torch.cuda.device)
    assert device_guard(torch.device("cuda", 1)).idx == 1
    monkeypatch.setattr(driver, "device_guard", lambda device: contextlib.nullcontext())
    with pytest.raises(AssertionError):
        driver.run(replace(small(), options=Options()), Recorder(), torch.empty(4, device="meta"), BOTH)


def small() -> Problem:
    def head() -> Head:
        shapes = ((4, 16), (32, 16))
        return Head(*(torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in shapes))

    ids = torch.empty(4, dtype=torch.int64, device="meta")
    return Problem(Options(), head(), ids, torch.empty(4, device="meta"), teacher=head())


@pytest.mark.parametrize("kind", ["cpu", "cuda", "xpu"])
def test_autocast_is_off_inside(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every device."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    before = torch.is_autocast_enabled(kind)
    torch.set_autocast_enabled(kind, True)
    try:
        with without_autocast(torch.device(kind)):
            assert not torch.is_autocast_enabled(kind)
        assert torch.is_autocast_enabled(kind)
    finally:
        torch.set_autocast_enabled(kind, before)


def test_a_torch_that_does_not_add_to_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked once a device; then the product is made tile by tile, and added."""
    real, calls = torch.addmm, []

    def refuses(added: Tensor, *operands: Tensor, **options: Any) -> Tensor:
        calls.append(added.shape)
        if added.dtype != operands[0].dtype:
            raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
        return real(added, *operands, **options)

    tensor_cores.adds_in_place.cache_clear()
    monkeypatch.setattr(torch, "addmm", refuses)
    monkeypatch.setattr(tensor_cores, "COLUMNS_AT_ONCE", 32)
    products = []
    monkeypatch.setattr(torch, "mm", lambda a, b, **options: (products.append(a.shape), a.float() @ b.float())[1])
    try:
        a, b, out = (torch.empty(*s, dtype=d, device="meta") for s, d in SHAPES)
        TritonBackend().multiply(a, b, out, add=True)
        TritonBackend().multiply(a, b, out, add=True)
        assert calls == [(16, 16)] and products == [(32, 24), (32, 24), (6, 24)] * 2
        TritonBackend().multiply(a, b, out, add=False, factor=0.5)
        assert calls == [(16, 16)] and products[6:] == [(70, 24)]
    finally:
        tensor_cores.adds_in_place.cache_clear()
    monkeypatch.undo()
    assert tensor_cores.adds_in_place(torch.device("meta")), "this torch does"
    TritonBackend().multiply(a, b, out, add=True)
    TritonBackend().multiply(a, b, out, add=False, factor=0.5)


def test_fp16_products_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allowed outside; and it is allowed again afterwards."""
    settings, seen = torch.backends.cuda.matmul, []
    for name in ("mm", "addmm"):
        real = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, real=real, **k: (seen.append(settings.allow_fp16_accumulation), real(*a, **k))[1]
        )
    before = settings.allow_fp16_accumulation
    settings.allow_fp16_accumulation = True
    try:
        call = run(Options())
        assert settings.allow_fp16_accumulation and len(seen) >= len(call.backend.launches) - len(call.chunks)
    finally:
        settings.allow_fp16_accumulation = before
    assert not any(seen)


SHAPES = (((70, 24), torch.bfloat16), ((24, 40), torch.bfloat16), ((70, 40), torch.float32))
