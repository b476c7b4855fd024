r"""From a response to an answer, and everything about an answer that can be told without sympy.

All of it is string work in linear time on capped input, so the trainer's own process does it: most rollouts
are decided here, and only a real question of mathematics reaches a worker process (`sgopd.math_equality`).

The answer of a response is its last balanced `\boxed{}` outside thoughts (`THOUGHT_TAGS`). What an answer is, and when
two are equal, is in `sgopd.answers`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sgopd.answers import Comparer, NeedsWorker, another_case, clean, number, read, spelling, unit

Example = dict[str, Any]

RESPONSE_CHARS = 2**21  # a longer response is a flood, and not searched
TAIL_CHARS = 65_536  # an answer is looked for in the last 64 Ki characters outside thoughts
MAX_ANSWER_CHARS = 512  # of LaTeX: a final answer of that length is a derivation, and sympy needs seconds for it
MAX_NESTING = 24
MAX_EXPONENT = 10_000  # even of a symbol: (x+1)^10000 would be expanded
MAX_DIGITS = 20_000  # of any number that sympy would write out
MAX_FACTORIAL = 5_000


# --- extraction ---

# What opens a thought, and what closes it. In the order of the models that came with them: DeepSeek-R1 and Qwen 3,
# Magistral, Sky-T1, Seed-OSS, Kimi, Command A, MedGemma, gpt-oss (twice), and what prompts ask for.
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
_BRACE = re.compile(
    r"(?P<box>\\{1,3}(?:boxed|fbox|framebox)\s{0,9}\{)|\\{1,3}boxed\s{0,9}(?P<bare>-?\d[\d.,/]{0,99}|[a-zA-Z](?![a-zA-Z]))"
    r"|\\\\|\\[{}]|(?P<open>\{)|(?P<close>\})"
)
_ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|texttt|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s?\{([^{}]*)\}")
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_LISTED = re.compile(r"\[(?:(?:'[^']*'|\"[^\"]*\")(?:, ?|(?=\])))+\]")
# Between two boxes that are one answer: x = \boxed{2} and y = \boxed{3}, \boxed{2} or \boxed{3}.
_JOINT = re.compile(
    r"[\s$.,]{0,5}(?:\\text\s?\{\s?)?(?P<word>and|or)[\s$}]{1,5}(?:[a-zA-Z] ?= ?){0,2}"
    r"|[\s$]{0,5},[\s$]{1,5}[a-zA-Z] ?= ?"
)
_NAMED = re.compile(r"(?<![a-zA-Z\\])([a-zA-Z]) ?= ?$")
_DENIED = re.compile(
    r"(?:\bnot|\bcannot|n't|\bneither|\bnor)(?: be| equal to| equal)?[\s$]{1,3}(?:[a-zA-Z] ?= ?)?$"
    # Supposed: suppose that the answer were 8, if x = 3.
    r"|\b(?:suppose|supposing|assume|assuming|imagine|if|whether)(?: that)?(?:[ $]{1,2}(?:the|our|its|this|that|it"
    r"|there|final|correct|answer|value|result|solution|number|total|sum|of|[a-zA-Z])){0,6}[ $]{1,2}"
    r"(?:(?:were|was|is|equals|equal|to|be|=)[ $]{1,2}){1,3}$"
    r"|\b(?:wrong|incorrect|tempting|mistaken|naive) (?:answer|guess|value|result)(?: (?:of|is|would be))?[ $]{1,2}$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[\s$]{0,3}(?:is|was|would be) (?:not|wrong|incorrect|false)\b|[\s$]{0,3}isn't (?!it)|[\s$]{0,3}\? ?(?:No\b|Wrong)"
    r"|[\s$.,;]{0,5}(?:(?:which|but|and|yet|this|that|it) ){0,2}(?:(?:is|would be|leads to|gives|contradicts) ){0,1}"
    r"(?:clearly |an? )?(?:impossible|contradiction|contradictory|absurd|not possible|not allowed|incorrect|wrong)\b",
    re.IGNORECASE,
)
# The unit behind a box: \boxed{12} cm, \boxed{12}\text{ cm}. One letter is a unit only where it ends the sentence.
_BEHIND = re.compile(
    r"(?P<gap>(?:[ \t$~]|\\[,;:! )\]]){0,6})(?:(?P<sign>\\?%|\^\s?\{?\s?\\circ\s?\}?(?!\s?\{?[CF])|°(?![CF]))"
    r"|(?P<word>(?:\\(?:text|mathrm|textrm|mbox|rm)\s?\{[^{}]{1,40}\}(?:\^\s?\{?-?\d\}?)?[ /]{0,2}){1,3}"
    r"|[A-Za-zμ]{1,20}(?:\^\{?-?\d\}?|[²³])?(?:(?: ?/ ?| per | )[A-Za-zμ]{1,20}(?:\^\{?-?\d\}?|[²³])?){0,3}))"
)
_GOES_ON = re.compile(r"[ $]{0,3}(?:an?|per|each|/|\^|\\|(?:and )?\d)")
# Where nothing is boxed, an answer that is marked as one in the last line: #### 17, **17**, Answer: 17.
_MARKED = re.compile(
    r"#{4} ?(.+)|.*\*\*([^*:]+)\*\*( [a-zA-Zμ/^²³ ]{1,30})?[.\s]*"
    r"|[*#\s]*(?:final )?answer\s?[*\s]*:[*\s]*([^*]+?)[*\s]*",
    re.IGNORECASE,
)


@lru_cache(maxsize=16)
def _thought_patterns(tags: tuple[tuple[str, str], ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """A thought to its end, and all up to the last closing tag."""
    thoughts = "|".join(rf"{re.escape(start)}.*?(?:{re.escape(end)}|\Z)" for start, end in tags)
    ends = "|".join(re.escape(end) for _, end in tags)
    return re.compile(thoughts, re.DOTALL | re.IGNORECASE), re.compile(f".*(?:{ends})", re.DOTALL | re.IGNORECASE)


def visible_text(response: str, tags: Tags = THOUGHT_TAGS) -> str:
    """The last `TAIL_CHARS` characters of `response` outside thoughts; nothing of one above `RESPONSE_CHARS`.

    A lone closing tag closes a thought that the chat template opened; an unclosed thought runs to the end. Inside a
    thought only its own closing tag counts: whatever else stands there is what the model thought about.
    """
    if len(response) > RESPONSE_CHARS:
        return ""
    if tags:
        thought, closed = _thought_patterns(tuple((start, end) for start, end in tags))
        response = thought.sub("", response)
        lone = closed.match(response)
        response = response[lone.end() :] if lone else response
    return response[-TAIL_CHARS:]


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Where each balanced `\boxed{}` or `\fbox{}` opens and closes, and what it holds, in the order of opening."""
    openings: list[tuple[int, int, bool]] = []
    found = []
    for brace in _BRACE.finditer(text):
        if brace["bare"]:
            found.append((brace.start(), brace.end(), brace["bare"].rstrip(".,")))
        elif brace["box"] or brace["open"]:
            openings.append((brace.start(), brace.end(), bool(brace["box"])))
        elif brace["close"] and openings:
            command, start, is_box = openings.pop()
            if is_box:
                found.append((command, brace.end(), text[start : brace.start()]))
    return sorted(found)


