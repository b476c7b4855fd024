"""Readers of mathematics: formulae, vectors, tuples, permutations, matrices."""

from __future__ import annotations

import re

from sgopd.answers.latex import CLOSE, OPEN, THOUSANDS, inside, items, pieces
from sgopd.answers.numbers import DECIMAL, number
from sgopd.answers.value import Value, read, word_set

_COMMANDS = word_set(
    "frac sqrt pi cdot times div infty sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan ln log exp binom "
    "gcd lcm max min theta alpha beta gamma delta epsilon varepsilon lambda mu nu omega phi varphi psi rho sigma tau "
    "xi zeta eta kappa chi Gamma Delta Theta Lambda Omega Phi Psi Sigma lfloor rfloor lceil rceil sum prod int lim "
    "to lg"
)
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_ANGLE = re.compile(r"([\d.]+|\([^()]*\)|\\frac ?\{[^{}]*\} ?\{[^{}]*\}) ?\^\\circ")
_FORMULA_PIECE = re.compile(r"\\[a-zA-Z]+|[\d.]+|[a-zA-Z]|[+\-*/()\[\]{}^_!|, =]")


def formula(text: str) -> Value | None:
    """Mathematics that sympy reads to the last character: (its LaTeX)."""
    if number(text):
        return Value("formula", (re.sub(r"(?<=\d)[ ,](?=\d{3})", "", text) if DECIMAL.fullmatch(text) else text,))
    text = re.sub(rf"(?<![\d.,]){THOUSANDS.pattern}(?![\d,])", lambda match: match[0].replace(",", ""), text)
    if r"\cancel" in text:
        if r"\frac" not in text:
            return None
        text = re.sub(r"\\cancel ?\{((?:[^{}]|\{[^{}]*\})*)\}", r"{\1}", text)
    if TRIGONOMETRIC.search(text):
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
    depth = [piece in OPEN for piece in pieces(text)].count(True) - [piece in CLOSE for piece in pieces(text)].count(
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
