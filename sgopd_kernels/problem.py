"""A loss call as plain data: its operands and choices (`Problem`), and how they cross into the op (`encode`, `decode`).

Plans and backends read it. A new operand is a field of `Problem`, a new choice a field of `Options`: neither is named
again on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from .gate import Gate, cell_weights, resolve_gate
from .options import PRECISIONS, Head, Options


@dataclass(frozen=True)
class Problem:
    """Operands of one call, flattened to N tokens. N may be 0."""

    options: Options
    student: Head
    token_ids: Tensor  # [N] int64
    verdict: Tensor  # [N] float32: 1, -1, 0
    teacher: Head | None = None
    teacher_logprob: Tensor | None = None  # [N], in place of a teacher head
    topk_ids: Tensor | None = None  # [N, K] int64, distinct in a row: columns of topk_logprob
    topk_logprob: Tensor | None = None  # [N, K], in place of a teacher head; the rest of its mass is one bucket
    behaviour_logprob: Tensor | None = None  # [N], of the policy that sampled token_ids
    reference: Head | None = None
    reliability: Tensor | None = None  # [N] float32 in [0, 1]
    token_weight: Tensor | None = None  # [N] float32: multiplies the gate's weight; with a reference, the loss
    uniform: Tensor | None = None  # [N] in [0, 1): draws of the `random` control
    num_items: Tensor | None = None  # [] float64: the mean's denominator; None: the valid tokens

    @property
    def gate(self) -> Gate:
        return resolve_gate(self.options.gate)

    @property
    def divergence(self) -> tuple[str, float]:
        """(name, parameter); 0.5 where there is none."""
        chosen = self.options.divergence
        return (chosen, 0.5) if isinstance(chosen, str) else chosen

    @property
    def budget(self) -> float:
        """Relative error of loss and gradients that may be traded for speed; 0: exact."""
        chosen = self.options.precision
        return PRECISIONS[chosen] if isinstance(chosen, str) else chosen

    @property
    def heads(self) -> list[Head]:
        return [head for head in (self.student, self.teacher, self.reference) if head is not None]

    @property
    def vocabulary(self) -> int:
        """The shared prefix: the shorter of the heads."""
        return min(head.weight.shape[0] for head in self.heads)

    def operands(self) -> list[Tensor]:
        """Hidden states and weights of all models."""
        return [t for head in self.heads for t in (head.hidden, head.weight)]

    def valid_rows(self) -> Tensor:
        """Indices [M] of the tokens that are not ignored."""
        return torch.nonzero(self.token_ids != self.options.ignore_index).squeeze(-1)

    def cell_weights(self, rows: Tensor) -> Tensor:
        """What tokens may weigh by their rollouts alone: [3, M] float64, of `gate.cell_weights`."""
        reliability = None if self.reliability is None else self.reliability[rows]
        weights = cell_weights(self.verdict[rows], reliability, self.gate)
        if self.token_weight is not None and self.reference is None:  # there the gate's weight moves the target
            weights = weights * self.token_weight[rows]
        return weights

    @property
    def row_numbers(self) -> dict[str, float]:
        """What every row pass is given by these names; csrc/rows.h has them for the native ones."""
        options = {f.name: getattr(self.options, f.name) for f in fields(Options) if f.metadata["row"]}
        return {"parameter": self.divergence[1], "tolerance": self.gate.tolerance, **options}

    @property
    def may_weigh_0(self) -> bool:
        """Whether a token's weight can be 0, which takes it out of the backward."""
        return self.token_weight is not None or self.gate.may_be_0

    @property
    def loss_factor(self) -> Tensor | None:
        """[N]: multiplies each token's loss, beside the gate's weight; 0 where a token is ignored."""
        if self.reference is None or self.token_weight is None:
            return None
        return self.token_weight.where(self.token_ids != self.options.ignore_index, 0.0)


# --- across the op, which takes tensors, numbers and text, but no dataclass ---

_CLASSES = {"options": Options, "options.gate": Gate, "student": Head, "teacher": Head, "reference": Head}
_FIELDS = {cls: tuple(f.name for f in fields(cls)) for cls in (Problem, Options, Gate, Head)}
LEAVES = ("student.hidden", "student.weight", "student.bias")  # arguments of the op's own: they take gradients


