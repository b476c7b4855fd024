"""A call's stages, one by one, as the Triton backend runs them on one chunk: for tools/gpu_suite.py.

python bench/pieces.py --rows 2048       # the row pass alone, twice: what ncu looks at
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
import candidates
import roofline
import torch

from sgopd_kernels import Options, backends
from sgopd_kernels.options import Head
from sgopd_kernels.problem import Chunk, Problem

CAST = "head to fp16"
KLS = (0.5, 1e-3)  # below 0.05 nats the row pass reads its logits once more


@dataclass(frozen=True)
class Piece:
    name: str
    work: Callable[[], Any]
    stage: roofline.Stage  # operations and bytes
    prepare: Callable[[], Any] = lambda: None  # before each time


def pieces(shape: candidates.Shape, rows: int, device: str) -> Iterator[Piece]:
    """Of bf16 heads. What one kind holds is gone when the next begins."""
    for kind in (projections, row_passes, gradients):
        yield from kind(shape, rows, device)


def randn(device: str, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator(device).manual_seed(sum(size)), device=device)


def modelled(shape: candidates.Shape, rows: int) -> roofline.Shape:
    return roofline.Shape(rows, shape.vocabulary, shape.student, shape.teacher, chunk=rows)


def projections(shape: candidates.Shape, rows: int, device: str) -> Iterator[Piece]:
    backend, stages = backends.get("triton"), roofline.forward(modelled(shape, rows), roofline.Storage())
    for width, stage in zip((shape.student, shape.teacher), stages, strict=True):
        hidden, weight = (randn(device, n, width).bfloat16() for n in (rows, shape.vocabulary))
        z = backend.logits(rows, shape.vocabulary, torch.device(device))
        yield Piece(stage.name, partial(backend.project, hidden, weight, z), stage)


def row_passes(shape: candidates.Shape, rows: int, device: str) -> Iterator[Piece]:
    backend, v = backends.get("triton"), shape.vocabulary
    z, t = (backend.logits(rows, v, torch.device(device)) for _ in range(2))
    positions, ones = torch.arange(rows, device=device), torch.ones(rows, device=device)
    head = Head(torch.empty(rows, 1, device=device), torch.empty(v, 1, device=device))
    problem = Problem(Options(gate="opd"), head, torch.zeros_like(positions), ones, head)
    weights = problem.cell_weights(positions)
    chunk = Chunk(positions, head.hidden, z, t, None, weights, None, ones.double(), top=torch.ones((), device=device))
    for kl in KLS:
        logits = 4 * randn(device, rows, v)
        t.copy_(logits + (2 * kl) ** 0.5 * randn(device, v, rows).T)
        for what, form in (("rows", torch.float16), ("statistics", None)):
            stage = roofline.row_pass(modelled(shape, rows), roofline.Storage(), gradient=form is not None)
            again = 2 * 4 * rows * v if kl < 0.05 else 0
            stage = replace(stage, traffic=stage.traffic + again)
            work = partial(backend.rows, problem, chunk, form)
            yield Piece(f"{what}, KL {kl:g}", work, stage, partial(z.copy_, logits))


def gradients(shape: candidates.Shape, rows: int, device: str) -> Iterator[Piece]:
    """G in fp16 as the backend has it, and in bf16 beside it."""
    backend: Any = backends.get("triton")
    v, hs = shape.vocabulary, shape.student
    _, d_hidden, d_weight = roofline.gradients(modelled(shape, rows), roofline.Storage())
    written = v * hs * 4  # the sum of dW, once
    first = replace(d_weight, traffic=2.0 * (rows * v + rows * hs) + written)
    added = replace(first, traffic=first.traffic + written)
    weight, hidden, g = randn(device, v, hs).bfloat16(), randn(device, rows, hs), randn(device, rows, v)
    half, one = torch.empty_like(weight, dtype=torch.float16), torch.ones((), device=device)
    yield Piece(CAST, lambda: torch.mul(weight, one, out=half), roofline.Stage(CAST, 0.0, 4.0 * v * hs))
    out_h, out_w = torch.empty(rows, hs, device=device), torch.zeros(v, hs, device=device)
    for kind in (torch.float16, torch.bfloat16):
        name, (a, b, c) = str(kind).removeprefix("torch."), (x.to(kind) for x in (g, weight, hidden))
        yield Piece(f"dH, {name}", partial(backend.multiply, a, b, out_h, add=False), d_hidden)
        yield Piece(f"dW first, {name}", partial(backend.multiply, a.T, c, out_w, add=False), first)
        yield Piece(f"dW added, {name}", partial(backend.multiply, a.T, c, out_w, add=True), added)


def a_call(times: dict[str, float], chunks: int) -> float | None:
    """Seconds of a default call's chunks, from its pieces' at that chunk size; None where one is missing."""
    names = ("student logits", "teacher logits", "rows, KL 0.5", "dH, float16", "dW added, float16")
    once = (CAST, "dW first, float16")
    if not all(name in times for name in (*names, *once)):
        return None
    return chunks * sum(times[n] for n in names) + sum(times[n] for n in once) - times["dW added, float16"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--tiny", action="store_true", help="a dry run's shape, on the CPU")
    args = parser.parse_args()
    device, shape = ("cpu", candidates.TINY) if args.tiny else ("cuda", candidates.TARGET)
    for piece in row_passes(shape, args.rows, device):
        piece.prepare()
        piece.work()
    if not args.tiny:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
