r"""From a response to an answer, and everything about an answer that can be told without sympy.

All of it is string work in linear time on capped input, so the trainer's own process does it: most rollouts
are decided here, and only a real question of mathematics reaches a worker process (`sgopd.math_equality`).

The answer of a response is its last balanced `\boxed{}` outside thoughts (`THOUGHT_TAGS`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

Example = dict[str, Any]

TAIL_CHARS = 65_536  # an answer is looked for in the last 64 Ki characters outside thoughts
MAX_ANSWER_CHARS = 512  # of LaTeX: a final answer of that length is a derivation, and sympy needs seconds for it
MAX_NESTING = 24
MAX_EXPONENT = 10_000  # even of a symbol: (x+1)^10000 would be expanded
MAX_DIGITS = 20_000  # of any number that sympy would write out
MAX_FACTORIAL = 5_000


# --- extraction ---

# What opens a thought, and what closes it. In order of the models that came with them: DeepSeek-R1 and Qwen 3, Magistral,
# Sky-T1, Seed-OSS, Kimi, Command A, MedGemma, gpt-oss (twice), and what prompts ask for.
THOUGHT_TAGS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<unused94>", "<unused95>"),
    ("<|channel|>analysis", "<|channel|>final"),
    ("<|channel|>commentary", "<|channel|>final"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<thoughts>", "</thoughts>"),
    ("<reasoning>", "</reasoning>"),
    ("<reflection>", "</reflection>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<analysis>", "</analysis>"),
)
Tags = Sequence[Sequence[str]]
# The bounded repeats keep this linear: an unbounded one rescans a run of backslashes or blanks from every start.
_BRACE = re.compile(r"(?P<box>\\{1,3}(?:boxed|fbox)\s{0,9}\{)|\\\\|\\[{}]|(?P<open>\{)|(?P<close>\})")
_ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|texttt|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s?\{([^{}]*)\}")


@lru_cache(maxsize=16)
def _tag_pattern(tags: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tags, key=len, reverse=True))), re.IGNORECASE)


def visible_text(response: str, tags: Tags = THOUGHT_TAGS) -> str:
    """The last `TAIL_CHARS` characters of `response` outside thoughts.

    A lone closing tag closes a thought that the chat template opened; an unclosed thought runs to the end. Inside a
    thought only its own closing tag counts: whatever else stands there is what the model thought about.
    """
    if not tags:
        return response[-TAIL_CHARS:]
    closes = {start.casefold(): end.casefold() for start, end in tags}
    kept, position, awaited = [], 0, ""
    for match in _tag_pattern(tuple(tag for pair in tags for tag in pair)).finditer(response):
        tag = match[0].casefold()
        if awaited:
            if tag == awaited:
                awaited, position = "", match.end()
        elif tag in closes:
            kept.append(response[position : match.start()])
            awaited = closes[tag]
        else:
            kept, position = [], match.end()
    return "".join([*kept, "" if awaited else response[position:]])[-TAIL_CHARS:]


def last_box(text: str) -> str | None:
    r"""Content of the balanced `\boxed{}` (or `\fbox{}`) that opens last in `text`; None if there is none."""
    openings: list[tuple[int, bool]] = []
    box_start, box = -1, None
    for brace in _BRACE.finditer(text):
        if brace["box"] or brace["open"]:
            openings.append((brace.end(), bool(brace["box"])))
        elif brace["close"] and openings:
            start, is_box = openings.pop()
            if is_box and start > box_start:
                box_start, box = start, text[start : brace.start()]
    return box


def boxed_answer(response: str, tags: Tags = THOUGHT_TAGS) -> str | None:
    """The boxed answer, stripped; None where there is none or it is empty."""
    return (last_box(visible_text(response, tags)) or "").strip() or None


def stated_answer(response: str, tags: Tags = THOUGHT_TAGS) -> str | None:
    r"""The answer of a task that is not mathematics: box, else `<answer>…</answer>`, else the last line with text.

    `\text{…}` around the whole is typography and taken off. None if nothing is said outside thoughts.
    """
    text = visible_text(response, tags)
    tagged = _ANSWER_TAG.findall(text)
    lines = text.strip().splitlines()
    answer = last_box(text) or (tagged and tagged[-1]) or (lines and lines[-1]) or ""
    wrapped = _WRAPPED.fullmatch(answer.strip())
    return (wrapped[1] if wrapped else answer).strip() or None


def reference_answer(example: Example) -> str | None:
    r"""The gold of `example["answer"]`: its last box, or what follows `####` (GSM8K), or the whole; None if empty."""
    answer = example.get("answer")
    text = "" if answer is None else str(answer)
    return (last_box(text) or text.rpartition("####")[2]).strip() or None


# --- one spelling for equal LaTeX ---

_SYMBOLS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ "}
    | {
        "√": "sqrt",
        "½": r"\frac{1}{2}",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∪": r"\cup ",
        "∅": r"\emptyset ",
    }
    | dict.fromkeys("€£¥", "")
    | {"，": ",", "（": "(", "）": ")", "％": "%", "\u00a0": " ", "~": " "}
)
_SUPERSCRIPTS = re.compile("[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_LOWERED = str.maketrans("⁻⁺⁰¹²³⁴⁵⁶⁷⁸⁹", "-+0123456789")
# 30° is as good as 30, but its sine is not that of 30 radians.
_ANGLE = (
    r"\\(sin|cos|tan|cot|sec|csc)((?:\^\{?\d\}?)?\s?[({]?)\s?([\d.]+)\s?\^\s?(?:\\circ(?![a-zA-Z])|\{\s?\\circ\s?\})"
)
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<!\\)(?:\\[()\[\]]|\$)|\\displaystyle(?![a-zA-Z])", " "),  # \$ stays: it is a currency
        (r"\\\$", ""),
        (r"(?<=\d)(?:,?\\[,;:! ]|\{,\})\s?(?=\d{3}(?!\d))", ""),  # 12{,}345 and 12\,345
        (r"(?<!\\)\\[,;:! ]|\\q?quad(?![a-zA-Z])", " "),
        (r"^\s*(?:\\approx(?![a-zA-Z])|≈|\\text\s?\{[^{}]*\b(?:is|are|equals)\s?:?\s?\})", " "),
        (r"\\(?:boldsymbol|bm|underline)(?=\s?\{)", ""),
        (r"\\(?:mathrm|mathit)\s?\{\s?([ei])\s?\}", r"\1"),
        (r"\\sqrt\s?\[(\d*[13579])\]\s?\{\s?-([^-+{}]+)\}", r"(-\\sqrt[\1]{\2})"),  # the real root
        (r"(?<![\d.])(\d+)\s?\\[dt]?frac\s?(\d|\{\d+\})\s?(\d|\{\d+\})\s?(?=\\?%)", r"(\1+\\frac\2\3)"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (_ANGLE, r"\\\1\2\\frac{\3\\pi}{180}"),
        (r"\*\*", "^"),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
        (r"(?<![\d.])(\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),  # 2 1/2
        (r"\^\s?([+-]\s?(?:\d+|[a-zA-Z]))", r"^{\1}"),  # 2^-99
        (r"(?<![\\a-zA-Z])(sqrt|pi)(?![a-zA-Z])", r"\\\1 "),
        (r"\\sqrt\s?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\s+", " "),
    ]
]
_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:left|right)(?![a-zA-Z])", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"(?<!\d)\s|\s(?!\d)", ""),  # a blank between digits means something: 2 1/2
        (r"(?<!\\)\{([0-9a-zA-Z])\}", r"\1"),
    ]
]


# x = a ± b, which math-verify does not read inside a fraction or after an equals sign
_SYSTEM = re.compile(r"\\begin ?\{cases\}([^&]*)\\end ?\{cases\}")  # of equations; with an & it is a function in pieces
_PLUS_MINUS = re.compile(r"(?:[a-zA-Z] ?= ?)?([^,=\[]*[^,=\[ ]) ?\\pm(?![a-zA-Z]) ?([^,=\]]+)")


def clean(latex: str) -> str:
    """`latex` as math-verify reads it best: ASCII, no math delimiters, thin spaces or final full stop."""
    text = _SUPERSCRIPTS.sub(lambda match: f"^{{{match[0].translate(_LOWERED)}}}", latex).translate(_SYMBOLS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,;").strip()
    if system := _SYSTEM.fullmatch(text):
        text = re.sub(r" ?,? ?\\\\ ?", ", ", system[1].strip().removesuffix(r"\\").strip())
    both = _PLUS_MINUS.fullmatch(text)
    if both and len(re.findall(r"\\[pm][pm](?![a-zA-Z])|\\\{", text)) == 1:
        text = f"{both[1]}+{both[2]}, {both[1]}-{both[2]}"
    return text


def literal(text: str) -> str:
    r"""A spelling of cleaned LaTeX that ignores blanks, \left and \right, \dfrac, {1} for 1, and case in words."""
    wrapped = _WRAPPED.fullmatch(text)
    text = wrapped[1].strip(" .,;!") if wrapped else text
    if re.fullmatch(r"[a-zA-Z ]+", text):
        return " ".join(text.casefold().split())
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


_DECIMAL = re.compile(r"([+-]?)(\d{1,3}(?:[ ,]\d{3})+|\d*)(\.\d*)?(?:[eE]([+-]?\d{1,3}))?")
_SCIENTIFIC = re.compile(r"([+-]?\d+(\.\d+)?)\\(?:times|cdot)10\^(\d|\{[+-]?\d{1,3}\})")
_RATIO = re.compile(r"([+-]?)\\frac(\d|\{[+-]?\d+\})(\d|\{[+-]?\d+\})|([+-]?\d+)/(\d+)")
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\overline(\d|\{\d+\})")
_BLANKS = re.compile(r"[-+]?[\d.]+(?:\s[-+]?[\d.]+)+")
_BASE = re.compile(r"\(?[0-9A-F]+\)?_\{?(\d+)\}?")


Number = tuple[Fraction, bool]  # a value, and whether it is a decimal, thus perhaps rounded
Plain = tuple[str, list[Number]]  # brackets, and the numbers between them; a bare number has no brackets


def number(text: str) -> Number | None:
    """A literal that is a plain number; None for anything else."""
    if match := _DECIMAL.fullmatch(text):
        sign, whole, decimals, exponent = match.groups()
        whole, decimals = re.sub("[ ,]", "", whole), (decimals or ".")[1:]
        if not whole + decimals:
            return None
        value = int(whole + decimals) * Fraction(10) ** (int(exponent or 0) - len(decimals))
        return -value if sign == "-" else value, match[3] is not None or exponent is not None
    if match := _SCIENTIFIC.fullmatch(text):
        return Fraction(match[1]) * Fraction(10) ** int(match[3].strip("{}")), match[2] is not None
    if match := _RATIO.fullmatch(text):
        sign, *parts = match.groups()
        numerator, denominator = (int(part.strip("{}")) for part in parts if part)
        return (Fraction(numerator, denominator) * (-1 if sign == "-" else 1), False) if denominator else None
    if match := _REPEATING.fullmatch(text):
        sign, whole, decimals, period = match.groups()
        period = period.strip("{}")
        value = int(whole + decimals or 0) + Fraction(int(period), 10 ** len(period) - 1)
        value /= 10 ** len(decimals)
        return -value if sign == "-" else value, False
    return None


_WORD = re.compile(r"[a-zA-Z ]{3,}")


def other_word(gold: str, answer: str) -> bool:
    """Whether two cleaned texts, spelled differently, are words or names: to sympy they are products of letters."""
    wrapped = [_WRAPPED.fullmatch(text) for text in (gold, answer)]
    words = [(match[1] if match else text).strip() for match, text in zip(wrapped, (gold, answer))]
    named = any(wrapped) or all(word.isupper() for word in words)  # BAC is an order, not b·a·c
    return named and all(_WORD.fullmatch(word) for word in words)


_CHOICE = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mathbf) ?\{ ?\(?([A-J])[).:] ?\}|\(([A-J])\) ) ?[.:]? ?([^\s,^_=+*/&].*)"
)
_SEVERAL = re.compile(r"\b(?:and|or)\b|\([A-J]\)|[,&]")
_LETTER = re.compile(r"\(?[A-J]\)?")


def choice(text: str) -> tuple[str, str] | None:
    r"""Letter and rest of a choice with its value, such as `\textbf{(B)} 12`; None for anything else."""
    match = _CHOICE.fullmatch(text)
    return (match[1] or match[2], match[3]) if match and not _SEVERAL.search(match[3]) else None


# Units of one dimension, each with how many of the first it is. math-verify drops whatever unit there is.
_UNITS = {
    name: (dimension, Fraction(factor))
    for dimension, units in {
        "length": {
            "m meter meters metre metres": "1",
            "cm centimeter centimeters centimetre centimetres": "0.01",
            "mm millimeter millimeters millimetre millimetres": "0.001",
            "km kilometer kilometers kilometre kilometres": "1000",
            "in inch inches": "0.0254",
            "ft foot feet": "0.3048",
            "yd yard yards": "0.9144",
            "mi mile miles": "1609.344",
        },
        "time": {
            "s sec second seconds": "1",
            "min minute minutes": "60",
            "h hr hrs hour hours": "3600",
            "day days": "86400",
            "week weeks": "604800",
        },
        "mass": {
            "g gram grams": "1",
            "mg milligram milligrams": "0.001",
            "kg kilogram kilograms": "1000",
            "lb lbs pound pounds": "453.59237",
            "oz ounce ounces": "28.349523125",
        },
        "money": {"dollar dollars USD": "1", "cent cents": "0.01"},
    }.items()
    for names, factor in units.items()
    for name in names.split()
}
_IN_UNITS = re.compile(
    r"((?:(?!\\text|\\mathrm|\\mbox).)*?) ?\\(?:text|textrm|mathrm|mbox) ?"
    r"\{ ?(square |cubic |sq\.? )?([a-zA-Z]+)\.? ?\} ?(?:\^ ?\{?([23])\}?)?"
)


def with_unit(text: str) -> tuple[str, tuple[str, int], Fraction] | None:
    """Number, dimension and scale of a cleaned quantity in a unit of `_UNITS`; None for anything else."""
    match = _IN_UNITS.fullmatch(text)
    if not match or match[3] not in _UNITS:
        return None
    dimension, factor = _UNITS[match[3]]
    power = int(match[4] or {"s": 2, "c": 3}.get((match[2] or " ")[0], 1))
    return match[1], (dimension, power), factor**power


def same_quantity(gold: str, answer: str) -> bool | None:
    """Whether two quantities in units of the table are equal; None where the units agree, or only the power differs."""
    first, second = with_unit(gold), with_unit(answer)
    if first is None or second is None:
        return None
    (x_text, (x_kind, x_power), x_scale), (y_text, (y_kind, y_power), y_scale) = first, second
    if x_kind == y_kind and (x_power != y_power or x_scale == y_scale):
        return None
    x, y = number(literal(x_text)), number(literal(y_text))
    if x_kind != y_kind or x is None or y is None:
        return False
    return same_number((x[0] * x_scale, x[1]), (y[0] * y_scale, y[1]))


def plain(text: str) -> Plain | None:
    """A literal that is a plain number, or a point or interval of such; None for anything else."""
    match = re.fullmatch(r"([(\[])(.+,.+)([)\]])", text)
    brackets, parts = (match[1] + match[3], match[2].split(",")) if match else ("", [text])
    numbers = [value for value in map(number, parts) if value]
    return (brackets, numbers) if len(numbers) == len(parts) else None


_PROPORTION = re.compile(r"\d+(?::\d+){2,}")


def same_proportion(gold: str, answer: str) -> bool | None:
    """Whether two literals a:b:c are one proportion (math-verify divides them all); None if either is no such."""
    if not (_PROPORTION.fullmatch(gold) and _PROPORTION.fullmatch(answer)):
        return None
    xs, ys = ([int(term) for term in text.split(":")] for text in (gold, answer))
    proportional = all(x * sum(ys) == y * sum(xs) for x, y in zip(xs, ys))
    return len(xs) == len(ys) and proportional and any(xs) == any(ys)


def same_number(gold: Number, answer: Number) -> bool:
    """Exact equality; with a decimal on either side also equality to six decimals and five leading digits."""
    (x, x_rounded), (y, y_rounded) = gold, answer
    if x == y or not (x_rounded or y_rounded):
        return x == y
    return abs(x - y) <= min(Fraction(1, 10**6), Fraction(1, 10**5) * max(abs(x), abs(y)))


# --- what must never reach sympy ---


class _TooLarge(ValueError):
    pass


class _Magnitude:
    """An upper bound, as log10, on the numbers sympy would write out for a LaTeX text. Letters count as 1.

    Rough on purpose: sums are bounded by products, and an ambiguous `10^9!` by its larger reading.
    """

    _TOKEN = re.compile(r"\d+|\\[a-zA-Z]+|\\.|\S")

    def __init__(self, text: str) -> None:
        self.tokens = self._TOKEN.findall(text)[::-1]
        self.depth = 0

    def of_all(self) -> float:
        total = 0.0
        while self.tokens:
            total += self._of_factor()
        return total

    def _of_group(self) -> float:
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise _TooLarge(f"it nests brackets deeper than {MAX_NESTING}")
        total = 0.0
        while self.tokens and self.tokens[-1] not in ")]}":
            total += self._of_factor()
        self.tokens[-1:] = []
        self.depth -= 1
        return total

    def _of_factor(self) -> float:
        if not self.tokens:
            return 0.0
        token = self.tokens.pop()
        size = 0.0
        if token in "([{":
            size = self._of_group()
        elif token.isdecimal():  # isdigit is true of ⑤, which int cannot read
            size = math.log10(int(token) + 1)
        elif token.endswith("binom"):
            size = self._exponent(self._of_factor()) * math.log10(2)
        while self.tokens and self.tokens[-1] in "^!":
            if self.tokens.pop() == "^":
                exponent = self._exponent(self._of_factor())
                size *= exponent
            else:
                if size > math.log10(MAX_FACTORIAL + 1):
                    raise _TooLarge(f"it takes the factorial of a number above {MAX_FACTORIAL}")
                size *= 10**size
            if size > MAX_DIGITS:
                raise _TooLarge(f"it holds a number of more than {MAX_DIGITS} digits")
        return size

    @staticmethod
    def _exponent(size: float) -> float:
        if size > math.log10(MAX_EXPONENT + 1):
            raise _TooLarge(f"it holds an exponent above {MAX_EXPONENT}")
        return 10.0**size


def magnitude(text: str) -> float:
    """An upper bound on the digits of the numbers in cleaned LaTeX; infinite where `refusal` has something to say."""
    try:
        return _Magnitude(text).of_all()
    except _TooLarge:
        return math.inf


def refusal(text: str) -> str | None:
    """Why cleaned LaTeX must not be handed to sympy (it could run for hours, or misread it); None if it may."""
    if len(text) > MAX_ANSWER_CHARS:
        return f"it is longer than {MAX_ANSWER_CHARS} characters"
    if _BLANKS.fullmatch(text) and not number(text):  # math-verify adds them: "1 2" would equal 3
        return "it holds numbers separated by blanks only"
    try:
        _Magnitude(text).of_all()
    except _TooLarge as reason:
        return str(reason)
    return None


# --- decisions: a reason, or the arguments of the grade function in a worker ---

Work = tuple[Any, ...]


@lru_cache(maxsize=16_384)
def _read(latex: str) -> tuple[str, str, Plain | None, str | None]:
    """`latex` cleaned, its spelling, what it is if that is plain, and why sympy must not see it, if so."""
    if len(latex) > MAX_ANSWER_CHARS * 4:  # not worth cleaning; golds that long are refused as well
        return latex, latex, None, refusal(latex)
    text = clean(latex)
    spelling = literal(text)
    why_not = refusal(text)
    return text, spelling, None if why_not else plain(spelling), why_not


def _without_letter(gold: str, answer: str) -> tuple[str, str]:
    """Of two answers, one or both with a choice's letter before the value, what they can be compared by."""
    labelled = choice(_read(gold)[0]), choice(_read(answer)[0])
    if labelled == (None, None):
        return gold, answer
    letters = [_LETTER.fullmatch(literal(_read(text)[0]).upper()) for text in (gold, answer)]
    by_letter = all(pair or letter for pair, letter in zip(labelled, letters))
    part = 0 if by_letter else 1
    first, second = (pair[part] if pair else text for pair, text in zip(labelled, (gold, answer)))
    return first, second


