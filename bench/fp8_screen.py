"""Would an fp8 screen pay on a device? Its error on real hidden states, emulated on the CPU: why no such plan exists.

    python bench/hidden_states.py --output runs/hidden
    python bench/fp8_screen.py --hidden runs/hidden/high.safetensors runs/hidden/low.safetensors   # half an hour

The plan in question: both projections in fp8 (e4m3, a scale per token and per row of the head: `torch._scaled_mm`);
then the columns that matter to a chunk again from bf16 operands, as one gathered product. Columns, because a device's
strength is dense products. Here they are ordered by the sum of p^2 + q^2 over the chunk, as the screen's noise weighs
in the gradient, and the smallest share of them is sought that brings the error of dH under the budget. "+ 16": the
head's 16 leading directions (sparse.Directions) in full precision and only what is outside them quantised; on a device
one more pass over each model's logits. "int8": for scale. Truth: float64 softmaxes of fp32 products of the same bf16
operands. Emulated products accumulate in fp32: fp8 tensor cores may round more.

`bench/roofline.py` says below which share the plan could pay.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import roofline
import torch
from loss import Inputs
from torch import Tensor

from sgopd_kernels.backends.torch import TorchBackend
from sgopd_kernels.sparse import AUTO, Directions

MASS = 3e-5  # probability in one of the models from which a column "carries mass"
STEPS = 5  # of the bisection: shares to 3 %


def fp8(x: Tensor) -> Tensor:
    scale = x.abs().amax(1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round() * scale


@dataclass(frozen=True)
class Screen:
    quantise: Callable[[Tensor], Tensor]
    directions: bool = False

    def project(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if not self.directions:
            return self.quantise(hidden) @ self.quantise(weight).T
        d = Directions.of(weight)
        u = d.along(weight, TorchBackend().project)
        along = hidden @ d.basis.T
        inside = along @ u
        return inside + self.quantise(hidden - along @ d.basis) @ self.quantise(weight - u.T @ d.basis).T


SCREENS = {"fp8": Screen(fp8), "fp8 + 16": Screen(fp8, True), "int8 + 16": Screen(int8, True)}


def gradient(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(d KL / dz [n, V] in fp32, KL [n] in float64) of the reverse KL, both from float64 softmaxes."""
    log_p = torch.log_softmax(z.double(), -1)
    ratio = log_p - torch.log_softmax(t.double(), -1)
    p = log_p.exp_()
    kl = (p * ratio).sum(-1)
    return p.mul_(ratio.sub_(kl.unsqueeze(-1))).float(), kl


def relative(got: Tensor, true: Tensor) -> float:
    return float((got - true).norm() / true.norm())


def study(path: str, noise: str, chunk: int, screens: list[str]) -> None:
    h, w, th, tw, *_ = (x.float() for x in Inputs(chunk, 2**30, 0, "bfloat16", path, noise).make())
    z, t = h @ w.T, th @ tw.T
    g, kl = gradient(z, t)
    d_hidden, d_weight = g @ w, g.T @ h
    p, q = torch.softmax(z, -1), torch.softmax(t, -1)
    union = float(((p > MASS) | (q > MASS)).any(0).float().mean())
    print(f"\n{path}, noise {noise}, {len(h)} tokens a chunk: KL {float(kl.mean()):.1e}")
    print(f"columns above {MASS:g} for some token: {union:.0%}\n")
    print("| screen | rms error of a logit | columns | dH error | dW error | loss error |\n|" + "---|" * 6)
    for name in screens:
        screen = SCREENS[name]
        z_8, t_8 = screen.project(h, w), screen.project(th, tw)
        p, q = torch.softmax(z_8, -1), torch.softmax(t_8, -1)
        order = p.square_().add_(q.square_()).sum(0).sort(descending=True).indices

        def refined(share: float) -> tuple[Tensor, float]:
            columns = order[: int(share * order.numel())]  # noqa: B023
            a, b = z_8.index_copy(1, columns, z[:, columns]), t_8.index_copy(1, columns, t[:, columns])  # noqa: B023
            got, value = gradient(a, b)
            return got, abs(float(value.sum() / kl.sum()) - 1)

        low, high = 0.0, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if relative(refined(middle)[0] @ w, d_hidden) <= AUTO else (middle, high)
        for share in (0.25, high):
            got, loss = refined(share)
            errors = (relative(got @ w, d_hidden), relative(got.T @ h, d_weight), loss)
            cells = (name, f"{float((z_8 - z).std()):.2f}", f"{share:.0%}", *(f"{e:.1e}" for e in errors))
            print(f"| {' | '.join(cells)} |", flush=True)


def break_even(shape: roofline.Shape, device: roofline.Device, kept: float = 0.1) -> float:
    """The share of refined columns at which the screened plan costs what the filtered one does."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        pays = roofline.screened(shape, kept, middle).seconds(device) < roofline.filtered(shape, kept).seconds(device)
        low, high = (middle, high) if pays else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", nargs="+", required=True, help="files of bench/hidden_states.py")
    parser.add_argument("--noise", nargs="+", default=["0.03", "0.003"], help="teachers (default: KL 0.07 and 7e-4)")
    parser.add_argument("--chunk", type=int, nargs="+", default=[256, roofline.Shape.chunk], help="tokens")
    parser.add_argument("--screens", nargs="+", default=list(SCREENS), choices=SCREENS)
    args = parser.parse_args()
    for device in roofline.DEVICES:
        if device.fp8 is not None:
            share = break_even(roofline.Shape(), device)
            print(
                f"{device.name}, target shape: refining more than {share:.0%} of the columns costs more than it saves"
            )
    for path in args.hidden:
        for noise in args.noise:
            for chunk in args.chunk:
                study(path, noise, chunk, args.screens)


if __name__ == "__main__":
    main()
