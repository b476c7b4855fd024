"""The reader of a number with a unit, a noun, or words that matter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from sgopd.answers.numbers import fraction, number, plain_value
from sgopd.answers.units import unit
from sgopd.answers.value import Value, read, word_set
from sgopd.answers.words import NEUTRAL, plain_words, stem

_MATTERS = word_set(
    "or and more less least most not no than between remainder over under above below before after increase decrease "
    "increased decreased up down east west north south left right clockwise counterclockwise anticlockwise am pm odd "
    "even per profit loss gain extraneous tens tenths halves thirds quarters fifths hundredths ones gross score "
    "negative minus plus times half double twice percent each every either neither never "
    "none fewer greater smaller larger at any except without isn't ago later earlier until since short extra bc ad "
    "bce ce dozen dozens million thousand billion hundred trillion wins losses lower higher base mod modulo outside "
    "inside factorial degrees radians does cannot wrong incorrect false pairs"
)
_PHRASES = {"or more": "at least", "or greater": "at least", "no less than": "at least", "or les": "at most"}
_PHRASES |= {"or less": "at most", "or fewer": "at most", "no more than": "at most", "increase of": "increase"}
DENY = word_set("not no or nor neither between except")  # of these, it is another answer
_MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PEOPLE = word_set("people children men women feet mice geese teeth students sheep fish deer cattle person percent")
_MONEY = re.compile(r"([+-]?) ?(\\\$|€|£|¥|⟦US⟧ ?\\\$|⟦(?:Rs\.?)⟧ ?) ?(.+)")
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "s": "rupee"}
_QUALIFIED = re.compile(r"⟦([A-Za-z' ,.()\-]+)⟧ ?([^⟦]+(?:⟦[^⟧]*⟧[^⟦]*)?)")
_COMPOUND = re.compile(r"(\d[\d.,]*) ?⟦([A-Za-z]+)\.?(?: and)?⟧,? ?")
_UNITS_OF_NOTHING = re.compile(r"⟦(?:square |cubic |sq\.? )?units?⟧ ?(?:\^ ?\{?[23]\}?)?")
_UNIT_START = r"\\frac ?\{ ?⟦|⟦|\\mu ?⟦|\^\\circ ?⟦?[CF]⟧?$|k?\\Omega ?$"
_HEAD = re.compile(rf"((?:(?!{_UNIT_START}).)*?) *(?:\\cdot|\\times)? ?((?:{_UNIT_START}).*)")


def quantity(text: str) -> Value | None:
    """A number with something after it: (number, unit, noun, words that matter)."""
    if match := re.fullmatch(r"([^€£¥⟦]+?) ?([€£¥])", text):
        text = match[2] + match[1]
    if match := _MONEY.fullmatch(text):
        value = read(match[3].strip())
        dimension = _CURRENCIES[match[2].strip("⟦⟧ .")[-1]]
        own = (Fraction(1), ((dimension, 1),))
        if value.kind == "quantity" and (value.parts[1] == own or (value.parts[1] is None and not value.parts[3])):
            value = Value("formula", value.parts[:1])
        if value.kind != "formula":
            return None
        return Value("quantity", ("-" * (match[1] == "-") + value.parts[0], own, "", ()))
    if len(_COMPOUND.findall(text)) > 1 and not _COMPOUND.sub("", text + " ").strip():
        return _compound(_COMPOUND.findall(text))
    if match := _QUALIFIED.fullmatch(text):
        value = read(match[2])
        if match[1].casefold() in ("negative", "minus"):
            return Value(value.kind, ("-" + value.parts[0],)) if value.kind == "formula" and number(match[2]) else None
        if value.kind in ("formula", "percent", "degrees", "quantity") and (
            value.kind != "quantity" or not value.parts[3]
        ):
            return _modified(value, match[1], before=True)
    match = _HEAD.fullmatch(text)
    if not match or not match[1]:
        return None
    head, tail = read(match[1]), match[2]
    if head.kind in ("percent", "degrees", "quantity") and "⟦" in tail:
        return _modified(head, plain_words(tail))
    if head.kind not in ("formula",):
        return None
    made = unit(tail)
    if made or _UNITS_OF_NOTHING.fullmatch(tail):
        return Value("quantity", (head.parts[0], made, "", ()))
    said = plain_words(tail)
    if not re.fullmatch(r"[A-Za-z' .,()\-/]+", said):
        return None
    remark = re.fullmatch(r"\((.*)\)", said)
    if remark and not all(word.casefold() in NEUTRAL | {"degrees"} for word in remark[1].split()):
        return None
    said = remark[1] if remark else said
    listed = said.split()
    times, figure = _MULTIPLIERS.get(listed[0].casefold()), plain_value(head.parts[0])
    if times and figure is not None:
        rest = read(fraction(figure * times) + (f" ⟦{' '.join(listed[1:])}⟧" if listed[1:] else ""))
        return rest if rest.kind in ("formula", "quantity") else None
    for count in range(len(listed), 0, -1):
        made = unit(" ".join(listed[:count]))
        if made:
            return _modified(Value("quantity", (head.parts[0], made, "", ())), " ".join(listed[count:]))
    return _modified(Value("quantity", (head.parts[0], None, "", ())), said)


def _modified(value: Value, said: str, before: bool = False) -> Value:
    """A quantity with the words after it, as a noun or as words that matter."""
    listed = [word.strip(".,()").casefold() for word in said.split()]
    listed = [word for word in listed if word]
    matters = tuple(stem(word) for word in listed if word not in NEUTRAL and word not in ("by", "due", "for", "with"))
    noun = ""
    loud = [word for word in listed if word in _MATTERS]
    if (
        not loud
        and not before
        and len(matters) <= 2
        and (not matters or listed[-1] in NEUTRAL | _PEOPLE or listed[-1].endswith("s") or " of " in said)
    ):
        noun, matters = " ".join(matters), ()
    matters = tuple(_PHRASES.get(" ".join(matters), " ".join(matters)).split())
    made = value.parts[1] if value.kind == "quantity" else None if value.kind == "formula" else value.kind
    noun = noun or (value.parts[2] if value.kind == "quantity" else "")
    return Value("quantity", (value.parts[0], made, noun, matters))


def _compound(parts: Sequence[tuple[str, str]]) -> Value | None:
    total, smallest, dimensions = Fraction(0), Fraction(0), None
    for figure, name in parts:
        made, value = unit(name), number(figure)
        if made is None or value is None or (dimensions is not None and (made[1] != dimensions or made[0] >= smallest)):
            return None
        smallest, dimensions = made
        total += value.value * made[0]
    assert dimensions is not None
    return Value("quantity", (fraction(total), (Fraction(1), dimensions), "", ("compound",)))
