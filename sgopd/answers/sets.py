"""Readers of sets of numbers: listed, by a condition, intervals, residues, families."""

from __future__ import annotations

import math
import re
from itertools import pairwise

from sgopd.answers.latex import inside, items, split, variables
from sgopd.answers.numbers import number, plain_value
from sgopd.answers.value import Value, read

ALL_REALS = (("-\\infty", "\\infty", False, False),)


def empty(text: str) -> Value | None:
    """The empty set, all reals."""
    if re.fullmatch(r"\\emptyset|\\\{ ?\\\}", text):
        return Value("set", ())
    if re.fullmatch(r"(?:[a-z] ?\\in ?)?\\mathbb ?\{?R\}? ?\^ ?\{?\+\}?", text):
        return Value("interval", ((("0", "\\infty", False, False),), ""))
    if re.fullmatch(r"(?:[a-z] ?\\in ?)?\\mathbb ?\{?R\}?", text):
        return Value("interval", (ALL_REALS, ""))
    return None


DOMAINS = re.compile(r"\\in ?\\mathbb ?\{? ?([NZQRC]) ?\}?(?:\^ ?\{? ?([+*]) ?\}?)?")


def braces(text: str) -> Value | None:
    """A set: its items, or by a condition."""
    content = inside(re.sub(r"^[a-zA-Z] ?\\in ?(?=\\\{)", "", text), r"\{", r"\}")
    if content is None:
        return None
    for bar in (r"\mid", ":", "|"):
        parts = split(content, {bar})
        if len(parts) == 2:
            return _set_builder(parts[0][1], parts[1][1])
    found = tuple(read(part) for _, part in items(content))
    if any(value.kind == "unread" for value in found) or r"\ldots" in content:
        return None
    return Value("set", flat(found))


def flat(found: tuple[Value, ...]) -> tuple[Value, ...]:
    """Items of a set or list, where a plus-minus is two of them."""
    return tuple(item for value in found for item in (value.parts[0] if value.kind == "list" else (value,)))


def _set_builder(member: str, condition: str) -> Value | None:
    domain = "R"
    if match := re.search(r"^([a-zA-Z]) ?" + DOMAINS.pattern + "$", member):
        member, domain = match[1], match[2] + (match[3] or "")
    if not re.fullmatch("[a-zA-Z]", member):
        return None
    parts = [part for _, part in items(condition)]
    kept = []
    for part in parts:
        if match := re.fullmatch(member + " ?" + DOMAINS.pattern, part):
            domain = match[1] + (match[2] or "")
        else:
            kept.append(part)
    value = read(r" ⟦and⟧ ".join(kept)) if kept else None
    if value is None or value.kind != "interval" or value.parts[1] not in ("", member):
        return None
    if domain == "R":
        return Value("interval", (value.parts[0], ""))
    if domain in ("Z", "N", "Z+", "N+", "N*") and len(value.parts[0]) == 1:
        low, high, closed_low, closed_high = value.parts[0][0]
        x, y = number(low), number(high)
        if domain != "Z" and x and x.value < 0:
            return None
        if x and y and y.value - x.value < 200:
            first, last = math.ceil(x.value), math.floor(y.value)
            first += first == x.value and not closed_low
            last -= last == y.value and not closed_high
            if domain != "Z" and first == 0:
                return None  # whether 0 is a natural number
            return Value("set", tuple(Value("formula", (str(n),)) for n in range(first, last + 1)))
    return Value("integers", (domain, value.parts))


_ENDS = {"(": False, "[": True, ")": False, "]": True}


def union(text: str) -> Value | None:
    """Intervals and their unions, all reals but some: (pieces (low, high, low closed, high closed), variable)."""
    variable = ""
    if match := re.match(r"([a-zA-Z]) ?\\in ?", text):
        variable, text = match[1], text[match.end() :]
    if match := re.fullmatch(r"\\mathbb ?\{?R\}? ?(?:\\setminus|\\backslash|-|/) ?\\\{(.*)\\\}", text):
        return all_but([part for _, part in items(match[1])], variable)
    if match := re.fullmatch(r"\(-\\infty, ?\+?\\infty\) ?(?:\\setminus|\\backslash) ?\\\{(.*)\\\}", text):
        return all_but([part for _, part in items(match[1])], variable)
    parts = [part for _, part in split(text, {r"\cup"})]
    if len(parts) == 1 and not variable and not re.search(r"\\infty|^\[|\]$", text):
        return None
    found = []
    for part in parts:
        if part[:1] not in _ENDS or part[-1:] not in _ENDS or len(part) < 3:
            return None
        ends = [end for _, end in items(part[1:-1])]
        if len(ends) != 2 or any(read(end).kind != "formula" for end in ends):
            return None
        low, high = (end.lstrip("+").strip() for end in ends)
        found.append((low, high, _ENDS[part[0]], _ENDS[part[-1]]))
    return Value("interval", (tuple(found), variable))


