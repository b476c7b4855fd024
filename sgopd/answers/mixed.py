"""When values of two kinds are equal: where one can be seen as the other. `turned`: the gold is the second."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import partial

from sgopd.answers.comparer import MIXED, Comparer, every
from sgopd.answers.figures import ORDINALS
from sgopd.answers.latex import variables
from sgopd.answers.numbers import fraction, number, plain_value
from sgopd.answers.quantities import DENY
from sgopd.answers.rules import distinct, have_relations, same_interval, same_ratio, same_words
from sgopd.answers.sets import ALL_REALS, linear
from sgopd.answers.value import Value


def _one_of(comparer: Comparer, collection: Value, other: Value, turned: bool) -> bool | None:
    """A set or list of one, beside that one."""
    values = distinct(comparer, collection.parts) if collection.kind == "set" else collection.parts[0]
    if len(values) != 1:
        decimal = _decimal_comma(collection, other)
        return False if decimal is None else comparer.compare(other, decimal)
    return comparer.compare(values[0], other) if not turned else comparer.compare(other, values[0])


def _decimal_comma(collection: Value, other: Value) -> Value | None:
    """3,5 beside 3.5: where the other is a decimal, two whole numbers may be one with a decimal comma."""
    values = collection.parts[0] if collection.kind == "list" else ()
    plain = [value.parts[0] for value in values if value.kind == "formula"]
    gold = number(other.parts[0]) if other.kind == "formula" else None
    if len(plain) != 2 or not gold or gold.decimals is None or not all(re.fullmatch(r"-?\d+", text) for text in plain):
        return None
    return Value("formula", (".".join(plain),)) if collection.parts[1] == "," else None


def _percent(comparer: Comparer, gold: Value, answer: Value, turned: bool) -> bool | None:
    if answer.kind != "formula":
        return None if answer.kind == "unread" else False
    value = number(gold.parts[0])
    hundredth = fraction(value.value / 100) if value else rf"\frac{{{gold.parts[0]}}}{{100}}"
    figures = [(hundredth, answer.parts[0])]
    if not turned or re.fullmatch(r"[\d.,]+", gold.parts[0]):  # 50 may be 50 %, but 1/3 is not 1/3 %
        figures.append((gold.parts[0], answer.parts[0]))
    verdicts = [comparer.formula(*(pair if not turned else pair[::-1])) for pair in figures]
    return True in verdicts or (None if None in verdicts else False)


def _degrees(comparer: Comparer, angle: Value, other: Value, turned: bool) -> bool | None:
    """Degrees beside a number: the figure itself, or radians if they are written with pi."""
    figure = angle.parts[0]
    if other.kind == "quantity":
        if other.parts[1:] == ((Fraction(1), (("radian", 1),)), "", ()):
            return comparer.formula(rf"\frac{{{figure}\pi}}{{180}}", other.parts[0])
        return None if other.parts[1] in (None, "degrees") else False
    if other.kind != "formula":
        return None if other.kind == "unread" else False
    radians = r"\pi" in other.parts[0] and r"\pi" not in figure
    return comparer.formula(rf"\frac{{({figure})\pi}}{{180}}" if radians else figure, other.parts[0])


def _measured(comparer: Comparer, measured: Value, other: Value, turned: bool) -> bool | None:
    """A quantity beside a plain number: units and nouns may be left out, words that matter may not."""
    figure, made, _, said = measured.parts
    if other.kind == "unread":
        return None
    kind = made if isinstance(made, str) else "formula"
    if other.kind == "ratio" and made is None:
        return None
    if other.kind in ("interval", "relation") and said:
        return None  # at least 5
    if other.kind not in ("formula", "percent", "degrees"):
        return False
    if said == ("compound",):
        return None
    same = comparer.compare(Value(kind, (figure,)), other)
    if same and said:
        return False if DENY & set(said) else None
    if same and isinstance(made, tuple) and made[1] == (("radian", 1),) and other.kind == "degrees":
        return False
    return same


def _named_or_not(comparer: Comparer, named: Value, other: Value, turned: bool) -> bool | None:
    name, value = named.parts
    if other.kind == "equation":
        if value.kind != "formula" or "'" in name:
            return False
        if not variables(value.parts[0]) and not variables(other.parts[0] + other.parts[1]) - variables(name):
            return False
        return comparer.same_equation((name, value.parts[0]), other.parts)
    if other.kind == "assignments":
        return False
    if not turned:
        return comparer.compare(value, other)
    same = comparer.compare(other, value)
    composed = re.match(r"\\(?:sin|cos|tan|cot|sec|csc|frac)", name)  # tan A = 2 may be an equation for A
    return None if same and composed else same


def _chained(comparer: Comparer, chain: Value, other: Value, turned: bool) -> bool | None:
    """Equal sides beside a value: each must be that value."""
    return every(partial(comparer.compare, other, side) for side in chain.parts)


def _pair(comparer: Comparer, pair: Value, interval: Value, turned: bool) -> bool | None:
    """(a, b) beside an interval: the open one."""
    opening, values = pair.parts
    if opening != "(" or len(values) != 2 or any(value.kind != "formula" for value in values):
        return False
    ours = (((values[0].parts[0], values[1].parts[0], False, False),), "")
    if interval.kind != "interval":
        return comparer.same_relation(Value("interval", ours), interval)
    return (
        same_interval(comparer, ours, interval.parts) if not turned else same_interval(comparer, interval.parts, ours)
    )


def _bounded(comparer: Comparer, bounds: Value, listed: Value, turned: bool) -> bool | None:
    """An interval or a relation beside a list of them."""
    return comparer.same_relation(bounds, listed) if have_relations(listed.parts[0]) else False


def _timed(comparer: Comparer, clock: Value, ratio: Value, turned: bool) -> bool | None:
    """8:10 beside 4:5, which is no time: as the gold's ratio. The other way round, the gold may be a time."""
    hour, minute, second, half = clock.parts
    if half or second:
        return False
    terms = tuple(Value("formula", (str(term),)) for term in (hour, minute))
    return same_ratio(comparer, ratio.parts, terms) if turned else None


