r"""What an answer is, and when two are equal: readers that turn LaTeX into a small typed value, and rules that compare.

`READERS` is a table: a reader takes cleaned LaTeX and returns a `Value`, or None where the text is not of its kind; the
first that reads it counts. Each says what it reads and has examples, which a test runs. A reader accounts for every
character: what none of them reads is of kind "unread", and is correct only where it is spelled like the gold.

`Comparer.compare` tells whether two values are equal: True, False, or None where that rests on text that only one
of them has. `RULES` has a comparison for each kind; values of two kinds are equal where one can be seen as
the other (`MIXED`). What needs sympy is asked of `Comparer.same_formula`: here that raises `NeedsWorker`, and
`sgopd.math_equality` has a comparer that can. All of it is string work in linear time on capped input.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple


class Value(NamedTuple):
    """An answer of one kind; what the parts are, the kind's reader says."""

    kind: str
    parts: tuple[Any, ...]


class Reader(NamedTuple):
    kind: str
    says: str  # what it reads
    read: Callable[[str], Value | None]
    examples: tuple[tuple[str, str, int], ...]  # gold, answer, verdict


def _word_list(text: str) -> list[str]:
    return text.split()


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# --- one spelling for equal LaTeX ---

_SYMBOLS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty "}
    | {"°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset "}
    | {"√": "sqrt", "∈": r"\in ", "±": r"\pm ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda "}
    | {"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "μ": r"\mu ", "µ": r"\mu ", "Ω": r"\Omega "}
    | {"≈": r"\approx ", "≡": r"\equiv ", "′": "'", "’": "'", "∠": r"\angle ", "△": r"\triangle ", "∧": r"\wedge "}
    | {
        "∨": r"\vee ",
        "→": r"\to ",
        "≅": r"\cong ",
        "∖": r"\setminus ",
        "⟨": r"\langle ",
        "⟩": r"\rangle ",
    }
    | {
        "¢": r"\text{ cents}",
        "，": ",",
        "（": "(",
        "）": ")",
        "％": "%",
        "：": ":",
        "；": ";",
        "＝": "=",
        "＋": "+",
        "．": ".",
        "。": ".",
    }
    | {"\u00a0": " ", "~": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "⟦": "", "⟧": "", "∶": ":", "−": "-"}
)
_SUPERSCRIPTS = re.compile("[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+|ⁿ")
_SUBSCRIPTS = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_LEVELLED = str.maketrans("⁻⁺⁰¹²³⁴⁵⁶⁷⁸⁹ⁿ₀₁₂₃₄₅₆₇₈₉", "-+0123456789n0123456789")
_VULGAR = {"½": "12", "⅓": "13", "⅔": "23", "¼": "14", "¾": "34", "⅕": "15", "⅖": "25", "⅗": "35", "⅘": "45", "⅙": "16"}
_VULGAR |= {"⅚": "56", "⅐": "17", "⅛": "18", "⅜": "38", "⅝": "58", "⅞": "78", "⅑": "19"}
_VULGARS = re.compile("|".join(_VULGAR))
_FONTS = (
    "text|textbf|textit|texttt|textrm|textsf|textnormal|emph|mathrm|mbox|hbox|mathsf|mathtt|mathit|mathbf|operatorname"
)
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|gcd|lcm|max|min|det"

Rewrite = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]


def _rewrites(*pairs: tuple[str, str | Callable[[re.Match[str]], str]]) -> list[Rewrite]:
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


def _words_of(match: re.Match[str]) -> str:
    """What stands in a font: a letter or a number stays mathematics; anything else is words."""
    font, inside = match[1], match[2].strip()
    if font.startswith("math") and inside in ("e", "i", "d") and font != "mathbf":
        return f" {inside} "
    if font == "mathbf" and inside in ("i", "j", "k"):
        return rf"\mathbf{{{inside}}}"
    if font.startswith("operatorname") and re.fullmatch(_FUNCTIONS, inside):
        return rf"\{inside} "
    if re.fullmatch(r"[\d.,:+\-/^_=()\\{}$% ]*", inside) or (font in ("mathbf", "mathit") and len(inside) == 1):
        return f" {inside} "
    return f" ⟦{inside}⟧ "


