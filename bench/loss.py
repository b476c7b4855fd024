"""The loss beside its peers: forward and backward, interleaved in one run, memory and error beside the time.

    python bench/loss.py                                                # random inputs, two minutes on two cores
    python bench/hidden_states.py --output runs/hidden
    python bench/loss.py --hidden runs/hidden/high.safetensors --noise 0.03 --output bench/results/cpu_fp32.json
    python bench/loss.py --flat                                         # nothing to leave out: the worst case
    python bench/loss.py --hidden runs/hidden/high.safetensors --scale tokens --output bench/results/scale_tokens.json
    python bench/plot_scaling.py bench/results/scale_tokens.json

Every peer computes what it can: the ungated reverse KL, a mean over tokens. Ours computes the gate too. Inputs: real
hidden states (`--hidden`; low.safetensors has the low-entropy samples), random peaked ones (a student's logits of
standard deviation 3, a teacher on perturbed hidden states, KL about 0.5 nats; the default), or `--flat`. Every round
runs all peers in turn, so that a drift of the machine's speed meets them alike; a ratio is the median over rounds of
(the fastest peer / this one) in the same round. Memory is the high-water mark above inputs and gradients, each peer in
a process of its own. Errors are Frobenius, against float64 on the same operands. Quote ratios, not seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from sgopd_kernels import gated_kl_loss


class Operands(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    teacher_hidden: Tensor
    teacher_weight: Tensor
    token_ids: Tensor  # [N]
    verdict: Tensor  # [N]


Peer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
CHUNK = 128  # tokens, of the peers that cut the batch up


def reverse_kl(hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor) -> Tensor:
    log_p = torch.log_softmax((hidden @ weight.T).float(), -1)
    log_q = torch.log_softmax((t_hidden @ t_weight.T).float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum()


def eager(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, ids: Tensor, verdict: Tensor) -> Tensor:
    return reverse_kl(h, w, th, tw) / h.shape[0]


def _checkpointed(function: Callable[..., Tensor]) -> Peer:
    def run(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, ids: Tensor, verdict: Tensor) -> Tensor:
        chunks = zip(h.split(CHUNK), th.split(CHUNK), strict=True)
        parts: list[Tensor] = [checkpoint(function, a, w, b, tw, use_reentrant=False) for a, b in chunks]
        return torch.stack(parts).sum() / h.shape[0]

    return run


class CompiledChunks(torch.autograd.Function):
    """The strongest rival one can write by hand: chunks, gradients in the forward pass, elementwise work compiled."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, th: Tensor, tw: Tensor) -> Tensor:
        d_h, d_w = torch.empty_like(h), torch.zeros(w.shape, dtype=torch.float32)
        loss = torch.zeros((), dtype=torch.float32)
        for first in range(0, h.shape[0], CHUNK):
            part = slice(first, first + CHUNK)
            kl, g = compiled_rows(h[part] @ w.T, th[part] @ tw.T)
            loss += kl
            g = (g / h.shape[0]).to(h.dtype)
            d_h[part] = g @ w
            d_w += g.T @ h[part]
        ctx.save_for_backward(d_h, d_w.to(w.dtype))
        return loss / h.shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        d_h, d_w = ctx.saved_tensors
        return grad * d_h, grad * d_w, None, None


