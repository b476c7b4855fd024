"""Where the time of one call goes on the CPU: milliseconds of all threads a step of its plan, best of three calls.

    python tools/hidden_states.py --output runs/hidden
    python tools/profile_plan.py --hidden runs/hidden/high.safetensors
    python tools/profile_plan.py --hidden runs/hidden/high.safetensors --precision exact

Steps are timed by wrapping the backend's methods; what is left over is allocation, gathering rows, and the call itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
from candidates import DISTRIBUTIONS, Case

from sgopd_kernels import gated_kl_loss
from sgopd_kernels.backends.cpu import CpuBackend
from sgopd_kernels.plans.directions import Directions

STEPS: dict[type, tuple[str, ...]] = {
    CpuBackend: (
        "project",
        "project_quantized",
        "refine",
        "rows",
        "project_tiles",
        "add_hidden_gradient_tiles",
        "add_weight_gradient_tiles",
        "extract_top",
        "add_pairs_hidden",
        "add_pairs_weight",
        "add_hidden_gradient",
        "add_weight_gradient",
    ),
    Directions: ("along",),
}


def timed(owner: type, name: str, spent: Counter[str], running: list[str]) -> None:
    """A step within another counts as the outer one's."""
    inner = getattr(owner, name)

    def outer(*args: Any, **options: Any) -> Any:
        if running:
            return inner(*args, **options)
        running.append(name)
        start = time.process_time()
        try:
            return inner(*args, **options)
        finally:
            spent[name] += time.process_time() - start
            running.pop()

    setattr(owner, name, outer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", default="", help="a file of tools/hidden_states.py (default: made ones)")
    names = [distribution.name for distribution in DISTRIBUTIONS]
    parser.add_argument("--distribution", default="usual", choices=names, help="near: teacher noise 0.003 of the file")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--isa", default="", help="an instruction set by name (default: the best)")
    args = parser.parse_args()
    CpuBackend.isa = args.isa
    distribution = DISTRIBUTIONS[names.index(args.distribution)]
    operands = Case(args.dtype, distribution, hidden=args.hidden, tokens=args.tokens).operands()
    spent: Counter[str] = Counter()
    running: list[str] = []
    for owner, names in STEPS.items():
        for name in names:
            timed(owner, name, spent, running)
    best: tuple[float, dict[str, float], Any] | None = None
    for _ in range(3):
        spent.clear()
        leaves = [t.clone().requires_grad_() for t in operands[:2]]
        start = time.process_time()
        loss, stats = gated_kl_loss(*leaves, *operands[2:], backend="cpu", precision=args.precision, return_stats=True)
        loss.backward()
        total = time.process_time() - start
        if best is None or total < best[0]:
            best = total, dict(spent), stats
    assert best is not None
    total, steps, stats = best
    print(f"{args.tokens} tokens, {args.dtype}, {torch.get_num_threads()} threads: {stats.plan}, kept {stats.kept:.1%}")
    for name, seconds in sorted(steps.items(), key=lambda item: -item[1]):
        print(f"  {name:22} {seconds * 1e3:7.1f} ms")
    print(f"  {'the rest':22} {(total - sum(steps.values())) * 1e3:7.1f} ms\n  {'total':22} {total * 1e3:7.1f} ms")


if __name__ == "__main__":
    main()
