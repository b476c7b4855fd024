"""Estimated against true errors of the plans on real hidden states: what the factors of plans/calibration.py must be,
and whether they hold on prompts that they were not fitted on.

    python tools/hidden_states.py --output runs/hidden
    python tools/hidden_states.py --model gemma --tokens 1024 --output runs/gemma
    python tools/calibrate.py --hidden runs/hidden/*.safetensors runs/gemma/*.safetensors --page docs/kernels.md

A chunk is one prompt's tokens, and one call of the ungated reverse KL. Teachers are those of the files, and each again
with the student's own head, as a model has whose body alone was trained: "(body)". The truth has its logits and the
row's gradient in float64, and fp32 products of that.

Even prompts are fitted on. A ratio is the true error over what the estimate makes of it with a factor of 1:

    quantized, <products>   noise in dH from logits in integers, the gradient whole
    log-ratio               the largest error of a token's, against the one below which a gate's sign may flip
    residual                what is lost in dH by taking pairs, logits in fp32
    spread                  … in dW
    blocks, hidden          with --isa amx, in place of those: what rounding to one number costs dH, logits in fp32
    blocks, weight          … dW
    blocks, noise           noise in dH from logits of three products, the gradient in two numbers everywhere

and a factor is `margin` times the largest ratio of the chunks that matter: whose error is a tenth or more of what is
allowed. (A smaller one adds less than a hundredth to the estimate, however far it is from its
own.) On the odd prompts the default call is held against its estimate. What fp32 itself can't give where models nearly
agree is no plan's: the exact call's own error is allowed beside it. The error of one token's row of dH is shown too, of
any token and of those whose row is at least a tenth of the usual norm.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import page
import torch
from safetensors import safe_open
from torch import Tensor

from sgopd_kernels import gated_kl_loss
from sgopd_kernels.backends.cpu import CpuBackend
from sgopd_kernels.plans import calibration
from sgopd_kernels.plans.blocks import Blocks
from sgopd_kernels.plans.directions import Residual
from sgopd_kernels.plans.pairs import Pairs
from sgopd_kernels.plans.quantized import Quantized

BODY = " (body)"  # a teacher that has the student's head
ANY = 0.99  # a budget that refuses nothing
SHARES = (0.25, 1.0)  # of the default budget: left of ||G|| by the pairs taken


@dataclass
class Chunk:
    """One prompt's tokens. `held_out`: of the odd half of the prompts."""

    model: str
    states: str
    teacher: str
    prompt: int
    operands: list[Tensor]  # of `gated_kl_loss`, up to token_ids

    @property
    def held_out(self) -> bool:
        return self.prompt % 2 == 1


@dataclass
class Gradients:
    loss: float
    hidden: Tensor
    weight: Tensor
    logratio: Tensor  # [n]

    def errors(self, true: Gradients) -> dict[str, float]:
        difference = (self.hidden - true.hidden).norm(dim=1)
        own = true.hidden.norm(dim=1)
        tokens = difference / own.clamp(min=1e-30)
        large = tokens[own >= 0.1 * float(own.square().mean().sqrt())]
        return {
            "loss": abs(self.loss - true.loss) / abs(true.loss),
            "dH": float(difference.norm() / true.hidden.norm()),
            "dW": float((self.weight - true.weight).norm() / true.weight.norm()),
            "token": float(tokens.max()),
            "large token": float(large.max()),
        }


def chunks(path: Path, teachers: list[str], dtype: torch.dtype) -> Iterator[Chunk]:
    with safe_open(path, "pt") as file:
        stored = list(file.keys())
        names = [name.removeprefix("teacher_hidden.") for name in stored if name.startswith("teacher_hidden.")]
        hidden, weight, ids, prompt = (
            file.get_tensor(name) for name in ("student_hidden", "student_weight", "token_ids", "prompt")
        )
        model = f"{weight.shape[0]:,} x {weight.shape[1]}" + (", bf16" if dtype == torch.bfloat16 else "")
        for teacher in [*sorted(names), *(f"{name}{BODY}" for name in sorted(names))]:
            if teachers and teacher not in teachers:
                continue
            of = teacher.removesuffix(BODY)
            t_hidden = file.get_tensor(f"teacher_hidden.{of}")
            t_weight = weight if teacher != of else file.get_tensor(f"teacher_weight.{of}")
            for which in prompt.unique().tolist():
                at = prompt == which
                operands = [t.to(dtype) for t in (hidden[at], weight, t_hidden[at], t_weight)] + [ids[at]]
                yield Chunk(model, f"{path.parent.name}/{path.stem}", teacher, which, operands)


