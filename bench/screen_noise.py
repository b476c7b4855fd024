"""What the 16-bit screen leaves in dH, with hidden states rounded to the nearest and with feedback (docs/kernels.md).

    python bench/hidden_states.py --output runs/hidden
    python bench/screen_noise.py --hidden runs/hidden/high.safetensors

The native products, the logits that carry probability put right in float64, and the gradient of the rest in float64:
nothing but the screen's noise on the tail is left. `coherence` is that noise against errors of the measured variance
that are independent. The teacher is moved towards the student, to the KLs at which distillation converges.
"""

from __future__ import annotations

import argparse

import torch
from loss import Inputs
from torch import Tensor

from sgopd_kernels.backends.cpu import CpuBackend
from sgopd_kernels.sparse import MASS, SETTINGS, Directions, Rounding


def gradient(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """G [n, V] of the reverse KL, and the KL."""
    log_p, log_q = z.log_softmax(-1), t.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)
    return log_p.exp() * (log_p - log_q - kl), kl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", required=True, help="a file of bench/hidden_states.py")
    parser.add_argument("--tokens", type=int, default=64, help="spread over the file's 512")
    parser.add_argument("--closer", type=float, nargs="+", default=[1.0, 0.3, 0.1], help="of the teacher's distance")
    args = parser.parse_args()
    full = Inputs(512, 49_152, 576, "float32", args.hidden, "0.003").make()
    backend, every = CpuBackend(), max(1, 512 // args.tokens)
    print(f"{'KL':>8} {'products':>8} {'rounding':>9} {'variance':>9} {'dH':>8} {'coherence':>9}")
    for closer in args.closer:
        h, w = full.hidden[::every], full.weight
        models = [(h, w), (h + closer * (full.teacher_hidden[::every] - h), w + closer * (full.teacher_weight - w))]
        exact = [x.double() @ head.double().T for x, head in models]
        g, kl = gradient(*exact)
        mass = torch.maximum(*(z.log_softmax(-1) for z in exact)).exp() > MASS
        d_hidden = g @ w.double()
        for segment in sorted({s.segment for s in SETTINGS}):
            for feedback in (False, True):
                refined, variance = [], torch.zeros(h.shape[0], 1, dtype=torch.float64)
                for (x, head), z in zip(models, exact, strict=True):
                    out = torch.empty(z.shape)
                    rounding = Rounding(Directions.of(head)) if feedback else None
                    backend.project_screened(x, head, out, segment, rounding)
                    off, count = z - out, mass.sum(-1, keepdim=True)
                    mean = (off * mass).sum(-1, keepdim=True) / count
                    variance += ((off - mean) * mass).square().sum(-1, keepdim=True) / count
                    refined.append(torch.where(mass, z - mean, out.double()))
                noise = float((gradient(*refined)[0] @ w.double() - d_hidden).norm() / d_hidden.norm())
                tail = torch.maximum(*((z.softmax(-1) * ~mass).sum(-1, keepdim=True) for z in exact))
                independent = float((MASS * tail * variance).sum().sqrt() / g.norm())
                name = "feedback" if feedback else "nearest"
                figures = f"{float(variance.mean()):9.1e} {noise:8.1e} {noise / independent:9.2f}"
                print(f"{float(kl.mean()):8.1e} {segment:8} {name:>9} {figures}", flush=True)


if __name__ == "__main__":
    main()