@torch.compile(dynamic=True)
def compiled_rows(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    log_p, log_q = torch.log_softmax(z.float(), -1), torch.log_softmax(t.float(), -1)
    ratio = log_p - log_q
    p = log_p.exp()
    kl = (p * ratio).sum(-1, keepdim=True)
    return kl.sum(), p * (ratio - kl)


def compiled(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, ids: Tensor, verdict: Tensor) -> Tensor:
    return CompiledChunks.apply(h, w, th, tw)


def trl(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, ids: Tensor, verdict: Tensor) -> Tensor:
    return ChunkedDivergenceFunction.apply(h, w, None, th, tw, None, 1.0)[0].mean()


def liger(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, ids: Tensor, verdict: Tensor) -> Tensor:
    # beta 1 is the reverse KL; hard loss off; eager chunks (its default compiles them)
    loss = LigerFusedLinearJSDFunction.apply(h, w, th, tw, ids, None, None, 0.0, 1.0, 1.0, -100, 1.0, False, CHUNK)
    return loss[0] if isinstance(loss, tuple) else loss


def ours(**options: Any) -> Peer:
    def run(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, ids: Tensor, verdict: Tensor) -> Tensor:
        loss = gated_kl_loss(h, w, th, tw, ids, verdict, gate="opd", **options)
        assert isinstance(loss, Tensor)
        return loss

    return run


OURS: dict[str, dict[str, Any]] = {
    "sgopd": {"backend": "cpu"},
    "sgopd exact": {"backend": "cpu", "precision": "exact"},
    "sgopd exact, torch": {"backend": "torch", "precision": "exact"},
}
PEERS: dict[str, Peer] = {
    **{name: ours(**options) for name, options in OURS.items()},
    "eager": eager,
    "checkpointed chunks": _checkpointed(reverse_kl),
    "compiled chunks": compiled,
    "TRL ChunkedDivergence": trl,
    "Liger chunked_loss": liger,
}


@dataclass(frozen=True)
class Inputs:
    """What makes the operands again, here or in the process that measures memory."""

    tokens: int
    vocabulary: int
    width: int
    dtype: str
    hidden: str = ""  # a file of bench/hidden_states.py
    noise: str = "0.03"  # its teacher
    flat: bool = False

    def make(self) -> Operands:
        dtype = getattr(torch, self.dtype)
        if self.hidden:
            names = (
                "student_hidden",
                "student_weight",
                f"teacher_hidden.{self.noise}",
                f"teacher_weight.{self.noise}",
                "token_ids",
            )
            with safe_open(self.hidden, "pt") as file:
                h, w, th, tw, ids = (file.get_tensor(name) for name in names)
            n = min(self.tokens, h.shape[0])
            # More tokens than the file has: the same ones again, moved a little so that no two rows are equal.
            repeats = -(-self.tokens // h.shape[0])
            if repeats > 1:
                n, g = self.tokens, torch.Generator().manual_seed(0)
                h, th = (
                    (x.repeat(repeats, 1) + 0.01 * x.std() * torch.randn(repeats * len(x), x.shape[1], generator=g))
                    for x in (h, th)
                )
                ids = ids.repeat(repeats)
            h, th, ids = h[:n], th[:n], ids[:n]
            w, tw = w[: self.vocabulary], tw[: self.vocabulary]
            ids = ids.clamp(max=w.shape[0] - 1)
        else:
            g = torch.Generator().manual_seed(0)
            h = torch.randn(self.tokens, self.width, generator=g)
            w = torch.randn(self.vocabulary, self.width, generator=g) * ((0.1 if self.flat else 3) / self.width**0.5)
            th, tw = h + 0.35 * torch.randn(self.tokens, self.width, generator=g), w.clone()
            ids = torch.randint(0, self.vocabulary, (self.tokens,), generator=g)
        verdict = torch.randint(0, 2, (h.shape[0],), generator=torch.Generator().manual_seed(1)) * 2 - 1
        # copies: what is mapped from a file would become resident only while it is measured
        h, w, th, tw = (t.to(dtype, copy=True) for t in (h, w, th, tw))
        return Operands(h, w, th, tw, ids.clone(), verdict)


def gradients(peer: Peer, operands: Operands) -> tuple[float, Tensor, Tensor, Tensor]:
    """(seconds, loss, d_hidden, d_weight)."""
    hidden, weight = (t.clone().requires_grad_() for t in operands[:2])
    gc.collect()
    start = time.perf_counter()
    loss = peer(hidden, weight, *operands[2:])
    loss.backward()
    seconds = time.perf_counter() - start
    assert hidden.grad is not None and weight.grad is not None
    return seconds, loss.detach(), hidden.grad, weight.grad


def truth(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
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
        d_weight.addmm_(g.T, h[part])
    return loss, d_hidden, d_weight


def _available() -> float:
    return _proc("/proc/meminfo", "MemAvailable") if sys.platform.startswith("linux") else float("inf")


def _proc(path: str, key: str) -> int:
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def measure_memory(name: str, inputs: Inputs) -> int:
    """High-water mark in bytes above inputs and gradients; runs in this process, which should be a fresh one."""
    small = Operands(*(t[:2] if i in (0, 2, 4, 5) else t for i, t in enumerate(inputs.make())))
    gradients(PEERS[name], small)  # libraries, thread pools, compilers
    operands = inputs.make()
    hidden, weight = (t.clone().requires_grad_() for t in operands[:2])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
    before = _proc("/proc/self/status", "VmRSS")
    PEERS[name](hidden, weight, *operands[2:]).backward()
    assert hidden.grad is not None and weight.grad is not None
    return _proc("/proc/self/status", "VmHWM") - before - hidden.grad.nbytes - weight.grad.nbytes


def peak_memory(name: str, inputs: Inputs, threads: int) -> int | None:
    """In a process of its own; None where the system keeps no high-water mark."""
    if not sys.platform.startswith("linux"):
        return None
    request = json.dumps({"name": name, "inputs": inputs.__dict__, "threads": threads})
    command = [sys.executable, __file__, "--measure-memory", request]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


def relative(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true).norm() / true.norm())


def times_the_fastest(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Of each one, the median over rounds of the fastest peer's seconds against its own; {} without a peer."""
    others = [name for name in seconds if name not in OURS]
    if not others:
        return {}
    fastest = seconds[min(others, key=lambda name: statistics.median(seconds[name]))]
    return {name: statistics.median(f / s for f, s in zip(fastest, own, strict=True)) for name, own in seconds.items()}


def compare(inputs: Inputs, peers: list[str], rounds: int, threads: int, memory: bool, errors: bool) -> dict[str, Any]:
    """One interleaved run: a row a peer."""
    torch.set_num_threads(threads)
    # Autograd over whole logits holds about seven fp32 copies of [N, V].
    if 28 * inputs.tokens * inputs.vocabulary > 0.7 * _available() and "eager" in peers:
        print(f"eager is left out: {28 * inputs.tokens * inputs.vocabulary / 2**30:.0f} GiB would not fit", flush=True)
        peers = [name for name in peers if name != "eager"]
    operands = inputs.make()
    exact = truth(operands) if errors else None
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    rows: dict[str, dict[str, Any]] = {name: {"peer": name} for name in peers}
    for turn in range(rounds + 1):  # the first is a warm-up
        for name in peers:
            took, *got = gradients(PEERS[name], operands)
            if turn:
                seconds[name].append(took)
            elif exact is not None:
                keys = ("loss error", "d_hidden error", "d_weight error")
                rows[name].update(zip(keys, (relative(g, t) for g, t in zip(got, exact, strict=True)), strict=True))
            del got
    ratios = times_the_fastest(seconds)
    for name, row in rows.items():
        row |= {"seconds": statistics.median(seconds[name]), "min": min(seconds[name]), "max": max(seconds[name])}
        row |= {"times the fastest peer": ratios[name]} if ratios else {}
        if memory:
            row["peak bytes"] = peak_memory(name, inputs, threads)
        if name in OURS:
            leaves = [t.clone().requires_grad_() for t in operands[:2]]
            _, stats = gated_kl_loss(*leaves, *operands[2:], gate="opd", return_stats=True, **OURS[name])
            row |= {"plan": stats.plan, "kept": stats.kept, "estimate": stats.error_estimate}
    return {
        "inputs": inputs.__dict__,
        "threads": threads,
        "rounds": rounds,
        "kl": None if exact is None else float(exact[0]),
        "rows": list(rows.values()),
    }


def show(run: dict[str, Any]) -> None:
    i = run["inputs"]
    source = Path(i["hidden"]).stem + f" entropy, teacher noise {i['noise']}" if i["hidden"] else "random"
    source = "flat" if i["flat"] else source
    kl = "" if run["kl"] is None else f", KL {run['kl']:.2g}"
    title = (
        f"N {i['tokens']}, V {i['vocabulary']}, H {i['width']}, {i['dtype']}, {source}{kl}, {run['threads']} threads"
    )
    names = ("peer", "median s", "min–max", "× fastest peer", "MiB", "loss err", "dH err", "dW err", "plan", "kept")
    table = Table(*names, title=title)

    def cell(row: dict[str, Any], key: str, form: str, factor: float = 1) -> str:
        return "" if row.get(key) is None else format(row[key] * factor, form)

    for r in run["rows"]:
        table.add_row(
            r["peer"],
            f"{r['seconds']:.2f}",
            f"{r['min']:.2f}–{r['max']:.2f}",
            cell(r, "times the fastest peer", ".2f"),
            cell(r, "peak bytes", ".0f", 2**-20),
            *(cell(r, k, ".1e") for k in ("loss error", "d_hidden error", "d_weight error")),
            r.get("plan", ""),
            cell(r, "kept", ".1%"),
        )
    Console(width=160).print(table)


SCALES = {
    "tokens": [("tokens", n) for n in (64, 256, 1024, 4096, 16384)],
    "vocabulary": [("vocabulary", v) for v in (6144, 12288, 24576, 49152)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--width", type=int, default=576, help="of random inputs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--hidden", default="", help="a file of bench/hidden_states.py")
    parser.add_argument("--noise", default="0.03", help="which of its teachers: 0.003, 0.03, 0.1")
    parser.add_argument("--flat", action="store_true", help="random flat logits: nothing can be left out")
    parser.add_argument(
        "--scale", choices=list(SCALES), help="time and memory against this size, in place of one table"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), help="some of them, by name")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurement")
    parser.add_argument("--output", type=Path, help="also write the runs as JSON; an existing file is extended")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_memory:
        request = json.loads(args.measure_memory)
        torch.set_num_threads(request["threads"])
        print(measure_memory(request["name"], Inputs(**request["inputs"])))
        return
    peers = args.peers
    if unknown := [name for name in peers if name not in PEERS]:
        parser.error(f"--peers: unknown {unknown}; there are {list(PEERS)}")
    first = Inputs(args.tokens, args.vocabulary, args.width, args.dtype, args.hidden, args.noise, args.flat)
    sizes = [Inputs(**{**first.__dict__, key: size}) for key, size in SCALES[args.scale]] if args.scale else [first]
    runs = []
    for inputs in sizes:
        run = compare(inputs, peers, args.rounds, args.threads, not args.no_memory, errors=args.scale is None)
        # The file's name, not where it lay.
        run["inputs"] = {**run["inputs"], "hidden": Path(inputs.hidden).name}
        show(run)
        runs.append(run)
        if args.output:
            write(args.output, args.scale, run)


def write(path: Path, scale: str | None, run: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    path.write_text(json.dumps({**facts(), "scale": scale, "runs": [*before, run]}, indent=1) + "\n", encoding="utf-8")


def facts() -> dict[str, Any]:
    return {"torch": torch.__version__, "machine": platform.machine(), "processor": processor()}


def processor() -> str:
    """Its name and the vector instructions our kernels take."""
    from sgopd_kernels.backends.cpu import CpuBackend

    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform.startswith("linux") else ""
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "unknown")
    return f"{name}, {CpuBackend().instruction_sets()[0]}"


if __name__ == "__main__":
    main()