def truth(operands: list[Tensor], tile: int = 32_768) -> tuple[Gradients, float]:
    """And the mean KL."""
    hidden, weight, t_hidden, t_weight, ids = operands
    n, v = hidden.shape[0], weight.shape[0]
    z, t = (torch.empty(n, v, dtype=torch.float64) for _ in range(2))
    for first in range(0, v, tile):
        part = slice(first, first + tile)
        z[:, part] = hidden.double() @ weight[part].double().T
        t[:, part] = t_hidden.double() @ t_weight[part].double().T
    log_p = torch.log_softmax(z, -1, out=z)
    ratio = torch.log_softmax(t, -1).neg_().add_(log_p)
    d = -ratio.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    p = log_p.exp_()
    kl = (p * ratio).sum(-1, keepdim=True)
    g = ratio.sub_(kl).mul_(p).div_(n).float()
    mean = float(kl.mean())
    return Gradients(mean, g @ weight.float(), g.T @ hidden.float(), d), mean


def call(operands: list[Tensor], precision: float | str) -> tuple[Gradients, Any]:
    leaves = [t.clone().requires_grad_() for t in operands[:2]]
    verdict = torch.ones(len(operands[4]))
    loss, stats = gated_kl_loss(
        *leaves,
        *operands[2:],
        verdict,
        gate="opd",
        precision=precision,
        backend="cpu",
        workspace=2**34,
        return_stats=True,
    )
    loss.backward()
    assert leaves[0].grad is not None and leaves[1].grad is not None
    return Gradients(float(loss.detach().double()), leaves[0].grad, leaves[1].grad, stats.logratio.double()), stats


@contextmanager
def changed(**parts: dict[str, Any]) -> Iterator[None]:
    before = calibration.FITTED
    calibration.FITTED = before.changed(**parts)
    try:
        yield
    finally:
        calibration.FITTED = before


@contextmanager
def watched(owner: type, name: str, seen: Callable[..., None]) -> Iterator[None]:
    """`seen(result, self, *arguments)` after every call of a method."""
    inner = getattr(owner, name)

    def outer(self: Any, *arguments: Any) -> Any:
        result = inner(self, *arguments)
        seen(result, self, *arguments)
        return result

    setattr(owner, name, outer)
    try:
        yield
    finally:
        setattr(owner, name, inner)


@contextmanager
def no_pairs() -> Iterator[None]:
    """All gradients in dense products."""
    inner = CpuBackend.extract_top
    CpuBackend.extract_top = lambda self, g, budget, most: inner(self, g, budget, 1e-12)  # type: ignore[method-assign]
    try:
        yield
    finally:
        CpuBackend.extract_top = inner  # type: ignore[method-assign]


def plain() -> str:
    """The best instruction set without tiles, where quantized and filtered plans are taken."""
    backend = CpuBackend()
    return next((isa for isa in backend.instruction_sets() if not backend.module.kernels(isa).tiles), "")  # type: ignore[union-attr]


def in_force() -> dict[str, float]:
    """Factor -> its value in the calibration."""
    numbers = calibration.FITTED
    settings = {name_of(s): numbers.quantized.coherence for s in numbers.quantized.settings}
    rest = {"residual": numbers.residual.coherence, "spread": numbers.residual.spread}
    tiles = numbers.blocks
    blocks = {"blocks, hidden": tiles.hidden, "blocks, weight": tiles.weight, "blocks, noise": tiles.coherence}
    return {**settings, "log-ratio": 1.0, **rest, **blocks}


def name_of(setting: calibration.Setting) -> str:
    return f"quantized, {setting.products}{', feedback' if setting.feedback else ''}"


