"""What bench/gpu_suite.py times: inputs on the device, float64 truth, our plans, the peers, the products alone.

Nothing here needs a GPU: the same functions run on the CPU at tiny shapes (`gpu_suite.py --dry-run`).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgopd_kernels import backends, gated_kl_loss


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
class Case:
    """A distribution. Real hidden states at this vocabulary don't fit into a repository: these are synthetic."""

    name: str
    candidates: int  # columns a token that stand out, as a language model's do; 0: random logits, the worst case
    distance: float  # standard deviation of the teacher's logits from the student's


CASES = (Case("peaked", 16, 0.5), Case("near", 16, 0.03), Case("flat", 0, 0.5))


def inputs(shape: Shape, case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> Operands:
    """The teacher's head has the student's in its first columns, so that the two can be near each other."""
    g = torch.Generator(device).manual_seed(seed)
    n, v, hs, ht = shape.tokens, shape.vocabulary, shape.student, shape.teacher
    assert ht >= hs

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    weight = randn(v, hs) / hs**0.5
    if case.candidates:
        hidden = 0.5 * randn(n, hs)
        ids = torch.randint(0, v, (n, case.candidates), generator=g, device=device)
        # The best candidate's logit from below to far above the log-sum-exp of all others (about 12.5 at the target).
        best = 12 + 10 * torch.rand(n, 1, generator=g, device=device)
        rank = torch.arange(1, case.candidates + 1, device=device).log()
        logits = best - 2 * rank + 0.7 * randn(n, case.candidates)
        for part in torch.arange(n, device=device).split(256):
            hidden[part] += torch.einsum("nk,nkh->nh", logits[part], weight[ids[part]])
        token_ids = ids.gather(1, torch.multinomial(logits.softmax(-1), 1, generator=g)).squeeze(1)
    else:
        hidden = randn(n, hs)
        token_ids = torch.randint(0, v, (n,), generator=g, device=device)
    other = randn(v, ht - hs) / hs**0.5
    t_hidden = torch.cat([hidden + case.distance * randn(n, hs), 0.1 * case.distance * randn(n, ht - hs)], 1)
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


class Truth(NamedTuple):
    """The ungated reverse KL, a mean over tokens, in float64 on the same operands."""

    loss: Tensor
    d_hidden: Tensor
    d_weight: Tensor
    entropy: float  # mean, nats


def truth(operands: Operands, rows: int = 256) -> Truth:
    """All tokens: a card with float64 units does it in about a second at the target shape."""
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
    plan: str = ""  # the name in roofline.PLANS that it is held against; "" for none


# ---- ours


def ours(backend: str, gate: str = "opd", **options: Any) -> Callable[..., Any]:
    def call(o: Operands, **more: Any) -> Any:
        return gated_kl_loss(*o, gate=gate, backend=backend, **options, **more)

    return call


def our_plans(backend: str) -> list[Candidate]:
    """`precision="auto"` rounds the gradient to bf16 before its products, "exact" doesn't: triton_kernels.py."""
    name = f"sgopd {backend}"
    modelled = backend == "triton"  # the others' products are fp32
    plans = [
        Candidate(f"{name}, default precision", ours(backend), "ours", plan="exact, G in bf16"),
        Candidate(f"{name}, exact", ours(backend, precision="exact"), "ours", plan="exact, G in two bf16 parts"),
        Candidate(f"{name}, statistics", ours(backend), "ours", backward=False, plan="statistics, no gradient"),
        Candidate(
            f"{name}, gate density ½",
            ours(backend, "verified-only"),
            "ours",
            compared=False,
            plan="exact, G in bf16, gate density ½",
        ),
    ]
    return plans if modelled else [replace(p, plan="") for p in plans]


# ---- peers: each computes the ungated reverse KL


def trl_chunked(o: Operands) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(*o[:2], None, *o[2:4], None, 1.0)[0].mean()


def liger_chunked(compiled: bool) -> Callable[[Operands], Tensor]:
    def call(o: Operands) -> Tensor:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

        # no hard loss, beta 1 (the reverse KL), temperature 1, its default chunk of 1,024
        loss = LigerFusedLinearJSDFunction.apply(*o[:5], None, None, 0.0, 1.0, 1.0, -100, 1.0, compiled, 1024)
        return loss[0] if isinstance(loss, tuple) else loss

    return call


def liger_fused(o: Operands) -> Tensor:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    return LigerFusedLinearJSDFunction.apply(*o[:5], 1.0, -100, 1.0)


def _loss_and_gradient(z_student: Tensor, z_teacher: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(z_student.float(), -1)
    ratio = log_p - torch.log_softmax(z_teacher.float(), -1)
    p = log_p.exp()
    kl = (p * ratio).sum(-1, keepdim=True)
    return kl.sum() * scale, (p * (ratio - kl) * scale).to(z_student.dtype)


class CompiledChunks(torch.autograd.Function):
    """What one would write by hand today: cuBLAS products in the inputs' dtype, one compiled row function."""

    compiler = "inductor"
    _rows: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {}  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, th: Tensor, tw: Tensor, rows: int) -> Tensor:
        kind = CompiledChunks.compiler
        if kind not in CompiledChunks._rows:
            CompiledChunks._rows[kind] = torch.compile(_loss_and_gradient, backend=kind, dynamic=False)
        step = CompiledChunks._rows[kind]
        loss = torch.zeros((), device=h.device)
        d_hidden, d_weight = torch.empty_like(h), torch.zeros(w.shape, device=w.device)
        for first in range(0, h.shape[0], rows):
            part = slice(first, first + rows)
            value, g = step(h[part] @ w.T, th[part] @ tw.T, 1 / h.shape[0])
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


def compiled_chunks(rows: int) -> Callable[[Operands], Tensor]:
    return lambda o: CompiledChunks.apply(*o[:4], rows)


# ---- the products alone


def products(backward: bool, rows: int) -> Callable[[Operands], None]:
    """cuBLAS in the inputs' dtype, results overwritten chunk after chunk: no row work, no accumulation."""

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


def candidates(names: list[str], rows: int, dry: bool) -> list[Candidate]:
    """The most important first: a run that is cut early has measured those."""
    if dry:
        CompiledChunks.compiler = "aot_eager"  # the graph, without a C++ compilation
    floors = [
        Candidate(f"products of exact, {rows} rows", products(True, rows), "floor", False, False),
        Candidate(f"products of the forward, {rows} rows", products(False, rows), "floor", False, False),
    ]
    peers = [
        Candidate(f"compiled chunks of {rows}", compiled_chunks(rows), "peer"),
        Candidate("Liger chunked_loss JSD", liger_chunked(not dry), "peer", package="liger_kernel"),
        Candidate("TRL ChunkedDivergence", trl_chunked, "peer", package="trl"),
        Candidate("Liger fused_linear_jsd", liger_fused, "peer", package="liger_kernel"),
    ]
    first, *others = (our_plans(b) for b in names)
    return [*first, *floors, *peers, *(plans[0] for plans in others)]


def missing(candidate: Candidate) -> str | None:
    """Why the candidate can't be tried here, or None."""
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
    backend = backends.get(candidate.name.split()[1].rstrip(","))
    rows, chunks = backend.rows, []

    def seen(problem: Any, at: Tensor, *rest: Any, **options: Any) -> Tensor:
        chunks.append(at.numel())
        return rows(problem, at, *rest, **options)

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
        workspace = int(1.03 * 8 * rows * shape.vocabulary) + 2**24
        name = f"{rows} rows"
        for words, options in (("default precision", {}), ("exact", {"precision": "exact"})):
            call = ours(backend, workspace=workspace, **options)
            tried.append(Candidate(f"sgopd {backend}, {words}, {name}", call, "ours"))
        tried.append(Candidate(f"products of exact, {name}", products(True, rows), "floor", False, False))
    if backend == "triton":
        for block, warps in ((512, 4),) if dry else ((1024, 4), (2048, 4), (2048, 16), (4096, 8), (4096, 16)):
            name = f"sgopd {backend}, default precision, tiles {block} × {warps} warps"
            tried.append(Candidate(name, tiled(backend, block, warps), "ours"))
    return tried
