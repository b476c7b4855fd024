r"""Whether two constants in closed form are equal, in a fraction of a millisecond and without sympy.

What is read, of LaTeX as `answers.clean` leaves it, and by whole strings only:

    sum     terms joined by + and -, the first perhaps with a sign
    term    factors joined by \cdot \times * / \div, or side by side (2\sqrt3, 2(1+\pi), never 2 3)
    factor  base, or base^exponent with a rational exponent written out (2^{10}, 5^{-1/2})
    base    an integer, \pi, (sum), {sum}, \frac{sum}{sum}, \sqrt{sum}, \sqrt[n]{sum}

Everything else is left to sympy, above all what has two readings: decimals (rounded or not), letters, units, 2\frac12
(a mixed number, or a product), 1/2\sqrt3, \frac12^2, 2^10, and roots of what is not surely ≥ 0.

Constants are compared by intervals of integers, scaled by a power of 2: where that of the difference does not hold 0,
they differ. Where it does, it is narrowed until it is smaller than the smallest number but 0 that the difference of
two such expressions may be: the separation bound of Burnikel, Funke, Mehlhorn, Schirra and Schmitt (A separation bound
for real algebraic expressions, 2001). So both words are proofs. Only with \pi there is no such bound, and equal means
equal to 400 digits and more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from mpmath.libmp import pi_fixed

MAX_BITS = 20_000  # of a number, and of the precision
MAX_DEGREE = 20  # of a root
MAX_EXPONENT = 1_000
MAX_DEPTH = 60  # of brackets within each other
FIRST_BITS = 192  # of precision: tells most that differ

Node = tuple[Any, ...]  # an operation's name and its operands
Interval = tuple[int, int]


class _Unread(ValueError):
    """It is not of this form, or not to be decided within the caps."""


def equal(gold: str, answer: str) -> bool | None:
    """Whether two cleaned LaTeX texts are one value; None where either is left to sympy."""
    first, second = _read(gold), _read(answer)
    if first is None or second is None:
        return None
    try:
        return _equal(first, second)
    except _Unread:
        return None


# --- reading ---

_TOKEN = re.compile(r"\\[a-zA-Z]+|\d+|[-+*/^(){}\[\]]")
_TIMES = ("*", r"\cdot", r"\times")
_DIVIDE = ("/", r"\div")
_FRACTIONS = (r"\frac", r"\dfrac", r"\tfrac", r"\cfrac")
_SIDE_BY_SIDE = ("(", r"\sqrt", r"\pi", *_FRACTIONS)


@lru_cache(maxsize=4_096)
def _read(text: str) -> Node | None:
    try:
        reader = _Reader(text)
        value = reader.sum()
        return value if reader.token is None else None
    except _Unread:
        return None


class _Reader:
    """Recursive descent; each token is looked at once."""

    def __init__(self, text: str) -> None:
        if re.search(r"\d\s+\d", text) or _TOKEN.sub("", text).strip():
            raise _Unread
        tokens = [token for token in _TOKEN.findall(text) if token not in (r"\left", r"\right")]
        self.tokens = tokens[::-1]
        self.depth = 0

    @property
    def token(self) -> str | None:
        return self.tokens[-1] if self.tokens else None

    def take(self, *expected: str) -> str:
        if self.token is None or (expected and self.token not in expected):
            raise _Unread
        return self.tokens.pop()

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unread

    def sum(self) -> Node:
        self.deeper()
        sign = self.take() if self.token in ("+", "-") else "+"
        total = self.term() if sign == "+" else ("-", _integer(0), self.term())
        while self.token in ("+", "-"):
            total = self.take(), total, self.term()
        self.depth -= 1
        return total

    def term(self) -> Node:
        product, divided = self.factor(), False
        while True:
            token = self.token
            if token in _TIMES or token in _DIVIDE:
                self.take()
                divided = token == "/"
                product = "*" if token in _TIMES else "/", product, self.factor()
            elif token in _SIDE_BY_SIDE:
                if divided:
                    raise _Unread  # 1/2\sqrt3
                factor = self.factor()
                if product[0] == "integer" and factor[0] == "/" and factor[1][0] == factor[2][0] == "integer":
                    raise _Unread  # 2\frac12
                product = "*", product, factor
            else:
                return product

    def factor(self) -> Node:
        fraction = self.token in _FRACTIONS
        base = self.base()
        if self.token != "^":
            return base
        self.take()
        exponent = _rational(self.argument())
        if fraction or self.token == "^" or not exponent:
            raise _Unread  # \frac12^2, 2^3^4, 0^0
        if abs(exponent.numerator) > MAX_EXPONENT or exponent.denominator > MAX_DEGREE:
            raise _Unread
        if exponent.denominator > 1:
            base = "root", exponent.denominator, base
        power = "power", abs(exponent.numerator), base
        return power if exponent > 0 else ("/", _integer(1), power)

    def base(self) -> Node:
        token = self.take()
        if token.isdecimal():
            return _integer(int(token))
        if token == r"\pi":
            return ("pi",)
        if token in "({":
            inner = self.sum()
            self.take({"(": ")", "{": "}"}[token])
            return inner
        if token == r"\sqrt":
            return "root", self.degree(), self.argument()
        if token in _FRACTIONS:
            digits = self.token or ""
            if digits.isdecimal() and len(digits) == 2:  # \frac12
                self.take()
                return "/", _integer(int(digits[0])), _integer(int(digits[1]))
            return "/", self.argument(), self.argument()
        raise _Unread

    def degree(self) -> int:
        if self.token != "[":
            return 2
        self.take("[")
        degree = self.take()
        self.take("]")
        if not degree.isdecimal() or not 2 <= int(degree) <= MAX_DEGREE:
            raise _Unread
        return int(degree)

    def argument(self) -> Node:
        r"""What TeX takes after \sqrt, \frac and ^: a group, or one character."""
        token = self.token or ""
        if token == "{" or token == r"\pi" or (token.isdecimal() and len(token) == 1):
            return self.base()
        raise _Unread


def _integer(number: int) -> Node:
    if number.bit_length() > MAX_BITS:
        raise _Unread
    return "integer", number


def _rational(node: Node) -> Fraction:
    """An exponent's value."""
    name, *operands = node
    if name == "integer":
        return Fraction(operands[0])
    if name == "-" and operands[0] == _integer(0):
        return -_rational(operands[1])
    if name == "/" and operands[1] != _integer(0):
        return _rational(operands[0]) / _rational(operands[1])
    raise _Unread


