"""What rounding the gradient G costs in dH and dW, by the KL: in fp32, in bf16, in fp16, in fp16 with units of rows.

    python tools/gradient_rounding.py [--page docs/kernels.md]      # a minute: Triton's interpreter, on the CPU

The row pass is Triton's, and so are the units; products are float64, of the operands as plans/narrow.py rounds them, so
that nothing but rounding is left. Errors are Frobenius, against float64 of the same logits. The teacher's logits are
the student's and noise of the size that makes the KL; "peaked" logits have a deviation of 4, "flat" ones of 0.1. fp16
without units: G as it is, of a mean over 8,192 tokens.
"""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from typing import Any

import page

runpy.run_path(str(Path(__file__).resolve().parent.parent / "tests" / "triton" / "interpreter.py"))  # before Triton

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from sgopd_kernels import Options  # noqa: E402
from sgopd_kernels.backends.tensor_cores import narrow_gradient  # noqa: E402
from sgopd_kernels.backends.triton import TritonBackend  # noqa: E402
from sgopd_kernels.options import Head  # noqa: E402
from sgopd_kernels.plans.narrow import Narrow, NeedsGrad  # noqa: E402
from sgopd_kernels.problem import Chunk, Problem  # noqa: E402

N, V, H, TOKENS = 48, 4096, 64, 8192
KLS = (10.0, 1e-1, 1e-2, 1e-4, 1e-6)
SHAPES = {"peaked": 4.0, "flat": 0.1}
Pair = tuple[Tensor, Tensor]


def logits(deviation: float, kl: float) -> Pair:
    """(student's, teacher's) [N, V] fp32, with this mean KL to a per cent or two."""
    g = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(N, V, generator=g, dtype=torch.float64) for _ in range(2))
    z, size = (deviation * z).float().double(), (2 * kl) ** 0.5

    def found(size: float) -> float:
        log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(z + size * noise, -1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    for _ in range(20):
        size *= (kl / found(size)) ** 0.5
    return z.float(), (z + size * noise).float()


def errors(z: Tensor, t: Tensor) -> dict[str, tuple[float, float]]:
    """Form of G -> errors of dH and dW."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, H, generator=g).bfloat16() for n in (N, V))
    ids, scale = torch.zeros(N, dtype=torch.int64), torch.full((N,), 1 / TOKENS, dtype=torch.float64)
    problem = Problem(
        Options(gate="opd", precision="exact"), Head(hidden, weight), ids, torch.ones(N), Head(hidden, weight)
    )
    rows, weights = torch.arange(N), problem.cell_weights(torch.arange(N))
    backend = TritonBackend()
    plan = Narrow(problem, backend, NeedsGrad(True, True), rows, None, weights, scale)

    def left(form: torch.dtype) -> tuple[Tensor, Chunk]:
        chunk = Chunk(rows, hidden, z.clone(), t, None, weights, None, scale, top=plan.top_of_call())
        backend.rows(problem, chunk, form)
        return narrow_gradient(chunk.z_student) if form == torch.float16 else chunk.z_student, chunk

    def products(of_hidden: Tensor, of_weight: Tensor, operand: Tensor = hidden) -> Pair:
        return of_hidden.double() @ weight.double(), of_weight.double().T @ operand.double()

    log_p, log_q = (torch.log_softmax(x.double(), -1) for x in (z, t))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)
    truth = products(*[log_p.exp() * (log_p - log_q - kl) / TOKENS] * 2)
    wide, (narrow, chunk) = left(torch.float32)[0], left(torch.float16)
    assert chunk.units is not None and chunk.top is not None
    units = chunk.units.double().unsqueeze(1)
    d_hidden, d_weight = products(narrow.double() * units * chunk.top, narrow, (hidden * units * 2.0**13).half())
    forms = {
        "fp32": products(wide, wide),
        "bf16": products(wide.bfloat16(), wide.bfloat16()),
        "fp16, no units": products(wide.half(), wide.half()),
        "fp16, a unit a row": (d_hidden, d_weight * float(chunk.top) * 2.0**-13),
    }

    def error(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm())

    return {name: (error(a[0], truth[0]), error(a[1], truth[1])) for name, a in forms.items()}


def table() -> str:
    found: dict[str, Any] = {
        f"{name}, KL {kl:.0e}": errors(*logits(deviation, kl)) for name, deviation in SHAPES.items() for kl in KLS
    }
    names = list(next(iter(found.values())))
    lines = ["| logits | " + " | ".join(f"{n}: dH, dW" for n in names) + " |", "|---" * (1 + len(names)) + "|"]
    lines += [f"| {row} | " + " | ".join(f"{a:.1e}, {b:.1e}" for a, b in e.values()) + " |" for row, e in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="write the table between its marks on this page")
    text = table()
    print(text)
    if (to := parser.parse_args().page) is not None:
        page.write(to, "rounding", text)


if __name__ == "__main__":
    main()