def decide_math(response: str, example: Example, tags: Tags = THOUGHT_TAGS) -> str | Work:
    r"""Grades by spelling and by plain-number value; the rest, (gold, answer) in cleaned LaTeX, is for a worker.

    An answer that must not reach sympy is correct if spelled like the gold, else incorrect: a final
    answer is a value written out, not a tower of powers. Against such a gold any other answer is "bad_gold".
    """
    answer = boxed_answer(response, tags)
    if answer is None:
        return "no_answer"
    gold = reference_answer(example)
    if gold is None:
        return "bad_gold"
    gold, answer = _without_letter(gold, answer)
    gold_text, gold_spelling, gold_plain, gold_refused = _read(gold)
    answer_text, answer_spelling, answer_plain, answer_refused = _read(answer)
    if not answer_text:
        return "no_answer"
    if gold_spelling == answer_spelling:
        return "correct"
    if gold_refused or not gold_text:
        return "bad_gold"
    if answer_refused or other_word(gold_text, answer_text):
        return "incorrect"
    for same in (same_quantity(gold_text, answer_text), same_proportion(gold_spelling, answer_spelling)):
        if same is not None:
            return "correct" if same else "incorrect"
    if gold_plain and answer_plain:
        (gold_brackets, xs), (answer_brackets, ys) = gold_plain, answer_plain
        if gold_brackets == answer_brackets and len(xs) == len(ys):
            return "correct" if all(map(same_number, xs, ys)) else "incorrect"
    gold_base, answer_base = _BASE.fullmatch(gold_spelling), _BASE.fullmatch(answer_spelling)
    if gold_base and answer_base and gold_base[1] != answer_base[1]:  # math-verify drops the base
        return "incorrect"
    return gold_text, answer_text


