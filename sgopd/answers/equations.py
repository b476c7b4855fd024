"""Readers of what has a relation sign, and of several answers at once."""

from __future__ import annotations

import re

from sgopd.answers.latex import items, pieces, split, variables
from sgopd.answers.sets import all_but, flat
from sgopd.answers.value import Value, read

_RELATIONS = {"<", ">", r"\le", r"\ge", r"\ne", "="}
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}


def relation(text: str) -> Value | None:
    """An inequality: an interval if it bounds one letter, else (signs, sides)."""
    if not re.search(r"[<>]|\\[lgn]e(?![a-zA-Z])", text) or "⟦" in text:
        return None
    parts = split(text, _RELATIONS)
    signs, sides = [sign for sign, _ in parts[1:]], [side for _, side in parts]
    if match := re.fullmatch(r"([a-zA-Z]) ?\\ne ?([^,]+(?:, ?[^,]+)+)", text):  # x is not 1, 2
        return all_but([part for _, part in items(match[2])], match[1])
    if not signs or "=" in signs or any(read(side).kind not in ("formula", "percent", "degrees") for side in sides):
        return None
    letters = [index for index, side in enumerate(sides) if re.fullmatch(r"[a-zA-Z]|\\theta|[a-z]_\{?\w\}?", side)]
    others = [side for index, side in enumerate(sides) if index not in letters]
    if len(letters) == 1 and not any(map(variables, others)):
        (at,) = letters
        ends, variable = ["-\\infty", "\\infty"], sides[at]
        closed = [False, False]
        if len(sides) == 2:
            sign = signs[0] if at == 0 else _FLIPPED[signs[0]]
            if sign == r"\ne":
                return all_but([sides[1 - at]], variable)
            end = 1 if sign in ("<", r"\le") else 0
            ends[end], closed[end] = sides[1 - at], sign in (r"\le", r"\ge")
            return Value("interval", (((ends[0], ends[1], closed[0], closed[1]),), variable))
        if len(sides) == 3 and at == 1:
            if all(sign in (">", r"\ge") for sign in signs):
                signs, sides = [_FLIPPED[sign] for sign in signs[::-1]], sides[::-1]
            if all(sign in ("<", r"\le") for sign in signs):
                return Value("interval", (((sides[0], sides[2], signs[0] == r"\le", signs[1] == r"\le"),), variable))
    if len(signs) > 1 and r"\ne" in signs:
        return None
    if len(signs) > 1 and all(sign in (">", r"\ge") for sign in signs):  # c > b > a
        signs, sides = [_FLIPPED[sign] for sign in signs[::-1]], sides[::-1]
    return Value("relation", (tuple(signs), tuple(sides)))


_NAME = re.compile(
    r"(?:m ?)?(?:\\angle|\\triangle|\\measuredangle|\\overline|\\vec|\\hat"
    r"|\\bar|\\widehat|\\overrightarrow|\\Delta|\\mathbf|\\mathbb)? ?"
    r"(?:\{ ?[a-zA-Z]{1,4} ?\}|[a-zA-Z]|[A-Z]{2,4}|\\[a-zA-Z]+|⟦[^⟧]*⟧)(?:_ ?(?:\w|\{[^{}]*\}))?"
    r"(?:'{0,3}|\^ ?\{ ?(?:-1|\\prime|\(\d\)|'{1,3}) ?\})"
    r" ?(?:\([^()=]{1,12}\))?|\|[a-zA-Z]{2}\||\[[A-Z]{3,6}\]|\\frac ?\{d[a-z]?\} ?\{d[a-z]\}"
    r"|\\(?:sin|cos|tan|cot|sec|csc|det) ?\(?(?:[a-zA-Z]|\\[a-z]+)\)?|\\frac ?\{[a-zA-Z]\} ?\{[a-zA-Z]\}"
    r"|d[a-z] ?/ ?d[a-z]"
    r"|\( ?[a-zA-Z](?:_\d)?(?: ?, ?[a-zA-Z](?:_\d)?)* ?\)|P ?\([^()]*\)"
)


def _name(text: str) -> str:
    """The normal form of what may stand before an equals sign as a name; empty if it is none."""
    text = text.strip()
    if re.fullmatch(r"e|i|\\pi", text) or not _NAME.fullmatch(text):
        return ""
    if re.fullmatch(r"\\frac ?\{dy\} ?\{dx\}|dy ?/ ?dx", text):
        return "y'"
    return re.sub(r"\\angle|\\measuredangle|⟦|⟧|\s|\\mathbf|[{}]|^m(?=[A-Z]{3}$|\\)", "", text).replace("^\\prime", "'")


def sequence(text: str) -> Value | None:
    """Answers with commas, semicolons, and, or between them."""
    parts = items(text, bare=True)
    if len(parts) < 2 or any(not part for _, part in parts):
        return None
    values = tuple(read(re.sub(r"^⟦(?:both|the) ⟧", "", part)) for _, part in parts)
    if any(value.kind in ("unread", "words") for value in values):
        return None
    joined = {before for before, _ in parts[1:]} & {"and", "or", r"\wedge", r"\vee"}
    join = "or" if joined & {"or", r"\vee"} else "and" if joined else ""
    if joined & {r"\wedge", r"\vee"} and not all(value.kind in ("interval", "relation", "named") for value in values):
        return None  # of statements, which are not read
    if "or" in join and joined & {"and", r"\wedge"}:
        return None
    # Without a blank, two whole numbers may be one with a decimal comma.
    return _sequence(values, "," if re.fullmatch(r"-?\d+,\d+", text) else join)


