"""One spelling for equal LaTeX, and splitting it where no bracket is open."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

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
    return trimmed(_without_doubles(text))


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


def trimmed(text: str) -> str:
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


_PIECE = re.compile(r"\\[a-zA-Z]+|\\.|⟦[^⟧]*⟧|.", re.DOTALL)
OPEN = {"(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil", r"\begin"}
CLOSE = {")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil", r"\end"}


def pieces(text: str) -> list[str]:
    return _PIECE.findall(text)


def split(text: str, separators: set[str]) -> list[tuple[str, str]]:
    """Parts of `text` between separators outside brackets, each with the separator before it."""
    parts, depth, before, start, position = [], 0, "", 0, 0
    for piece in _PIECE.findall(text):
        depth += (piece in OPEN) - (piece in CLOSE)
        found = piece if piece in separators else piece[1:-1].casefold() if piece[0] == "⟦" else ""
        if depth == 0 and found in separators:
            parts.append((before, text[start:position].strip()))
            before, start = found, position + len(piece)
        position += len(piece)
    return [*parts, (before, text[start:].strip())]


THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_SEPARATORS = {",", ";", "and", "or", r"\wedge", r"\vee", r"\lor", "as well as", ", and", "and also"}


def items(text: str, bare: bool = False) -> list[tuple[str, str]]:
    """The items of a list. A comma without a blank may be one of thousands; in brackets, if others have one."""
    if bare or ", " in text:
        without = re.sub(rf"(?<![\d,.]){THOUSANDS.pattern}(?![\d.]|,\d)", lambda m: m[0].replace(",", ""), text)
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
        depth += (piece in OPEN) - (piece in CLOSE)
        seen += len(piece)
        if depth == 0 and seen < len(text):
            return None
    return text[len(opening) : -len(closing)].strip() if depth == 0 else None


_NOT_VARIABLES = re.compile(r"\\[a-zA-Z]+|⟦[^⟧]*⟧")


def variables(text: str) -> set[str]:
    """The letters of a formula that may be variables."""
    return set(re.findall("[a-zA-Z]", _NOT_VARIABLES.sub(" ", text))) - {"e", "i"}