_BEFORE_WORDS = _rewrites(
    (r"\\boxed\s?\{([^{}]*)\}", r"\1"),
    (r"(?<!\\)(?:\\[()\[\]]|\$)|\\(?:displaystyle|textstyle|limits|nolimits|bf|rm|it)(?![a-zA-Z])|`", " "),
    (r"^\s*\*\*(.*)\*\*\s*$|^\s*__(.*)__\s*$", lambda match: match[1] or match[2]),
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", ""),
    (r"(?<=\d)(?:\{,\}|,\\!|\\!)(?=\d{3}(?!\d))|(?<=\d)\\[,;: ](?=\d{3}(?!\d))", ""),  # 12{,}345 and 12\,345
    (r"(?<=\d)\{,\}(?=\d)", "."),
    (r"\{:\}", ":"),
    (r"(?<!\\)\\!", ""),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|\\enspace(?![a-zA-Z])|\\ensuremath(?![a-zA-Z])", " "),
    (r"\\(?:boldsymbol|bm|underline|mathsf|phantom)\s?(?=\{)", ""),
    (r"\\hat\s?\{\s?\\([ij])math\s?\}", r"\\mathbf{\1}"),
    (r"\\hat\s?\{\s?(?:\\(?:mathbf|imath|jmath|bm)\s?)?\{?\s?([ijk])\s?\}?\s?\}", r"\\mathbf{\1}"),
    (r"\\hat\s?([ijk])(?![a-zA-Z])|\\(?:vec|overrightarrow|boldsymbol)\s?\{\s?([ijk])\s?\}",
     lambda match: rf"\mathbf{{{match[1] or match[2]}}}"),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\{ ?([^{}]*?) ?\\over ?([^{}a-zA-Z][^{}]*|[a-zA-Z]) ?\}", r"\\frac{\1}{\2}"),
    (r"\\sqrt\s?\[ ?(\d*[13579]) ?\]\s?\{\s?-([^-+{}]+)\}", r"(-\\sqrt[\1]{\2})"),  # the real root
    (r"\\frac\s?(\d)\s?(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s?([\da-z])\s?\{", r"\\frac{\1}{"),
    (r"(\\frac\s?\{[^{}]*\})\s?([\da-z])", r"\1{\2}"),
    (r"\\sqrt\s?(\d)", r"\\sqrt{\1}"),
    (r"\\d?binom\s?(\d)\s?(\d)", r"\\binom{\1}{\2}"),
    (r"(?:\{\}\s?)?[_^]\{?(\d+)\}?\s?C\s?_\{?(\d+)\}?", r"\\binom{\1}{\2}"),
    (r"\\(?:leqslant|leqq|leq)(?![a-zA-Z])", r"\\le "),
    (r"\\(?:geqslant|geqq|geq)(?![a-zA-Z])", r"\\ge "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\neq(?![a-zA-Z])|\\not\s?=", r"\\ne "),
    (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
    (r"\\(?:lvert|rvert|vert)(?![a-zA-Z])", "|"),
    (r"\\(?:lbrace)(?![a-zA-Z])", r"\\{"),
    (r"\\(?:rbrace)(?![a-zA-Z])", r"\\}"),
    (r"\\(?:dots|ldots|cdots|dotsc)(?![a-zA-Z])|…|\.\.\.", r"\\ldots "),
    (r"\\mod(?![a-zA-Z])|\\bmod(?![a-zA-Z])", r"\\mod "),
    (r"\\pmod\s?(\d)", r"\\pmod{\1}"),
    (r"\\degree(?![a-zA-Z])|\^\s?\{\s?\\circ\s?\}|\^\s?\\circ(?![a-zA-Z])", r"^\\circ "),
    (r"\\(?:land)(?![a-zA-Z])", r"\\wedge "),
    (r"\\(?:lor)(?![a-zA-Z])", r"\\vee "),
    (r"\\textdollar(?![a-zA-Z])", r"\\$"),
    (r"\\(?:textsterling|pounds)(?![a-zA-Z])", "£"),
    (r"\\(?:text)?euro(?![a-zA-Z])", "€"),
    (r"\\(?:xcancel|bcancel|cancel)(?=\s?\{)", r"\\cancel"),
)  # fmt: skip
_FONT = re.compile(rf"\\({_FONTS})\*?\s?\{{([^{{}}]*)\}}")
_AFTER_WORDS = _rewrites(
    (r"⟧\s*⟦", " "),
    (r"\*\*", "^"),
    (r"(?<![\\a-zA-Z])(sqrt|pi|infty|infinity)(?![a-zA-Z])", lambda m: r"\infty " if m[1][0] == "i" else rf"\{m[1]} "),
    (rf"(?<![\\a-zA-Z])({_FUNCTIONS})(?![a-zA-Z])(?=\s?[(\d^\\a-z])", r"\\\1 "),
    (r"\\sqrt\s?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s?([\da-zA-Z])", r"\\sqrt{\1}"),
    (r"\^\s?([+-]\s?(?:\d+|[a-zA-Z]))", r"^{\1}"),  # 2^-99
    (r"\\tan\^\{-1\}", r"\\arctan "),
    (r"\\sin\^\{-1\}", r"\\arcsin "),
    (r"\\cos\^\{-1\}", r"\\arccos "),
    (r"\s+", " "),
)
# Words that stand in mathematics without a font: and, or; long words; and a unit after a number and a blank.
_BARE = re.compile(
    r"(?<![\\a-zA-Z⟦'_^{])(and|or|[a-zA-Z]{4,})(?![a-zA-Z(])"
    r"|(?<=[\d)}] )(cm|mm|km|kg|mg|mL|ml|min|ft|mph|am|pm|AM|PM|USD|EUR|GBP|hrs?|lbs?|oz|yd|mi|to)(?![a-zA-Z(])"
)
_DOTTED = re.compile(r"\b([ap])\.\s?m\.?(?![a-zA-Z])", re.IGNORECASE)


@lru_cache(maxsize=16_384)
def clean(latex: str) -> str:
    """`latex` in one spelling: ASCII, no delimiters or sizes, words in ⟦…⟧, no blank that means nothing."""
    text = _SUPERSCRIPTS.sub(lambda match: f"^{{{match[0].translate(_LEVELLED)}}}", latex)
    text = _SUBSCRIPTS.sub(lambda match: f"_{{{match[0].translate(_LEVELLED)}}}", text)
    text = _VULGARS.sub(lambda match: r"\frac{{{}}}{{{}}}".format(*_VULGAR[match[0]]), text).translate(_SYMBOLS)
    for pattern, replacement in _BEFORE_WORDS:
        text = pattern.sub(replacement, text)
    for _ in range(2):  # a font in a font
        text = _FONT.sub(_words_of, text)
    for pattern, replacement in _AFTER_WORDS:
        text = pattern.sub(replacement, text)
    text = _DOTTED.sub(lambda match: f"{match[1]}m", text)
    outside = re.split("(⟦[^⟧]*⟧)", text)
    bare = [part if part[:1] == "⟦" else _BARE.sub(lambda m: f"⟦{m[0]}⟧", part) for part in outside]
    text = re.sub(r"⟧\s*⟦", " ", "".join(bare))
    text = re.sub(r"\s+(?=[,;.)\]}])|(?<=[(\[])\s+|\s+(?=[\^_])", "", text)
    text = re.sub(r"⟦\s*|\s*⟧", lambda match: match[0].strip(), text)
    return _trimmed(_without_doubles(text))


def _without_doubles(text: str) -> str:
    """Without braces around all, or right inside braces, or parentheses so: each doubles the work of sympy's parser."""
    openings: list[tuple[str, int]] = []
    partners: dict[int, int] = {}
    for mark in re.finditer(r"\\.|[{}()]", text):
        if mark[0] in ("{", "("):
            openings.append((mark[0], mark.start()))
        elif mark[0] in ("}", ")"):
            opening, start = openings.pop() if openings else ("", 0)
            if opening + mark[0] not in ("{}", "()"):  # a half-open interval, or nothing that closes
                return text
            partners[start] = mark.start()
    superfluous = {
        end
        for start, last in partners.items()
        if (text[start + 1] == text[start] and partners.get(start + 1) == last - 1)
        or (text[: start + 1] == "{" * (start + 1) and last == len(text) - 1 - start)
        for end in (start, last)
    }
    return "".join(character for place, character in enumerate(text) if place not in superfluous)


def _trimmed(text: str) -> str:
    text = text.strip()
    while (
        text and (text[-1] in ".,;!? " or text.endswith(".⟧")) and not text.endswith(r"\,") and text[-2:] not in ("n!",)
    ):
        if text[-1] == "!" and re.search(r"[\d)a-zA-Z}]!+$", text) and "⟦" not in text:
            break  # a factorial
        text = text[:-2].rstrip() + "⟧" if text.endswith(".⟧") else text[:-1].rstrip()
    return text


def spelling(text: str) -> str:
    """Cleaned LaTeX without blanks (but those between digits, which mean something), and words in lower case."""
    text = text.replace("⟦", "").replace("⟧", "")
    if re.fullmatch(r"[a-zA-Z ,.;']{2,}", text):
        return " ".join(text.casefold().split()).strip(" .,;")
    text = re.sub(r"(?<![\d,])\s|(?<=,)\s(?!\d)|\s(?!\d)", "", text)
    return re.sub(r"(?<!\\)\{([0-9a-zA-Z])\}", r"\1", text)


_ELEMENTS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb "
    "Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg "
    "Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu"
)
_COMPOUND_NAME = re.compile(rf"(?:(?:{'|'.join(sorted(_ELEMENTS.split(), key=len, reverse=True))})\d*)+")


def another_case(gold: str, answer: str) -> bool:
    """Whether a unit or a chemical formula has letters of another case: MW is not mW, nor Co carbon monoxide."""
    golds, answers = (set(re.findall(r"[A-Za-z]{2,}", text)) for text in (gold, answer))
    meant = {word.casefold(): word for word in golds - answers}
    for word in answers - golds:
        other = meant.get(word.casefold(), "")
        if other in UNITS and word in UNITS and UNITS[other] != UNITS[word]:
            return True
        if word.casefold() != "no" and _COMPOUND_NAME.fullmatch(other) and _COMPOUND_NAME.fullmatch(word):
            return True
        if re.search("[a-z][A-Z]|[A-Z]{2}[a-z]", other) and _COMPOUND_NAME.fullmatch(other):  # NaCl, HCl
            return True
    return False


# --- numbers ---


class Number(NamedTuple):
    value: Fraction
    decimals: int | None  # digits after the point, where it is a decimal and thus perhaps rounded


_DECIMAL = re.compile(r"([+-]?) ?(\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d*)(\.\d*)?(?:[eE]([+-]?\d{1,3}))?")
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
    if match := _DECIMAL.fullmatch(text):
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


def _plain_value(text: str) -> Fraction | None:
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


# --- splitting outside brackets ---

_PIECE = re.compile(r"\\[a-zA-Z]+|\\.|⟦[^⟧]*⟧|.", re.DOTALL)
_OPEN = {"(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil", r"\begin"}
_CLOSE = {")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil", r"\end"}


def pieces(text: str) -> list[str]:
    return _PIECE.findall(text)


def split(text: str, separators: set[str]) -> list[tuple[str, str]]:
    """Parts of `text` between separators outside brackets, each with the separator before it."""
    parts, depth, before, start, position = [], 0, "", 0, 0
    for piece in _PIECE.findall(text):
        depth += (piece in _OPEN) - (piece in _CLOSE)
        found = piece if piece in separators else piece[1:-1].casefold() if piece[0] == "⟦" else ""
        if depth == 0 and found in separators:
            parts.append((before, text[start:position].strip()))
            before, start = found, position + len(piece)
        position += len(piece)
    return [*parts, (before, text[start:].strip())]


_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_SEPARATORS = {",", ";", "and", "or", r"\wedge", r"\vee", r"\lor", "as well as", ", and", "and also"}


def items(text: str, bare: bool = False) -> list[tuple[str, str]]:
    """The items of a list. A comma without a blank may be one of thousands; in brackets, if others have one."""
    if bare or ", " in text:
        without = re.sub(rf"(?<![\d,.]){_THOUSANDS.pattern}(?![\d.]|,\d)", lambda m: m[0].replace(",", ""), text)
        text = text if re.search(r"\d,\d", without) else without
    parts = split(text, _SEPARATORS)
    if len(parts) > 1 and any(re.fullmatch(r"0\d+", part) for _, part in parts):
        return [("", "")]  # a group of thousands, cut off
    words = {"and", "or"}
    return [
        (before, part)
        for index, (before, part) in enumerate(parts)
        if part or not (index + 1 < len(parts) and parts[index + 1][0] in words)
    ]


def inside(text: str, opening: str, closing: str) -> str | None:
    """What is between a pair of brackets that surround the whole text."""
    if not (text.startswith(opening) and text.endswith(closing)) or len(text) < len(opening) + len(closing):
        return None
    depth, seen = 0, 0
    for piece in _PIECE.findall(text):
        depth += (piece in _OPEN) - (piece in _CLOSE)
        seen += len(piece)
        if depth == 0 and seen < len(text):
            return None
    return text[len(opening) : -len(closing)].strip() if depth == 0 else None


# --- units ---

# Dimensions: what a unit is made of, and how many of the base units it is.
_BASE_UNITS = {
    "length": "m:1 meter:1 metre:1 in:0.0254 inch:0.0254 inches:0.0254 ft:0.3048 foot:0.3048 feet:0.3048 yd:0.9144 "
    "yard:0.9144 mi:1609.344 mile:1609.344",
    "time": "s:1 sec:1 second:1 min:60 minute:60 h:3600 hr:3600 hour:3600 day:86400 week:604800",
    "cup": "cup:1 pint:2 quart:4 gallon:16 tablespoon:1/16 tbsp:1/16 teaspoon:1/48 tsp:1/48",
    "month": "month:1 year:12 yr:12",
    "mass": "g:1 gram:1 lb:453.59237 pound:453.59237 oz:28.349523125 ounce:28.349523125 tonne:1000000 ton:1000000",
    "current": "A:1 amp:1 ampere:1",
    "amount": "mol:1 mole:1",
    "kelvin": "K:1 kelvin:1",
    "celsius": "celsius:1",
    "fahrenheit": "fahrenheit:1",
    "dollar": "dollar:1 USD:1 buck:1 cent:0.01",
    "euro": "euro:1 EUR:1",
    "sterling": "sterling:1 GBP:1",
    "yen": "yen:1",
    "rupee": "rupee:1 Rs:1",
    "radian": "rad:1 radian:1",
    "byte": "byte:1",
    "bit": "bit:1",
}
_DERIVED = {  # in grams, metres, seconds and amperes
    "L liter litre": ("1/1000", "length:3"),
    "N newton": ("1000", "mass:1 length:1 time:-2"),
    "J joule": ("1000", "mass:1 length:2 time:-2"),
    "W watt": ("1000", "mass:1 length:2 time:-3"),
    "Pa pascal": ("1000", "mass:1 length:-1 time:-2"),
    "V volt": ("1000", "mass:1 length:2 time:-3 current:-1"),
    "C coulomb": ("1", "current:1 time:1"),
    "F farad": ("1/1000", "mass:-1 length:-2 time:4 current:2"),
    "Ω ohm": ("1000", "mass:1 length:2 time:-3 current:-2"),
    "T tesla": ("1000", "mass:1 time:-2 current:-1"),
    "H henry": ("1000", "mass:1 length:2 time:-2 current:-2"),
    "Hz hertz": ("1", "time:-1"),
    "mph": ("0.44704", "length:1 time:-1"),
    "kph kmh": ("5/18", "length:1 time:-1"),
    "cc": ("1/1000000", "length:3"),
    "hectare ha": ("10000", "length:2"),
}
_PREFIXES = {"k": 3, "c": -2, "m": -3, "μ": -6, "n": -9, "M": 6, "G": 9, "d": -1, "p": -12, "T": 12}
_LONG_PREFIXES = {"kilo": 3, "centi": -2, "milli": -3, "micro": -6, "nano": -9, "mega": 6, "giga": 9, "deci": -1}
_METRIC = _word_list("m g s L l A N J W Pa V C F Ω T H Hz mol K")
_LONG_METRIC = _word_list(
    "meter metre gram second liter litre newton joule watt pascal volt coulomb farad ohm hertz amp ampere mole"
)
Dimensions = tuple[tuple[str, int], ...]
Unit = tuple[Fraction, Dimensions]


def _all_units() -> dict[str, Unit]:
    units: dict[str, Unit] = {}
    for dimension, names in _BASE_UNITS.items():
        for name, _, factor in (entry.partition(":") for entry in names.split()):
            units[name] = Fraction(factor), ((dimension, 1),)
    for names, (factor, powers) in _DERIVED.items():
        made = tuple(
            sorted((name, int(power)) for name, _, power in (entry.partition(":") for entry in powers.split()))
        )
        units |= {name: (Fraction(factor), made) for name in names.split()}
    units["l"] = units["L"]
    for roots, prefixes in ((_METRIC, _PREFIXES), (_LONG_METRIC, _LONG_PREFIXES)):
        for unit in roots:
            for prefix, exponent in prefixes.items():
                scale, dimensions = units[unit]
                units.setdefault(prefix + unit, (scale * Fraction(10) ** exponent, dimensions))
    for name in [name for name in units if len(name) > 2 and name.islower()]:
        units.setdefault(name + "s", units[name])
    units |= {name + "s": units[name] for name in ("hr", "yr", "lb", "min", "sec")}
    return units


UNITS = _all_units()
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_UNIT_TOKEN = re.compile(r"([A-Za-zΩμ¢]+)\.?|(/|per)|(\\cdot|\*|-)|\^ ?\{? ?(-?\d) ?\}?| |([{}()])")


@lru_cache(maxsize=4096)
def unit(text: str) -> Unit | None:
    """A product of units with powers, such as ⟦m⟧/⟦s⟧^{2} or ⟦square miles per hour⟧; None if a word is no unit."""
    text = re.sub(r"\\frac ?\{([^{}]*)\} ?\{([^{}]*(?:\{\d\})?[^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\mu[\s⟦]*", "μ", text).replace(r"\Omega", "Ω").replace("⟦", " ").replace("⟧", " ")
    text = re.sub(r"\^\s*\\circ\s*(C|F)(?![a-z])", lambda m: " celsius" if m[1] == "C" else " fahrenheit", text)
    text = re.sub(r"\bdegrees? (celsius|fahrenheit)", r"\1", text, flags=re.IGNORECASE)
    powers: dict[str, int] = {}
    last: tuple[Unit, int] | None = None
    factor, sign, pending, position = Fraction(1), 1, 1, 0
    while position < len(text):
        match = _UNIT_TOKEN.match(text, position)
        if match is None:
            return None
        position = match.end()
        word, over, _, power, _ = match.groups()
        if over or word == "per":
            sign, last = -1, None
        elif word and word.casefold() in _POWERS:
            pending = _POWERS[word.casefold()]
        elif word and word.casefold() in ("squared", "cubed") and last:
            power = "2" if word.casefold() == "squared" else "3"
            word = None
        elif word:
            found = UNITS.get(word) or UNITS.get(word.casefold() if len(word) > 3 else "")
            if found is None:
                return None
            last = found, sign
            factor *= found[0] ** (sign * pending)
            for name, exponent in found[1]:
                powers[name] = powers.get(name, 0) + exponent * sign * pending
            pending = 1
        if power and word is None:
            if last is None:
                return None
            (scale, made), direction = last
            factor *= scale ** (direction * (int(power) - 1))
            for name, exponent in made:
                powers[name] += exponent * direction * (int(power) - 1)
            last = None
    made = tuple(sorted((name, power) for name, power in powers.items() if power))
    return (factor, made) if made else None


# --- words ---

# Say nothing of the answer; what stands before or after a number besides these is a noun, or matters.
_NEUTRAL = _word_set(
    "so thus hence therefore final correct the answer answers result value values there are is it equals equal "
    "to we old long wide tall high deep get have exactly a an total of solution solutions approximately about "
    "in all altogether such integers integer different distinct possible them ways way units unit square "
    "points point numbers number that which only"
)
_MATTERS = _word_set(
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
_DENY = _word_set("not no or nor neither between except")  # of these, it is another answer
_IN_ORDER = _word_set(  # of these a list answers several questions
    "true false t f yes no first second third fourth last positive negative even odd increasing decreasing always "
    "sometimes never up down left right greater less more fewer correct incorrect rational irrational"
)
_MEASURES = _word_set(
    "area volume perimeter probability length distance speed sum product mean median average age cost price radius "
    "diameter height circumference slope remainder percentage total amount maximum minimum range mode"
)
_MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PEOPLE = _word_set("people children men women feet mice geese teeth students sheep fish deer cattle person percent")
_ARTICLES = _word_set("the a an is are it to of there that be in solution value number answer")
_SYNONYMS = {
    name: meant
    for meant, names in {
        "no solution": "no solutions|empty set|empty|no solution exists|no solutions exist",
        "infinitely many": "infinite|infinitely many solutions|infinite solutions|an infinite number",
        "does not exist": "dne|doesn't exist",
        "no real solution": "no real solutions",
        "no real root": "no real roots|no real root exists",
        "all reals": "all real numbers|real numbers|the real numbers|all reals",
        "diverges": "divergent|diverge",
        "converges": "convergent|converge",
    }.items()
    for name in names.split("|")
}


def _stem(word: str) -> str:
    if word[2:8] == "crease":  # increased by, decreases by
        return word[:8]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _plain(text: str) -> str:
    return " ".join(text.replace("⟦", " ").replace("⟧", " ").split())


def words(text: str) -> Value | None:
    """Words and names without mathematics: (sorted content words if there are two, else in order, the whole)."""
    plain = _plain(text).strip(" .,;!?")
    single_name = re.fullmatch(r"[A-Z]{2,}|[A-Z][a-z]+", plain)
    if (
        not plain
        or not (text[0] == "⟦" or "⟦" in text or single_name)
        or not re.fullmatch(r"[A-Za-zÀ-ÿ' ,.\-]+", plain)
    ):
        return None
    name = plain.casefold()
    name = re.sub(r"^(?:there (?:is|are|exists?)|it|the answer is|they|the \w+ is) |(?<=s) exist$", "", name)
    name = re.sub(r"^the (?:series|sequence|integral|limit) (?=(?:con|di)verges$)", "", name)
    name = _SYNONYMS.get(name, name)
    content = [word for word in re.findall(r"[^\s,]+", name) if word not in _ARTICLES] or [name]
    if name in _SYNONYMS.values():
        content = [name]
    listed = re.split(r",? and |, ", name)
    if len(listed) > 1 and not any(" " in word for word in listed):  # names, in any order
        content = listed
    if not _IN_ORDER & set(content) if content is listed else len(content) == 2:
        content = sorted(content)
    return Value("words", (tuple(content), name))


# --- readers ---

_LETTERS = re.compile(
    r"(?:(?:the )?(?:correct )?(?:options?|choices?|answers?|statements?)(?: is| are)?)?:? ?"
    r"((?:\(?[A-J]\)?(?: ?(?:,|;|and|&|or|/|, and) ?| )?)+)",
    re.IGNORECASE,
)


def choice(text: str) -> Value | None:
    """Letters of a multiple choice: (letters, whether they are listed one by one)."""
    plain = _plain(text)
    match = _LETTERS.fullmatch(plain)
    if not match or " or " in plain or "/" in plain or re.search(r"(?<![a-zA-Z])[a-j](?![a-zA-Z])", match[1]):
        return None
    letters = re.findall(r"[A-J]", match[1])
    if len(set(letters)) < len(letters):  # I and II
        return None
    said = match[1].strip()
    listed = len(letters) == 1 or bool(re.search(r"[,;&]| and |^(?:\([A-J]\) ?)+$", said))
    if not listed and (" " in said or "(" in said):
        return None
    return Value("choice", (tuple(letters), listed))


_LABEL = re.compile(
    r"(?:⟦ ?\(?([A-J])[).:] ?⟧|\(([A-J])\)|⟦\(?([A-J])\) |([A-J])[.:)]) ?[.:]? ?"
    r"([^\s,^_=+*/&⟧(][^⟧]*(?:⟦[^⟧]*⟧[^⟧]*)*⟧?)"
)


def labelled(text: str) -> Value | None:
    """A choice's letter and its value: (letter, value)."""
    match = _LABEL.fullmatch(text)
    if not match or re.search(r"\b(?:and|or)\b|\([A-J]\)|&", match[5]) or (match[4] and " " not in text):
        return None
    rest = "⟦" + match[5] if match[3] else match[5]
    value = read(rest)
    return (
        Value("labelled", (match[1] or match[2] or match[3] or match[4], value))
        if value.kind not in ("list", "choice")
        else None
    )


_MONTHS = _word_list("january february march april may june july august september october november december")
_DATE = re.compile(
    r"(?:on )?(?:([a-z]+)\.? (\d{1,2})(?:st|nd|rd|th)?|(\d{1,2})(?:st|nd|rd|th)? (?:of )?([a-z]+))(?:,? (\d{4}))?"
)


def date(text: str) -> Value | None:
    """A day of a month: (month, day, year or empty)."""
    match = _DATE.fullmatch(_plain(text).casefold())
    name = match and (match[1] or match[4])
    if not match or not name or len(name) < 3:
        return None
    month = next((month for month in _MONTHS if month.startswith(name)), None)
    return Value("date", (month, int(match[2] or match[3]), match[5] or "")) if month else None


_CLOCK = re.compile(r"(?:at )?(\d{1,2}) ?: ?(\d{2})(?: ?: ?(\d{2}))?( ?[ap]m| noon| midnight)?|(\d{1,2})( ?[ap]m)")


def clock(text: str) -> Value | None:
    """A time of day: (hour, minute, second, am or pm or empty). Without am or pm it may be a ratio."""
    plain = {"noon": "12:00 pm", "midnight": "12:00 am"}.get(_plain(text).casefold(), _plain(text).casefold())
    match = _CLOCK.fullmatch(plain)
    if not match or int(match[1] or match[5]) > 24 or int(match[2] or 0) > 59:
        return None
    half = (match[4] or match[6] or "").strip()
    hour = int(match[1] or match[5])
    if match[1] and not half and match[3]:
        return None
    return Value(
        "clock", (hour, int(match[2] or 0), int(match[3] or 0), {"noon": "pm", "midnight": "am"}.get(half, half))
    )


def _lead(text: str) -> str:
    """`text` without words before it that say nothing: the answer is, there are, approximately."""
    text = re.sub(r"^(?:(?:\\approx|≈|=|:|\\therefore|\\Rightarrow|\\implies) ?)+", "", text)
    match = re.match(r"⟦([^⟧]*)⟧ ?", text)
    if match and match.end() < len(text):
        said = re.findall(r"[^\s,:]+", match[1].casefold())
        measured = said[-1:] in (["is"], ["are"], ["equals"], ["of"])
        if said and all(word in _NEUTRAL or (measured and word in _MEASURES) for word in said):
            return text[match.end() :].lstrip(":= ")
    return text


def sentence(text: str) -> Value | None:
    """An answer after words that say nothing of it, or in words with a number among them."""
    rest = _lead(text)
    if text[0] == "⟦" and text[-1] == "⟧" and text.count("⟦") == 1 and re.search(r"\d", text):
        said = re.sub(r"[A-Za-z'][A-Za-z' ]*[A-Za-z']|[A-Za-z]{2,}", lambda m: f"⟦{m[0]}⟧", text[1:-1])
        rest = re.sub(r"(?<![A-Za-z⟦])(?<=\d )([A-Za-z])(?![A-Za-z⟧'])", r"⟦\1⟧", said)
    return read(_trimmed(rest)) if rest != text and rest else None


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


_CONSTANT_SETS = {r"\mathbb{R}": (("-\\infty", "\\infty", False, False),)}


def empty(text: str) -> Value | None:
    """The empty set, all reals."""
    if re.fullmatch(r"\\emptyset|\\\{ ?\\\}", text):
        return Value("set", ())
    if re.fullmatch(r"(?:[a-z] ?\\in ?)?\\mathbb ?\{?R\}? ?\^ ?\{?\+\}?", text):
        return Value("interval", ((("0", "\\infty", False, False),), ""))
    if re.fullmatch(r"(?:[a-z] ?\\in ?)?\\mathbb ?\{?R\}?", text):
        return Value("interval", (_CONSTANT_SETS[r"\mathbb{R}"], ""))
    return None


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


_DOMAINS = re.compile(r"\\in ?\\mathbb ?\{? ?([NZQRC]) ?\}?(?:\^ ?\{? ?([+*]) ?\}?)?")


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
    return Value("set", _flat(found))


def _flat(found: tuple[Value, ...]) -> tuple[Value, ...]:
    """Items of a set or list, where a plus-minus is two of them."""
    return tuple(item for value in found for item in (value.parts[0] if value.kind == "list" else (value,)))


def _set_builder(member: str, condition: str) -> Value | None:
    domain = "R"
    if match := re.search(r"^([a-zA-Z]) ?" + _DOMAINS.pattern + "$", member):
        member, domain = match[1], match[2] + (match[3] or "")
    if not re.fullmatch("[a-zA-Z]", member):
        return None
    parts = [part for _, part in items(condition)]
    kept = []
    for part in parts:
        if match := re.fullmatch(member + " ?" + _DOMAINS.pattern, part):
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
        return _all_but([part for _, part in items(match[1])], variable)
    if match := re.fullmatch(r"\(-\\infty, ?\+?\\infty\) ?(?:\\setminus|\\backslash) ?\\\{(.*)\\\}", text):
        return _all_but([part for _, part in items(match[1])], variable)
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


def _all_but(points: list[str], variable: str) -> Value | None:
    values = [_plain_value(point) for point in points]
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


def _linear(text: str) -> Value | None:
    """4k + 1, where k is a whole number though nobody says so."""
    letters = _letters(text)
    return congruence(rf"{text}, {letters.pop()} \in \mathbb{{Z}}") if len(letters) == 1 else None


def family(text: str) -> Value | None:
    """Values that depend on a whole number: (value, letter, domain)."""
    match = re.fullmatch(r"(.*[^\s,])(?:,| ⟦where⟧| ⟦for⟧|\() ?([a-zA-Z]) ?" + _DOMAINS.pattern + r"\)?", text)
    if not match:
        return None
    value = read(match[1])
    inner = value.parts[1] if value.kind == "named" else value
    if inner.kind not in ("formula", "list", "tuple"):
        return None
    return Value("family", (inner, match[2], match[3] + (match[4] or "")))


_RELATIONS = {"<", ">", r"\le", r"\ge", r"\ne", "="}
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}


def relation(text: str) -> Value | None:
    """An inequality: an interval if it bounds one letter, else (signs, sides)."""
    if not re.search(r"[<>]|\\[lgn]e(?![a-zA-Z])", text) or "⟦" in text:
        return None
    parts = split(text, _RELATIONS)
    signs, sides = [sign for sign, _ in parts[1:]], [side for _, side in parts]
    if match := re.fullmatch(r"([a-zA-Z]) ?\\ne ?([^,]+(?:, ?[^,]+)+)", text):  # x is not 1, 2
        return _all_but([part for _, part in items(match[2])], match[1])
    if not signs or "=" in signs or any(read(side).kind not in ("formula", "percent", "degrees") for side in sides):
        return None
    letters = [index for index, side in enumerate(sides) if re.fullmatch(r"[a-zA-Z]|\\theta|[a-z]_\{?\w\}?", side)]
    others = [side for index, side in enumerate(sides) if index not in letters]
    if len(letters) == 1 and not any(map(_letters, others)):
        (at,) = letters
        ends, variable = ["-\\infty", "\\infty"], sides[at]
        closed = [False, False]
        if len(sides) == 2:
            sign = signs[0] if at == 0 else _FLIPPED[signs[0]]
            if sign == r"\ne":
                return _all_but([sides[1 - at]], variable)
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


_NOT_VARIABLES = re.compile(r"\\[a-zA-Z]+|⟦[^⟧]*⟧")


def _letters(text: str) -> set[str]:
    """The letters of a formula that may be variables."""
    return set(re.findall("[a-zA-Z]", _NOT_VARIABLES.sub(" ", text))) - {"e", "i"}


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
            return Value("named", (names[0], Value("list", (_flat(tuple(v.parts[1] for v in values)), join))))
        if len(set(names)) == len(names):
            return Value("assignments", tuple(sorted((value.parts for value in values), key=lambda part: part[0])))
    if values[0].kind == "named" and values[0].parts[1].kind == "list" and kinds == {"named"}:
        pass
    if (
        values[0].kind == "named"
        and len(kinds) == 2
        and "formula" in kinds
        and all(v.kind == "formula" for v in values[1:])
    ):
        first = values[0].parts  # x = 1, 2
        return Value("named", (first[0], Value("list", (_flat((first[1], *values[1:])), join))))
    shared = values[-1]  # 3 and 4 cm
    if shared.kind in ("quantity", "degrees", "percent") and all(value.kind == "formula" for value in values[:-1]):
        values = (*(Value(shared.kind, (value.parts[0], *shared.parts[1:])) for value in values[:-1]), shared)
    return Value("list", (_flat(values), join))


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
        if name and not (own & _letters(parts[1])):
            other = _name(parts[1])
            if value.kind == "formula" and other and len(other) == 1 and _letters(other):
                return Value("equation", (parts[0], parts[1]))
            return Value("named", (name, value)) if value.kind not in ("unread", "words") else None
        if read(parts[0]).kind == value.kind == "formula":
            if _name(parts[1]) and not _letters(parts[0]) and not name:
                return Value("named", (_name(parts[1]), read(parts[0])))
            if not _letters(text):
                return Value("chain", (read(parts[0]), value))
            return Value("equation", (parts[0], parts[1]))
        return None
    values = [read(part) for part in (parts[1:] if name else parts)]
    if any(value.kind not in ("formula", "percent", "degrees", "quantity") for value in values):
        return None
    chain = Value("chain", tuple(values))
    return Value("named", (name, chain)) if name else chain


def brackets(text: str) -> Value | None:
    """A tuple, point or vector: (opening bracket, items); one item in parentheses is that item."""
    for opening, closing in (("(", ")"), (r"\langle", r"\rangle")):
        content = inside(text, opening, closing)
        if not content:
            continue
        values = tuple(read(part) for part in (part for _, part in items(content)))
        if any(
            value.kind in ("unread", "words", "list", "choice")
            and not re.fullmatch("[A-Z]", value.parts[0][0] if value.kind == "choice" else "")
            for value in values
        ):
            return None
        if len(values) > 1:
            return Value("tuple", (opening, values))
        if opening == "(" and not re.search(r"\d \d", content):
            return values[0]
    return None


_CYCLES = re.compile(r"(?:\((?:\d+(?:\\? |, ?))+\d+\) ?)+")


def cycles(text: str) -> Value | None:
    """A permutation in cycles: where each number goes."""
    if not _CYCLES.fullmatch(text) or ("," in text and text.count("(") == 1):
        return None
    moves: dict[int, int] = {}
    for cycle in re.findall(r"\(([^)]*)\)", text):
        numbers = [int(number) for number in re.findall(r"\d+", cycle)]
        if len(set(numbers)) < len(numbers) or set(numbers) & moves.keys():
            return None
        moves |= dict(zip(numbers, numbers[1:] + numbers[:1]))
    return Value("permutation", tuple(sorted(moves.items())))


_MATRIX = re.compile(
    r"([(\[|]?) ?\\begin ?\{([pbvVB]?matrix|smallmatrix|array)\} ?(?:\{[lcr| ]+\})?(.*)\\end ?\{\2\} ?([)\]|]?)"
    r"(?: ?\^ ?\{?(T|\\top)\}?)?"
)


def matrix(text: str) -> Value | None:
    """A matrix: its rows. With bars it is a determinant, and not read."""
    match = _MATRIX.fullmatch(text)
    if (
        not match
        or r"\begin" in match[3]
        or match[2][0] in "vV"
        or match[1] == "|"
        or (match[2] == "array" and not match[1])
    ):
        return None
    rows = [
        [read(cell.strip()) for cell in row.split("&")]
        for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[3])
        if row.strip()
    ]
    if not rows or any(cell.kind != "formula" for row in rows for cell in row) or len({len(row) for row in rows}) > 1:
        return None
    if match[5]:
        rows = [list(column) for column in zip(*rows)]
    return Value("matrix", tuple(tuple(row) for row in rows))