def _sequence(values: tuple[Value, ...], join: str) -> Value:
    kinds = {value.kind for value in values}
    if kinds == {"interval"} and join and len({value.parts[1] for value in values}) == 1:
        found = tuple(piece for value in values for piece in value.parts[0])
        if join == "or":
            return Value("interval", (found, values[0].parts[1]))
        bounded = [[piece for piece in found if piece[side] != end] for side, end in ((0, "-\\infty"), (1, "\\infty"))]
        if len(found) == 2 and len(bounded[0]) == len(bounded[1]) == 1 and bounded[0] != bounded[1]:
            low, high = bounded[0][0], bounded[1][0]
            return Value("interval", (((low[0], high[1], low[2], high[3]),), values[0].parts[1]))
        return Value("list", (values, join))
    if kinds <= {"named"} and values:
        names = [value.parts[0] for value in values]
        if len(set(names)) == 1:
            return Value("named", (names[0], Value("list", (flat(tuple(v.parts[1] for v in values)), join))))
        if len(set(names)) == len(names):
            return Value("assignments", tuple(sorted((value.parts for value in values), key=lambda part: part[0])))
    if values[0].kind == "named" and kinds == {"named", "formula"} and all(v.kind == "formula" for v in values[1:]):
        first = values[0].parts  # x = 1, 2
        return Value("named", (first[0], Value("list", (flat((first[1], *values[1:])), join))))
    shared = values[-1]  # 3 and 4 cm
    if shared.kind in ("quantity", "degrees", "percent") and all(value.kind == "formula" for value in values[:-1]):
        values = (*(Value(shared.kind, (value.parts[0], *shared.parts[1:])) for value in values[:-1]), shared)
    return Value("list", (flat(values), join))


def equation(text: str) -> Value | None:
    """An equation: (name, value) if a name stands on one side alone, a chain of equal sides, or (left, right)."""
    parts = [part for _, part in split(text, {"="})]
    if len(parts) < 2 or not all(parts):
        return None
    name = _name(parts[0])
    if name[:1] == "(" and len(parts) == 2:
        names, value = name[1:-1].split(","), read(parts[1])
        if value.kind == "tuple" and len(value.parts[1]) == len(names) > 1:
            return Value("assignments", tuple(sorted(zip(names, value.parts[1]), key=lambda pair: pair[0])))
        return None
    if len(parts) == 2:
        own = {name} if len(name) == 1 else set()
        value = read(parts[1])
        if name and not (own & variables(parts[1])):
            other = _name(parts[1])
            if value.kind == "formula" and other and len(other) == 1 and variables(other):
                return Value("equation", (parts[0], parts[1]))
            return Value("named", (name, value)) if value.kind not in ("unread", "words") else None
        if read(parts[0]).kind == value.kind == "formula":
            if _name(parts[1]) and not variables(parts[0]) and not name:
                return Value("named", (_name(parts[1]), read(parts[0])))
            if not variables(text):
                return Value("chain", (read(parts[0]), value))
            return Value("equation", (parts[0], parts[1]))
        return None
    values = [read(part) for part in (parts[1:] if name else parts)]
    if any(value.kind not in ("formula", "percent", "degrees", "quantity") for value in values):
        return None
    chain = Value("chain", tuple(values))
    return Value("named", (name, chain)) if name else chain


def system(text: str) -> Value | None:
    r"""A system of equations, as a list; or a function in pieces: (value, condition) of each."""
    match = re.fullmatch(
        r"\\begin ?\{(?:cases|aligned|array)\}(?:\{[lcr]+\})?(.*)\\end ?\{(?:cases|aligned|array)\}"
        r"|\\\{ ?\\begin ?\{array\}\{[lcr]+\}(.*)\\end ?\{array\}",
        text,
    )
    if not match:
        return None
    rows = [row.strip(" ,;") for row in re.split(r"\\\\", match[1] or match[2])]
    rows = [row for row in rows if row]
    if "aligned" in text or not any("&" in row for row in rows):
        return _sequence(tuple(read(row.replace("&", " ").strip()) for row in rows), "and")
    pairs = [row.split("&") for row in rows]
    if any(len(pair) != 2 for pair in pairs):
        return None
    conditions = [
        re.sub(
            r"^(?:⟦(?:if|for|when)⟧|⟦(?:if|for|when) ([^⟧]*)⟧)", lambda m: f"⟦{m[1]}⟧" if m[1] else "", c.strip()
        ).strip()
        for _, c in pairs
    ]
    return Value("pieces", tuple((read(value.strip(" ,")), read(c)) for (value, _), c in zip(pairs, conditions)))


def plus_minus(text: str) -> Value | None:
    r"""a \pm b, as the list of both."""
    signs = [piece for piece in pieces(text) if piece in (r"\pm", r"\mp")]
    if signs != [r"\pm"] or "⟦" in text or "," in text:
        return None
    left, equals, right = text.rpartition("=")
    both = [read(re.sub(r"^\+", "", right.replace(r"\pm", sign).strip())) for sign in "+-"]
    if any(value.kind not in ("formula", "percent", "degrees", "quantity") for value in both):
        return None
    value = Value("list", (tuple(both), ""))
    return Value("named", (_name(left), value)) if equals and _name(left) else None if equals else value