def _column(comparer: Comparer, point: Value, column: Value, turned: bool) -> bool | None:
    rows = column.parts
    if len(rows) > 1 and len(rows[0]) > 1:
        return False
    return comparer.in_order(point.parts[1], [cell for row in rows for cell in row])


def _assigned(comparer: Comparer, point: Value, assignments: Value, turned: bool) -> bool | None:
    """(1, 2) beside x = 1, y = 2."""
    return comparer.in_order(point.parts[1], [value for _, value in assignments.parts])


def _indexed(comparer: Comparer, assignments: Value, listed: Value, turned: bool) -> bool | None:
    """x_1 = 1, x_2 = 2 beside 1, 2; with other names, which is which would be lost."""
    same = comparer.unordered([value for _, value in assignments.parts], listed.parts[0])
    indexed = len({name.partition("_")[0] for name, _ in assignments.parts}) == 1
    return same if indexed or same is False else None


def _residues(comparer: Comparer, congruence: Value, other: Value, turned: bool) -> bool | None:
    """A class of residues beside the residue, or beside 4k + 1."""
    name, residue, _ = congruence.parts
    values = linear(other.parts[0]) if other.kind == "formula" else None
    if values:
        return values.parts[1:] == congruence.parts[1:]
    if other.kind != "formula":
        return None
    return (str(residue) == other.parts[0]) and (turned or not name or None)


def _listed(comparer: Comparer, listed: Value, collection: Value, turned: bool) -> bool | None:
    return comparer.unordered(listed.parts[0], distinct(comparer, collection.parts))