def all_but(points: list[str], variable: str) -> Value | None:
    values = [plain_value(point) for point in points]
    if any(value is None for value in values) and len(points) > 1:
        return None
    ordered = [point for _, point in sorted(zip(values, points), key=lambda pair: pair[0] or 0)]
    ends = ["-\\infty", *ordered, "\\infty"]
    return Value("interval", (tuple((a, b, False, False) for a, b in pairwise(ends)), variable))


_CONGRUENT = re.compile(
    r"(?:([a-zA-Z]) ?(?:\\equiv|=|\\cong) ?)?(-?\d+) ?"
    r"(?:\\pmod ?\{? ?(\d+) ?\}?|\(? ?\\mod ?\{? ?(\d+) ?\}? ?\)?|\(?⟦mod⟧ ?(\d+)\)?)"
)
_LINEAR = re.compile(
    r"(?:([a-zA-Z]) ?= ?)?(?:(-?\d*) ?([a-zA-Z]) ?([+-] ?\d+)?|(-?\d+) ?([+-] ?\d*) ?([a-zA-Z]))"
    r" ?(?:|, ?|⟦(?:where|for|with|for some|for all|for any|for every|for integers?|for any integer|where) ?⟧ ?|\( ?)"
    r"(?:([a-zA-Z]) ?\\in ?\\mathbb ?\{?Z\}?|⟦(?:for )?(?:any |some |an |every |all )?integers? ?⟧ ?([a-zA-Z])"
    r"|([a-zA-Z]) ?⟦(?:is )?(?:an |any )?integers?⟧)\)?"
)


def congruence(text: str) -> Value | None:
    """A class of residues: (name or empty, residue, modulus)."""
    if match := _CONGRUENT.fullmatch(text):
        modulus = int(match[3] or match[4] or match[5])
        return Value("congruence", (match[1] or "", int(match[2]) % modulus, modulus)) if modulus else None
    if match := re.fullmatch(r"(?:([a-zA-Z]) ?\\equiv ?)?([\d\-, ]+,[\d\-, ]+|\\pm ?\d+) ?\\pmod ?\{?(\d+)\}?", text):
        residues = re.findall(r"-?\d+", match[2])
        residues += ["-" + residue for residue in residues if "pm" in match[2]]
        modulus = int(match[3])
        found = {Value("congruence", (match[1] or "", int(r) % modulus, modulus)) for r in residues if modulus}
        return Value("set", tuple(sorted(found))) if found else None
    if match := _LINEAR.fullmatch(text):
        name, factor, letter, shift, start, step, other, a, b, c = match.groups()
        slope, offset = (factor, shift or "0") if letter else (step, start)
        slope = int(slope.replace(" ", "") + "1") if slope.strip() in ("", "-", "+") else int(slope.replace(" ", ""))
        if (letter or other) == (a or b or c) and slope:
            return Value("congruence", (name or "", int(offset.replace(" ", "")) % abs(slope), abs(slope)))
    return None


def linear(text: str) -> Value | None:
    """4k + 1, where k is a whole number though nobody says so."""
    letters = variables(text)
    return congruence(rf"{text}, {letters.pop()} \in \mathbb{{Z}}") if len(letters) == 1 else None


def family(text: str) -> Value | None:
    """Values that depend on a whole number: (value, letter, domain)."""
    match = re.fullmatch(r"(.*[^\s,])(?:,| ⟦where⟧| ⟦for⟧|\() ?([a-zA-Z]) ?" + DOMAINS.pattern + r"\)?", text)
    if not match:
        return None
    value = read(match[1])
    inner = value.parts[1] if value.kind == "named" else value
    if inner.kind not in ("formula", "list", "tuple"):
        return None
    return Value("family", (inner, match[2], match[3] + (match[4] or "")))