def encode(problem: Problem) -> tuple[list[Tensor], list[float], str]:
    """(constant tensors, numbers, what each of them is called, with words and whole numbers in their places)."""
    tensors: list[Tensor] = []
    numbers: list[float] = []
    form: list[str] = []
    for name in _FIELDS[Problem]:
        _encode(name, getattr(problem, name), tensors, numbers, form)
    return tensors, numbers, " ".join(form)


def _encode(path: str, value: Any, tensors: list[Tensor], numbers: list[float], form: list[str]) -> None:
    if value is None or path in LEAVES:
        return
    if isinstance(value, (Head, Options, Gate)):
        for name in _FIELDS[type(value)]:
            _encode(f"{path}.{name}", getattr(value, name), tensors, numbers, form)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            _encode(f"{path}.{i}", item, tensors, numbers, form)
    elif isinstance(value, Tensor):
        tensors.append(value)
        form.append(f"{path}@")
    elif isinstance(value, str):
        form.append(f"{path}={value}")
    elif isinstance(value, int):
        form.append(f"{path}#{value}")
    else:
        numbers.append(value)
        form.append(path)


def decode(leaves: tuple[Tensor | None, ...], tensors: list[Tensor], numbers: list[float], form: str) -> Problem:
    """The problem again; `leaves` in the order of LEAVES."""
    tree: dict[str, Any] = {}
    constants, values = iter(tensors), iter(numbers)

    def entries() -> Iterator[tuple[str, Any]]:
        yield from zip(LEAVES, leaves)
        for entry in form.split(" "):
            if entry.endswith("@"):
                yield entry[:-1], next(constants)
            elif "=" in entry:
                yield tuple(entry.split("=", 1))  # type: ignore[misc]
            elif "#" in entry:
                path, _, whole = entry.partition("#")
                yield path, int(whole)
            else:
                yield entry, next(values)

    for path, value in entries():
        *rooms, leaf = path.split(".")
        node = tree
        for room in rooms:
            node = node.setdefault(room, {})
        node[leaf] = value
    return Problem(**{name: _decode(name, node) for name, node in tree.items()})


def _decode(path: str, node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    inner = {name: _decode(f"{path}.{name}", value) for name, value in node.items()}
    if path not in _CLASSES:
        return tuple(inner.values())
    # Checked when it was encoded; what is absent is None by default.
    made: Any = object.__new__(_CLASSES[path])
    made.__dict__.update(inner)
    return made


@dataclass
class Chunk:
    """n of a call's tokens, with space for their logits in all V columns. A plan computes it, the driver takes over."""

    positions: Tensor  # [n] in the problem's tokens
    hidden: Tensor  # [n, Hs] the student's, 0 where the token is none
    z_student: Tensor  # [n, V] fp32: projections; after the row pass their gradient
    z_teacher: Tensor | None
    z_reference: Tensor | None
    weights: Tensor  # [3, n] float64: what a token may weigh, of `Problem.cell_weights`
    forced: Tensor | None  # [n] int8: agreement, where it is drawn
    scale: Tensor  # [n] multiplies each row's gradient
    valid: Tensor | None = None  # [n] bool: which rows are tokens; None: all
    stats: Tensor = field(default_factory=lambda: torch.empty(0))  # [n, 8] float64, in the order of oracle.STATS
    # [n, ceil(V / 32)] fp32 for the squares of the gradient, summed over 32 columns; None: they are not asked for
    energy: Tensor | None = None
    # Of a gradient in fp16 (plans/narrow.py): [] fp32, a power of two that no row's coefficient exceeds, and what the
    # row pass finds: [n] fp32 powers of two; the gradient is what it leaves, times both.
    top: Tensor | None = None
    units: Tensor | None = None

    def part(self, rows: slice) -> Chunk:
        """Some of its tokens, in the same space."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        return Chunk(
            self.positions[rows],
            self.hidden[rows],
            self.z_student[rows],
            cut(self.z_teacher),
            cut(self.z_reference),
            self.weights[:, rows],
            cut(self.forced),
            self.scale[rows],
            cut(self.valid),
        )
