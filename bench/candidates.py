"""What is timed beside what: inputs, float64 truth, our plans, the peers, the products alone, on any device.

For `pytest bench` (test_loss.py, test_update.py) and tools/gpu_suite.py. Every candidate computes what it can: the
ungated reverse KL, a mean over tokens; ours computes the gate too.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sgopd_kernels import backends, gated_kl_loss
from sgopd_kernels.backends.tensor_cores import TensorCoreBackend


class Operands(NamedTuple):
    """Of one call, in the order of `gated_kl_loss`."""

    hidden: Tensor  # [N, Hs]
    weight: Tensor  # [V, Hs]
    teacher_hidden: Tensor  # [N, Ht]
    teacher_weight: Tensor  # [V, Ht]
    token_ids: Tensor  # [N]
    verdict: Tensor  # [N]


@dataclass(frozen=True)
class Shape:
    tokens: int = 8192
    vocabulary: int = 151_936
    student: int = 2048
    teacher: int = 4096


TARGET = Shape()
TINY = Shape(8, 512, 32, 64)  # a dry run's: Triton's interpreter takes tens of milliseconds a token


@dataclass(frozen=True)
class Distribution:
    """Made hidden states. Those of a model (tools/hidden_states.py) don't fit into a repository; `real` reads them."""

    name: str
    candidates: int  # columns a token that stand out, as a language model's do; 0: random logits, the worst case
    distance: float  # standard deviation of the teacher's logits from the student's


# At V 49,152 "usual" has the entropy (1.5 nats) and the share of kept pairs (4 to 6 %) of a model's own samples.
USUAL, NEAR, FLAT = Distribution("usual", 16, 0.5), Distribution("near", 16, 0.03), Distribution("flat", 0, 0.5)
DISTRIBUTIONS = (USUAL, NEAR, FLAT)


def inputs(shape: Shape, distribution: Distribution, dtype: torch.dtype, device: str, seed: int = 0) -> Operands:
    """The teacher's head has the student's in its first columns, so that the two can be near each other."""
    g = torch.Generator(device).manual_seed(seed)
    n, v, hs, ht = shape.tokens, shape.vocabulary, shape.student, shape.teacher
    assert ht >= hs

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    weight = randn(v, hs) / hs**0.5
    if distribution.candidates:
        hidden = 0.5 * randn(n, hs)
        ids = torch.randint(0, v, (n, distribution.candidates), generator=g, device=device)
        # The best candidate's logit from below to far above the log-sum-exp of all others (about 12.5 at the target).
        best = 12 + 10 * torch.rand(n, 1, generator=g, device=device)
        rank = torch.arange(1, distribution.candidates + 1, device=device).log()
        logits = best - 2 * rank + 0.7 * randn(n, distribution.candidates)
        for part in torch.arange(n, device=device).split(256):
            hidden[part] += torch.einsum("nk,nkh->nh", logits[part], weight[ids[part]])
        token_ids = ids.gather(1, torch.multinomial(logits.softmax(-1), 1, generator=g)).squeeze(1)
    else:
        hidden = randn(n, hs)
        token_ids = torch.randint(0, v, (n,), generator=g, device=device)
    other = randn(v, ht - hs) / hs**0.5
    t_hidden = torch.cat(
        [hidden + distribution.distance * randn(n, hs), 0.1 * distribution.distance * randn(n, ht - hs)], 1
    )
    rollout = torch.arange(n, device=device) // max(1, n // 512)
    verdict = 1 - 2 * (rollout % 2)  # correct, incorrect, correct, …
    return Operands(
        hidden.to(dtype),
        weight.to(dtype),
        t_hidden.to(dtype),
        torch.cat([weight, other], 1).to(dtype),
        token_ids,
        verdict.float(),
    )