def ratio(text: str) -> Value | None:
    """a:b, a to b, a:b:c: its terms."""
    parts = [part for _, part in split(text.replace(" ⟦to⟧ ", ":").replace(r"\colon", ":"), {":"})]
    values = [read(part) for part in parts] if 1 < len(parts) < 9 and all(parts) else []
    return Value("ratio", tuple(values)) if values and all(value.kind == "formula" for value in values) else None


_BASES = _word_list("zero one two three four five six seven eight nine ten eleven twelve 13 14 15 sixteen")
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


_ORDINALS = _word_list("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")
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
    value = read(match[1]) if match and match[1] and not _TRIGONOMETRIC.search(match[1]) else None
    return Value("degrees", (value.parts[0],)) if value and value.kind == "formula" else None


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
        return _modified(head, _plain(tail))
    if head.kind not in ("formula",):
        return None
    made = unit(tail)
    if made or _UNITS_OF_NOTHING.fullmatch(tail):
        return Value("quantity", (head.parts[0], made, "", ()))
    said = _plain(tail)
    if not re.fullmatch(r"[A-Za-z' .,()\-/]+", said):
        return None
    remark = re.fullmatch(r"\((.*)\)", said)
    if remark and not all(word.casefold() in _NEUTRAL | {"degrees"} for word in remark[1].split()):
        return None
    said = remark[1] if remark else said
    listed = said.split()
    times, figure = _MULTIPLIERS.get(listed[0].casefold()), _plain_value(head.parts[0])
    if times and figure is not None:
        rest = read(_fraction(figure * times) + (f" ⟦{' '.join(listed[1:])}⟧" if listed[1:] else ""))
        return rest if rest.kind in ("formula", "quantity") else None
    for count in range(len(listed), 0, -1):
        made = unit(" ".join(listed[:count]))
        if made:
            return _modified(Value("quantity", (head.parts[0], made, "", ())), " ".join(listed[count:]))
    return _modified(Value("quantity", (head.parts[0], None, "", ())), said)


