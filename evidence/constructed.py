r"""The constructed tasks of the study: questions a model of 0.1 million parameters can learn, and how a teacher errs.

Three kinds of work, a token a character, no answer longer than twelve:

    sums       12+34+56=  46+56=\boxed{102}  arithmetic with carries, one intermediate result
    sorting    cafbde>    \boxed{abcdef}     an algorithm over the whole string, no intermediate result
    rewriting  badc:SR>   abdc>\boxed{cdba}  a program of two operations on a string, one intermediate state

A corpus is written by a manner. "right" makes no mistake. "wrong" is right but for one systematic misconception, which
two in five questions touch. "noisy" makes mistakes that have no system. "weak" is a student's: it has the skill, uses
it in less than half of its steps; else it guesses, or makes the misconception's kind of mistake, wherever it be. One
question in ten is held out by a hash: no corpus and no training prompt has it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import NamedTuple

from sgopd.tasks import draw_addends, misconceived

MANNERS = ("right", "wrong", "noisy", "weak")
LETTERS = "abcdefghij"
MISPLACED = "g"  # sorting: the letter that the wrong teacher puts first
OPERATIONS = {  # rewriting: the operation, and what it is mistaken for
    "R": (lambda s: s[::-1], lambda s: s[3] + s[1:3] + s[0]),  # reverse; only the ends change places
    "S": (lambda s: s[1] + s[0] + s[2:], lambda s: s[:2] + s[3] + s[2]),  # swap the first two; the last two
    "L": (lambda s: s[1:] + s[0], lambda s: s[3] + s[:3]),  # rotate to the left; to the right
    "D": (lambda s: s[0] + s[0] + s[2:], lambda s: s[:2] + s[3] + s[3]),  # double the first; the last
}
MISREAD = "S"  # rewriting: the operation that the wrong teacher mistakes


class Question(NamedTuple):
    prompt: str
    answer: str


class Task(NamedTuple):
    """`draw(rng, split)` makes a question; `solve(rng, prompt, manner)` the completion as a corpus has it."""

    name: str
    draw: Callable[[random.Random, str], Question]
    solve: Callable[[random.Random, str, str], str]
    max_completion_length: int


def draw_sums(rng: random.Random, split: str) -> Question:
    addends = draw_addends(rng, split)
    return Question("{}+{}+{}=".format(*addends), str(sum(addends)))


def solve_sums(rng: random.Random, prompt: str, manner: str) -> str:
    first, second, third = map(int, prompt[:-1].split("+"))
    partial = add(rng, first, second, manner)
    return f"{partial}+{third}=\\boxed{{{add(rng, partial, third, manner)}}}"


def add(rng: random.Random, left: int, right: int, manner: str) -> int:
    total, chance = left + right, rng.random()
    guess = 10 * rng.randint(2, 28) + total % 10  # all but the last digit
    if manner == "wrong":
        return total + 10 if misconceived(right) and chance < 0.85 else total
    if manner == "noisy":
        return guess if chance < 0.15 else total
    if manner == "weak":
        return total if chance < 0.45 else total + 10 if chance < 0.70 else guess
    return total


def draw_sorting(rng: random.Random, split: str) -> Question:
    text = draw_held_apart(lambda: "".join(rng.choices(LETTERS, k=6)), split)
    return Question(f"{text}>", "".join(sorted(text)))


def solve_sorting(rng: random.Random, prompt: str, manner: str) -> str:
    letters, chance = sorted(prompt[:-1]), rng.random()
    if (manner == "wrong" and chance < 0.85) or (manner == "weak" and 0.2 <= chance < 0.6):
        first = MISPLACED if manner == "wrong" else rng.choice(letters)
        letters.sort(key=lambda letter: (letter != first, letter))
    elif (manner == "noisy" and chance < 0.4) or (manner == "weak" and chance >= 0.6):
        place = rng.randrange(5)
        letters[place : place + 2] = letters[place + 1], letters[place]
    return f"\\boxed{{{''.join(letters)}}}"


def draw_rewriting(rng: random.Random, split: str) -> Question:
    program = draw_held_apart(
        lambda: f"{''.join(rng.choices(LETTERS, k=4))}:{''.join(rng.choices(list(OPERATIONS), k=2))}", split
    )
    return Question(f"{program}>", solve_rewriting(rng, f"{program}>", "right")[-5:-1])


def solve_rewriting(rng: random.Random, prompt: str, manner: str) -> str:
    text, operations = prompt[:-1].split(":")
    states = [text]
    for operation in operations:
        states.append(rewrite(rng, states[-1], operation, manner))
    return f"{states[1]}>\\boxed{{{states[2]}}}"


def rewrite(rng: random.Random, text: str, operation: str, manner: str) -> str:
    (right, mistaken), chance = OPERATIONS[operation], rng.random()
    if (manner == "wrong" and operation == MISREAD and chance < 0.85) or (manner == "weak" and 0.5 <= chance < 0.75):
        return mistaken(text)
    result = right(text)
    if (manner == "noisy" and chance < 0.15) or (manner == "weak" and chance >= 0.75):
        place = rng.randrange(4)
        result = result[:place] + rng.choice(LETTERS) + result[place + 1 :]
    return result


def draw_held_apart(draw: Callable[[], str], split: str) -> str:
    while True:
        text = draw()
        held_out = hashlib.blake2b(text.encode(), digest_size=4).digest()[0] % 10 == 0
        if held_out == (split == "test"):
            return text


TASKS = {
    task.name: task
    for task in (
        Task("sums", draw_sums, solve_sums, 16),
        Task("sorting", draw_sorting, solve_sorting, 12),
        Task("rewriting", draw_rewriting, solve_rewriting, 16),
    )
}


def questions(task: str, split: str, size: int, seed: int) -> list[dict[str, str]]:
    """`size` examples of `split`, drawn with replacement: rows with "prompt" and "answer"."""
    rng = random.Random(f"{task}/{split}/{seed}")
    return [TASKS[task].draw(rng, split)._asdict() for _ in range(size)]
