"""Plain numbers, exact: integers, decimals, fractions; and when two of them are the same number."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple


class Number(NamedTuple):
    value: Fraction
    decimals: int | None  # digits after the point, where it is a decimal and thus perhaps rounded


DECIMAL = re.compile(r"([+-]?) ?(\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d*)(\.\d*)?(?:[eE]([+-]?\d{1,3}))?")
_SCIENTIFIC = re.compile(r"([+-]? ?\d*(\.\d+)?) ?(?:\\times|\\cdot|\*) ?10 ?\^ ?(\d|\{ ?[+-]?\d{1,3} ?\})")
_RATIO = re.compile(r"([+-]?) ?(?:\\frac ?\{ ?([+-]?\d+) ?\} ?\{ ?([+-]?\d+) ?\}|([+-]?\d+) ?/ ?([+-]?\d+))")
_MIXED = re.compile(r"([+-]?) ?(\d+)( ?\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}| (\d+) ?/ ?(\d+))")
_ELLIPSIS = re.compile(r"([+-]?\d*\.\d{0,9}?)(\d{1,6}?)\2{2,20} ?\\ldots ?")
_REPEATING = re.compile(
    r"([+-]?)(\d*)\.(\d*)(?:\\overline ?\{?(\d+)\}?|\\dot ?\{?(\d)\}?(?:(\d*)\\dot ?\{?(\d)\}?)?|\((\d+)\))"
)


def number(text: str) -> Number | None:
    """A plain number: integer, decimal, fraction, mixed or repeating; None for anything else."""
    text = text.strip()
    while text[:1] == "{" and text[-1:] == "}" and "{" not in text[1:]:
        text = text[1:-1].strip()
    if match := DECIMAL.fullmatch(text):
        sign, whole, decimals, exponent = match.groups()
        if "," in whole and whole[0] == "0":
            return None
        whole, decimals = re.sub("[ ,]", "", whole), (decimals or ".")[1:]
        if not whole + decimals:
            return None
        value = int(whole + decimals) * Fraction(10) ** (int(exponent or 0) - len(decimals))
        rounded = match[3] is not None or exponent is not None
        return Number(-value if sign == "-" else value, len(decimals) - int(exponent or 0) if rounded else None)
    if match := _SCIENTIFIC.fullmatch(text):
        mantissa = match[1].replace(" ", "")
        if mantissa in ("", "+", "-"):
            return None
        power = int(match[3].strip("{} "))
        places = len(match[2]) - 1 - power if match[2] else None
        return Number(Fraction(mantissa) * Fraction(10) ** power, places)
    if match := _RATIO.fullmatch(text):
        numerator, denominator = (int(part) for part in match.groups()[1:] if part is not None)
        sign = -1 if match[1] == "-" else 1
        return Number(Fraction(numerator, denominator) * sign, None) if denominator else None
    if match := _MIXED.fullmatch(text):
        numerator, denominator = (int(part) for part in match.groups()[3:] if part is not None)
        if not denominator or (match[3][0] == " " and "frac" not in match[3] and numerator >= denominator):
            return None
        value = int(match[2]) + Fraction(numerator, denominator)
        return Number(-value if match[1] == "-" else value, None)
    if match := _ELLIPSIS.fullmatch(text):  # 0.1666...
        return number(rf"{match[1]}\overline{{{match[2]}}}")
    if match := _REPEATING.fullmatch(text):
        sign, whole, decimals, over, first, middle, last, brackets = match.groups()
        period = over or brackets or first + (middle or "") + (last or "")
        value = int(whole + decimals or 0) + Fraction(int(period), 10 ** len(period) - 1)
        value /= 10 ** len(decimals)
        return Number(-value if sign == "-" else value, None)
    return None


def plain_value(text: str) -> Fraction | None:
    found = number(text)
    return found.value if found else None


def same_number(gold: Number, answer: Number) -> bool | None:
    """Equal; or one is a decimal of six places and five digits at least that rounds the other. None: too few places."""
    (x, x_places), (y, y_places) = gold, answer
    if x == y or x_places is y_places is None:
        return x == y
    places = min(p for p in (x_places, y_places) if p is not None)
    apart, unit = abs(x - y), Fraction(10) ** -places
    if x_places is not None and y_places is not None:
        unit = unit / 2 if x_places != y_places else Fraction(0)
    if apart <= unit and apart <= min(Fraction(1, 10**6), Fraction(1, 10**5) * max(abs(x), abs(y))):
        return True
    return None if x_places is not None and y_places is None and apart <= unit / 2 else False


def fraction(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