def _scaled(comparer: Comparer, matrix: Value, other: Value, turned: bool) -> bool | None:
    return comparer.same_matrix(matrix, other) if other.kind in ("unread", "formula") else False


def _divided(comparer: Comparer, ratio: Value, other: Value, turned: bool) -> bool | None:
    if len(ratio.parts) != 2:
        return False
    first, second = (part.parts[0] for part in ratio.parts)
    x, y = plain_value(first), plain_value(second)
    if y == 0:
        return False
    if turned and re.fullmatch(r"-?\d+", other.parts[0]):
        return None if number(first) else False  # 10:1 is more than 10
    quotient = rf"\frac{{{first}}}{{{second}}}" if x is None or y is None else fraction(x / y)
    return comparer.formula(quotient, other.parts[0])


def _based(comparer: Comparer, based: Value, plain: Value, turned: bool) -> bool | None:
    """The base may be left out; a number in base ten is one, but who asks for a base wants that base."""
    digits, base = based.parts
    if plain.parts[0].lstrip("0") == digits:
        return True if base == 10 or not turned else None
    value = number(plain.parts[0])
    if value is None or re.search("[^0-9A-F]", digits):
        return False if value else None
    return (
        None
        if int(digits, base if base < 37 else 36) == value.value
        else False
        if base != 10
        else int(digits) == value.value
    )


MIXED |= {
    ("named", "any"): _named_or_not,
    ("labelled", "choice"): lambda c, x, y, _: y.parts[0] == (x.parts[0],),
    ("labelled", "any"): lambda c, x, y, turned: c.compare(x.parts[1], y) if not turned else c.compare(y, x.parts[1]),
    ("chain", "formula"): _chained,
    ("chain", "quantity"): _chained,
    ("percent", "formula"): _percent,
    ("degrees", "formula"): _degrees,
    ("degrees", "quantity"): _degrees,
    ("quantity", "any"): _measured,
    ("tuple", "interval"): _pair,
    ("tuple", "relation"): _pair,
    ("tuple", "matrix"): _column,
    ("tuple", "assignments"): _assigned,
    ("tuple", "list"): lambda c, x, y, turned: (
        _pair(c, x, y, turned) if have_relations(y.parts[0]) else c.in_order(x.parts[1], y.parts[0]) and None
    ),
    ("assignments", "list"): _indexed,
    ("list", "set"): _listed,
    ("list", "formula"): _one_of,
    ("set", "formula"): _one_of,
    ("set", "tuple"): _one_of,
    ("set", "words"): lambda c, x, y, _: (not x.parts and y.parts[1] == "no solution") or False,
    ("interval", "words"): lambda c, x, y, _: (x.parts[0] == ALL_REALS and y.parts[1] == "all reals") or False,
    ("interval", "relation"): lambda c, x, y, turned: c.same_relation(x, y),
    ("interval", "list"): _bounded,
    ("relation", "list"): _bounded,
    ("matrix", "any"): _scaled,
    ("ratio", "formula"): _divided,
    ("words", "formula"): lambda c, x, y, _: (
        y.parts[0] == str(ORDINALS.index(x.parts[1]) + 1)
        if x.parts[1] in ORDINALS
        else same_words(c, x.parts, ((y.parts[0].casefold(),), y.parts[0].casefold()))
        if y.parts[0].isalpha()
        else False
    ),
    ("clock", "ratio"): _timed,
    ("clock", "formula"): lambda c, x, y, _: (
        _divided(c, Value("ratio", tuple(Value("formula", (str(p),)) for p in x.parts[:2])), y, _)
        if not x.parts[3] and x.parts[1]
        else False
    ),
    ("based", "formula"): _based,
    ("congruence", "formula"): _residues,
    ("congruence", "named"): lambda c, x, y, turned: _residues(c, x, y.parts[1], turned),
    ("family", "any"): lambda c, x, y, turned: c.compare(x.parts[0], y) or None,
    ("pieces", "any"): lambda c, x, y, turned: None,
}