def real(path: str, noise: str, shape: Shape, dtype: torch.dtype) -> Operands:
    """From a file of tools/hidden_states.py, on the CPU: as many tokens and as much of the vocabulary as there are."""
    from safetensors import safe_open

    names = ("student_hidden", "student_weight", f"teacher_hidden.{noise}", f"teacher_weight.{noise}", "token_ids")
    with safe_open(path, "pt") as file:
        h, w, th, tw, ids = (file.get_tensor(name) for name in names)
    w, tw = w[: shape.vocabulary], tw[: shape.vocabulary]
    n, repeats = shape.tokens, -(-shape.tokens // len(h))
    if repeats > 1:  # the same tokens again, moved a little so that no two rows are equal
        g = torch.Generator().manual_seed(0)
        h, th = (
            (x.repeat(repeats, 1) + 0.01 * x.std() * torch.randn(repeats * len(x), x.shape[1], generator=g))
            for x in (h, th)
        )
    ids = ids.repeat(repeats)[:n].clamp(max=len(w) - 1)
    # copies: what is mapped from a file would become resident only while it is measured
    h, w, th, tw = (x.to(dtype, copy=True) for x in (h[:n], w, th[:n], tw))
    return Operands(h, w, th, tw, ids, 1.0 - 2.0 * (torch.arange(n) // 64 % 2))


class Truth(NamedTuple):
    """The ungated reverse KL, a mean over tokens, in float64 on the same operands."""

    loss: Tensor
    d_hidden: Tensor
    d_weight: Tensor
    entropy: float  # mean, nats


def truth(operands: Operands, rows: int = 256) -> Truth:
    """Of all tokens."""
    h, w, th, tw = (t.double() for t in operands[:4])
    n = h.shape[0]
    loss, entropy = (torch.zeros((), dtype=torch.float64, device=h.device) for _ in range(2))
    d_hidden, d_weight = torch.empty_like(h), torch.zeros_like(w)
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        log_p = torch.log_softmax(h[part] @ w.T, -1)
        ratio = log_p - torch.log_softmax(th[part] @ tw.T, -1)
        p = log_p.exp()
        kl = (p * ratio).sum(-1, keepdim=True)
        entropy -= (p * log_p).sum() / n
        loss += kl.sum() / n
        g = ratio.sub_(kl).mul_(p).div_(n)
        torch.mm(g, w, out=d_hidden[part])
        d_weight.addmm_(g.T, h[part])
    return Truth(loss, d_hidden, d_weight, float(entropy))


@dataclass(frozen=True)
class Candidate:
    """`call(operands)` -> a loss to call backward on, or None for bare products."""

    name: str
    call: Callable[..., Tensor | None]
    kind: str  # "ours", "peer", "floor"
    backward: bool = True
    compared: bool = True  # computes what `truth` does
    package: str = ""  # what it needs beyond torch
    device: str = ""  # what it needs to run on
    plan: str = ""  # the name in roofline.PLANS that it is held against; "" for none
    backend: str = "auto"  # of ours


# ---- ours


def ours(backend: str = "auto", gate: str = "opd", **options: Any) -> Callable[..., Any]:
    def call(o: Operands, **more: Any) -> Any:
        return gated_kl_loss(*o, gate=gate, backend=backend, **options, **more)

    return call


def our_plans(backend: str) -> list[Candidate]:
    """Of bf16 heads `precision="exact"` is the default, call for call: plans/narrow.py."""

    def plan(what: str, call: Callable[..., Any], model: str, **fields: Any) -> Candidate:
        model = model if backend == "triton" else ""  # the others have further passes
        return Candidate(f"sgopd {backend}, {what}", call, "ours", plan=model, backend=backend, **fields)

    half = ours(backend, "verified-only")
    return [
        plan("default precision", ours(backend), "exact, G in fp16"),
        plan("exact", ours(backend, precision="exact"), "exact, G in fp16"),
        plan("statistics", ours(backend), "statistics, no gradient", backward=False),
        plan("gate density ½", half, "exact, G in fp16, gate density ½", compared=False),
    ]


# ---- peers


def reverse_kl(hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor) -> Tensor:
    log_p = torch.log_softmax((hidden @ weight.T).float(), -1)
    log_q = torch.log_softmax((t_hidden @ t_weight.T).float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum()


def eager(o: Operands) -> Tensor:
    return reverse_kl(*o[:4]) / o.hidden.shape[0]


def checkpointed_chunks(rows: int) -> Callable[[Operands], Tensor]:
    def call(o: Operands) -> Tensor:
        chunks = zip(o.hidden.split(rows), o.teacher_hidden.split(rows))
        parts = [checkpoint(reverse_kl, h, o.weight, th, o.teacher_weight, use_reentrant=False) for h, th in chunks]
        return torch.stack(parts).sum() / o.hidden.shape[0]

    return call


def orda(o: Operands) -> Tensor:
    """On the CPU its torch implementation, which makes whole logits; "auto" would warn of that."""
    from orda_kernel import SeparateTeacher, distillation_loss

    terms: dict[str, Any] = {"student_ce_weight": 0.0, "kl_weight": 1.0, "kl_divergence": "reverse"}
    backend = "torch" if o.hidden.device.type == "cpu" else "triton"
    return distillation_loss(*o[:2], o.token_ids, SeparateTeacher(*o[2:4]), backend=backend, **terms).loss


def trl_chunked(o: Operands) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(*o[:2], None, *o[2:4], None, 1.0)[0].mean()


def liger_chunked(rows: int, compiled: bool) -> Callable[[Operands], Tensor]:
    def call(o: Operands) -> Tensor:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

        # no hard loss, beta 1 (the reverse KL), temperature 1
        loss = LigerFusedLinearJSDFunction.apply(*o[:5], None, None, 0.0, 1.0, 1.0, -100, 1.0, compiled, rows)
        return loss[0] if isinstance(loss, tuple) else loss

    return call


def liger_fused(o: Operands) -> Tensor:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    return LigerFusedLinearJSDFunction.apply(*o[:5], 1.0, -100, 1.0)


def _loss_and_gradient(z_student: Tensor, z_teacher: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(z_student.float(), -1)
    ratio = log_p - torch.log_softmax(z_teacher.float(), -1)
    p = log_p.exp()
    kl = (p * ratio).sum(-1, keepdim=True)
    return kl.sum() * scale, (p * (ratio - kl) * scale).to(dtype)


class CompiledChunks(torch.autograd.Function):
    """What one would write by hand today: products in the inputs' dtype, one compiled row function."""

    compiler = "inductor"
    _rows: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {}  # noqa: RUF012

    @classmethod
    def step(cls) -> Callable[..., tuple[Tensor, Tensor]]:
        if cls.compiler not in cls._rows:
            cls._rows[cls.compiler] = torch.compile(_loss_and_gradient, backend=cls.compiler, dynamic=False)
        return cls._rows[cls.compiler]

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, th: Tensor, tw: Tensor, rows: int) -> Tensor:
        step = CompiledChunks.step()
        loss = torch.zeros((), device=h.device)
        d_hidden, d_weight = torch.empty_like(h), torch.zeros(w.shape, device=w.device)
        for first in range(0, h.shape[0], rows):
            part = slice(first, first + rows)
            value, g = step(h[part] @ w.T, th[part] @ tw.T, 1 / h.shape[0], h.dtype)
            loss += value
            torch.mm(g, w, out=d_hidden[part])
            d_weight += g.T @ h[part]
        ctx.gradients = d_hidden, d_weight.to(w.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_hidden, d_weight = ctx.gradients
        del ctx.gradients
        return d_hidden.mul_(incoming[0]), d_weight.mul_(incoming[0]), None, None, None


class CompiledChunksInFp32(CompiledChunks):
    """The same with the products that our backends have: fp32 logits, and dW added to in fp32 by its product."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, th: Tensor, tw: Tensor, rows: int) -> Tensor:
        multiply, step = TensorCoreBackend().multiply, CompiledChunks.step()
        loss, rows = torch.zeros((), device=h.device), min(rows, h.shape[0])
        d_hidden, d_weight = torch.empty_like(h), torch.empty(w.shape, device=w.device)
        z, t = (torch.empty(rows, w.shape[0], device=h.device) for _ in range(2))
        for first in range(0, h.shape[0], rows):
            part = slice(first, first + rows)
            n = h[part].shape[0]
            multiply(h[part], w.T, z[:n], add=False)
            multiply(th[part], tw.T, t[:n], add=False)
            value, g = step(z[:n], t[:n], 1 / h.shape[0], h.dtype)
            loss += value
            torch.mm(g, w, out=d_hidden[part])
            multiply(g.T, h[part], d_weight, add=first > 0)
        ctx.gradients = d_hidden, d_weight.to(w.dtype)
        return loss


def compiled_chunks(rows: int, kind: type[CompiledChunks] = CompiledChunks) -> Callable[[Operands], Tensor]:
    return lambda o: kind.apply(*o[:4], rows)


# ---- the products alone


def products(backward: bool, rows: int) -> Callable[[Operands], None]:
    """In the inputs' dtype, results overwritten chunk after chunk: no row work, no accumulation."""

    def call(o: Operands) -> None:
        h, w, th, tw = o[:4]
        z_s, z_t = (h.new_empty(min(rows, h.shape[0]), w.shape[0]) for _ in range(2))
        d_hidden, d_weight = torch.empty_like(h), torch.empty_like(w)
        for first in range(0, h.shape[0], rows):
            part = slice(first, first + rows)
            a, b = z_s[: h[part].shape[0]], z_t[: h[part].shape[0]]
            torch.mm(h[part], w.T, out=a)
            torch.mm(th[part], tw.T, out=b)
            if backward:
                torch.mm(a, w, out=d_hidden[part])
                torch.mm(a.T, h[part], out=d_weight)

    return call


def products_alone(rows: int) -> list[Candidate]:
    return [
        Candidate(f"products of exact, {rows} rows", products(True, rows), "floor", False, False),
        Candidate(f"products of the forward, {rows} rows", products(False, rows), "floor", False, False),
    ]


def chunked_peers(rows: int, liger: Callable[[Operands], Tensor]) -> list[Candidate]:
    return [
        Candidate("compiled chunks", compiled_chunks(rows), "peer"),
        Candidate("Liger chunked_loss JSD", liger, "peer", package="liger_kernel"),
        Candidate("TRL ChunkedDivergence", trl_chunked, "peer", package="trl"),
        Candidate("Liger fused_linear_jsd", liger_fused, "peer", package="liger_kernel", device="cuda"),
        Candidate("orda-kernel", orda, "peer", package="orda_kernel"),
    ]


def for_gpu_suite(names: list[str], rows: int, dry: bool) -> list[Candidate]:
    """The most important first: a run that is cut early has measured those."""
    if dry:
        CompiledChunks.compiler = "aot_eager"  # the graph, without a C++ compilation
    strongest = Candidate("compiled chunks, addmm(out_dtype)", compiled_chunks(rows, CompiledChunksInFp32), "peer")
    peers = [strongest, *chunked_peers(rows, liger_chunked(1024, not dry))]
    first, *others = (our_plans(b) for b in names)
    return [*first, *products_alone(rows), *peers, *(plans[0] for plans in others)]


def for_pytest(device: str, tiny: bool) -> dict[str, Candidate]:
    rows = 2048 if device == "cuda" else 128
    CompiledChunks.compiler = "aot_eager" if tiny else "inductor"
    listed = [
        Candidate("sgopd", ours(), "ours"),
        Candidate("sgopd exact", ours(precision="exact"), "ours"),
        Candidate("sgopd exact torch", ours("torch", precision="exact"), "ours", backend="torch"),
        Candidate("eager", eager, "peer"),
        Candidate("checkpointed chunks", checkpointed_chunks(rows), "peer"),
        *chunked_peers(rows, liger_chunked(1024, True) if device == "cuda" else liger_chunked(rows, False)),
        Candidate("products", products(True, rows), "floor", False, False),
    ]
    return {candidate.name: candidate for candidate in listed}


NAMES = tuple(for_pytest("cpu", tiny=False))


def missing(candidate: Candidate, device: str) -> str | None:
    """Why the candidate can't be tried here, or None. (Triton's interpreter stands in for a device.)"""
    if candidate.device not in ("", device) and os.environ.get("TRITON_INTERPRET") != "1":
        return f"runs on {candidate.device} only"
    if not candidate.package:
        return None
    try:
        importlib.import_module(candidate.package)
    except ImportError:
        return "not installed"
    return None


def errors(candidate: Candidate, loss: Tensor | None, leaves: list[Tensor], exact: Truth) -> dict[str, float]:
    """Frobenius, relative."""
    if not candidate.compared or loss is None:
        return {}

    def relative(got: Tensor, true: Tensor) -> float:
        return float((got.detach().double() - true).norm() / true.norm())

    found = {"loss error": relative(loss, exact.loss)}
    if candidate.backward:
        for name, leaf, true in zip(("dH error", "dW error"), leaves, (exact.d_hidden, exact.d_weight)):
            assert leaf.grad is not None
            found[name] = relative(leaf.grad, true)
    return found


class Meter:
    """Times, memory and faults of one device."""

    def __init__(self, device: str) -> None:
        self.device, self.cuda = device, device == "cuda"

    def seconds(self, work: Callable[[], Any]) -> tuple[float, float]:
        """(on the device, on the host until everything was queued)."""
        if not self.cuda:
            began = time.perf_counter()
            work()
            return (took := time.perf_counter() - began), took
        cuda = torch.cuda
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda.synchronize()
        began = time.perf_counter()
        start.record()
        work()
        end.record()
        host = time.perf_counter() - began
        cuda.synchronize()
        return start.elapsed_time(end) / 1e3, host

    @contextlib.contextmanager
    def peak(self) -> Iterator[Callable[[], int | None]]:
        """Bytes above what was allocated at the start, at the worst moment."""
        if not self.cuda:
            yield lambda: None
            return
        cuda = torch.cuda
        cuda.synchronize()
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        yield lambda: cuda.max_memory_allocated() - before

    def alive(self) -> bool:
        try:
            if self.cuda:
                torch.cuda.synchronize()
            return True
        except RuntimeError:
            return False


@contextlib.contextmanager
def patched(where: Any, **values: Any) -> Iterator[None]:
    """Attributes set for the time of a call."""
    before = {k: vars(where)[k] for k in values if k in vars(where)}
    for k, v in values.items():
        setattr(where, k, v)
    try:
        yield
    finally:
        for k in values:
            setattr(where, k, before[k]) if k in before else delattr(where, k)


def report(candidate: Candidate, operands: Operands) -> dict[str, Any]:
    """What a call of ours says of itself, and how many tokens its chunks had."""
    if candidate.kind != "ours":
        return {}
    automatic = backends.resolve("auto", operands.hidden.device, operands.hidden.dtype)
    backend = backends.get(automatic if candidate.backend == "auto" else candidate.backend)
    rows, chunks = backend.rows, []

    def seen(problem: Any, chunk: Any, *rest: Any) -> Tensor:
        chunks.append(chunk.positions.numel())
        return rows(problem, chunk, *rest)

    leaves = [t.detach().requires_grad_(candidate.backward) for t in operands[:2]]
    with patched(backend, rows=seen):
        _, stats = candidate.call(operands._replace(hidden=leaves[0], weight=leaves[1]), return_stats=True)
    return {
        "ran": f"{stats.backend} {stats.plan}",
        "kept": stats.kept,
        "estimate": stats.error_estimate,
        "chunk": max(chunks, default=0),
    }


def tiled(backend: str, block: int, warps: int) -> Callable[..., Any]:
    """Default precision with other tiles of the Triton row kernel."""
    from sgopd_kernels.backends import triton as tiles

    plain = ours(backend)

    def call(o: Operands, **more: Any) -> Any:
        with patched(tiles, BLOCK=block, WARPS=warps):
            return plain(o, **more)

    return call


def swept(backend: str, shape: Shape, dry: bool) -> list[Candidate]:
    """Chunk sizes by their workspace, beside the products in chunks of as many tokens; then tiles of the row kernel."""
    tried = []
    for rows in (4,) if dry else (512, 1024, 2048, 4096, 8192):
        logits = int(1.03 * 8 * rows * shape.vocabulary) + 2**24
        head = 2 * shape.vocabulary * shape.student  # in fp16: all of it, or two tiles
        workspace = logits + (head if logits >= 3 * head else min(head, 2**15 * shape.student))
        name = f"{rows} rows"
        call = ours(backend, workspace=workspace)
        tried.append(Candidate(f"sgopd {backend}, default precision, {name}", call, "ours", backend=backend))
        tried.append(products_alone(rows)[0])
    if backend == "triton":
        for block, warps in ((512, 4),) if dry else ((1024, 4), (2048, 4), (2048, 16), (4096, 8), (4096, 16)):
            name = f"sgopd {backend}, default precision, tiles {block} × {warps} warps"
            tried.append(Candidate(name, tiled(backend, block, warps), "ours", backend=backend))
    return tried


# ---- what `pytest bench` asks of them


SIZES = {
    "tiny": Shape(48, 1000, 32, 48),
    "small": Shape(512, 6144, 576, 576),
    "usual": Shape(512, 49_152, 576, 576),  # SmolLM2-135M's
    "wide": Shape(256, 151_936, 512, 512),
    "target": TARGET,
}


@dataclass(frozen=True)
class Case:
    """One loss to compute, by every candidate."""

    dtype: str = "float32"
    distribution: Distribution = USUAL
    size: str = "usual"
    gradients: bool = True  # forward and backward; else loss and statistics alone
    device: str = "cpu"
    hidden: str = ""  # a file of tools/hidden_states.py, in place of made inputs of the usual size
    tokens: int = 0  # in place of the size's
    vocabulary: int = 0

    def __str__(self) -> str:
        sizes = [f"{n} {what}" for n, what in ((self.tokens, "tokens"), (self.vocabulary, "columns")) if n]
        work = "gradients" if self.gradients else "statistics"
        source = [Path(self.hidden).stem] if self.hidden else []
        return " ".join([work, self.dtype, self.distribution.name, *(sizes or [self.size]), *source, self.device])

    def operands(self) -> Operands:
        shape, dtype = SIZES[self.size], getattr(torch, self.dtype)
        changed = {"tokens": self.tokens, "vocabulary": self.vocabulary}
        shape = replace(shape, **{name: size for name, size in changed.items() if size})
        if self.hidden:
            return real(self.hidden, "0.003" if self.distribution is NEAR else "0.03", shape, dtype)
        return inputs(shape, self.distribution, dtype, self.device)

    def call(self, candidate: Candidate, operands: Operands) -> tuple[tuple[float, float], Tensor | None, list[Tensor]]:
        """(seconds on the device and the host, loss, the leaves with their gradients)."""
        leaves = [x.detach().requires_grad_(candidate.backward) for x in operands[:2]]
        loss = None

        def work() -> None:
            nonlocal loss
            with torch.set_grad_enabled(candidate.backward):
                loss = candidate.call(operands._replace(hidden=leaves[0], weight=leaves[1]))
                if candidate.backward and loss is not None:
                    loss.backward()

        return Meter(self.device).seconds(work), loss, leaves

    def peak(self, name: str) -> int | None:
        """Bytes above inputs and gradients; on the CPU the process's high-water mark, so in a fresh process."""
        candidate, operands = for_pytest(self.device, tiny=False)[name], self.operands()
        small = operands._replace(**{k: t[:2] for k, t in operands._asdict().items() if not k.endswith("weight")})
        self.call(candidate, small)  # libraries, thread pools, compilers
        if self.device == "cuda":
            with Meter(self.device).peak() as peak:
                leaves = self.call(candidate, operands)[2]
                return (peak() or 0) - sum(x.grad.nbytes for x in leaves if x.grad is not None)
        if not sys.platform.startswith("linux"):
            return None

        def mark(key: str) -> int:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps would hide what is allocated
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
        before = mark("VmRSS")
        leaves = self.call(candidate, operands)[2]
        return mark("VmHWM") - before - sum(x.grad.nbytes for x in leaves if x.grad is not None)


def times_the_fastest(seconds: Mapping[str, Sequence[float]], peers: Sequence[str]) -> dict[str, float]:
    """Of each, the median over rounds of (the fastest peer's seconds / its own in that round); {} without a peer."""
    raced = [name for name in peers if seconds.get(name)]
    if not raced:
        return {}
    fastest = seconds[min(raced, key=lambda name: statistics.median(seconds[name]))]
    return {name: statistics.median(f / s for f, s in zip(fastest, own)) for name, own in seconds.items()}
