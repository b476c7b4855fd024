r"""The verifier under attack: a short form of tests/verifier_hostile.py, fuzzed answers, the backstop for errors."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgopd import grading
from sgopd.verifier import CORRECT, INCORRECT, UNKNOWN, VALUES, VerifierPool

TESTS = str(Path(__file__).resolve().parents[1])


@pytest.fixture(scope="module")
def hostile() -> Iterator[ModuleType]:
    """tests/verifier_hostile.py, importable by the workers too: one of its verifiers is a killer of workers."""
    sys.path.append(TESTS)
    yield importlib.import_module("verifier_hostile")
    sys.path.remove(TESTS)


def test_one_in_twelve_of_the_hostile_answers(hostile: ModuleType, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    attackers = hostile.cases(str(trace), every=12)
    assert len(attackers) > 60 and len({case.family for case in attackers}) >= 11
    memory_mb = 768
    report = hostile.attack(attackers, trace, workers=2, timeout=1.0, memory_mb=memory_mb)
    assert sum(report.reasons.values()) == report.answers == report.neighbours == len(attackers)
    assert report.called_correct == []
    assert report.overrun <= 0.5 and report.deciding <= 0.5, "seconds beyond the deadline, and in this process"
    assert report.address_space <= memory_mb
    assert report.caller_growth <= 128, "MiB: ten-megabyte responses are held while they are graded"
    assert report.wrong_neighbours == 0
    assert report.left_behind == 0
    assert not report.executed and not trace.exists()


def test_what_the_attack_reports_is_not_a_constant(hostile: ModuleType, tmp_path: Path) -> None:
    """A wrong verdict, a file that was made and a missing neighbour show: the report can be red."""
    trace = tmp_path / "executed"
    trace.touch()
    right = hostile.Case("none", hostile.box("7.0"), "math", {"answer": "7"})
    asleep = hostile.Case("none", "sleep", "verifier_hostile:killer", {"answer": ""})
    report = hostile.attack([right, asleep], trace, workers=1, timeout=0.5)
    assert report.called_correct == [right] and report.executed
    assert report.reasons == {"correct": 1, "timeout": 1} and report.overrun > 0
    assert hostile.differences(report, report._replace(verdicts=[(-1, "incorrect"), (0, "timeout")])) == [0]


def test_throughput_on_ordinary_answers(hostile: ModuleType) -> None:
    assert hostile.rate(count=600) > 50  # tests/verifier_hostile.py measures it: an idle machine does ten times that


# --- whatever a model may write ---

PIECES = [
    *"0123456789xXeiπ+-−*/^_=<>≤|!%°²½√{}[]()\\$&,.;: ~\n\x00",
    *(r"\frac", r"\sqrt", r"\boxed{", r"\text{", r"\left(", r"\right]", r"\cdot", r"\pm", r"\infty", r"\overline{"),
    *(r"\{", r"\}", r"\circ", r"\sin", r"\cup", r"\%", r"\$", "cm", " or ", "and", "(A)", "10^", "<think>", "</think>"),
    *(r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", "⑤", "①", "٦", "\ud800", "👩‍👦", "e+9", "0.", "1,000", "##", "####"),
]


@settings(max_examples=300, deadline=1_000)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join), st.sampled_from(["5", r"\frac{1}{2}", "x+1"]))
def test_deciding_never_raises_and_never_endorses_noise(answer: str, gold: str) -> None:
    decision = grading.decide_math(rf"\boxed{{{answer}}}", {"answer": gold})
    if isinstance(decision, str):
        assert decision in VALUES
        assert decision != "correct" or any(character in answer for character in "5x12½⑤"), "endorsed without a reason"
    grading.stated_answer(answer)
    grading.decide_gold({"answer": answer})


def test_an_error_while_reading_an_answer_is_a_verdict(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The backstop: whatever bug is left, it costs one verdict, is counted, and is logged with its cause once."""
    decide = grading.decide_math

    def faulty(response: str, *arguments: Any) -> str | grading.Work:
        if "⑤" in response:
            raise ValueError("cannot read this digit")
        return decide(response, *arguments)

    monkeypatch.setattr(grading, "decide_math", faulty)
    answers = ["x+1", "⑤", "1+x", "⑤x", "2+x", "7"]
    with VerifierPool("math", workers=2) as pool, caplog.at_level(logging.WARNING):
        verdicts = pool.verify([rf"\boxed{{{a}}}" for a in answers], [{"answer": "x+1"}] * 6)
        assert [v.reason for v in verdicts] == ["correct", "error", "correct", "error", "incorrect", "incorrect"]
        assert [v.value for v in verdicts] == [CORRECT, UNKNOWN, CORRECT, UNKNOWN, INCORRECT, INCORRECT]
        assert verdicts[1].detail == "ValueError: cannot read this digit"
        assert pool.counts()["error"] == 2 and pool.counts()["correct"] == 2
    logged = [record for record in caplog.records if "error while reading" in record.getMessage()]
    assert len(logged) == 1 and "⑤" in logged[0].getMessage() and logged[0].exc_info


def test_an_error_in_a_worker_is_a_verdict_and_the_worker_stays(hostile: ModuleType) -> None:
    responses = ["1", "SystemExit", "KeyboardInterrupt", "long message", "recursion", "1"]
    with VerifierPool("verifier_hostile:killer", workers=1, timeout=5.0) as pool:
        pool.check_golds([])
        worker = pool._workers[0].process.pid
        verdicts = pool.verify(responses, [{"answer": "1"}] * len(responses))
        assert [v.reason for v in verdicts] == ["correct", *["error"] * 4, "correct"]
        assert [v.value for v in verdicts] == [CORRECT, *[UNKNOWN] * 4, CORRECT]
        assert pool.counts()["error"] == 4 and pool._workers[0].process.pid == worker
