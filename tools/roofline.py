"""What each plan must cost on a GPU: operations, bytes and launches -> a lower bound in milliseconds, as Markdown.

    python tools/roofline.py                                     # the target shape, all devices, a sweep of chunk sizes
    python tools/roofline.py --tokens 4096 --chunk 2048 --output runs/roofline.md
    python tools/roofline.py --page docs/gpu.md                  # brings the page's tables up to date

A model, not a measurement. Every product reads its operands and writes its result once (the cache is perfect within a
product, and useless between two); a stage takes the longer of its arithmetic and its traffic; stages follow one
another; each launch costs a gap. So a device should not be faster than this by more than the error of its assumed
rates, and what it is slower by is what the kernels waste: tiles that don't fill the device, operands read twice,
launches that wait for the host. `tools/gpu_suite.py` puts its measurements beside these numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import page

# Kernels launched for one chunk. Exact: four products and the row pass, which tests/triton count, and 16 small ones
# (indexing of hidden states and statistics, casts, units).
LAUNCHES_EXACT, LAUNCHES_FORWARD = 21, 8
PARTS_BYTES = 24 * 2**20  # of a head's parts at once, as backends/tensor_cores.py has it
LAUNCH_GAP = 2e-6  # seconds between two kernels of a stream whose queue is never empty; assumed


@dataclass(frozen=True)
class Device:
    """Sustained rates: what a large product and a large copy reach, not the datasheet's."""

    name: str
    bf16: float  # FLOP/s, dense, fp32 accumulation
    bandwidth: float  # bytes/s, read and written together
    source: str


# A large bf16 product reaches 0.81 of the H100's datasheet rate and a large copy 0.90 of its bandwidth: what is assumed
# for cards that gave us no such reading.
_PRODUCT, _COPY = 798 / 989, 3.0 / 3.35
DEVICES = (
    Device(
        "H100",
        798e12,
        3.0e12,
        "SXM5 80 GB: an 8,192³ bf16 product and a device-to-device copy, read on such a card outside this project",
    ),
    Device("H200", 788e12, 4.3e12, "SXM 141 GB: likewise"),
    Device("A100", 312e12 * _PRODUCT, 2.04e12 * _COPY, "SXM4 80 GB: datasheet × the H100's shares"),
    Device("B200", 2250e12 * _PRODUCT, 8.0e12 * _COPY, "SXM: datasheet × the H100's shares"),
)


