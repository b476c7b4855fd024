"""Readers of a figure with a mark: percent, degrees, ordinals, remainders, ratios, other bases."""

from __future__ import annotations

import re
from fractions import Fraction

from sgopd.answers.formulae import TRIGONOMETRIC
from sgopd.answers.latex import split
from sgopd.answers.value import Value, read, word_list

_BASES = word_list("zero one two three four five six seven eight nine ten eleven twelve 13 14 15 sixteen")
_BASE = re.compile(
    rf"\(?([0-9A-F]+(?:\.[0-9A-F]+)?)\)? ?"
    rf"(?:_ ?\{{? ?(?:⟦? ?\(?base ?⟧? ?|⟦)?(\d+|{'|'.join(_BASES)})\)?⟧? ?\}}?| ⟦(?:\(|in )?base⟧ ?(\d+)\)?|"
    rf" ?⟦\(?(?:in )?base (\d+)\)?⟧)"
)


def based(text: str) -> Value | None:
    """A number in a base: (digits, base)."""
    match = _BASE.fullmatch(text)
    if not match:
        return None
    base = match[2] or match[3] or match[4]
    return Value("based", (match[1].lstrip("0") or "0", int(base) if base.isdecimal() else _BASES.index(base)))


_ORDINAL = re.compile(r"(?:⟦the⟧ )?(\d+) ?(?:\^ ?\{? ?)?⟦?(?:st|nd|rd|th)⟧?\}?")
ORDINALS = word_list("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")
_REMAINDER = re.compile(r"(\d+) ?(?:⟦(?:remainder|rem|r|with a? ?remainder(?: of)?)⟧|[rR]) ?(\d+)", re.IGNORECASE)


def remainder(text: str) -> Value | None:
    """A quotient and what is left."""
    match = _REMAINDER.fullmatch(text)
    return Value("tuple", ("remainder", (read(match[1]), read(match[2])))) if match else None


def ordinal(text: str) -> Value | None:
    """The 7th, as 7."""
    match = _ORDINAL.fullmatch(text)
    return Value("formula", (match[1],)) if match else None


def percent(text: str) -> Value | None:
    """A percentage: what stands before the sign."""
    match = re.fullmatch(r"([^%]*?) ?(?:\\?%|⟦(?:percent|per cent|%)⟧)", text)
    value = read(match[1]) if match and match[1] else None
    return Value("percent", (value.parts[0],)) if value and value.kind == "formula" else None


def degrees(text: str) -> Value | None:
    """An angle in degrees: what stands before the sign, which is dropped; or in degrees, minutes and seconds."""
    if match := re.fullmatch(r"(\d+) ?\^\\circ ?(\d+) ?(?:'|\^ ?\\prime|\^ ?\{\\prime\})(?: ?(\d+) ?(?:''|\"))?", text):
        angle = Fraction(int(match[1])) + Fraction(int(match[2]), 60) + Fraction(int(match[3] or 0), 3600)
        return Value("degrees", (f"{angle.numerator}/{angle.denominator}",))
    match = re.fullmatch(r"(.*?) ?(?:\^\\circ|⟦degrees?⟧|\^\\circ ?⟦?\(?degrees\)?⟧?)", text)
    value = read(match[1]) if match and match[1] and not TRIGONOMETRIC.search(match[1]) else None
    return Value("degrees", (value.parts[0],)) if value and value.kind == "formula" else None


def ratio(text: str) -> Value | None:
    """a:b, a to b, a:b:c: its terms."""
    parts = [part for _, part in split(text.replace(" ⟦to⟧ ", ":").replace(r"\colon", ":"), {":"})]
    values = [read(part) for part in parts] if 1 < len(parts) < 9 and all(parts) else []
    return Value("ratio", tuple(values)) if values and all(value.kind == "formula" for value in values) else None