def decide_gold(example: Example) -> str | Work:
    """A complaint about the reference answer of a mathematics example, or the (gold, None) that a worker parses."""
    gold = reference_answer(example)
    if gold is None:
        return "it is empty"
    text, _, value, why_not = _read(gold)
    if why_not:
        return f"sympy must not see it, since {why_not}: only an answer spelled the same would be correct"
    return "" if value else (text, None)


def decide_exact(response: str, example: Example, tags: Tags = THOUGHT_TAGS) -> str:
    """Grades `stated_answer` by string equality with `example["answer"]`, both stripped."""
    answer = stated_answer(response, tags)
    gold = str(example.get("answer") or "").strip()
    if answer is None:
        return "no_answer"
    if not gold:
        return "bad_gold"
    return "correct" if answer == gold else "incorrect"


# reasoning_gym scorers that eval() the model's answer.
EVALUATING_DATASETS = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
# Those that give it to sympy.parse_expr, which evaluates it too (`__import__` included): plain formulas only.
PARSING_DATASETS = (
    "countdown",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
)
_FORMULA = re.compile(
    r"(?:a?sin|a?cos|a?tan|exp|log|ln|sqrt|pi|(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])|\.?\d|[+\-*/^(),|\s])*"
)


def decide_reasoning_gym(response: str, example: Example, tags: Tags = THOUGHT_TAGS) -> str | Work:
    """Extracts `stated_answer`; the dataset's scorer, in a worker, decides.

    Raises:
        ValueError: the example does not say its dataset, or its scorer would execute the model's answer.
    """
    dataset, entry = reasoning_gym_entry(example)
    answer = stated_answer(response, tags)
    if answer is None:
        return "no_answer"
    if dataset in PARSING_DATASETS and (not _FORMULA.fullmatch(answer) or refusal(answer.replace("**", "^"))):
        return "incorrect"
    return dataset, answer, entry


def reasoning_gym_entry(example: Example) -> tuple[str, dict[str, Any]]:
    """Dataset name and {question, answer, metadata} of an example made by `load_task("reasoning-gym:…")`."""
    metadata = example.get("metadata")
    dataset = metadata.get("source_dataset") if isinstance(metadata, dict) else None
    dataset = dataset or example.get("source_dataset")
    if not isinstance(metadata, dict) or not isinstance(dataset, str):
        raise ValueError(
            f"an example for the reasoning-gym verifier needs the columns 'metadata' (a dict) and 'source_dataset', "
            f"got {sorted(example)}; load_task('reasoning-gym:<dataset>') makes both"
        )
    if dataset in EVALUATING_DATASETS:
        raise ValueError(
            f"reasoning_gym's scorer of {dataset!r} runs eval() on the model's answer, so it is left out; choose "
            "another dataset, or name your own verifier as 'package.module:function'"
        )
    return dataset, {"question": example.get("question"), "answer": example.get("answer"), "metadata": metadata}