# --- comparing ---


def _equal(first: Node, second: Node) -> bool:
    difference = "-", first, second
    roots: set[Node] = set()
    above, below = _sizes(difference, roots)
    if _holds(difference, "pi"):
        smallest = 1_400 + 4 * (above + below)
    else:
        smallest = (math.prod(root[1] for root in roots) - 1) * above + below + 1
    bits: float = FIRST_BITS
    while True:
        try:
            low, high = _interval(difference, int(bits))
            if low > 0 or high < 0:
                return False
            if bits > smallest and max(-low, high) < 1 << int(bits - smallest):
                return True
        except ZeroDivisionError:  # an interval holds 0, until now
            pass
        if bits >= MAX_BITS or smallest > MAX_BITS:
            raise _Unread
        bits = min(max(2 * bits, smallest + 64), MAX_BITS)


def _holds(node: Node, name: str) -> bool:
    return node[0] == name or any(_holds(part, name) for part in node[1:] if isinstance(part, tuple))


# --- bounds: log2 of u and l, where a value is U/L with algebraic integers U and L whose conjugates are ≤ u and ≤ l ---


def _sizes(node: Node, roots: set[Node]) -> tuple[float, float]:
    name, *operands = node
    if name == "integer":
        return float(operands[0].bit_length()), 0.0
    if name == "pi":
        return 2.0, 0.0
    if name in ("root", "power"):
        count, radicand = operands
        above, below = _sizes(radicand, roots)
        if name == "power":
            return count * above, count * below
        roots.add(node)
        if above >= below:
            return (above + (count - 1) * below) / count, below
        return above, ((count - 1) * above + below) / count
    (x_above, x_below), (y_above, y_below) = (_sizes(operand, roots) for operand in operands)
    if name == "*":
        return x_above + y_above, x_below + y_below
    if name == "/":
        return x_above + y_below, x_below + y_above
    return max(x_above + y_below, x_below + y_above) + 1, x_below + y_below


# --- intervals: (low, high) stands for low/2^bits to high/2^bits ---


def _interval(node: Node, bits: int) -> Interval:
    name, *operands = node
    if name == "integer":
        return operands[0] << bits, operands[0] << bits
    if name == "pi":
        near = pi_fixed(bits)
        return near - 4, near + 4
    if name in ("root", "power"):
        count, inner = operands
        value = _interval(inner, bits)
        result = _root(value, count, bits) if name == "root" else _power(value, count, bits)
    else:
        result = _OPERATIONS[name](_interval(operands[0], bits), _interval(operands[1], bits), bits)
    if max(-result[0], result[1]).bit_length() > bits + MAX_BITS:
        raise _Unread
    return result


def _times(x: Interval, y: Interval, bits: int) -> Interval:
    ends = [a * b for a in x for b in y]
    return min(ends) >> bits, -(-max(ends) >> bits)


def _divided(x: Interval, y: Interval, bits: int) -> Interval:
    if y[0] <= 0 <= y[1]:
        raise ZeroDivisionError
    return min((a << bits) // b for a in x for b in y), max(-((-a << bits) // b) for a in x for b in y)


_OPERATIONS: dict[str, Callable[[Interval, Interval, int], Interval]] = {
    "+": lambda x, y, bits: (x[0] + y[0], x[1] + y[1]),
    "-": lambda x, y, bits: (x[0] - y[1], x[1] - y[0]),
    "*": _times,
    "/": _divided,
}


def _power(x: Interval, exponent: int, bits: int) -> Interval:
    result = 1 << bits, 1 << bits
    for digit in f"{exponent:b}":
        result = _times(result, result, bits)
        if digit == "1":
            result = _times(result, x, bits)
        if max(-result[0], result[1]).bit_length() > bits + MAX_BITS:
            raise _Unread
    return result


def _root(x: Interval, degree: int, bits: int) -> Interval:
    if x[0] < 0 or bits * degree > 8 * MAX_BITS:
        raise _Unread  # complex, or 0 perhaps
    scale = bits * (degree - 1)
    return _floor_root(x[0] << scale, degree), _floor_root(x[1] << scale, degree) + 1


def _floor_root(number: int, degree: int) -> int:
    if degree == 2 or number == 0:
        return math.isqrt(number)
    guess = 1 << -(-number.bit_length() // degree)
    while True:  # Newton's steps go down to the root, from above
        better = ((degree - 1) * guess + number // guess ** (degree - 1)) // degree
        if better >= guess:
            return guess
        guess = better
