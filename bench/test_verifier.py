"""The verifier: answers a second by kind, beside the same grading without its protection.

    pytest bench/test_verifier.py

"In process" is the grader's documented use in the caller's own process: nothing stops it when it hangs, takes all
memory or runs what it reads. The error is the share of answers whose verdict is not the hand-checked or constructed
one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
import verifier_accuracy as accuracy

from sgopd.grading import reference_answer, stated_answer
from sgopd.tasks import load_task
from sgopd.verifier import VerifierPool

POOLS = {"sgopd, 1 worker": 1, "sgopd, 2 workers": 2}


class Answers(NamedTuple):
    kind: str
    responses: list[str]
    examples: list[dict[str, Any]]
    right: list[bool]
    alone: Callable[[str, dict[str, Any]], bool]  # in process

    def first(self, count: int) -> Answers:
        return self._replace(**{name: getattr(self, name)[:count] for name in ("responses", "examples", "right")})


def same(response: str, example: dict[str, Any]) -> bool:
    """A verifier of one's own."""
    return stated_answer(response) == example["answer"]


def hand_checked() -> Answers:
    """Every way to write an answer that the rules were written for or tried on."""
    from math_verify import parse, verify

    def alone(response: str, example: dict[str, Any]) -> bool:
        return bool(verify(parse(rf"\boxed{{{reference_answer(example)}}}"), parse(response)))

    rows = [row for name in accuracy.FILES for row in accuracy.read(name)]
    rows = [row for start in range(7) for row in rows[start::7]]  # the first few are of every form
    return Answers(
        "math",
        [row.response for row in rows],
        [{"answer": row.gold} for row in rows],
        [row.correct for row in rows],
        alone,
    )


def sums(kind: str, alone: Callable[[str, dict[str, Any]], bool] = same) -> Answers:
    """Numbers in a box, every third of them wrong."""
    examples = load_task("three-sums", size=2_000)
    right = [n % 3 > 0 for n in range(len(examples))]
    answers = [int(example["answer"]) + (not correct) for example, correct in zip(examples, right)]
    return Answers(kind, [rf"So it is $\boxed{{{n}}}$." for n in answers], examples, right, alone)


def plain_numbers() -> Answers:
    return sums("math", hand_checked().alone)


def gym() -> Answers:
    reasoning_gym = pytest.importorskip("reasoning_gym", reason="reasoning_gym is not installed (extra: reasoning-gym)")

    def alone(response: str, example: dict[str, Any]) -> bool:
        score = reasoning_gym.get_score_answer_fn(example["source_dataset"])
        return score(stated_answer(response), example) == 1

    examples = load_task("reasoning-gym:chain_sum", size=500)
    right = [n % 3 > 0 for n in range(len(examples))]
    texts = [str(int(example["answer"]) + (not correct)) for example, correct in zip(examples, right)]
    return Answers("reasoning-gym", [rf"\boxed{{{text}}}" for text in texts], examples, right, alone)


CASES: dict[str, Callable[[], Answers]] = {
    "math, hand-checked answers": hand_checked,
    "math, numbers": plain_numbers,
    "exact": lambda: sums("exact"),
    "reasoning-gym": gym,
    "a function of one's own": lambda: sums("test_verifier:same"),
}


def prepare(answers: Answers, stack: ExitStack) -> Callable[[str, bool], tuple[float, dict[str, Any]]]:
    pools: dict[str, VerifierPool] = {}
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def turn(name: str, look: bool) -> tuple[float, dict[str, Any]]:
        if name in POOLS and name not in pools:
            pool = VerifierPool(answers.kind, workers=POOLS[name], timeout=10.0)
            pools[name] = stack.enter_context(pool)
        began = time.perf_counter()
        if name in pools:
            verdicts = [verdict.value == 1 for verdict in pools[name].verify(answers.responses, answers.examples)]
        else:
            verdicts = [answers.alone(*pair) for pair in zip(answers.responses, answers.examples)]
        seconds = time.perf_counter() - began
        wrong = sum(said != correct for said, correct in zip(verdicts, answers.right))
        seen = {"peer": name not in POOLS, "wrong verdicts": wrong / len(verdicts), "count": len(verdicts)}
        return seconds, seen if look else {}

    return turn


@pytest.mark.parametrize("candidate", [*POOLS, "in process"])
@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(f"{name}, 40 of them", marks=pytest.mark.smoke) for name in CASES)]
)
def test_verifier(case: str, candidate: str, in_turn: Any) -> None:
    name, some, _ = case.partition(", 40 of them")
    with ExitStack() as stack:
        seen = in_turn(lambda: prepare(CASES[name]().first(40 if some else 10**9), stack))
    if candidate in POOLS:  # the hand-checked rows have some that no rule gets right
        assert seen["wrong verdicts"] <= (0.05 if "hand-checked" in case else 0)
