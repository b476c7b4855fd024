"""The loss beside its peers: forward and backward, interleaved in one run, the error beside the time.

    python bench/loss.py --output bench/results/cpu_fp32.json              # about two minutes on two cores
    python bench/loss.py --dtype bfloat16 --tokens 256

Every peer computes what it can: the ungated reverse KL, a mean over tokens. Ours computes the gate too. The inputs
are synthetic: a student of peaked logits (standard deviation 3) and a teacher on perturbed hidden states, KL about
0.5 nats. The error is Frobenius, against float64 on the same operands. Medians over rounds; every round runs all
peers in turn, so that a drift of the machine's speed meets them alike. Quote ratios, not seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from sgopd_kernels import gated_kl_loss

Peer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def reverse_kl(hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor) -> Tensor:
    log_p = torch.log_softmax((hidden @ weight.T).float(), -1)
    log_q = torch.log_softmax((t_hidden @ t_weight.T).float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum()


def eager(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, ids: Tensor, verdict: Tensor) -> Tensor:
    return reverse_kl(h, w, th, tw) / h.shape[0]


def checkpointed(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, ids: Tensor, verdict: Tensor) -> Tensor:
    parts = [
        checkpoint(reverse_kl, a, w, b, tw, use_reentrant=False)
        for a, b in zip(h.split(128), th.split(128), strict=True)
    ]
    return torch.stack(parts).sum() / h.shape[0]


def trl(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, ids: Tensor, verdict: Tensor) -> Tensor:
    return ChunkedDivergenceFunction.apply(h, w, None, th, tw, None, 1.0)[0].mean()


def liger(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, ids: Tensor, verdict: Tensor) -> Tensor:
    # beta 1 is the reverse KL; hard loss off; eager chunks (its default compiles them)
    loss = LigerFusedLinearJSDFunction.apply(h, w, th, tw, ids, None, None, 0.0, 1.0, 1.0, -100, 1.0, False, 128)
    return loss[0] if isinstance(loss, tuple) else loss


def ours(backend: str) -> Peer:
    def run(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, ids: Tensor, verdict: Tensor) -> Tensor:
        loss = gated_kl_loss(h, w, th, tw, ids, verdict, gate="opd", backend=backend)
        assert isinstance(loss, Tensor)
        return loss

    return run


PEERS: dict[str, Peer] = {
    "sgopd exact, cpu": ours("cpu"),
    "sgopd exact, torch": ours("torch"),
    "eager": eager,
    "checkpointed chunks": checkpointed,
    "TRL ChunkedDivergence": trl,
    "Liger chunked_loss": liger,
}


def inputs(tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g)
    weight = torch.randn(vocabulary, width, generator=g) * (3 / width**0.5)
    teacher = hidden + 0.35 * torch.randn(tokens, width, generator=g)
    ids = torch.randint(0, vocabulary, (tokens,), generator=g)
    verdict = torch.randint(0, 2, (tokens,), generator=g) * 2 - 1
    return hidden.to(dtype), weight.to(dtype), teacher.to(dtype), weight.to(dtype).clone(), ids, verdict


def gradients(peer: Peer, operands: tuple[Tensor, ...]) -> tuple[float, Tensor, Tensor, Tensor]:
    """(seconds, loss, d_hidden, d_weight)."""
    hidden, weight = (t.clone().requires_grad_() for t in operands[:2])
    start = time.perf_counter()
    loss = peer(hidden, weight, *operands[2:])
    loss.backward()
    seconds = time.perf_counter() - start
    assert hidden.grad is not None and weight.grad is not None
    return seconds, loss.detach(), hidden.grad, weight.grad


def truth(operands: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """float64, in chunks of 64 tokens."""
    h, w, th, tw = (t.double() for t in operands[:4])
    n, loss = h.shape[0], torch.zeros((), dtype=torch.float64)
    d_hidden, d_weight = torch.zeros_like(h), torch.zeros_like(w)
    for part in torch.arange(n).split(64):
        log_p, log_q = torch.log_softmax(h[part] @ w.T, -1), torch.log_softmax(th[part] @ tw.T, -1)
        ratio = log_p - log_q
        kl = (log_p.exp() * ratio).sum(-1, keepdim=True)
        g = log_p.exp() * (ratio - kl) / n
        loss += kl.sum() / n
        d_hidden[part] = g @ w
        d_weight += g.T @ h[part]
    return loss, d_hidden, d_weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the rows as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    operands = inputs(args.tokens, args.vocabulary, args.width, getattr(torch, args.dtype))
    exact = truth(operands)

    def error(got: Tensor, true: Tensor) -> float:
        return float((got.double() - true).norm() / true.norm())

    seconds: dict[str, list[float]] = {name: [] for name in PEERS}
    errors: dict[str, list[float]] = {}
    for turn in range(args.rounds + 1):  # the first is a warm-up
        for name, peer in PEERS.items():
            took, *got = gradients(peer, operands)
            if turn:
                seconds[name].append(took)
            else:
                errors[name] = [error(g, t) for g, t in zip(got, exact, strict=True)]
    fastest = min(statistics.median(s) for name, s in seconds.items() if not name.startswith("sgopd"))
    rows: list[dict[str, Any]] = []
    for name, taken in seconds.items():
        median = statistics.median(taken)
        rows.append(
            {
                "peer": name,
                "seconds": median,
                "min": min(taken),
                "max": max(taken),
                "times the fastest peer": fastest / median,
                "loss error": errors[name][0],
                "d_hidden error": errors[name][1],
                "d_weight error": errors[name][2],
            }
        )
    title = (
        f"N {args.tokens}, V {args.vocabulary}, H {args.width}, {args.dtype}, {args.threads} threads, KL {exact[0]:.2f}"
    )
    table = Table("peer", "median s", "min–max", "speed / fastest peer", "loss err", "dH err", "dW err", title=title)
    for r in rows:
        table.add_row(
            r["peer"],
            f"{r['seconds']:.2f}",
            f"{r['min']:.2f}–{r['max']:.2f}",
            f"{r['times the fastest peer']:.2f}×",
            *(f"{r[k]:.1e}" for k in ("loss error", "d_hidden error", "d_weight error")),
        )
    Console().print(table)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        facts = {"torch": torch.__version__, "machine": platform.machine(), **vars(args)}
        text = json.dumps({"settings": facts, "rows": rows}, indent=1, default=str)
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