def last_box(text: str) -> str | None:
    r"""Content of the box that opens last in `text`; None if there is none."""
    found = boxes(text)
    return found[-1][2] if found else None


def boxed_answer(response: str, tags: Tags = THOUGHT_TAGS) -> str | None:
    r"""The boxed answer, stripped; None where there is none, it is empty, or the text says that it is not the answer.

    Boxes joined by a word (`x = \boxed{2}` and `y = \boxed{3}`) are one answer. Where nothing is boxed, an answer in
    `<answer>…</answer>`, or one marked in the last line.
    """
    text = visible_text(response, tags)
    found = boxes(text)
    if not found:
        return None if "boxed" in text else _marked(text)
    while found and _denied(text, *found[-1][:2]):
        found.pop()
    if not found:
        return None
    start, closed, answer = found[-1]
    joined = [_named(text, start) + answer]
    for (before, closes, content), (opens, _, _) in zip(found[-2::-1], found[:0:-1]):
        joint = _JOINT.fullmatch(text[closes:opens]) if opens - closes < 40 else None
        if joint is None or not content.strip() or len(joined) > 8:
            break
        joined += [r"\text{ or }" if joint["word"] == "or" else ", ", _named(text, before) + content]
    if len(joined) == 1:
        return (answer + _unit_behind(text[closed : closed + 80], answer)).strip() or None
    return "".join(joined[::-1]).strip() or None


def _denied(text: str, start: int, end: int) -> bool:
    return bool(_DENIED.search(text[max(0, start - 80) : start]) or _DENIED_AFTER.match(text[end : end + 40]))


def _unit_behind(text: str, answer: str) -> str:
    """The unit that stands in `text`, right behind an answer that has none; empty if there is none."""
    match = _BEHIND.match(text)
    cleaned, refused = _read(answer) if match else ("", None)
    if match is None or refused or "⟦" in cleaned or read(cleaned).kind not in ("formula", "named"):
        return ""
    if match["sign"]:
        return match["sign"]
    if match["word"][0] == "\\":
        return match["word"] if unit(clean(match["word"])) else ""
    said = match["word"].split(" ")
    for count in range(len(said), 0, -1):
        words = " ".join(said[:count])
        rest = text[match.start("word") + len(words) :]
        if words not in ("in", "A", "a") and (unit(words) or words.casefold() in ("percent", "degree", "degrees")):
            alone = len(words) > 1 or re.match(r"[.,;]?(?:\s|$)", rest)
            return rf"\text{{ {words}}}" if alone and not _GOES_ON.match(rest) else ""
    return ""


