"""Readers of words: names, multiple choice, days and times, answers in a sentence."""

from __future__ import annotations

import re

from sgopd.answers.latex import trimmed
from sgopd.answers.value import Value, read, word_list, word_set

# Say nothing of the answer; what stands before or after a number besides these is a noun, or matters.
NEUTRAL = word_set(
    "so thus hence therefore final correct the answer answers result value values there are is it equals equal "
    "to we old long wide tall high deep get have exactly a an total of solution solutions approximately about "
    "in all altogether such integers integer different distinct possible them ways way units unit square "
    "points point numbers number that which only"
)
_IN_ORDER = word_set(  # of these a list answers several questions
    "true false t f yes no first second third fourth last positive negative even odd increasing decreasing always "
    "sometimes never up down left right greater less more fewer correct incorrect rational irrational"
)
_MEASURES = word_set(
    "area volume perimeter probability length distance speed sum product mean median average age cost price radius "
    "diameter height circumference slope remainder percentage total amount maximum minimum range mode"
)
_ARTICLES = word_set("the a an is are it to of there that be in solution value number answer")
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


def stem(word: str) -> str:
    if word[2:8] == "crease":  # increased by, decreases by
        return word[:8]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def plain_words(text: str) -> str:
    return " ".join(text.replace("⟦", " ").replace("⟧", " ").split())


def words(text: str) -> Value | None:
    """Words and names without mathematics: (sorted content words if there are two, else in order, the whole)."""
    plain = plain_words(text).strip(" .,;!?")
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


_LETTERS = re.compile(
    r"(?:(?:the )?(?:correct )?(?:options?|choices?|answers?|statements?)(?: is| are)?)?:? ?"
    r"((?:\(?[A-J]\)?(?: ?(?:,|;|and|&|or|/|, and) ?| )?)+)",
    re.IGNORECASE,
)


def choice(text: str) -> Value | None:
    """Letters of a multiple choice: (letters, whether they are listed one by one)."""
    plain = plain_words(text)
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


_MONTHS = word_list("january february march april may june july august september october november december")
_DATE = re.compile(
    r"(?:on )?(?:([a-z]+)\.? (\d{1,2})(?:st|nd|rd|th)?|(\d{1,2})(?:st|nd|rd|th)? (?:of )?([a-z]+))(?:,? (\d{4}))?"
)


def date(text: str) -> Value | None:
    """A day of a month: (month, day, year or empty)."""
    match = _DATE.fullmatch(plain_words(text).casefold())
    name = match and (match[1] or match[4])
    if not match or not name or len(name) < 3:
        return None
    month = next((month for month in _MONTHS if month.startswith(name)), None)
    return Value("date", (month, int(match[2] or match[3]), match[5] or "")) if month else None


_CLOCK = re.compile(r"(?:at )?(\d{1,2}) ?: ?(\d{2})(?: ?: ?(\d{2}))?( ?[ap]m| noon| midnight)?|(\d{1,2})( ?[ap]m)")


def clock(text: str) -> Value | None:
    """A time of day: (hour, minute, second, am or pm or empty). Without am or pm it may be a ratio."""
    plain = {"noon": "12:00 pm", "midnight": "12:00 am"}.get(plain_words(text).casefold(), plain_words(text).casefold())
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
        if said and all(word in NEUTRAL or (measured and word in _MEASURES) for word in said):
            return text[match.end() :].lstrip(":= ")
    return text


def sentence(text: str) -> Value | None:
    """An answer after words that say nothing of it, or in words with a number among them."""
    rest = _lead(text)
    if text[0] == "⟦" and text[-1] == "⟧" and text.count("⟦") == 1 and re.search(r"\d", text):
        said = re.sub(r"[A-Za-z'][A-Za-z' ]*[A-Za-z']|[A-Za-z]{2,}", lambda m: f"⟦{m[0]}⟧", text[1:-1])
        rest = re.sub(r"(?<![A-Za-z⟦])(?<=\d )([A-Za-z])(?![A-Za-z⟧'])", r"⟦\1⟧", said)
    return read(trimmed(rest)) if rest != text and rest else None
