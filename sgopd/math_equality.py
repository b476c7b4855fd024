"""Whether two LaTeX answers are equal: math-verify, and a second look at what it calls equal.

Imported by verifier workers only (sympy takes half a second to load, and may run for hours on a hostile
input: the pool's deadline is what ends it, so math-verify's own alarms are off).
"""

from __future__ import annotations

import logging
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
    Interval,
    MatrixBase,
    Set,
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
    if answer is None or answer_value is None or _numbers_differ(gold_value, answer_value):
        return "incorrect"
    equal = verify(gold_value, answer_value, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)
    if not equal:
        equal = _same_constant(gold_value, answer_value) or _same_set(gold_value, gold, answer_value, answer)
    elif isinstance(gold_value, Eq) and isinstance(answer_value, Eq) and gold_value != answer_value:
        equal = _same_equation(gold_value.lhs - gold_value.rhs, answer_value.lhs - answer_value.rhs)
    return "correct" if equal else "incorrect"


def _parse(latex: str) -> Any | None:
    parsed = parse(rf"\boxed{{{latex}}}", _EXTRACTION, fallback_mode="no_fallback", parsing_timeout=None)
    return parsed[0] if parsed and parsed[0] not in (nan, zoo) else None


_parse_gold = lru_cache(maxsize=16_384)(_parse)


# math-verify compares numbers to 15 *absolute* decimals, so that 2^-99 equals 2^-98.


def _numbers_differ(gold: Any, answer: Any) -> bool:
    """Whether two values are made of equally many numbers, and not of the same ones."""
    xs, ys = _numbers(gold), _numbers(answer)
    return len(xs) == len(ys) and any(_different(x, y) for x, y in zip(xs, ys))


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


def _different(x: Expr, y: Expr) -> bool:
    if x.is_zero or y.is_zero:  # relative to nothing; math-verify is exact here
        return False
    tolerance = 1e-5 if x.has(Float) or y.has(Float) else 1e-20
    x, y = x.evalf(30), y.evalf(30)
    try:
        return bool(abs(x - y) > tolerance * abs(x))
    except TypeError:  # of infinities
        return False


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


def _same_constant(gold: Any, answer: Any) -> bool:
    """Whether two exact expressions are one real or complex number: their difference is below 1e-300."""
    if not (isinstance(gold, Expr) and isinstance(answer, Expr)) or gold.has(Float) or answer.has(Float):
        return False
    x, y = _with_unit_imaginary(gold), _with_unit_imaginary(answer)
    if not (x.is_number and y.is_number and x.is_finite is not False and y.is_finite is not False):
        return False
    # evalf raises its precision, to maxn digits, until the difference has one that counts
    try:
        return abs(complex((x - y).evalf(5, maxn=400))) < 1e-300
    except (TypeError, OverflowError):  # no number after all, or a huge one
        return False


def _with_unit_imaginary(value: Expr) -> Expr:
    letters = [symbol for symbol in value.free_symbols if symbol.name == "i"]
    return value.subs({letter: I for letter in letters}).doit()


# It compares an inequality with an interval only where the inequality is a bare x > a.


def _same_set(gold: Any, gold_latex: str, answer: Any, answer_latex: str) -> bool:
    """Whether two inequalities in one real variable, or unions of intervals, are one set."""
    first, second = _as_set(gold, gold_latex), _as_set(answer, answer_latex)
    if first is None or second is None:
        return False
    if _variables(gold) and _variables(answer) and _variables(gold) != _variables(answer):
        return False
    return bool(first == second)


def _variables(value: Any) -> set[str]:
    return {symbol.name for symbol in value.free_symbols}


def _as_set(value: Any, latex: str) -> Set | None:
    parts = [value]
    if isinstance(value, FiniteSet) and _OR.search(latex):  # x < 1 or x > 5
        parts = list(value.args)
    if isinstance(value, (Interval, Union)):
        return value
    relational = all(isinstance(part, (Relational, And)) and not isinstance(part, Eq) for part in parts)
    if not relational or len(_variables(value)) != 1 or value.atoms(Function) - value.atoms(Abs):
        return None
    return Union(*(part.doit().as_set() for part in parts))


_OR = re.compile(r"\bor\b|\\l?or\b|\\vee\b")