def _fraction(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _modified(value: Value, said: str, before: bool = False) -> Value:
    """A quantity with the words after it, as a noun or as words that matter."""
    listed = [word.strip(".,()").casefold() for word in said.split()]
    listed = [word for word in listed if word]
    matters = tuple(_stem(word) for word in listed if word not in _NEUTRAL and word not in ("by", "due", "for", "with"))
    noun = ""
    loud = [word for word in listed if word in _MATTERS]
    if (
        not loud
        and not before
        and len(matters) <= 2
        and (not matters or listed[-1] in _NEUTRAL | _PEOPLE or listed[-1].endswith("s") or " of " in said)
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
    return Value("quantity", (_fraction(total), (Fraction(1), dimensions), "", ("compound",)))


_COMMANDS = _word_set(
    "frac sqrt pi cdot times div infty sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan ln log exp binom "
    "gcd lcm max min theta alpha beta gamma delta epsilon varepsilon lambda mu nu omega phi varphi psi rho sigma tau "
    "xi zeta eta kappa chi Gamma Delta Theta Lambda Omega Phi Psi Sigma lfloor rfloor lceil rceil sum prod int lim "
    "to lg"
)
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_ANGLE = re.compile(r"([\d.]+|\([^()]*\)|\\frac ?\{[^{}]*\} ?\{[^{}]*\}) ?\^\\circ")
_FORMULA_PIECE = re.compile(r"\\[a-zA-Z]+|[\d.]+|[a-zA-Z]|[+\-*/()\[\]{}^_!|, =]")


def formula(text: str) -> Value | None:
    """Mathematics that sympy reads to the last character: (its LaTeX)."""
    if number(text):
        return Value("formula", (re.sub(r"(?<=\d)[ ,](?=\d{3})", "", text) if _DECIMAL.fullmatch(text) else text,))
    text = re.sub(rf"(?<![\d.,]){_THOUSANDS.pattern}(?![\d,])", lambda match: match[0].replace(",", ""), text)
    if r"\cancel" in text:
        if r"\frac" not in text:
            return None
        text = re.sub(r"\\cancel ?\{((?:[^{}]|\{[^{}]*\})*)\}", r"{\1}", text)
    if _TRIGONOMETRIC.search(text):
        text = _ANGLE.sub(r"{\\frac{\1\\pi}{180}}", text)
    if re.search(r"[\d} ]k? ?\\Omega$|\\frac ?\{ ?d ?(?:\^ ?\{?\d\}? ?)?[a-zA-Z(]", text):  # ohms, dy/dx
        return None
    text = text.replace("{,}", "").replace(r"\%", "%")
    bare = text
    position = 0
    commas = equals = 0
    for match in _FORMULA_PIECE.finditer(text):
        if match.start() != position:
            return None
        position, piece = match.end(), match[0]
        if piece[0] == "\\" and piece[1:] not in _COMMANDS:
            return None
        commas += piece == ","
        equals += piece == "="
        if piece[0] in "0123456789." and piece.count(".") > (len(piece) > 1):
            return None
    if position != len(text) or re.search(
        r"(?<![_^\d])\d+ \d|(?<![\d.])0\d|[+\-*/^_=,]$|^[*/^_=,!]|\( ?\)|\{ ?\}(?! ?\{)|[+\-]{3}", bare
    ):
        return None
    if equals > len(re.findall(r"\\(?:sum|prod)(?![a-z])", text)):
        return None
    if commas and not re.fullmatch(r".*(?:gcd|lcm|max|min) ?\{?\(.*|.*\\(?:gcd|lcm|max|min).*", text):
        return None
    depth = [piece in _OPEN for piece in pieces(text)].count(True) - [piece in _CLOSE for piece in pieces(text)].count(
        True
    )
    if depth or text.count("|") % 2:
        return None
    return Value("formula", (text.strip(),))


_VECTOR = re.compile(r"([+-]? ?[^+\-\\]*(?:\\(?:frac|sqrt)[^+\-]*)?) ?\\mathbf\{([ijk])\} ?")


def vector(text: str) -> Value | None:
    """A sum of unit vectors, as a tuple."""
    if r"\mathbf{" not in text or _VECTOR.sub("", text).strip():
        return None
    parts = {letter: coefficient.replace(" ", "").rstrip("*") for coefficient, letter in _VECTOR.findall(text)}
    if len(parts) < len(_VECTOR.findall(text)):
        return None
    signs = {"": "1", "+": "1", "-": "-1"}
    numbers = [signs.get(parts.get(letter, "0"), parts.get(letter, "0")).lstrip("+") for letter in "ijk"]
    values = tuple(read(figure) for figure in numbers)
    return Value("tuple", ("vector", values)) if all(value.kind == "formula" for value in values) else None


# The first that reads a text counts: words and letters before mathematics, lists before what they consist of.
READERS = (
    Reader(
        "choice", "letters of a multiple choice", choice, ((r"\text{ACD}", "A, C, D", 1), ("(C)", r"\text{not C}", -1))
    ),
    Reader(
        "labelled",
        "a choice's letter and its value",
        labelled,
        (("B", r"\textbf{(B)}\ 12", 1), ("12", r"\text{(B)}\ 13", -1)),
    ),
    Reader("date", "a day", date, ((r"\text{June 20}", "20 June", 1), (r"\text{June 20}", "June 21", -1))),
    Reader(
        "clock",
        "a time of day",
        clock,
        (
            (r"6:30\text{ PM}", "18:30", 1),
            (r"9:15\text{ AM}", r"9:15\text{ PM}", -1),
            ("2:30", "5:12", -1),
            (r"\text{noon}", r"12:00\text{ PM}", 1),
            (r"\text{noon}", r"\text{midnight}", -1),
        ),
    ),
    Reader(
        "words",
        "words without mathematics",
        words,
        (
            (r"\text{no solution}", "No solutions.", 1),
            (r"\text{odd}", "even", -1),
            (r"\text{no real roots}", r"\text{No real roots exist.}", 1),
            (r"\text{converges}", r"\text{The series converges}", 1),
            (r"\text{converges}", r"\text{The series diverges}", -1),
            (r"\text{CO}", r"\text{Co}", 0),
            (r"\text{MW}", r"\text{mW}", 0),
        ),
    ),
    Reader(
        "",
        "an answer in a sentence",
        sentence,
        (("31", r"\text{There are } 31 \text{ such integers.}", 1), ("31", r"\text{more than }31", 0)),
    ),
    Reader(
        "matrix", "matrices", matrix, ((r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{bmatrix}1&2\end{bmatrix}", 1),)
    ),
    Reader(
        "", "systems of equations, functions in pieces", system, ((r"\begin{cases}x=1\\y=2\end{cases}", "y=2, x=1", 1),)
    ),
    Reader("", "no number and every number", empty, ((r"\emptyset", r"\{\}", 1), ("0", r"\emptyset", -1))),
    Reader("", "plus or minus", plus_minus, ((r"\pm 3", "3, -3", 1), (r"\pm 3", "3", -1))),
    Reader("set", "a set", braces, ((r"\{1,2\}", r"\{2, 1, 1\}", 1), ("(2,5)", r"\{2,5\}", -1))),
    Reader("interval", "intervals", union, (("(2,\\infty)", r"\{x : x > 2\}", 1), ("[0,1)", "(0,1]", -1))),
    Reader(
        "congruence",
        "a class of residues",
        congruence,
        ((r"x\equiv5\pmod{12}", r"x\equiv-7\pmod{12}", 1), ("5", r"5\pmod{12}", 1)),
    ),
    Reader(
        "family",
        "values that depend on a whole number",
        family,
        ((r"k\pi, k\in\mathbb{Z}", r"n\pi, n\in\mathbb{Z}", 1),),
    ),
    Reader(
        "permutation",
        "cycles of a permutation",
        cycles,
        ((r"(1\ 3\ 2\ 4)", r"(3\ 2\ 4\ 1)", 1), (r"(1\ 3\ 2\ 4)", r"(1\ 2\ 3\ 4)", -1)),
    ),
    Reader(
        "list",
        "several answers",
        sequence,
        (("1, 1, 2", "2, 1, 1", 1), ("1, 1, 2", "1, 2", -1), ("30150", "30, 150", -1)),
    ),
    Reader(
        "relation",
        "inequalities",
        relation,
        (("x>3", "3<x", 1), ("x>3", r"x\ge3", -1), ("x+y<3", "3>x+y", 1), ("a<b<c", "c>b>a", 1)),
    ),
    Reader(
        "equation",
        "equations",
        equation,
        (
            ("5", "x=5", 1),
            ("5", "x+1=5", -1),
            ("y=2x+1", "2x-y+1=0", 1),
            ("y'=4y", r"\frac{dy}{dx}=4y", 1),
            ("f(x)=3x^2", "f(t)=3t^2", 1),
            ("f(x)=3x^2", "f(t)=3x^2", -1),
            ("f(x)=3x^2", "f(t)=2t^2", 0),
        ),
    ),
    Reader(
        "tuple",
        "unit vectors",
        vector,
        (
            (r"\langle4,0,-1\rangle", r"4\mathbf{i}-\mathbf{k}", 1),
            (r"3\vec{i}-\vec{j}", r"3\hat{\imath}-\hat{\jmath}", 1),
        ),
    ),
    Reader("tuple", "points, vectors", brackets, (("(1,2)", r"\left(1,\frac42\right)", 1), ("(1,2)", "(2,1)", -1))),
    Reader("based", "numbers in a base", based, (("1101_2", r"(1101)_{\text{two}}", 1), ("243_5", "243_6", -1))),
    Reader(
        "percent",
        "percentages",
        percent,
        ((r"12.5\%", r"12\frac12\%", 1), (r"25\%", r"\frac14", 1), (r"25\%", r"2.5\%", -1)),
    ),
    Reader(
        "degrees",
        "angles in degrees",
        degrees,
        ((r"60^\circ", r"\frac{\pi}{3}", 1), ("90", "90°", 1), (r"60^\circ", r"60\text{ radians}", -1)),
    ),
    Reader(
        "tuple",
        "a quotient with its remainder",
        remainder,
        ((r"5\text{ remainder }2", "5 R 2", 1), ("5", r"5\text{ remainder }2", -1)),
    ),
    Reader(
        "",
        "ordinal numbers",
        ordinal,
        (("7", r"7^{\text{th}}", 1), ("12", "21^{st}", -1), (r"5\text{th}", r"\text{fifth}", 1)),
    ),
    Reader(
        "formula",
        "what sympy reads",
        formula,
        (
            (r"\sqrt8", r"2\sqrt2", 1),
            ("1,234", "1234", 1),
            (r"\sqrt2", "1.41", -1),
            ("C_1e^x+C_2e^{-2x}", "Ae^x+Be^{-2x}", 0),
        ),
    ),
    Reader("ratio", "ratios", ratio, (("3:4", r"3\text{ to }4", 1), ("1:2:3", "2:4:6", 1), ("3:4", "4:3", -1))),
    Reader(
        "quantity",
        "a number with a unit, a noun, or words that matter",
        quantity,
        (
            (r"5\text{ L}", r"5\text{ mL}", -1),
            (r"2\text{ hours}", r"120\text{ minutes}", 1),
            ("6", r"6\text{ apples}", 1),
            (r"20\%\text{ increase}", r"20\%\text{ decrease}", -1),
            ("5", r"5\text{ million}", -1),
            (r"\$1.25", r"125\text{ cents}", 1),
        ),
    ),
)


@lru_cache(maxsize=16_384)
def read(text: str) -> Value:
    """What cleaned LaTeX is."""
    for reader in READERS if text else ():
        value = reader.read(text)
        if value is not None:
            return value
    return Value("unread", (spelling(text),))


# --- comparison ---


class NeedsWorker(Exception):
    """The comparison needs sympy."""


def every(verdicts: Iterable[Callable[[], bool | None]]) -> bool | None:
    """True if all are, False if one is, else None; a worker is asked only where nothing else says False."""
    unknown = later = False
    for verdict in verdicts:
        try:
            same = verdict()
        except NeedsWorker:
            later = True
            continue
        if same is False:
            return False
        unknown |= same is None
    if later:
        raise NeedsWorker
    return None if unknown else True


def _characters(value: Any) -> set[str]:
    return set(re.findall(r"\w", str(value.parts)))


class Comparer:
    """Compares values; what needs sympy raises `NeedsWorker`, unless a subclass can."""

    def verdict(self, gold: str, answer: str) -> bool | None:
        """Whether an answer equals the gold, both cleaned LaTeX."""
        if spelling(gold) == spelling(answer):
            return True
        if re.search(r"\+ ?C$|^C ?\+", gold):  # the constant of an integral has no name of its own
            answer = re.sub(r"(?<=\+) ?[ck]$|^[ck](?= ?\+)", "C", answer)
        same = self.compare(read(gold), read(answer))
        constants = set(re.findall(r"[Cc]_\{?\d", gold)), set(re.findall(r"(?<![\\a-zA-Z])[A-DK](?!_)", answer))
        if same is False and constants[0] and len(constants[0]) == len(constants[1]):
            return None  # C_1 e^x + C_2 and A e^x + B: of other names
        if same is False:  # 100,200 is a number, but where the other is a list it may be one too
            if _THOUSANDS.fullmatch(answer) and self.compare(read(gold), read(answer.replace(",", ", "))):
                return True
            if _THOUSANDS.fullmatch(gold) and self.compare(read(gold.replace(",", ", ")), read(answer)) is not False:
                return None
        return same

    def compare(self, gold: Value, answer: Value) -> bool | None:
        if gold == answer:
            return gold.kind != "unread" or None
        if gold.kind == answer.kind:
            return RULES[gold.kind](self, gold.parts, answer.parts)
        for second_kind in (None, "any"):
            for first, second, turned in ((gold, answer, False), (answer, gold, True)):
                rule = MIXED.get((first.kind, second_kind or second.kind))
                if rule:
                    return rule(self, first, second, turned)
        if answer.kind == "unread":  # unless nothing in it is of the gold
            return None if _characters(gold) & _characters(answer) else False
        return None if gold.kind == "unread" else False

    def formula(self, gold: str, answer: str) -> bool | None:
        """Whether two formulae are equal."""
        x, y = number(gold), number(answer)
        if x and y:
            return same_number(x, y)
        return spelling(gold) == spelling(answer) or self.same_formula(gold, answer)

    def same_formula(self, gold: str, answer: str) -> bool | None:
        raise NeedsWorker

    def same_equation(self, gold: tuple[str, str], answer: tuple[str, str]) -> bool | None:
        raise NeedsWorker

    def same_relation(self, gold: Value, answer: Value) -> bool | None:
        raise NeedsWorker

    def same_matrix(self, gold: Value, answer: Value) -> bool | None:
        raise NeedsWorker

    def in_order(self, gold: Sequence[Value], answer: Sequence[Value]) -> bool | None:
        if len(gold) != len(answer):
            return False
        return every(partial(self.compare, x, y) for x, y in zip(gold, answer))

    def unordered(self, gold: Sequence[Value], answer: Sequence[Value]) -> bool | None:
        """Whether two collections hold equal values equally often."""
        if len(gold) != len(answer):
            return False
        left, missing = list(answer), []
        for value in gold:  # those of one spelling first: sympy is not asked of them
            if value in left:
                left.remove(value)
            else:
                missing.append(value)
        unknown = False
        by_number = {number(v.parts[0]): v for v in left if v.kind == "formula" and number(v.parts[0])}
        for value in missing:
            plain = number(value.parts[0]) if value.kind == "formula" else None
            if plain in by_number:
                left.remove(by_number.pop(plain))
                continue
            verdicts = []
            for other in left:
                same = self.compare(value, other)
                if same:
                    left.remove(other)
                    break
                verdicts.append(same)
            else:
                if None not in verdicts:
                    return False
                unknown = True
        return None if unknown else True


def _distinct(comparer: Comparer, values: Sequence[Value]) -> list[Value]:
    """Values of a set; those that are plain and equal once."""
    kept: dict[Any, Value] = {}
    for value in values:
        plain = number(value.parts[0]) if value.kind == "formula" else None
        kept.setdefault(plain.value if plain else value, value)
    return list(kept.values())


def _list(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    if {gold[1], answer[1]} == {"and", "or"} and _relations(gold[0]):
        return None
    nouns = [{value.parts[2] for value in values if value.kind == "quantity"} for values, _ in (gold, answer)]
    same = comparer.unordered(gold[0], answer[0])
    return same if same is False or nouns[0] == nouns[1] or max(map(len, nouns)) < 2 else None  # 3 dogs, 5 cats


def _named(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    if gold[0] == answer[0]:
        return comparer.compare(gold[1], answer[1])
    formulae = [value.parts[0] for _, value in (gold, answer) if value.kind == "formula"]
    if (
        len(formulae) == 2 and gold[0] in _letters(formulae[1]) and answer[0] in _letters(formulae[0])
    ):  # x = 2y, y = x/2
        return comparer.same_equation((gold[0], formulae[0]), (answer[0], formulae[1]))
    functions = [re.fullmatch(r"([a-zA-Z])\(([a-zA-Z])\)", name) for name, _ in (gold, answer)]
    if len(formulae) == 2 and functions[0] and functions[1] and functions[0][1] == functions[1][1]:  # f(x), f(t)
        own, other = functions[0][2], functions[1][2]
        if own not in _letters(formulae[1]) and other not in _letters(formulae[0]):
            renamed = re.sub(rf"(?<![\\a-zA-Z]){other}(?![a-zA-Z])", own, formulae[1])
            return comparer.formula(formulae[0], renamed) or None
    if "y" in (gold[0], answer[0]) and re.search(r"^[a-z]\(x\)", gold[0] + answer[0].removeprefix("y")):  # y = f(x)
        return comparer.compare(gold[1], answer[1])
    return False


def _labelled(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    return gold[0] == answer[0] and comparer.compare(gold[1], answer[1]) is not False


def _choice(comparer: Comparer, gold: tuple, answer: tuple) -> bool:
    (xs, x_listed), (ys, y_listed) = gold, answer
    if x_listed or y_listed:
        return sorted(xs) == sorted(ys) and all(
            listed or list(letters) == sorted(letters) for letters, listed in (gold, answer)
        )
    return xs == ys


def _words(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    if gold[0] == answer[0] or gold[1] == answer[1]:
        return True
    if [_stem(word) for word in gold[0]] == [_stem(word) for word in answer[0]]:
        return True
    few, many = sorted((set(gold[0]), set(answer[0])), key=len)
    return None if few and few < many and not {"no", "not", "none", "never"} & (many - few) else False


def _clock(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    times = []
    for hour, minute, second, half in (gold, answer):
        times.append((hour % 12 + 12 * (half == "pm") if half else hour, minute, second))
    if times[0] == times[1]:
        return True
    same_figures = gold[0] % 12 == answer[0] % 12 and gold[1:3] == answer[1:3]
    return None if same_figures and "" in (gold[3], answer[3]) else False


def _date(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    return gold[:2] == answer[:2] and (gold[2] == answer[2] or (None if "" in (gold[2], answer[2]) else False))


def _interval(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    (xs, x_name), (ys, y_name) = gold, answer
    if len(xs) != len(ys) or (x_name and y_name and x_name != y_name):
        return (
            comparer.same_relation(Value("interval", gold), Value("interval", answer))
            if x_name == y_name or not (x_name and y_name)
            else False
        )

    # In the order of their lower ends, if they are plain.
    xs, ys = (
        sorted(ends, key=lambda piece: (piece[0] != "-\\infty", _plain_value(piece[0]) or 0)) for ends in (xs, ys)
    )
    if any(x[2:] != y[2:] for x, y in zip(xs, ys)):
        return False
    pairs = [(a, b) for x, y in zip(xs, ys) for a, b in zip(x[:2], y[:2]) if a != b]
    if any("\\infty" in a + b for a, b in pairs):
        return False
    return every(partial(comparer.formula, a, b) for a, b in pairs)


def _integers(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    return gold[0] == answer[0] and _interval(comparer, gold[1], answer[1])


def _relation(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    return comparer.same_relation(Value("relation", gold), Value("relation", answer))


def _congruence(comparer: Comparer, gold: tuple, answer: tuple) -> bool:
    return gold[1:] == answer[1:] and (not gold[0] or not answer[0] or gold[0] == answer[0])


def _family(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    if gold[2] != answer[2] or gold[0].kind != answer[0].kind:
        return False if gold[2] == answer[2] else None

    def renamed(value: Value, letter: str) -> Value:
        parts = tuple(
            renamed(p, letter)
            if isinstance(p, Value)
            else tuple(renamed(q, letter) if isinstance(q, Value) else q for q in p)
            if isinstance(p, tuple)
            else p
            for p in value.parts
        )
        if value.kind == "formula":
            parts = (
                re.sub(rf"(?<![\\a-zA-Z]){letter}(?![a-zA-Z])|(?<=\d){letter}(?![a-zA-Z])", "{k}", value.parts[0]),
            )
        return Value(value.kind, parts)

    same = comparer.compare(renamed(gold[0], gold[1]), renamed(answer[0], answer[1]))
    return same or None  # the same values may be written with another start or sign


def _quantity(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    (x, x_unit, x_noun, x_words), (y, y_unit, y_noun, y_words) = gold, answer
    compound = ("compound",)
    if (
        x_words in ((), compound)
        and y_words in ((), compound)
        and isinstance(x_unit, tuple)
        and isinstance(y_unit, tuple)
    ):
        if x_unit[1] != y_unit[1]:
            pounds = {x_unit, y_unit} == {UNITS["pound"], UNITS["sterling"]}
            return comparer.formula(x, y) if pounds else False
        same = comparer.formula(_times(x, x_unit[0]), _times(y, y_unit[0]))
    elif x_unit == y_unit:
        same = comparer.formula(x, y)
    elif isinstance(x_unit, tuple) and isinstance(y_unit, tuple):
        return False
    else:
        same = comparer.formula(x, y) and None
    if same is not True:
        return same
    if _DENY & (set(x_words) ^ set(y_words)):
        return False
    if sorted(x_words) != sorted(y_words) and compound not in (x_words, y_words):
        opposite = x_words and y_words and len(x_words) == len(y_words)
        return False if opposite else None
    return (
        True
        if not x_noun or not y_noun or x_noun == y_noun or x_noun in y_noun.split() or y_noun in x_noun.split()
        else None
    )


def _times(figure: str, factor: Fraction) -> str:
    value = number(figure)
    if factor == 1:
        return figure
    if value is None:
        return rf"({figure})\cdot {_fraction(factor)}"
    exact = value.value * factor
    return _fraction(exact)


def _ratio(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    if len(gold) != len(answer):
        return False
    xs, ys = ([_plain_value(term.parts[0]) for term in terms] for terms in (gold, answer))
    plain_x, plain_y = [x for x in xs if x is not None], [y for y in ys if y is not None]
    if len(plain_x) == len(xs) and len(plain_y) == len(ys):
        if any(xs) != any(ys):
            return False
        return all(x * sum(plain_y) == y * sum(plain_x) for x, y in zip(plain_x, plain_y))
    first, second = (rf"({terms[0].parts[0]})" for terms in (gold, answer))
    return every(
        partial(comparer.formula, rf"({x.parts[0]}){second}", rf"({y.parts[0]}){first}")
        for x, y in zip(gold[1:], answer[1:])
    )


def _chain(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    return comparer.in_order([*gold, *gold[:1] * len(answer)], [*gold[:1] * len(gold), *answer])


def _pieces(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    pairs = [Value("tuple", ("(", pair)) for pair in gold], [Value("tuple", ("(", pair)) for pair in answer]
    return comparer.unordered(*pairs) or None


def _matrix(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    if [len(row) for row in gold] != [len(row) for row in answer]:
        return False
    return comparer.in_order([cell for row in gold for cell in row], [cell for row in answer for cell in row])


Rule = Callable[[Comparer, tuple, tuple], "bool | None"]
RULES: dict[str, Rule] = {
    "formula": lambda c, x, y: c.formula(x[0], y[0]),
    "percent": lambda c, x, y: c.formula(x[0], y[0]),
    "degrees": lambda c, x, y: c.formula(x[0], y[0]),
    "based": lambda c, x, y: x == y or (x[1] != y[1] and None) if x[1] == y[1] else False,
    "unread": lambda c, x, y: None,
    "words": _words,
    "choice": _choice,
    "labelled": _labelled,
    "date": _date,
    "clock": _clock,
    "set": lambda c, x, y: c.unordered(_distinct(c, x), _distinct(c, y)),
    "list": _list,
    "tuple": lambda c, x, y: (
        c.in_order(x[1], y[1]) if x[0] == y[0] or not {x[0], y[0]} - {"(", r"\langle"} else _vectors(c, x, y)
    ),
    "interval": _interval,
    "integers": _integers,
    "relation": _relation,
    "congruence": _congruence,
    "family": _family,
    "permutation": lambda c, x, y: x == y,
    "named": _named,
    "assignments": lambda c, x, y: (
        [p[0] for p in x] == [p[0] for p in y] and c.in_order([p[1] for p in x], [p[1] for p in y])
    ),
    "chain": _chain,
    "equation": lambda c, x, y: c.same_equation(x, y),
    "matrix": _matrix,
    "ratio": _ratio,
    "pieces": _pieces,
    "quantity": _quantity,
}


def _relations(values: Sequence[Value]) -> bool:
    return any(value.kind in ("interval", "relation") for value in values)


def _vectors(comparer: Comparer, gold: tuple, answer: tuple) -> bool | None:
    """A sum of unit vectors has three components; in the plane, the third is 0 and left out."""
    xs, ys = gold[1], answer[1]
    zero = (Value("formula", ("0",)),)
    if {gold[0], answer[0]} & {"vector"} and {len(xs), len(ys)} == {2, 3}:
        xs, ys = (values if len(values) == 3 else (*values, *zero) for values in (xs, ys))
    return comparer.in_order(xs, ys)


# --- values of two kinds: seen as one of them ---


def _one_of(comparer: Comparer, collection: Value, other: Value, turned: bool) -> bool | None:
    """A set or list of one, beside that one."""
    values = _distinct(comparer, collection.parts) if collection.kind == "set" else collection.parts[0]
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
    hundredth = _fraction(value.value / 100) if value else rf"\frac{{{gold.parts[0]}}}{{100}}"
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
        return False if _DENY & set(said) else None
    if same and isinstance(made, tuple) and made[1] == (("radian", 1),) and other.kind == "degrees":
        return False
    return same


def _named_or_not(comparer: Comparer, named: Value, other: Value, turned: bool) -> bool | None:
    name, value = named.parts
    if other.kind == "equation":
        if value.kind != "formula" or "'" in name:
            return False
        if not _letters(value.parts[0]):
            return (
                False
                if other.kind == "equation" and not _letters(other.parts[0] + other.parts[1]) - _letters(name)
                else comparer.same_equation((name, value.parts[0]), other.parts)
            )
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
    return _interval(comparer, ours, interval.parts) if not turned else _interval(comparer, interval.parts, ours)


def _timed(comparer: Comparer, clock: Value, ratio: Value, turned: bool) -> bool | None:
    """8:10 beside 4:5, which is no time: as the gold's ratio. The other way round, the gold may be a time."""
    hour, minute, second, half = clock.parts
    if half or second:
        return False
    terms = tuple(Value("formula", (str(term),)) for term in (hour, minute))
    return _ratio(comparer, ratio.parts, terms) if turned else None


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
    linear = _linear(other.parts[0]) if other.kind == "formula" else None
    if linear:
        return linear.parts[1:] == congruence.parts[1:]
    if other.kind != "formula":
        return None
    return (str(residue) == other.parts[0]) and (turned or not name or None)


def _listed(comparer: Comparer, listed: Value, collection: Value, turned: bool) -> bool | None:
    return comparer.unordered(listed.parts[0], _distinct(comparer, collection.parts))


def _scaled(comparer: Comparer, matrix: Value, other: Value, turned: bool) -> bool | None:
    return comparer.same_matrix(matrix, other) if other.kind in ("unread", "formula") else False


def _divided(comparer: Comparer, ratio: Value, other: Value, turned: bool) -> bool | None:
    if len(ratio.parts) != 2:
        return False
    first, second = (part.parts[0] for part in ratio.parts)
    x, y = _plain_value(first), _plain_value(second)
    if y == 0:
        return False
    if turned and re.fullmatch(r"-?\d+", other.parts[0]):
        return None if number(first) else False  # 10:1 is more than 10
    quotient = rf"\frac{{{first}}}{{{second}}}" if x is None or y is None else _fraction(x / y)
    return comparer.formula(quotient, other.parts[0])


Mixed = Callable[[Comparer, Value, Value, bool], "bool | None"]
MIXED: dict[tuple[str, str], Mixed] = {
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
        _pair(c, x, y, turned) if _relations(y.parts[0]) else c.in_order(x.parts[1], y.parts[0]) and None
    ),
    ("assignments", "list"): _indexed,
    ("list", "set"): _listed,
    ("list", "formula"): _one_of,
    ("set", "formula"): _one_of,
    ("set", "tuple"): _one_of,
    ("set", "words"): lambda c, x, y, _: (not x.parts and y.parts[1] == "no solution") or False,
    ("interval", "words"): lambda c, x, y, _: (
        (x.parts[0] == _CONSTANT_SETS[r"\mathbb{R}"] and y.parts[1] == "all reals") or False
    ),
    ("interval", "relation"): lambda c, x, y, turned: c.same_relation(x, y),
    ("interval", "list"): lambda c, x, y, turned: c.same_relation(x, y) if _relations(y.parts[0]) else False,
    ("relation", "list"): lambda c, x, y, turned: c.same_relation(x, y) if _relations(y.parts[0]) else False,
    ("matrix", "any"): _scaled,
    ("ratio", "formula"): _divided,
    ("words", "formula"): lambda c, x, y, _: (
        y.parts[0] == str(_ORDINALS.index(x.parts[1]) + 1)
        if x.parts[1] in _ORDINALS
        else _words(c, x.parts, ((y.parts[0].casefold(),), y.parts[0].casefold()))
        if y.parts[0].isalpha()
        else False
    ),
    ("clock", "ratio"): lambda c, x, y, turned: _timed(c, x, y, turned),
    ("clock", "formula"): lambda c, x, y, _: (
        _divided(c, Value("ratio", tuple(Value("formula", (str(p),)) for p in x.parts[:2])), y, _)
        if not x.parts[3] and x.parts[1]
        else False
    ),
    ("based", "formula"): lambda c, x, y, turned: _based(x, y, turned),
    ("congruence", "formula"): lambda c, x, y, turned: _residues(c, x, y, turned),
    ("congruence", "named"): lambda c, x, y, turned: _residues(c, x, y.parts[1], turned),
    ("family", "any"): lambda c, x, y, turned: c.compare(x.parts[0], y) or None,
    ("pieces", "any"): lambda c, x, y, turned: None,
}


def _based(based: Value, plain: Value, turned: bool) -> bool | None:
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