def factors(chunk: Chunk, true: Gradients) -> Iterator[tuple[str, dict[str, float]]]:
    """(factor, its ratio and what it was made of)."""
    numbers = calibration.FITTED.quantized
    for setting in numbers.settings:
        found: dict[str, float] = {}

        def of_call(_: Any, plan: Quantized, *__: Any, found: dict[str, float] = found) -> None:
            found |= {"variance": float(plan.measured[:, 4:].sum(1).mean()), "adds up": plan.adds_up}

        def of_take(result: float, *_: Any, found: dict[str, float] = found) -> None:
            found["noise"] = result

        quantized = {"settings": (replace(setting, kl=-1.0),), "coherence": 1.0, "gate": math.inf}
        with (
            changed(pairs={"worthwhile": 0.0}, quantized=quantized),
            watched(Quantized, "error", of_call),
            watched(Pairs, "take", of_take),
            no_pairs(),
        ):
            got, stats = call(chunk.operands, ANY)
        if stats.plan != "quantized":
            continue
        name = name_of(setting)
        errors = got.errors(true)
        yield name, {"ratio": errors["dH"] / found["noise"], **found, **errors}
        off = float((got.logratio - true.logratio).abs().max())
        yield "log-ratio", {"ratio": off / numbers.gate}
    for share in SHARES:
        found = {}

        def of_residual(
            result: float, _: Residual, left: float, energy: float, *__: Any, found: dict[str, float] = found
        ) -> None:
            found |= {"lost": result, "spread": (left / energy) ** 0.5}

        with (
            changed(
                residual={"coherence": 1.0, "spread": 0.0},
                pairs={"worthwhile": 0.0, "most": 1.0, "share": share * calibration.AUTO / ANY},
                quantized={"settings": (replace(numbers.settings[0], kl=math.inf),)},
            ),
            watched(Residual, "error", of_residual),
        ):
            got, stats = call(chunk.operands, ANY)
        if stats.plan != "filtered":
            continue
        errors = got.errors(true)
        yield "residual", {"ratio": errors["dH"] / found["lost"], "share": share, "kept": stats.kept, **found, **errors}
        yield "spread", {"ratio": errors["dW"] / found["spread"], "share": share, "dW": errors["dW"]}


def factors_of_blocks(chunk: Chunk, true: Gradients) -> Iterator[tuple[str, dict[str, float]]]:
    """As `factors`, on a processor with tiles."""
    numbers = calibration.FITTED.blocks
    none = {"hidden": 0.0, "weight": 0.0, "coherence": 0.0}
    rounded = {**none, "kl": math.inf, "share": numbers.share * calibration.AUTO / ANY}
    for name, asked in {
        "hidden": {**rounded, "hidden": 1.0},
        "weight": {**rounded, "weight": 1.0},
        "noise": {**none, "kl": -1.0, "share": 0.0, "coherence": 1.0},
    }.items():
        found: dict[str, float] = {}

        def of_multiply(result: float, *_: Any, found: dict[str, float] = found) -> None:
            found["estimate"] = result

        with changed(blocks={"worthwhile": 0.0, **asked}), watched(Blocks, "_multiply", of_multiply):
            got, stats = call(chunk.operands, ANY)
        if stats.plan != "blocks":
            continue
        errors = got.errors(true)
        error = errors["dW" if name == "weight" else "dH"]
        yield f"blocks, {name}", {"ratio": error / found["estimate"], "kept": stats.kept, **found, **errors}


def whole(chunk: Chunk, true: Gradients, precision: float) -> dict[str, Any]:
    """The call as it is by default, against its estimate."""
    with changed(pairs={"worthwhile": 0.0}):
        got, stats = call(chunk.operands, precision)
    row: dict[str, Any] = {"plan": stats.plan, "kept": stats.kept, "estimate": stats.error_estimate, **got.errors(true)}
    row["worst"] = max(row["loss"], row["dH"], row["dW"])
    row["floor"] = 0.0
    if stats.plan != "exact" and row["worst"] > stats.error_estimate:
        floor = call(chunk.operands, "exact")[0].errors(true)
        row["floor"] = max(floor["loss"], floor["dH"], floor["dW"])
    row["covered"] = row["plan"] == "exact" or row["worst"] <= math.hypot(stats.error_estimate, row["floor"])
    return row


