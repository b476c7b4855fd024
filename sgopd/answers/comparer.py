"""The comparer: rules for one kind, for two kinds, and what a subclass with sympy adds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from sgopd.answers.latex import THOUSANDS, spelling
from sgopd.answers.numbers import number, same_number
from sgopd.answers.value import Value, read


class NeedsWorker(Exception):
    """The comparison needs sympy."""


def every(verdicts: Iterable[Callable[[], bool | None]]) -> bool | None:
    """True if all are, False if one is, else None; a worker is asked only where nothing else says False."""
    unknown = later = False
    for verdict in verdicts:
        try:
            same = verdict()
        except NeedsWorker:
            later = True
            continue
        if same is False:
            return False
        unknown |= same is None
    if later:
        raise NeedsWorker
    return None if unknown else True


def _characters(value: Any) -> set[str]:
    return set(re.findall(r"\w", str(value.parts)))


class Comparer:
    """Compares values; what needs sympy raises `NeedsWorker`, unless a subclass can."""

    def verdict(self, gold: str, answer: str) -> bool | None:
        """Whether an answer equals the gold, both cleaned LaTeX."""
        if spelling(gold) == spelling(answer):
            return True
        if re.search(r"\+ ?C$|^C ?\+", gold):  # the constant of an integral has no name of its own
            answer = re.sub(r"(?<=\+) ?[ck]$|^[ck](?= ?\+)", "C", answer)
        same = self.compare(read(gold), read(answer))
        constants = set(re.findall(r"[Cc]_\{?\d", gold)), set(re.findall(r"(?<![\\a-zA-Z])[A-DK](?!_)", answer))
        if same is False and constants[0] and len(constants[0]) == len(constants[1]):
            return None  # C_1 e^x + C_2 and A e^x + B: of other names
        if same is False:  # 100,200 is a number, but where the other is a list it may be one too
            if THOUSANDS.fullmatch(answer) and self.compare(read(gold), read(answer.replace(",", ", "))):
                return True
            if THOUSANDS.fullmatch(gold) and self.compare(read(gold.replace(",", ", ")), read(answer)) is not False:
                return None
        return same

    def compare(self, gold: Value, answer: Value) -> bool | None:
        if gold == answer:
            return gold.kind != "unread" or None
        if gold.kind == answer.kind:
            return RULES[gold.kind](self, gold.parts, answer.parts)
        for second_kind in (None, "any"):
            for first, second, turned in ((gold, answer, False), (answer, gold, True)):
                rule = MIXED.get((first.kind, second_kind or second.kind))
                if rule:
                    return rule(self, first, second, turned)
        if answer.kind == "unread":  # unless nothing in it is of the gold
            return None if _characters(gold) & _characters(answer) else False
        return None if gold.kind == "unread" else False

    def formula(self, gold: str, answer: str) -> bool | None:
        """Whether two formulae are equal."""
        x, y = number(gold), number(answer)
        if x and y:
            return same_number(x, y)
        return spelling(gold) == spelling(answer) or self.same_formula(gold, answer)

    def same_formula(self, gold: str, answer: str) -> bool | None:
        raise NeedsWorker

    def same_equation(self, gold: tuple[str, str], answer: tuple[str, str]) -> bool | None:
        raise NeedsWorker

    def same_relation(self, gold: Value, answer: Value) -> bool | None:
        raise NeedsWorker

    def same_matrix(self, gold: Value, answer: Value) -> bool | None:
        raise NeedsWorker

    def in_order(self, gold: Sequence[Value], answer: Sequence[Value]) -> bool | None:
        if len(gold) != len(answer):
            return False
        return every(partial(self.compare, x, y) for x, y in zip(gold, answer))

    def unordered(self, gold: Sequence[Value], answer: Sequence[Value]) -> bool | None:
        """Whether two collections hold equal values equally often."""
        if len(gold) != len(answer):
            return False
        left, missing = list(answer), []
        for value in gold:  # those of one spelling first: sympy is not asked of them
            if value in left:
                left.remove(value)
            else:
                missing.append(value)
        unknown = False
        by_number = {number(v.parts[0]): v for v in left if v.kind == "formula" and number(v.parts[0])}
        for value in missing:
            plain = number(value.parts[0]) if value.kind == "formula" else None
            if plain in by_number:
                left.remove(by_number.pop(plain))
                continue
            verdicts = []
            for other in left:
                same = self.compare(value, other)
                if same:
                    left.remove(other)
                    break
                verdicts.append(same)
            else:
                if None not in verdicts:
                    return False
                unknown = True
        return None if unknown else True


# Filled by rules.py and mixed.py, since rules compare the parts of their values by a comparer.
RULES: dict[str, Callable[[Comparer, tuple, tuple], bool | None]] = {}  # of one kind: gold's parts, answer's
MIXED: dict[tuple[str, str], Callable[[Comparer, Value, Value, bool], bool | None]] = {}  # two kinds, in that order