def _named(text: str, start: int) -> str:
    match = _NAMED.search(text[max(0, start - 6) : start])
    return f"{match[1]} = " if match else ""


def _marked(text: str) -> str | None:
    if tagged := _ANSWER_TAG.findall(text):
        return tagged[-1].strip() or None
    lines = text.strip().splitlines()
    match = _MARKED.fullmatch(lines[-1].strip()) if lines and len(lines[-1]) < MAX_ANSWER_CHARS else None
    if match is None or (match[3] and not unit(match[3])):
        return None
    said = (match[1] or match[2] or match[4]).strip()
    return said + (rf"\text{{{match[3].rstrip()}}}" if match[3] else "") or None


def stated_answer(response: str, tags: Tags = THOUGHT_TAGS) -> str | None:
    r"""The answer of a task that is not mathematics: box, else `<answer>…</answer>`, else the last line with text.

    `\text{…}` around the whole is typography and taken off. None if nothing is said outside thoughts.
    """
    text = visible_text(response, tags)
    tagged = _ANSWER_TAG.findall(text)
    lines = text.strip().splitlines()
    answer = last_box(text) or (tagged and tagged[-1]) or (lines and lines[-1]) or ""
    return _unwrapped(answer) or None


def _unwrapped(text: str) -> str:
    wrapped = _WRAPPED.fullmatch(text.strip())
    return (wrapped[1] if wrapped else text).strip()


def stated_gold(example: Example) -> str:
    """The reference of a task that is not mathematics; empty where there is none."""
    answer = example.get("answer")
    return "" if answer is None else _unwrapped(str(answer))


def read_answer(kind: str, response: str, tags: Tags = THOUGHT_TAGS) -> str | None:
    """What a verifier of that kind compares with the reference: for a person to read.

    None where there is no answer, and for a custom verifier, which gets the whole response.
    """
    reader = {"math": boxed_answer, "exact": stated_answer, "reasoning-gym": stated_answer}.get(kind)
    try:
        return reader(response, tags) if reader else None
    except Exception:  # whatever a model may write; the verdict's reason says it
        return None


def reference_answer(example: Example) -> str | None:
    r"""The gold of `example["answer"]`: its last box, or what follows `####` (GSM8K), or the whole; None if empty.

    Several golds written as a list of texts are all of them in one answer.
    """
    answer = example.get("answer")
    text = "" if answer is None else str(answer)
    if listed := _LISTED.fullmatch(text.strip()):
        text = ", ".join(single or double for single, double in _QUOTED.findall(listed[0]))
    return (last_box(text) or text.rpartition("####")[2]).strip() or None


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


_BLANKS = re.compile(r"[-+]?[\d.]+(?:\s[-+]?[\d.]+)+")


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
REASONS = {True: "correct", False: "incorrect", None: "unknown"}


@lru_cache(maxsize=16_384)
def _read(latex: str) -> tuple[str, str | None]:
    """`latex` cleaned, and why sympy must not see it, if so."""
    if len(latex) > MAX_ANSWER_CHARS * 4:  # not worth cleaning; golds that long are refused as well
        return latex, refusal(latex)
    text = clean(latex)
    return text, refusal(text)


def decide_math(response: str, example: Example, tags: Tags = THOUGHT_TAGS) -> str | Work:
    r"""Grades what can be told here; the rest, (gold, answer) in cleaned LaTeX, is for a worker.

    An answer that must not reach sympy is correct if spelled like the gold, else incorrect: a final
    answer is a value written out, not a tower of powers. Against such a gold any other answer is "bad_gold".
    """
    answer = boxed_answer(response, tags)
    if answer is None:
        return "no_answer"
    gold = reference_answer(example)
    if gold is None:
        return "bad_gold"
    (gold_text, gold_refused), (answer_text, answer_refused) = _read(gold), _read(answer)
    if not answer_text:
        return "no_answer"
    if another_case(gold_text, answer_text):
        return "unknown"
    if spelling(gold_text) == spelling(answer_text):
        return "correct"
    if gold_refused or not gold_text:
        return "bad_gold"
    if answer_refused:
        return "incorrect"
    try:
        same = Comparer().verdict(gold_text, answer_text)
    except NeedsWorker:
        return gold_text, answer_text
    # A gold that nothing reads may be one that cannot be read: a worker knows.
    return (gold_text, answer_text) if same is None and read(gold_text).kind == "unread" else REASONS[same]


def decide_gold(example: Example) -> str | Work:
    """A complaint about the reference answer of a mathematics example, or the (gold, None) that a worker parses."""
    gold = reference_answer(example)
    if gold is None:
        return "it is empty"
    text, why_not = _read(gold)
    if why_not:
        return f"sympy must not see it, since {why_not}: only an answer spelled the same would be correct"
    return "" if number(text) else (text, None)


def decide_exact(response: str, example: Example, tags: Tags = THOUGHT_TAGS) -> str:
    """Grades `stated_answer` by string equality with `stated_gold`."""
    answer, gold = stated_answer(response, tags), stated_gold(example)
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
