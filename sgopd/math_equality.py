"""Whether two LaTeX answers are equal: math-verify, and a second look at what it calls equal.

Imported by verifier workers only (sympy takes half a second to load, and may run for hours on a hostile
input: the pool's deadline is what ends it, so math-verify's own alarms are off).
"""

from __future__ import annotations

import logging
import math
import random
import re
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import (
    Abs,
    And,
    Eq,
    Expr,
    FiniteSet,
    Float,
    Function,
    I,
    Integral,
    Intersection,
    Interval,
    Limit,
    MatrixBase,
    Product,
    Set,
    Sum,
    Tuple,
    UnevaluatedExpr,
    Union,
    default_sort_key,
    nan,
    simplify,
    solve,
    zoo,
)
from sympy.core.random import seed as seed_sympy
from sympy.core.relational import Relational

from sgopd.grading import MAX_DIGITS, magnitude

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its timeouts are off

_EXTRACTION = [LatexExtractionConfig(boxed_match_priority=0)]


def grade(gold: str, answer: str | None) -> str:
    """ "correct", "incorrect", or "bad_gold" where math-verify cannot parse the gold.

    Both are LaTeX as `grading.clean` leaves it. With `answer` None only the gold is parsed.
    """
    # sympy tests some identities at random points: a verdict must not depend on what was graded before.
    random.seed(0)
    seed_sympy(0)
    gold_value = _parse_gold(gold)
    if gold_value is None:
        return "bad_gold"
    answer_value = None if answer is None else _parse(answer)
    if answer is None or answer_value is None:
        return "incorrect"
    digits = _digits(gold, answer)
    if _numbers_differ(gold_value, answer_value, digits):
        return "incorrect"
    equal = verify(gold_value, answer_value, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)
    if not equal:
        equal = _same_constant(gold_value, answer_value, digits) or _same_set(gold_value, gold, answer_value, answer)
    elif isinstance(gold_value, Eq) and isinstance(answer_value, Eq) and gold_value != answer_value:
        equal = _same_equation(gold_value.lhs - gold_value.rhs, answer_value.lhs - answer_value.rhs)
    elif {_connective(gold), _connective(answer)} == {"and", "or"}:  # to math-verify they are the same
        equal = _same_set(gold_value, gold, answer_value, answer)
    return "correct" if equal else "incorrect"


def _parse(latex: str) -> Any | None:
    parsed = parse(rf"\boxed{{{latex}}}", _EXTRACTION, fallback_mode="no_fallback", parsing_timeout=None)
    return parsed[0] if parsed and parsed[0] not in (nan, zoo) else None


_parse_gold = lru_cache(maxsize=16_384)(_parse)


# math-verify compares numbers to 15 *absolute* decimals, so that 2^-99 equals 2^-98.


def _digits(gold: str, answer: str) -> int:
    """Digits to which two exact numbers are compared: hundreds, and several times what was written out.

    Not a proof of equality (a separation bound would be), but no number of this length that is known falls below.
    """
    return min(400 + math.ceil(4 * min(magnitude(gold) + magnitude(answer), MAX_DIGITS)), MAX_DIGITS)


def _numbers_differ(gold: Any, answer: Any, digits: int) -> bool:
    """Whether two values are made of equally many numbers, and not of the same ones."""
    xs, ys = _numbers(gold), _numbers(answer)
    return len(xs) == len(ys) and any(_different(x, y, digits) for x, y in zip(xs, ys))


def _numbers(value: Any) -> list[Expr]:
    """The numbers that a number, point, interval, finite set or matrix is made of, sorted; else none."""
    if isinstance(value, Interval):
        parts = [value.start, value.end]
    elif isinstance(value, (FiniteSet, Tuple)):
        parts = list(value.args)
    elif isinstance(value, MatrixBase):
        parts = value.flat()
    else:
        parts = [value]
    # A percentage (unevaluated hundredths) may equal its figure as well as its value.
    if not all(isinstance(part, Expr) and part.is_number and not part.has(UnevaluatedExpr) for part in parts):
        return []
    return sorted(parts, key=lambda part: default_sort_key(part.evalf()))


