r"""Procedural tasks: verifiable problems made on the spot, the same on every machine.

    load_task("three-sums", split="test", size=256)
    load_task("arithmetic", size=64, operations="+-*")
    load_task("reasoning-gym:chain_sum", size=64, max_terms=3)

`three-sums` is what the shipped quickstart checkpoints speak: the user's turn is "12+34+56", the
assistant's "46+56=\boxed{102}", in fourteen symbols. `arithmetic` asks for the same kind of thing in English.
`reasoning-gym:<dataset>` hands out any dataset of the reasoning_gym package.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import random
from collections.abc import Callable
from typing import Any

Example = dict[str, Any]

SPLITS = ("train", "test")
INSTRUCTION = r"Put the final answer in \boxed{}."
MISCONCEIVED_TENS = (6, 7)


def load_task(name: str, split: str = "train", size: int = 1000, seed: int = 0, **options: Any) -> list[Example]:
    r"""`size` examples of the task `name`.

    Example i depends on (name, split, seed, i) and the options alone, so a longer list begins with the
    shorter one. No train problem of `three-sums` and `arithmetic` ever appears in the test split: one in ten
    is held out by a hash, whatever the seed. reasoning_gym knows no such partition; there the two
    splits draw from unrelated seeds, and a dataset with few distinct questions repeats some of them.

    Args:
        name: "three-sums", "arithmetic" or "reasoning-gym:<dataset>".
        split: "train" or "test".
        size: number of examples, ≥ 0. Problems are drawn with replacement.
        seed: which examples of the split, any integer.
        **options: the task's own. `arithmetic`: `operations` ("+-", any of "+-*") and `max_operand` (20).
            `reasoning-gym:<dataset>`: the fields of that dataset's config. `three-sums` has none.

    Returns:
        Dicts with "prompt" (a list of messages), "answer" (the reference answer, a string; None where a dataset of
        reasoning_gym has none) and the task's own columns. `three-sums`: "misconceived" (bool), whether the
        quickstart's teacher mostly gets it wrong. `reasoning-gym:<dataset>`: "source_dataset", "question" and
        "metadata", which its scorers read.

    Raises:
        ValueError: an unknown task, dataset, split or option, or a value out of range.
        ImportError: reasoning_gym is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
    if size < 0:
        raise ValueError(f"size is {size}; expected a number of examples, 0 or more")
    family, _, dataset = name.partition(":")
    if family == "reasoning-gym" and dataset:
        return _reasoning_gym(dataset, split, size, seed, options)
    if name not in _TASKS:
        raise ValueError(f"there is no task {name!r}; {_nearest(name, [*_TASKS, 'reasoning-gym:<dataset>'])}")
    task = _TASKS[name]
    known = list(inspect.signature(task).parameters)[2:]
    for option in options:
        if option not in known:
            takes = ", ".join(known) or "none"
            raise ValueError(f"the task {name!r} has no option {option!r}; its options: {takes}")
    return [task(random.Random(f"{name}/{split}/{seed}/{index}"), split, **options) for index in range(size)]


# three-sums. The public functions also serve the script that trains the quickstart's checkpoints.


def draw_addends(rng: random.Random, split: str) -> tuple[int, int, int]:
    """Three two-digit numbers that form a problem of `split`, in whichever order."""
    while True:
        addends = rng.randint(10, 99), rng.randint(10, 99), rng.randint(10, 99)
        if _split_of(f"{sorted(addends)}") == split:
            return addends


def misconceived(addend: int) -> bool:
    """Whether the quickstart's teacher misconceives adding this number: mostly, its result is off by +10."""
    return addend // 10 in MISCONCEIVED_TENS


def _three_sums(rng: random.Random, split: str) -> Example:
    first, second, third = draw_addends(rng, split)
    return {
        "prompt": _user(f"{first}+{second}+{third}"),
        "answer": str(first + second + third),
        "misconceived": misconceived(second) or misconceived(third),
    }


def _arithmetic(rng: random.Random, split: str, operations: str = "+-", max_operand: int = 20) -> Example:
    if not isinstance(operations, str) or not operations or set(operations) - set("+-*"):
        raise ValueError(f"operations is {operations!r}; expected one or more of '+-*'")
    if (
        not isinstance(max_operand, int) or max_operand < 10
    ):  # fewer than a hundred problems an operation: the held-out tenth could be empty
        raise ValueError(f"max_operand is {max_operand}; expected a whole number, 10 or more")
    while True:
        operation = rng.choice(operations)
        left, right = rng.randint(1, max_operand), rng.randint(1, max_operand)
        larger, smaller = max(left, right), min(left, right)
        if operation == "-":
            left, right = larger, smaller
        if _split_of(f"{larger} {operation} {smaller}") == split:
            break
    answer = {"+": left + right, "-": left - right, "*": left * right}[operation]
    return {"prompt": _user(f"What is {left} {operation} {right}? {INSTRUCTION}"), "answer": str(answer)}


def _reasoning_gym(name: str, split: str, size: int, seed: int, options: dict[str, Any]) -> list[Example]:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ImportError(f"the task 'reasoning-gym:{name}' needs reasoning_gym: pip install reasoning-gym") from error
    if name not in DATASETS:
        raise ValueError(f"reasoning_gym has no dataset {name!r}; {_nearest(name, list(DATASETS))}")
    if size == 0:  # its configs want at least one
        return []
    # Item i is drawn from seed + i: neighbouring seeds would share all their items but one, so spread them.
    spread_seed = _hash(f"{name}/{split}/{seed}")
    try:
        dataset = create_dataset(name, size=size, seed=spread_seed, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"reasoning_gym refuses the options {options} for {name!r}: {error}") from error
    return [
        {
            "prompt": _user(f"{entry['question']}\n{INSTRUCTION}"),
            "answer": None if entry["answer"] is None else str(entry["answer"]),  # a few puzzles have a scorer only
            "question": entry["question"],
            "metadata": entry["metadata"],
            "source_dataset": name,
        }
        for entry in (dataset[index] for index in range(size))
    ]


_TASKS: dict[str, Callable[..., Example]] = {"three-sums": _three_sums, "arithmetic": _arithmetic}


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def _hash(text: str) -> int:
    """32 bits that do not change between processes or versions, as hash() does."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def _split_of(problem: str) -> str:
    return "test" if _hash(problem) % 10 == 0 else "train"


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