@dataclass(frozen=True)
class Shape:
    """One call, bf16 operands. Defaults: the target shape."""

    tokens: int = 8192
    vocabulary: int = 151_936
    student: int = 2048  # width Hs
    teacher: int = 4096  # width Ht
    chunk: int = 2048  # tokens a chunk, at the most: what the triton backend's default workspace holds at the target

    @property
    def chunks(self) -> int:
        return -(-self.tokens // self.chunk) if self.tokens else 0

    @property
    def logits(self) -> int:
        return self.tokens * self.vocabulary


@dataclass(frozen=True)
class Storage:
    """Bytes an element of operands, and of what a chunk leaves in memory between two kernels."""

    operand: int = 2  # bf16 hidden states and heads
    parts: int = 1  # 16-bit numbers that an operand of a projection is made of
    logit: int = 4  # fp32
    gradient: int = 2  # G as the row pass leaves it, in fp16
    accumulator: int = 4  # fp32 dW

    @property
    def products(self) -> int:
        """Of parts, for one of operands: two low parts are not multiplied."""
        return 2 * self.parts - 1


# fp32 operands as two fp16 numbers each, which a kernel of its own writes for every chunk, three times 2 bytes.
IN_PARTS = Storage(operand=4, parts=2)


@dataclass(frozen=True)
class Stage:
    """One step of all chunks together."""

    name: str
    flop: float = 0.0
    traffic: float = 0.0  # bytes

    def seconds(self, device: Device) -> float:
        return max(self.flop / device.bf16, self.traffic / device.bandwidth)


@dataclass(frozen=True)
class Cost:
    stages: tuple[Stage, ...]
    launches: int

    @property
    def flop(self) -> float:
        return sum(s.flop for s in self.stages)

    @property
    def traffic(self) -> float:
        return sum(s.traffic for s in self.stages)

    def arithmetic(self, device: Device) -> float:
        """Seconds of the products alone, were memory free."""
        return self.flop / device.bf16

    def seconds(self, device: Device) -> float:
        """The lower bound."""
        return sum(s.seconds(device) for s in self.stages) + self.launches * LAUNCH_GAP


def projection(who: str, shape: Shape, width: int, store: Storage) -> Iterator[Stage]:
    """Of all chunks: the head is read again for each. The parts of fp32 operands are written first, and then read."""
    head, hidden = shape.chunks * shape.vocabulary * width, shape.tokens * width
    read = store.operand if store.parts == 1 else 2 * store.products
    if store.parts > 1:
        yield Stage(f"{who} parts", 0.0, (head + hidden) * (store.operand + read))
    flop = 2.0 * shape.logits * width * store.products
    yield Stage(f"{who} logits", flop, (head + hidden) * read + shape.logits * store.logit)


def forward(shape: Shape, store: Storage) -> tuple[Stage, ...]:
    student, teacher = (projection(who, shape, getattr(shape, who), store) for who in ("student", "teacher"))
    return *student, *teacher


def gradients(shape: Shape, store: Storage, rows: float = 1.0) -> tuple[Stage, ...]:
    """dH and dW over a share of the tokens. Their other operands go to fp16 first: the head is read for its largest
    element and read and written once a call, hidden states go by way of fp32 once a chunk."""
    v, hs = shape.vocabulary, shape.student
    g, head, hidden = rows * shape.logits, shape.chunks * v * hs, rows * shape.tokens * hs
    casts = v * hs * (2 * store.operand + 2) + shape.tokens * hs * store.operand + hidden * (store.operand + 4 + 4 + 2)
    flop = 2.0 * g * hs
    # The first chunk writes the accumulator, the others read and write it; then it is read once and rounded.
    passes = (2 * shape.chunks - 1) * v * hs * store.accumulator if shape.chunks else 0
    rounding = v * hs * (store.accumulator + store.operand)
    return (
        Stage("operands to fp16", 0.0, casts),
        Stage("dH", flop, 2 * (g + head + hidden)),
        Stage("dW", flop, 2 * (g + hidden) + passes + rounding),
    )


def row_pass(shape: Shape, store: Storage, gradient: bool = True) -> Stage:
    """Both logits once for the statistics; once more for the gradient, which is written."""
    both = 2 * store.logit
    return Stage("rows", 0.0, shape.logits * (both + (both + store.gradient if gradient else 0)))


def exact(shape: Shape, store: Storage = Storage(), density: float = 1.0) -> Cost:
    """`density`: share of the tokens whose gate is not 0; the others leave the backward."""
    moved = 2 * density * shape.logits * store.gradient if density < 1 else 0  # the rows that stay move together
    stages = (
        *forward(shape, store),
        row_pass(shape, store),
        Stage("compaction", 0.0, moved),
        *gradients(shape, store, rows=density),
    )
    # Parts are made and multiplied tile by tile of the head.
    tiles = sum(
        -(-shape.vocabulary * 2 * store.products * width // PARTS_BYTES) for width in (shape.student, shape.teacher)
    )
    return Cost(stages, shape.chunks * (LAUNCHES_EXACT + (2 * tiles if store.parts > 1 else 0)))


def statistics(shape: Shape, store: Storage = Storage()) -> Cost:
    return Cost((*forward(shape, store), row_pass(shape, store, gradient=False)), shape.chunks * LAUNCHES_FORWARD)


def recomputed(shape: Shape, store: Storage = Storage()) -> Cost:
    """For scale: logits never stored, both projections again in the backward (TRL, cut-cross-entropy)."""
    seen = replace(store, logit=0, gradient=0)
    return Cost(
        (*forward(shape, seen), *forward(shape, seen), *gradients(shape, seen)[1:]), shape.chunks * LAUNCHES_FORWARD
    )


PLANS: dict[str, Callable[[Shape], Cost]] = {
    "exact, G in fp16": exact,
    "exact, G in fp16, gate density ½": lambda s: exact(s, density=0.5),
    "fp32 operands, in parts": lambda s: exact(s, IN_PARTS),
    "statistics, no gradient": statistics,
    "everything recomputed (peers)": recomputed,
}


CHUNKS = (256, 512, 1024, 2048, 4096, 8192)


def workspace(shape: Shape, store: Storage = Storage()) -> int:
    """Bytes of one chunk's logits of both models: what a caller must allow for chunks of this size."""
    return min(shape.chunk, shape.tokens) * shape.vocabulary * 2 * store.logit


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return ["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *map(list, rows))]


def markdown(shape: Shape, chunks: Iterable[int]) -> str:
    """The tables: plans by device, where the bytes go, chunk sizes, assumptions."""
    names = [d.name for d in DEVICES]
    lines = [
        f"N {shape.tokens:,}, V {shape.vocabulary:,}, Hs {shape.student:,}, Ht {shape.teacher:,}, bf16, chunks of "
        f"{shape.chunk:,}: modelled lower bounds, milliseconds. Not measured.",
        "",
    ]
    rows = []
    for name, plan in PLANS.items():
        cost = plan(shape)
        rows.append(
            [
                name,
                f"{cost.flop / 1e12:.1f}",
                f"{cost.traffic / 1e9:.0f}",
                f"{cost.launches:,}",
                _milliseconds(cost.arithmetic(DEVICES[0])),
                *(_milliseconds(cost.seconds(d)) for d in DEVICES),
            ]
        )
    lines += _table(["plan", "TFLOP", "GB moved", "launches", "arithmetic alone, H100", *names], rows)
    lines += ["", "Where two of them spend, by stage:", ""]
    rows = []
    for name in ("exact, G in fp16", "fp32 operands, in parts"):
        for s in PLANS[name](shape).stages:
            if s.flop or s.traffic:
                took = [_milliseconds(s.seconds(d)) for d in DEVICES]
                rows.append([name, s.name, f"{s.flop / 1e12:.2f}", f"{s.traffic / 1e9:.1f}", *took])
    lines += _table(["plan", "stage", "TFLOP", "GB moved", *names], rows)
    lines += ["", f"Chunk sizes, {DEVICES[0].name}:", ""]
    shown = [
        "exact, G in fp16",
        "fp32 operands, in parts",
        "statistics, no gradient",
    ]
    rows = []
    for size in chunks:
        sized = Shape(shape.tokens, shape.vocabulary, shape.student, shape.teacher, size)
        took = [_milliseconds(PLANS[name](sized).seconds(DEVICES[0])) for name in shown]
        rows.append([f"{size:,}", f"{workspace(sized) / 2**30:.2f}", *took])
    lines += _table(["tokens a chunk", "logits, GiB", *shown], rows)
    lines += ["", "Assumed rates:", ""]
    rows = [
        [
            d.name,
            f"{d.bf16 / 1e12:.0f}",
            f"{d.bandwidth / 1e12:.2f}",
            d.source,
        ]
        for d in DEVICES
    ]
    lines += _table(["device", "bf16 TFLOP/s", "TB/s", "from"], rows)
    lines += ["", f"{LAUNCH_GAP * 1e6:.0f} µs a launch."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tokens", "vocabulary", "student", "teacher", "chunk"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Shape, name), help="default %(default)s")
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNKS)
    parser.add_argument("--output", type=Path, help="write the Markdown here (default: standard output)")
    parser.add_argument("--page", type=Path, help="write it between the marks of this page")
    args = parser.parse_args()
    text = markdown(Shape(args.tokens, args.vocabulary, args.student, args.teacher, args.chunk), args.chunks)
    if args.page is not None:
        page.write(args.page, "roofline", text)
    elif args.output is None:
        print(text, end="")
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
