"""Every option of `gated_kl_loss` on every backend: its error against the float64 reference, as a Markdown table.

    python tools/errors.py [--page docs/loss.md]

Seeded inputs: 160 tokens, 20 % ignored, V 1,200, widths 48 and 64, logits of standard deviation 3, a teacher of its own
(KL several nats); "near": the student perturbed (KL about 1e-3). Errors are Frobenius: the loss per token, dH, dW.
tests/kernels/test_options.py holds them to bounds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import page
import torch
from torch import Tensor

from sgopd_kernels import gated_kl_loss

N, V, HS, HT = 160, 1200, 48, 64
BACKENDS = ("torch", "cpu")

Options = dict[str, Any]


def options() -> dict[str, Options]:
    """Name -> keywords. Tensors in float64; `cast` brings them to a call's dtype."""
    g = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    masked = randn(V)
    masked[900:] = -torch.inf
    reference = {"reference_hidden": randn(N, HT), "reference_weight": randn(V, HT) * (3 / HT**0.5)}
    return {
        "default (sg-opd, full reverse KL)": {},
        "near": {"near": True},
        "sampled": {"estimator": "sampled"},
        "sampled, near": {"estimator": "sampled", "near": True},
        "forward KL": {"divergence": "forward-kl"},
        "forward KL, near": {"divergence": "forward-kl", "near": True},
        "JSD 0.1": {"divergence": ("jsd", 0.1)},
        "JSD 0.5": {"divergence": ("jsd", 0.5)},
        "JSD 0.9": {"divergence": ("jsd", 0.9)},
        "JSD 0.5, near": {"divergence": ("jsd", 0.5), "near": True},
        "reference": reference,
        "reference, sampled": {**reference, "estimator": "sampled"},
        "temperature 0.7": {"temperature": 0.7},
        "logit scales": {"student_logit_scale": 0.25, "teacher_logit_scale": 1.5},
        "softcaps": {"student_softcap": 5.0, "teacher_softcap": 8.0},
        "softcap, sampled": {"student_softcap": 5.0, "estimator": "sampled"},
        "biases": {"student_bias": randn(V), "teacher_bias": randn(V)},
        "all of the heads' options": {
            "temperature": 1.3,
            "student_logit_scale": 0.7,
            "student_softcap": 6.0,
            "teacher_softcap": 9.0,
            "student_bias": randn(V),
            "teacher_bias": randn(V),
        },
        "-inf columns of the student": {"student_bias": masked},
        "-inf columns of the teacher": {"teacher_bias": masked},
        "gate opdvr": {"gate": "opdvr"},
        "gate protect, reliability 0.3": {"gate": "protect", "reliability": 0.3},
        "gate verified-only": {"gate": "verified-only"},
        "reduction sum": {"reduction": "sum"},
        "reduction none": {"reduction": "none"},
    }


def operands(near: bool) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = randn(N, HS), randn(V, HS) * (3 / HS**0.5)
    teacher, t_weight = randn(N, HT), randn(V, HT) * (3 / HT**0.5)
    if near:
        teacher, t_weight = hidden + 0.015 * randn(N, HS), weight.clone()
    ids = torch.randint(0, 900, (N,), generator=g)
    ids[torch.rand(N, generator=g) < 0.2] = -100
    return [hidden, weight, teacher, t_weight, ids, torch.randint(-1, 2, (N,), generator=g)]


def cast(value: Any, dtype: torch.dtype, device: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def run(given: Options, dtype: torch.dtype, backend: str, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """(loss per token, d_hidden, d_weight), on the CPU; an uneven incoming gradient for reduction none."""
    given = dict(given)
    tensors = [cast(t, dtype, device) for t in operands(given.pop("near", False))]
    keywords = {name: cast(value, dtype, device) for name, value in given.items()}
    hidden, weight = (t.requires_grad_() for t in tensors[:2])
    loss = gated_kl_loss(hidden, weight, *tensors[2:], backend=backend, **keywords)
    assert isinstance(loss, Tensor)
    loss.backward(torch.linspace(-1, 2, N).to(loss) if loss.ndim else None)
    assert hidden.grad is not None and weight.grad is not None
    with torch.no_grad():
        each = gated_kl_loss(hidden, weight, *tensors[2:], backend=backend, **{**keywords, "reduction": "none"})
    assert isinstance(each, Tensor)
    return each.cpu(), hidden.grad.cpu(), weight.grad.cpu()


def errors(given: Options, backend: str, device: str = "cpu") -> list[float]:
    truth = run(given, torch.float64, "reference")
    got = run(given, torch.float32, backend, device)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, truth, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="write the table between its marks on this page")
    arguments = parser.parse_args()
    lines = [
        "| option | " + " | ".join(f"{b}: loss, dH, dW" for b in BACKENDS) + " |",
        "|---" * (1 + len(BACKENDS)) + "|",
    ]
    for name, given in options().items():
        cells = (", ".join(f"{e:.0e}" for e in errors(given, backend)) for backend in BACKENDS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print(*lines, sep="\n")
    if arguments.page is not None:
        page.write(arguments.page, "errors", "\n".join(lines))


if __name__ == "__main__":
    main()
