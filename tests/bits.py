"""The bits of the loss: a fingerprint of every plan, backend and option, before a change and after it.

    python tests/bits.py record before.json       on the tree before
    python tests/bits.py compare before.json      on the tree after: which calls give other bits

Loss, statistics, gradients, plan, share kept and error estimate of seeded calls, hashed. For changes that must not
move a number. Bits depend on processor, torch and thread count, so that the file is of one machine and not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "triton"), str(HERE.parent / "tools")]
with contextlib.suppress(ImportError):
    import interpreter  # noqa: F401  before anything imports Triton
import errors  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from sgopd_kernels import (  # noqa: E402
    PRESETS,
    Gate,
    backends,
    gated_advantage,
    gated_kl_loss,
    gated_logprob_loss,
    gated_topk_kl_loss,
)
from sgopd_kernels.backends.cpu import CpuBackend  # noqa: E402
from sgopd_kernels.plans import calibration  # noqa: E402

Call = Callable[[], list[Any]]


def operands(n: int, v: int, h: int, spread: float, distance: float, dtype: torch.dtype) -> list[Tensor]:
    """Logits of standard deviation `spread`; a teacher at `distance`; every ninth token ignored."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, h, generator=g)
    weight = (torch.randn(v, h, generator=g) + 0.7) * (spread / h**0.5) * (0.5 + torch.rand(v, 1, generator=g))
    teacher_hidden = hidden + distance * torch.randn(n, h, generator=g)
    ids = torch.randint(0, v, (n,), generator=g)
    ids[::9] = -100
    verdict = torch.randint(-1, 2, (n,), generator=g).float()
    return [*(t.to(dtype) for t in (hidden, weight, teacher_hidden, weight)), ids, verdict]


def outcome(function: Any, leaves: list[Tensor], *rest: Any, **options: Any) -> list[Any]:
    """Everything a call says: a leaf is a tensor that takes a gradient."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    loss, stats = function(*leaves, *rest, return_stats=True, generator=torch.Generator().manual_seed(5), **options)
    loss.backward(torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape).to(loss.dtype))
    fields = [
        getattr(stats, name) for name in ("kl", "logratio", "student_entropy", "teacher_entropy", "gate", "agree")
    ]
    said = [stats.backend, stats.plan, stats.kept, stats.error_estimate]
    return [loss, *fields, stats.student_logprob, stats.teacher_logprob, *(leaf.grad for leaf in leaves), *said]


def calls() -> Iterator[tuple[str, Call]]:
    small = operands(67, 1201, 48, 3.0, 0.5, torch.float32)
    few = operands(7, 1201, 48, 3.0, 0.5, torch.float32)  # the interpreter runs one program after another
    devices = [("reference", ""), ("torch", ""), *(("cpu", isa) for isa in backends.get("cpu").instruction_sets())]  # type: ignore[attr-defined]
    if backends.usable("triton"):
        devices.append(("triton", ""))
    for backend, isa in devices:
        given = few if backend == "triton" else small
        errors.N = len(given[0])
        leaves, rest = given[:2], given[2:]

        def call(function: Any, *arguments: Any, isa: str = isa, backend: str = backend, **options: Any) -> Call:
            def run() -> list[Any]:
                CpuBackend.isa = isa
                return outcome(function, *arguments, backend=backend, **options)

            return run

        name = f"{backend}{isa and '-'}{isa}"
        for option, given_options in errors.options().items():
            options = {k: errors.cast(t, torch.float32, "cpu") for k, t in given_options.items()}
            tensors = [errors.cast(t, torch.float32, "cpu") for t in errors.operands(options.pop("near", False))]
            yield f"{name} {option}", call(gated_kl_loss, tensors[:2], *tensors[2:], **options)
        for gate in [*PRESETS, Gate((1.5, 0.5), (0.25, 0.75), 0.9, 0.1, "correct")]:
            yield f"{name} {gate}", call(gated_kl_loss, leaves, *rest, gate=gate, reliability=0.25)
        for dtype in (torch.bfloat16, torch.float16):
            cast = [t.to(dtype) for t in given[:4]]
            yield f"{name} {dtype}", call(gated_kl_loss, cast[:2], *cast[2:], *given[4:])
            yield f"{name} {dtype} none", call(gated_kl_loss, cast[:2], *cast[2:], *given[4:], reduction="none")
        yield f"{name} chunks", call(gated_kl_loss, leaves, *rest, workspace=200_000, num_items=12.5)
        log_q = -torch.rand(len(given[0]), generator=torch.Generator().manual_seed(1)) * 3
        yield f"{name} logprob", call(gated_logprob_loss, leaves, given[4], log_q, given[5])
        options = {"behaviour_logprob": log_q - 0.3, "ratio_clip": 1.1, "temperature": 0.8, "student_softcap": 4.0}
        yield f"{name} behaviour", call(gated_logprob_loss, leaves, given[4], log_q, given[5], **options)
        top = torch.log_softmax(given[2] @ given[3].T, -1).topk(9)
        yield f"{name} topk", call(gated_topk_kl_loss, leaves, given[4], top.indices, top.values, given[5])

    at_any_size()
    for dtype in (torch.float32, torch.bfloat16):
        for spread, distance in ((8.0, 0.1), (8.0, 0.01), (8.0, 3e-3), (8.0, 1e-4), (4.0, 0.3), (1.0, 0.3)):
            given = operands(70, 4103, 65, spread, distance, dtype)
            for backend, isa in devices[2:]:
                if backend == "triton":
                    given = [t[:12] if t.shape[0] == 70 else t for t in given]
                for options in ({}, {"workspace": 2**20, "gate": "opdvr"}, {"precision": 5e-3, "reduction": "none"}):

                    def plan(
                        given: list[Tensor] = given,
                        backend: str = backend,
                        isa: str = isa,
                        options: dict[str, Any] = options,
                    ) -> list[Any]:
                        CpuBackend.isa = isa
                        return outcome(gated_kl_loss, given[:2], *given[2:], backend=backend, **options)

                    yield f"plan {backend} {isa} {dtype} {spread} {distance} {options}", plan
    yield "advantage", lambda: list(gated_advantage(*torch.randn(2, 5, 9).unbind(0), torch.ones(5, 1), clip=1.0))


def at_any_size() -> None:
    """Plans that only large calls take are taken by small ones."""
    everywhere = {"worthwhile": 0.0}
    calibration.FITTED = calibration.FITTED.changed(
        pairs=everywhere, blocks=everywhere, devices={"narrow_worthwhile": 0.0}
    )


def fingerprint(values: list[Any]) -> str:
    sha = hashlib.sha256()
    for value in values:
        raw = (
            value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
            if isinstance(value, Tensor)
            else repr(value).encode()
        )
        sha.update(raw)
    said = [value for value in values if isinstance(value, (str, float))]
    return f"{sha.hexdigest()[:24]} {' '.join(map(str, said))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    found = {}
    for name, call in calls():
        torch.manual_seed(0)
        try:
            found[name] = fingerprint(call())
        except (NotImplementedError, ValueError) as error:  # an option that a backend refuses
            found[name] = f"{type(error).__name__}: {error}"
    if arguments.action == "record":
        arguments.file.write_text(json.dumps(found, indent=1))
        print(f"{len(found)} calls, {len(set(found.values()))} outcomes")
        return
    before = json.loads(arguments.file.read_text())
    different = [name for name in {**before, **found} if before.get(name) != found.get(name)]
    for name in different:
        print(f"{name}\n  before  {before.get(name)}\n  now     {found.get(name)}")
    print(f"{len(found)} calls, {len(different)} differ")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
