"""A value: what an answer is once it is read."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from sgopd.answers.latex import spelling


class Value(NamedTuple):
    """An answer of one kind; what the parts are, the kind's reader says."""

    kind: str
    parts: tuple[Any, ...]


class Reader(NamedTuple):
    kind: str
    says: str  # what it reads
    read: Callable[[str], Value | None]
    examples: tuple[tuple[str, str, int], ...]  # gold, answer, verdict


READERS: list[Reader] = []  # in order; readers.py fills it, since readers read their own parts by `read`


def word_list(text: str) -> list[str]:
    return text.split()


def word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


@lru_cache(maxsize=16_384)
def read(text: str) -> Value:
    """What cleaned LaTeX is, by the first reader that reads it; else of kind "unread", with its spelling."""
    for reader in READERS if text else ():
        value = reader.read(text)
        if value is not None:
            return value
    return Value("unread", (spelling(text),))