def measure(
    paths: list[Path], teachers: list[str], dtype: torch.dtype, fit: int, held_out: int, precision: float
) -> Iterator[dict[str, Any]]:
    of_plan = factors_of_blocks if CpuBackend().kernels().tiles else factors
    for path in paths:
        for chunk in chunks(path, teachers, dtype):
            if chunk.prompt // 2 >= (held_out if chunk.held_out else fit):
                continue
            true, kl = truth(chunk.operands)
            about = {"model": chunk.model, "states": chunk.states, "teacher": chunk.teacher, "kl": kl}
            about |= {"prompt": chunk.prompt, "held_out": chunk.held_out, "tokens": len(chunk.operands[4])}
            if not chunk.held_out:
                for name, found in of_plan(chunk, true):
                    yield {**about, "factor": name, **found}
            yield {**about, **whole(chunk, true, precision)}


def shortened(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in row.items()}


def matters(row: dict[str, Any]) -> bool:
    """Whether the error that a factor speaks of is a tenth or more of what is allowed."""
    if row["factor"] == "log-ratio":
        return True
    return bool(row["dW" if row["factor"] in ("spread", "blocks, weight") else "dH"] >= 0.1 * calibration.AUTO)


def tables(rows: list[dict[str, Any]]) -> str:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if "factor" in row:
            groups[row["factor"], row["model"]].append(row)
    lines = [
        "| factor | model | chunks that matter | ratio: median, largest | times the margin | in force |",
        "|---" * 6 + "|",
    ]
    for (name, model), group in sorted(groups.items()):
        ratios = sorted(row["ratio"] for row in group if matters(row))
        shown = (
            f"{ratios[len(ratios) // 2]:.2f}, {ratios[-1]:.2f} | {calibration.FITTED.margin * ratios[-1]:.2f}"
            if ratios
            else "– | –"
        )
        lines.append(f"| {name} | {model} | {len(ratios)} of {len(group)} | {shown} | {in_force()[name]:g} |")
    lines += [
        "",
        "| default, held out | KL | chunks | plans | covered | error / estimate, error | one token's dH: any, large |",
        "|---" * 7 + "|",
    ]
    groups.clear()
    for row in rows:
        if "plan" in row and row["held_out"]:
            groups[row["model"], row["teacher"]].append(row)
    for (model, teacher), group in sorted(groups.items(), key=lambda item: (item[0][0], item[1][0]["kl"])):
        estimated = [row for row in group if row["plan"] != "exact"]
        covered = f"{sum(row['covered'] for row in estimated)} of {len(estimated)}"
        plans = ", ".join(f"{p} {sum(r['plan'] == p for r in group)}" for p in sorted({r["plan"] for r in group}))
        kl = sorted(row["kl"] for row in group)[len(group) // 2]
        over = max((row["worst"] / row["estimate"] for row in estimated), default=0.0)
        worst, token, large = (max(row[what] for row in group) for what in ("worst", "token", "large token"))
        lines.append(
            f"| {model}, {teacher} | {kl:.1e} | {len(group)} | {plans} | {covered} "
            f"| {over:.2f}, {worst:.1e} | {token:.1e}, {large:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=Path, nargs="*", default=[], help="files of tools/hidden_states.py")
    parser.add_argument("--teachers", default="", help="of the files; default: all")
    parser.add_argument("--fit", type=int, default=1000, help="prompts a file and teacher to fit on, at most")
    parser.add_argument("--held-out", type=int, default=1000, help="… to hold out, at most")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the operands")
    parser.add_argument("--precision", type=float, default=calibration.AUTO)
    parser.add_argument("--isa", default=plain(), help="instruction set (default: the best without tiles)")
    parser.add_argument("--json", type=Path, help="write every measurement to this file, one a line")
    parser.add_argument("--read", type=Path, nargs="*", default=[], help="files that --json wrote, to be added")
    parser.add_argument("--page", type=Path, help="write the tables between their marks on this page")
    arguments = parser.parse_args()
    CpuBackend.isa = arguments.isa
    teachers = arguments.teachers.split(",") if arguments.teachers else []
    rows = []
    with arguments.json.open("w") if arguments.json is not None else nullcontext(sys.stderr) as file:
        for row in measure(
            arguments.hidden,
            teachers,
            getattr(torch, arguments.dtype),
            arguments.fit,
            arguments.held_out,
            arguments.precision,
        ):
            rows.append(shortened(row))
            print(json.dumps(rows[-1]), file=file, flush=True)  # it takes a while
    rows += [json.loads(line) for path in arguments.read for line in path.read_text().splitlines()]
    text = tables(rows)
    print(text)
    if arguments.page is not None:
        page.write(arguments.page, "calibration", text)


if __name__ == "__main__":
    main()
