"""Whether two formulae are equal: what `sgopd.answers` leaves to sympy.

Imported by verifier workers only (sympy takes half a second to load, and may run for hours on a hostile
input: the pool's deadline is what ends it, so math-verify's own alarms are off). math-verify reads the LaTeX; it never
sees words, units or lists, which it would drop or add up.
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from latex2sympy2_extended.math_normalization import normalize_latex
from math_verify import LatexExtractionConfig
from math_verify.parser import should_treat_as_complex
from sympy import (
    Abs,
    Expr,
    Float,
    Function,
    I,
    Integral,
    Intersection,
    Interval,
    Limit,
    Matrix,
    MatrixBase,
    Pow,
    Product,
    Rational,
    Set,
    Sum,
    Symbol,
    Union,
    default_sort_key,
    log,
    nan,
    oo,
    simplify,
    solve,
    zoo,
)
from sympy.core.random import seed as seed_sympy
from sympy.core.relational import Ge, Gt, Le, Lt, Ne

from sgopd import closed_form
from sgopd.answers import Comparer, Value, read
from sgopd.grading import MAX_DIGITS, REASONS, magnitude

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its timeouts are off

_NORMALIZATION = LatexExtractionConfig().normalization_config
_CONVERSION = ConversionConfig(lowercase_symbols=False)  # math-verify's own makes R and r one letter
_POINTS = 8  # at which two expressions are compared
_POINT_DIGITS = 40


class BadGold(ValueError):
    """Sympy cannot read a part of the gold."""


def grade(gold: str, answer: str | None) -> str:
    """A reason: "correct", "incorrect", "unknown", or "bad_gold" where a part of the gold cannot be parsed.

    Both are LaTeX as `answers.clean` leaves it. With `answer` None only the gold is parsed.
    """
    # sympy tests some identities at random points: a verdict must not depend on what was graded before.
    random.seed(0)
    seed_sympy(0)
    try:
        if answer is None:
            return _check(read(gold), gold)
        same = _WithSympy().verdict(gold, answer)
        if same is None and read(gold).kind == "unread" and _check(read(gold), gold) == "bad_gold":
            return "bad_gold"
        return REASONS[same]
    except BadGold:
        return "bad_gold"


def _check(value: Value, text: str) -> str:
    """Whether each formula of a gold can be parsed; one that is not read may only be words that are."""
    if value.kind == "unread":
        return "incorrect" if _parse(text) is not None or "⟦" in text else "bad_gold"
    if value.kind == "formula":
        return "incorrect" if _parse(value.parts[0]) is not None else "bad_gold"
    parts = [part for part in value.parts if isinstance(part, tuple)]
    parts += [part for group in parts for part in group if isinstance(part, tuple)]
    inner = [part for part in parts if isinstance(part, Value)]
    return "bad_gold" if any(_check(part, "⟦") == "bad_gold" for part in inner) else "incorrect"


@lru_cache(maxsize=16_384)
def _parse(latex: str) -> Any | None:
    """As math-verify reads a box, but with capital letters, primes and powers of T kept. None: it cannot be read."""
    text = _spelled(normalize_latex(latex, _NORMALIZATION))
    try:
        parsed = latex2sympy(
            text,
            is_real=not should_treat_as_complex(text),
            convert_degrees=False,
            normalization_config=None,
            conversion_config=_CONVERSION,
        )
    except Exception:  # whatever the grammar does not know
        return None
    return parsed if parsed not in (nan, zoo) else None


def _spelled(latex: str) -> str:
    """What the parser would take for something else, spelled as a letter: a capital I, which is the imaginary
    unit to it and loses its subscripts and powers; T in an exponent, a transposition; a prime, which it drops."""
    letters = set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", latex)))
    if letters != {"I"} or re.search(r"I\s*[_^]", latex):  # 3 + 4I alone is a complex number
        latex = re.sub(r"\\[A-Za-z]+|I", lambda found: r"\mathbf{I}" if found[0] == "I" else found[0], latex)
    latex = re.sub(r"\^\s*(?:T(?![A-Za-z])|\{\s*T\s*\})", r"^{\\mathbf{T}}", latex)
    return re.sub(r"'+(?!\s*\()", lambda found: "^{" + r"\prime" * len(found[0]) + "}", latex)


def _named(value: Any) -> Any:
    """Letters of one name are one real number, whatever else stands in the text that they are from; i is imaginary."""
    names = {symbol: re.sub(r"^math\{(\w+)\}", r"\1", symbol.name) for symbol in value.free_symbols}
    letters = {symbol: I if name == "i" else Symbol(name, real=True) for symbol, name in names.items()}
    return value.subs({old: new for old, new in letters.items() if old != new}, simultaneous=True)


class _WithSympy(Comparer):
    """Compares what needs sympy. Numbers to hundreds of digits, other expressions at random points."""

    def same_formula(self, gold: str, answer: str) -> bool | None:
        same = closed_form.equal(gold, answer)
        if same is not None:
            return same
        x = _expression(gold)
        if x is None:
            raise BadGold
        y = _expression(answer)
        if y is None:
            return None
        return _same_expression(x, y, _digits(gold, answer))

    def same_equation(self, gold: tuple[str, str], answer: tuple[str, str]) -> bool | None:
        sides = _expressions([*gold, *answer])
        if sides is None:
            return None
        first, second = sides[0] - sides[1], sides[2] - sides[3]
        if first.free_symbols != second.free_symbols:
            return False
        return _same_equation(first, second)

    def same_relation(self, gold: Value, answer: Value) -> bool | None:
        first, second = _as_set(gold), _as_set(answer)
        if first is not None and second is not None:
            return bool(first[0] == second[0]) and (first[1] == second[1] or "" in (first[1], second[1]))
        if gold.kind == answer.kind == "relation":
            return _same_inequality(gold, answer)
        return None

    def same_matrix(self, gold: Value, answer: Value) -> bool | None:
        matrix, other = (_as_matrix(value) for value in (gold, answer))
        if matrix is None or other is None:
            return None
        if matrix.shape != other.shape:
            return False
        return all(_same_expression(x, y, 400) for x, y in zip(matrix, other))


def _expressions(texts: Sequence[str]) -> list[Expr] | None:
    """All of them; None if one cannot be read."""
    found = [value for value in map(_expression, texts) if value is not None]
    return found if len(found) == len(texts) else None


def _expression(latex: str) -> Expr | None:
    value = _parse(latex)
    if not isinstance(value, Expr) or isinstance(value, MatrixBase):
        return None
    return _named(value).doit()


def _digits(gold: str, answer: str) -> int:
    """Digits to which two exact numbers are compared: hundreds, and several times what was written out.

    Not a proof of equality (a separation bound would be), but no number of this length that is known falls below.
    """
    return min(400 + math.ceil(4 * min(magnitude(gold) + magnitude(answer), MAX_DIGITS)), MAX_DIGITS)


def _same_expression(x: Expr, y: Expr, digits: int) -> bool | None:
    if x == y:
        return True
    names = [{symbol.name for symbol in value.free_symbols} for value in (x, y)]
    if not names[0] and not names[1]:
        if x.has(Float) or y.has(Float):
            return _close(x, y)
        apart = _apart(x, y, digits)
        return None if apart is None else not apart
    if names[0] != names[1] and simplify(x - y) != 0:
        return False
    return _same_at_points(x, y)


def _close(x: Expr, y: Expr) -> bool:
    """Equal to six decimals and five leading digits."""
    x, y = x.evalf(30), y.evalf(30)
    try:
        return bool(abs(x - y) <= min(1e-6, 1e-5 * max(abs(x), abs(y))))
    except TypeError:  # of infinities
        return False


def _apart(x: Expr, y: Expr, digits: int) -> bool | None:
    """Whether two exact numbers differ, real or complex; None where that has no meaning, as of infinities."""
    if x == y:
        return False
    if x.is_finite is False or y.is_finite is False:
        return True
    difference = x - y
    if difference.has(Integral, Sum, Product, Limit):  # by quadrature and the like: seconds for hundreds of digits
        digits = 30
    # evalf raises its precision, to `digits`, until the difference has a digit that counts; a Float of one bit has none
    parts = difference.evalf(5, maxn=digits).as_real_imag()
    if not all(part.is_Float or part.is_zero for part in parts):
        return None
    return any(part.is_Float and part != 0 and part._prec > 1 for part in parts)


def _same_at_points(x: Expr, y: Expr) -> bool | None:
    """Whether two expressions are equal at random real points, to so many digits that coefficients are equal too.

    None where they are equal at positive points alone, because of roots and logarithms: ln|x| and ln x may be the same
    or not.
    """
    symbols = sorted(x.free_symbols | y.free_symbols, key=default_sort_key)
    exact = {number: Rational(str(number)) for number in x.atoms(Float) | y.atoms(Float)}
    x, y = x.xreplace(exact), y.xreplace(exact)
    branches = any(value.has(log) or any(not power.exp.is_integer for power in value.atoms(Pow)) for value in (x, y))
    draw, compared = random.Random(0), 0
    for point in range(2 * _POINTS):
        positive = point < _POINTS
        sizes = [Rational(draw.randint(10**6, 4 * 10**6), 10**6) for _ in symbols]
        at = {s: size if positive or draw.random() < 0.3 else -size for s, size in zip(symbols, sizes)}
        try:
            a, b = (value.subs(at).evalf(_POINT_DIGITS) for value in (x, y))
        except (ValueError, ZeroDivisionError, OverflowError, TypeError):
            continue
        if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
            continue
        if abs(a - b) > Float(10) ** (10 - _POINT_DIGITS) * max(1, abs(a)):
            return False if positive or not branches else None
        compared += 1
    return True if compared >= 3 else None


def _same_equation(gold: Expr, answer: Expr) -> bool:
    """Whether gold = 0 and answer = 0 say the same: proportional, or the solutions of each solve the other."""
    if not simplify(gold / answer).free_symbols:
        return True
    for symbol in sorted(gold.free_symbols & answer.free_symbols, key=default_sort_key):
        solutions = solve(gold, symbol), solve(answer, symbol)
        if all(solutions) and len(solutions[0]) == len(solutions[1]):
            pairs = (answer, solutions[0]), (gold, solutions[1])
            return all(simplify(side.subs(symbol, root)) == 0 for side, roots in pairs for root in roots)
    return False


_SIGNS = {"<": Lt, ">": Gt, r"\le": Le, r"\ge": Ge, r"\ne": Ne}


def _as_set(value: Value) -> tuple[Set, str] | None:
    """The real numbers that intervals, or inequalities in one letter, leave, and that letter."""
    if value.kind == "interval":
        pieces, name = value.parts
        found = []
        for low, high, closed_low, closed_high in pieces:
            ends = [{"-\\infty": -oo, "\\infty": oo}.get(end, _expression(end)) for end in (low, high)]
            if any(end is None or not end.is_extended_real for end in ends):
                return None
            found.append(Interval(*ends, not closed_low, not closed_high))
        return Union(*found), name
    if value.kind == "list":
        sets = [found for found in map(_as_set, value.parts[0]) if found is not None]
        if not value.parts[1] or len(sets) < len(value.parts[0]):
            return None
        names = {part[1] for part in sets}
        join = Intersection if value.parts[1] == "and" else Union
        return (join(*(part[0] for part in sets)), names.pop()) if len(names) == 1 else None
    if value.kind != "relation":
        return None
    sides = _expressions(value.parts[1])
    if sides is None:
        return None
    symbols = set().union(*(side.free_symbols for side in sides))
    if len(symbols) != 1 or any(side.atoms(Function) - side.atoms(Abs) for side in sides):
        return None
    (symbol,) = symbols
    parts = [_SIGNS[sign](x, y) for sign, x, y in zip(value.parts[0], sides, sides[1:])]
    return Intersection(*(part.as_set() for part in parts)), symbol.name


def _same_inequality(gold: Value, answer: Value) -> bool | None:
    """Of two inequalities in several letters: whether one is the other times a positive number, or turned round."""
    normal = []
    for value in (gold, answer):
        signs, sides = value.parts
        both = _expressions(sides)
        if len(signs) != 1 or both is None:
            return None
        turned = {">": "<", r"\ge": r"\le"}.get(signs[0])
        normal.append((turned or signs[0], (both[0] - both[1]) * (-1 if turned else 1)))
    (x_sign, x), (y_sign, y) = normal
    ratio = simplify(x / y)
    if x_sign != y_sign or ratio.free_symbols:
        return None if x_sign == y_sign else False
    return bool(ratio > 0) or x_sign == r"\ne"


def _as_matrix(value: Value) -> MatrixBase | None:
    if value.kind == "matrix":
        cells = [[_expression(cell.parts[0]) for cell in row] for row in value.parts]
        return Matrix(cells) if all(cell is not None for row in cells for cell in row) else None
    parsed = _parse(value.parts[0]) if value.parts else None
    if parsed is None:
        return None
    parsed = _named(parsed).doit()
    return parsed if isinstance(parsed, MatrixBase) else None