def _different(x: Expr, y: Expr, digits: int) -> bool:
    if not (x.has(Float) or y.has(Float)):
        return _apart(x, y, digits) is True
    if x.is_zero or y.is_zero:  # relative to nothing; math-verify is exact here
        return False
    x, y = x.evalf(30), y.evalf(30)
    try:
        return bool(abs(x - y) > 1e-5 * abs(x))
    except TypeError:  # of infinities
        return False


def _apart(x: Expr, y: Expr, digits: int) -> bool | None:
    """Whether two exact numbers differ, real or complex; None where that has no meaning, as of infinities."""
    if x == y:
        return False
    difference = x - y
    if difference.has(Integral, Sum, Product, Limit):  # by quadrature and the like: seconds for hundreds of digits
        digits = 30
    # evalf raises its precision, to `digits`, until the difference has a digit that counts; a Float of one bit has none
    parts = difference.evalf(5, maxn=digits).as_real_imag()
    if not all(part.is_Float or part.is_zero for part in parts):
        return None
    return any(part.is_Float and part != 0 and part._prec > 1 for part in parts)


# It compares equations by their lists of solutions, so that any two without a real one are equal.


def _same_equation(gold: Expr, answer: Expr) -> bool:
    """Whether gold = 0 and answer = 0 say the same: proportional, or the solutions of each solve the other."""
    if not simplify(gold / answer).free_symbols:
        return True
    for symbol in sorted(gold.free_symbols & answer.free_symbols, key=default_sort_key):
        solutions = solve(gold, symbol), solve(answer, symbol)
        if all(solutions):
            pairs = (answer, solutions[0]), (gold, solutions[1])
            return all(simplify(side.subs(symbol, root)) == 0 for side, roots in pairs for root in roots)
    return False


# It misses constants whose equality is beyond `simplify`, and reads i as a letter.


def _same_constant(gold: Any, answer: Any, digits: int) -> bool:
    """Whether two exact expressions are one real or complex number."""
    if not (isinstance(gold, Expr) and isinstance(answer, Expr)) or gold.has(Float) or answer.has(Float):
        return False
    x, y = _with_unit_imaginary(gold), _with_unit_imaginary(answer)
    if not (x.is_number and y.is_number and x.is_finite is not False and y.is_finite is not False):
        return False
    return _apart(x, y, digits) is False


def _with_unit_imaginary(value: Expr) -> Expr:
    letters = [symbol for symbol in value.free_symbols if symbol.name == "i"]
    return value.subs({letter: I for letter in letters}).doit()


# It compares an inequality with an interval only where the inequality is a bare x > a.


def _same_set(gold: Any, gold_latex: str, answer: Any, answer_latex: str) -> bool:
    """Whether two inequalities in one real variable (several joined by a word), or unions of intervals, are one set."""
    first, second = _as_set(gold, gold_latex), _as_set(answer, answer_latex)
    if first is None or second is None:
        return False
    if _variables(gold) and _variables(answer) and _variables(gold) != _variables(answer):
        return False
    return bool(first == second)


def _variables(value: Any) -> set[str]:
    return {symbol.name for symbol in value.free_symbols}


def _as_set(value: Any, latex: str) -> Set | None:
    if isinstance(value, (Interval, Union)):
        return value
    connective = _connective(latex)
    parts = list(value.args) if isinstance(value, FiniteSet) and connective else [value]
    relational = all(isinstance(part, (Relational, And)) and not isinstance(part, Eq) for part in parts)
    if not relational or len(_variables(value)) != 1 or value.atoms(Function) - value.atoms(Abs):
        return None
    join = Intersection if connective == "and" else Union
    return join(*(part.doit().as_set() for part in parts))


def _connective(latex: str) -> str:
    """What joins the parts of an answer, if it is one of the two words."""
    words = set(re.findall(r"\b(?:and|or)\b", latex))
    return words.pop() if len(words) == 1 else ""
