"""When two values of one kind are equal: True, False, or None where that can't be told."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from sgopd.answers.comparer import RULES, Comparer, every
from sgopd.answers.latex import variables
from sgopd.answers.numbers import fraction, number, plain_value
from sgopd.answers.quantities import DENY
from sgopd.answers.units import UNITS
from sgopd.answers.value import Value
from sgopd.answers.words import stem


def distinct(comparer: Comparer, values: Sequence[Value]) -> list[Value]:
    """Values of a set; those that are plain and equal once."""
    kept: dict[Any, Value] = {}
    for value in values:
        plain = number(value.parts[0]) if value.kind == "formula" else None
        kept.setdefault(plain.value if plain else value, value)
    return list(kept.values())


def same_list(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    if {gold[1], answer[1]} == {"and", "or"} and have_relations(gold[0]):
        return None
    nouns = [{value.parts[2] for value in values if value.kind == "quantity"} for values, _ in (gold, answer)]
    same = comparer.unordered(gold[0], answer[0])
    return same if same is False or nouns[0] == nouns[1] or max(map(len, nouns)) < 2 else None  # 3 dogs, 5 cats


def same_named(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    if gold[0] == answer[0]:
        return comparer.compare(gold[1], answer[1])
    formulae = [value.parts[0] for _, value in (gold, answer) if value.kind == "formula"]
    if (
        len(formulae) == 2 and gold[0] in variables(formulae[1]) and answer[0] in variables(formulae[0])
    ):  # x = 2y, y = x/2
        return comparer.same_equation((gold[0], formulae[0]), (answer[0], formulae[1]))
    functions = [re.fullmatch(r"([a-zA-Z])\(([a-zA-Z])\)", name) for name, _ in (gold, answer)]
    if len(formulae) == 2 and functions[0] and functions[1] and functions[0][1] == functions[1][1]:  # f(x), f(t)
        own, other = functions[0][2], functions[1][2]
        if own not in variables(formulae[1]) and other not in variables(formulae[0]):
            renamed = re.sub(rf"(?<![\\a-zA-Z]){other}(?![a-zA-Z])", own, formulae[1])
            return comparer.formula(formulae[0], renamed) or None
    if "y" in (gold[0], answer[0]) and re.search(r"^[a-z]\(x\)", gold[0] + answer[0].removeprefix("y")):  # y = f(x)
        return comparer.compare(gold[1], answer[1])
    return False


def same_labelled(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    return gold[0] == answer[0] and comparer.compare(gold[1], answer[1]) is not False


def same_choice(comparer: Comparer, gold: tuple, answer: tuple) -> bool:
    (xs, x_listed), (ys, y_listed) = gold, answer
    if x_listed or y_listed:
        return sorted(xs) == sorted(ys) and all(
            listed or list(letters) == sorted(letters) for letters, listed in (gold, answer)
        )
    return xs == ys


def same_words(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    if gold[0] == answer[0] or gold[1] == answer[1]:
        return True
    if [stem(word) for word in gold[0]] == [stem(word) for word in answer[0]]:
        return True
    few, many = sorted((set(gold[0]), set(answer[0])), key=len)
    return None if few and few < many and not {"no", "not", "none", "never"} & (many - few) else False


def same_clock(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    times = []
    for hour, minute, second, half in (gold, answer):
        times.append((hour % 12 + 12 * (half == "pm") if half else hour, minute, second))
    if times[0] == times[1]:
        return True
    same_figures = gold[0] % 12 == answer[0] % 12 and gold[1:3] == answer[1:3]
    return None if same_figures and "" in (gold[3], answer[3]) else False


def same_date(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    return gold[:2] == answer[:2] and (gold[2] == answer[2] or (None if "" in (gold[2], answer[2]) else False))


def same_interval(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    (xs, x_name), (ys, y_name) = gold, answer
    if len(xs) != len(ys) or (x_name and y_name and x_name != y_name):
        return (
            comparer.same_relation(Value("interval", gold), Value("interval", answer))
            if x_name == y_name or not (x_name and y_name)
            else False
        )

    # In the order of their lower ends, if they are plain.
    xs, ys = (sorted(ends, key=lambda piece: (piece[0] != "-\\infty", plain_value(piece[0]) or 0)) for ends in (xs, ys))
    if any(x[2:] != y[2:] for x, y in zip(xs, ys)):
        return False
    pairs = [(a, b) for x, y in zip(xs, ys) for a, b in zip(x[:2], y[:2]) if a != b]
    if any("\\infty" in a + b for a, b in pairs):
        return False
    return every(partial(comparer.formula, a, b) for a, b in pairs)


def same_integers(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    return gold[0] == answer[0] and same_interval(comparer, gold[1], answer[1])


def same_relation(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    return comparer.same_relation(Value("relation", gold), Value("relation", answer))


def same_congruence(comparer: Comparer, gold: tuple, answer: tuple) -> bool:
    return gold[1:] == answer[1:] and (not gold[0] or not answer[0] or gold[0] == answer[0])


def same_family(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    if gold[2] != answer[2] or gold[0].kind != answer[0].kind:
        return False if gold[2] == answer[2] else None

    def renamed(value: Value, letter: str) -> Value:
        parts = tuple(
            renamed(p, letter)
            if isinstance(p, Value)
            else tuple(renamed(q, letter) if isinstance(q, Value) else q for q in p)
            if isinstance(p, tuple)
            else p
            for p in value.parts
        )
        if value.kind == "formula":
            parts = (
                re.sub(rf"(?<![\\a-zA-Z]){letter}(?![a-zA-Z])|(?<=\d){letter}(?![a-zA-Z])", "{k}", value.parts[0]),
            )
        return Value(value.kind, parts)

    same = comparer.compare(renamed(gold[0], gold[1]), renamed(answer[0], answer[1]))
    return same or None  # the same values may be written with another start or sign


def same_quantity(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    (x, x_unit, x_noun, x_words), (y, y_unit, y_noun, y_words) = gold, answer
    compound = ("compound",)
    if (
        x_words in ((), compound)
        and y_words in ((), compound)
        and isinstance(x_unit, tuple)
        and isinstance(y_unit, tuple)
    ):
        if x_unit[1] != y_unit[1]:
            pounds = {x_unit, y_unit} == {UNITS["pound"], UNITS["sterling"]}
            return comparer.formula(x, y) if pounds else False
        same = comparer.formula(_times(x, x_unit[0]), _times(y, y_unit[0]))
    elif x_unit == y_unit:
        same = comparer.formula(x, y)
    elif isinstance(x_unit, tuple) and isinstance(y_unit, tuple):
        return False
    else:
        same = comparer.formula(x, y) and None
    if same is not True:
        return same
    if DENY & (set(x_words) ^ set(y_words)):
        return False
    if sorted(x_words) != sorted(y_words) and compound not in (x_words, y_words):
        opposite = x_words and y_words and len(x_words) == len(y_words)
        return False if opposite else None
    return (
        True
        if not x_noun or not y_noun or x_noun == y_noun or x_noun in y_noun.split() or y_noun in x_noun.split()
        else None
    )


def _times(figure: str, factor: Fraction) -> str:
    value = number(figure)
    if factor == 1:
        return figure
    if value is None:
        return rf"({figure})\cdot {fraction(factor)}"
    exact = value.value * factor
    return fraction(exact)


def same_ratio(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    if len(gold) != len(answer):
        return False
    xs, ys = ([plain_value(term.parts[0]) for term in terms] for terms in (gold, answer))
    plain_x, plain_y = [x for x in xs if x is not None], [y for y in ys if y is not None]
    if len(plain_x) == len(xs) and len(plain_y) == len(ys):
        if any(xs) != any(ys):
            return False
        return all(x * sum(plain_y) == y * sum(plain_x) for x, y in zip(plain_x, plain_y))
    first, second = (rf"({terms[0].parts[0]})" for terms in (gold, answer))
    return every(
        partial(comparer.formula, rf"({x.parts[0]}){second}", rf"({y.parts[0]}){first}")
        for x, y in zip(gold[1:], answer[1:])
    )


def same_chain(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    return comparer.in_order([*gold, *gold[:1] * len(answer)], [*gold[:1] * len(gold), *answer])


def same_pieces(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    pairs = [Value("tuple", ("(", pair)) for pair in gold], [Value("tuple", ("(", pair)) for pair in answer]
    return comparer.unordered(*pairs) or None


def same_matrix(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    if [len(row) for row in gold] != [len(row) for row in answer]:
        return False
    return comparer.in_order([cell for row in gold for cell in row], [cell for row in answer for cell in row])


def have_relations(values: Sequence[Value]) -> bool:
    return any(value.kind in ("interval", "relation") for value in values)


def same_vectors(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    """A sum of unit vectors has three components; in the plane, the third is 0 and left out."""
    xs, ys = gold[1], answer[1]
    zero = (Value("formula", ("0",)),)
    if {gold[0], answer[0]} & {"vector"} and {len(xs), len(ys)} == {2, 3}:
        xs, ys = (values if len(values) == 3 else (*values, *zero) for values in (xs, ys))
    return comparer.in_order(xs, ys)


RULES |= {
    "formula": lambda c, x, y: c.formula(x[0], y[0]),
    "percent": lambda c, x, y: c.formula(x[0], y[0]),
    "degrees": lambda c, x, y: c.formula(x[0], y[0]),
    "based": lambda c, x, y: x == y,
    "unread": lambda c, x, y: None,
    "words": same_words,
    "choice": same_choice,
    "labelled": same_labelled,
    "date": same_date,
    "clock": same_clock,
    "set": lambda c, x, y: c.unordered(distinct(c, x), distinct(c, y)),
    "list": same_list,
    "tuple": lambda c, x, y: (
        c.in_order(x[1], y[1]) if x[0] == y[0] or not {x[0], y[0]} - {"(", r"\langle"} else same_vectors(c, x, y)
    ),
    "interval": same_interval,
    "integers": same_integers,
    "relation": same_relation,
    "congruence": same_congruence,
    "family": same_family,
    "permutation": lambda c, x, y: x == y,
    "named": same_named,
    "assignments": lambda c, x, y: (
        [p[0] for p in x] == [p[0] for p in y] and c.in_order([p[1] for p in x], [p[1] for p in y])
    ),
    "chain": same_chain,
    "equation": lambda c, x, y: c.same_equation(x, y),
    "matrix": same_matrix,
    "ratio": same_ratio,
    "pieces": same_pieces,
    "quantity": same_quantity,
}
