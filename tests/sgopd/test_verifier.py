r"""The verifier: right answers, and survival. Every test here can hang the caller if the pool is wrong."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import verifier_accuracy as accuracy

from sgopd import grading
from sgopd.answers import clean, read
from sgopd.answers.comparer import RULES
from sgopd.answers.value import READERS, Reader
from sgopd.verifier import CORRECT, INCORRECT, UNKNOWN, VerifierPool

SLACK = 0.5  # seconds past the deadline within which every verdict is due


def corpus() -> list[tuple[str, str, int]]:
    """Gold, response and right verdict of the rows that the rules were written against."""
    rows = accuracy.read("answers_rules.txt")
    return [(row.gold, row.response, CORRECT if row.correct else INCORRECT) for row in rows]


@pytest.fixture(scope="module")
def math_pool() -> Iterator[VerifierPool]:
    with VerifierPool("math", workers=2, timeout=10.0) as pool:
        yield pool


def grade(pool: VerifierPool, gold: str, response: str) -> tuple[int, str]:
    return pool.verify([response], [{"answer": gold}])[0][:2]


def box(answer: str) -> str:
    return rf"So the answer is $\boxed{{{answer}}}$."


# --- mathematics ---


def test_hand_checked_answers(math_pool: VerifierPool) -> None:
    rows = corpus()
    assert len(rows) > 200
    verdicts = math_pool.verify([response for _, response, _ in rows], [{"answer": gold} for gold, _, _ in rows])
    wrong = [(row, verdict) for row, verdict in zip(rows, verdicts) if verdict.value != row[2]]
    assert wrong == []


# What docs/trials.md says of the rows written after the rules: it may get better, not worse.
@pytest.mark.parametrize(
    ("name", "precision", "recall"),
    [
        ("answers_later.txt", 1.0, 1.0),
        ("answers_unseen.txt", 1.0, 1.0),
        ("answers_blind.txt", 1.0, 1.0),
        ("answers_dev.txt", 1.0, 1.0),
        ("answers_heldout.txt", 1.0, 0.9),
    ],
)
def test_answers_written_after_the_rules(math_pool: VerifierPool, name: str, precision: float, recall: float) -> None:
    rows = accuracy.read(name)
    verdicts = math_pool.verify([row.response for row in rows], [{"answer": row.gold} for row in rows])
    figures = accuracy.figures(rows, [verdict.value for verdict in verdicts])
    assert figures["precision"] >= precision and figures["recall"] >= recall, figures


# What math-verify's reading of LaTeX would make one letter, or no letter: right and wrong answers of a gold.
LETTERS = {
    "capital and small": [
        (r"\pi(R^2-r^2)", r"\pi R^2-\pi r^2", "0"),
        (r"\frac{m}{M+m}", r"\frac{2m}{2M+2m}", r"\frac{1}{2}", r"\frac{M}{M+m}"),
        (r"\ln\frac{R}{r}", r"\ln R-\ln r", "0"),
        ("x_1+X_1", "X_1+x_1", "2x_1"),
        ("(R,r)", "(R, r)", "(r,R)"),
        ("N>n", "n<N", "n>N"),
        (r"2\Delta", r"\Delta+\Delta", r"2\delta"),
        ("N!/2", r"\frac{N\cdot(N-1)!}{2}", "n!/2"),
    ],
    "a capital I": [
        ("I^2R", "RI^2", "IR"),
        (r"\frac{I_1}{I_2}", "I_1/I_2", "1", r"\frac{I_2}{I_1}"),
        ("3+4i", "3+4I", "3-4i"),
    ],
    "T in an exponent": [("P(1+r)^T", "(1+r)^{T}P", "P(1+r)"), ("e^{-T}", r"\frac{1}{e^T}", r"\frac{1}{e}")],
    "an i on one side alone": [
        (r"\frac{n(n+1)}{2}", r"\sum_{i=1}^n i", r"\sum_{i=1}^n i^2"),
        ("2^n", r"\sum_{i=0}^{n}\binom{n}{i}", r"\sum_{i=1}^{n}\binom{n}{i}"),
        (r"2\cos\theta", r"e^{i\theta}+e^{-i\theta}", r"e^{i\theta}-e^{-i\theta}"),
        (r"\cos x+i\sin x", "e^{ix}", "e^{-ix}"),
        (r"\begin{pmatrix}i&2x\end{pmatrix}", r"\begin{pmatrix}i&x+x\end{pmatrix}", r"\begin{pmatrix}i&x\end{pmatrix}"),
    ],
}


@pytest.mark.parametrize("what", LETTERS)
def test_letters_stay_apart_and_the_same(math_pool: VerifierPool, what: str) -> None:
    for gold, right, *wrong in LETTERS[what]:
        assert grade(math_pool, gold, box(right)) == (CORRECT, "correct"), (gold, right)
        for answer in wrong:
            assert grade(math_pool, gold, box(answer)) == (INCORRECT, "incorrect"), (gold, answer)


def test_verdicts_do_not_depend_on_the_pool_or_the_order() -> None:
    rows = corpus()[::5]

    def verdicts(workers: int, order: list[int]) -> list[tuple[int, str]]:
        with VerifierPool(workers=workers, timeout=20.0) as pool:
            graded = pool.verify([rows[i][1] for i in order], [{"answer": rows[i][0]} for i in order])
        return [verdict[:2] for _, verdict in sorted(zip(order, graded))]

    forward = list(range(len(rows)))
    one = verdicts(1, forward)
    assert {reason for _, reason in one} == {"correct", "incorrect"}
    assert verdicts(2, forward[::-1]) == one
    assert verdicts(3, forward[1::2] + forward[::2]) == one


def test_sympy_draws_the_same_random_points_for_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import sympy.core.random

    from sgopd import math_equality

    draws = []
    monkeypatch.setattr(math_equality, "_same_expression", lambda *_: draws.append(sympy.core.random.random()))
    for answer in ("1+x", "2+x", "1+x"):
        math_equality.grade("x+1", answer)
    assert draws[0] == draws[1] == draws[2]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.says)
def test_the_examples_of_each_rule(math_pool: VerifierPool, reader: Reader) -> None:
    assert {verdict for *_, verdict in reader.examples} & {CORRECT}, "a rule that nothing needs"
    for gold, answer, verdict in reader.examples:
        assert grade(math_pool, gold, box(answer))[0] == verdict, (gold, answer)
        for text in (gold, answer):
            assert read(clean(text)).kind in (*RULES, "unread")
    if reader.kind:
        assert any(read(clean(text)).kind == reader.kind for *pair, _ in reader.examples for text in pair)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"first \boxed{1} hmm no, \boxed{2}", "2"),
        (r"\boxed{1}\boxed{2}", "2"),
        (r"\boxed{1} and then \boxed{2", "1"),
        (r"\boxed{\frac{1}{2}} trailing text.", r"\frac{1}{2}"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {7}", "7"),
        (r"\\boxed{7}", "7"),
        (r"\fbox{7}", "7"),
        (r"a stray } and { around \boxed{7}", "7"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"\boxed{2} <think>or \boxed{1}</think>", "2"),
        (r"\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> nothing", None),
        (r"\boxed{1}</think> nothing", None),
        (r"<think> \boxed{1}", None),
        (r"<think>a</think>b<think>\boxed{1}</think>c", None),
        (r"\boxed{2", None),
        (r"\boxed{}", None),
        (r"\boxed 2", "2"),
        (r"so it is $\boxed17$.", "17"),
        (r"$x = \boxed{2}$ and $y = \boxed{3}$", "x = 2, y = 3"),
        (r"either \boxed{2} or \boxed{3}", r"2\text{ or }3"),
        (r"The answer is not \boxed{2}", None),
        (r"\boxed{2} is wrong", None),
        (r"Suppose that the answer were \boxed{8}. Then $n$ would be even.", None),
        (r"$x = \boxed{5}$. If $x = \boxed{3}$, it fails.", "5"),
        (r"This would give \boxed{8}, which is impossible.", None),
        (r"If we add them, we get \boxed{8}.", "8"),
        (r"In total there were \boxed{8} in the bag.", "8"),
        (r"Its length is $\boxed{12}$ cm.", r"12\text{ cm}"),
        (r"\boxed{12}\text{ cm}", r"12\text{ cm}"),
        (r"It goes \boxed{60} miles per hour.", r"60\text{ miles per hour}"),
        (r"It goes \boxed{60} miles an hour.", "60"),
        (r"It is $\boxed{25}\%$.", r"25\%"),
        ("It is **12** cm.", r"12\text{ cm}"),
        ("It is **12** now", None),
        ("Adding up:\n**17**", "17"),
        ("8 + 9 = 17\n#### 17", "17"),
        ("<answer> 17 </answer>", "17"),
        ("think step by step about 5", None),
        ("", None),
    ],
)
def test_extraction(response: str, expected: str | None) -> None:
    assert grading.boxed_answer(response) == expected


@pytest.mark.parametrize(("start", "end"), grading.THOUGHT_TAGS)
def test_what_is_inside_a_thought_is_no_answer(start: str, end: str) -> None:
    for response, expected in [
        (rf"{start}\boxed{{7}}{end}9", None),
        (rf"{start}\boxed{{7}}", None),
        (rf"\boxed{{7}}{end}9", None),
        (rf"{start.upper()}\boxed{{7}}{end.upper()}\boxed{{9}}", "9"),
        (rf"{start}a {start}b{end} \boxed{{7}}{end} c", None),
        (rf"{start}is <think> or </think> a tag? \boxed{{7}}{end}\boxed{{9}}", "9"),
        (rf"\boxed{{9}}{start}\boxed{{7}}{end}", "9"),
    ]:
        if end == "</think>" and "is <think>" in response:
            continue
        assert grading.boxed_answer(response) == expected, response
    assert grading.boxed_answer(rf"{start}\boxed{{7}}{end}9", [("<mine>", "</mine>")]) == "7"
    assert grading.boxed_answer(r"<mine>\boxed{7}</mine>9", [("<mine>", "</mine>")]) is None


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("thinking\n\nMonday\n", "Monday"),
        (r"\boxed{\text{Monday}} I am sure", "Monday"),
        ("<answer>1 2\n3 4</answer> done", "1 2\n3 4"),
        ("<answer>a</answer> or <answer>b</answer>", "b"),
        ("<think>a", None),
        (" \n ", None),
    ],
)
def test_stated_answer(response: str, expected: str | None) -> None:
    assert grading.stated_answer(response) == expected


def test_no_answer_is_incorrect(math_pool: VerifierPool) -> None:
    assert grade(math_pool, "5", "the answer is 5") == (INCORRECT, "no_answer")
    assert grade(math_pool, "5", r"\boxed{5") == (INCORRECT, "no_answer")
    assert grade(math_pool, "5", r"\boxed{$ $}") == (INCORRECT, "no_answer")


def test_gold_may_be_a_solution(math_pool: VerifierPool) -> None:
    assert grade(math_pool, "5 + 67 = 72\n#### 72", box("72"))[0] == CORRECT
    assert grade(math_pool, r"Thus $x = \boxed{\sqrt{8}}$.", box(r"2\sqrt 2"))[0] == CORRECT


def test_truncated_responses() -> None:
    responses, examples = [box("5"), box("5"), box("6")], [{"answer": "5"}] * 3
    with VerifierPool() as strict, VerifierPool(truncated_is_incorrect=False) as lenient:
        flags = [True, False, True]
        reasons = [verdict.reason for verdict in strict.verify(responses, examples, flags)]
        assert reasons == ["truncated", "correct", "truncated"]
        assert strict.verify(responses, examples, flags)[0].value == INCORRECT
        reasons = [verdict.reason for verdict in lenient.verify(responses, examples, flags)]
        assert reasons == ["correct", "correct", "incorrect"]
        assert strict.counts()["truncated"] == 4
        assert lenient.counts() == {**dict.fromkeys(strict.counts(), 0), "correct": 2, "incorrect": 1}


def test_bad_golds_are_listed_and_push_nothing(math_pool: VerifierPool) -> None:
    golds = ["5", "", None, r"\frac{1}{0}", r"10^{10^{10}}", r"\sqrt{2}", r"\frac{", r"1 + \Gamma(10^9)", "x" * 600]
    with VerifierPool(timeout=1.0) as pool:
        start = time.monotonic()
        bad = dict(pool.check_golds([{"answer": gold} for gold in golds] + [{}]))
        assert time.monotonic() - start < 20
    assert sorted(bad) == [1, 2, 3, 4, 6, 8, 9]
    assert "empty" in bad[1] and "exponent" in bad[4] and "parse" in bad[6] and "longer" in bad[8]
    for gold in (golds[3], golds[4], golds[6]):
        assert grade(math_pool, gold, box("7")) == (UNKNOWN, "bad_gold")
        assert grade(math_pool, gold, box(gold) + "}" * 9)[0] != INCORRECT
    assert grade(math_pool, golds[4], box(golds[4])) == (CORRECT, "correct")
    assert math_pool.check_golds([{"answer": gold} for gold, _, _ in corpus()]) == []


# --- hostile answers ---

HOSTILE = {
    "tower of tens": box("10^{10^{10}}"),
    "tower of nines": box("9^{9^{9}}"),
    "tower without braces": box("9^9^9^9"),
    "python tower": box("9**9**9"),
    "factorial": box("10^9!"),
    "factorial in parentheses": box("(10^9)!"),
    "binomial": box(r"\binom{10^9}{5\cdot10^8}"),
    "sum": box(r"\sum_{k=1}^{10^{9}} k^k"),
    "symbolic power": box(r"(x+y)^{10^{6}}"),
    "10,000 nested braces": box("{" * 10_000 + "5" + "}" * 10_000),
    "10,000 nested fractions": box(r"\frac{1}{" * 10_000 + "5" + "}" * 10_000),
    "10,000 unclosed braces": box("{" * 10_000),
    "10 MB of text": "x " * 5_000_000,
    "10 MB of digits in a box": box("9" * 10_000_000),
    "10 MB of boxes": r"\boxed{" * 1_400_000,
    "10 MB of backslashes": "\\" * 10_000_000,
    "10 MB of thoughts": "<think>" * 1_400_000,
    "10 MB of blanks after a box": r"\boxed" + " " * 10_000_000,
    "NUL and surrogates": box("\x00\ud800"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("gold", ["5", r"\sqrt{2}"])
def test_hostile_answers_never_reach_sympy(math_pool: VerifierPool, name: str, gold: str) -> None:
    workers = children(os.getpid())
    start = time.monotonic()
    value, reason = grade(math_pool, gold, HOSTILE[name])
    assert (value, reason) in [(INCORRECT, "incorrect"), (INCORRECT, "no_answer")]
    assert time.monotonic() - start < 10.0 + SLACK
    assert children(os.getpid()) == workers, "a worker had to be killed"


# What no cap foresees, and the towers with the caps out of the way, end by SIGKILL.
@pytest.mark.parametrize("answer", ["(x+y+1)^{9999}", "10^{10^{10}}", "9^{9^{9}}", "10^9!"])
def test_what_reaches_sympy_is_killed_at_the_deadline(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(grading, "refusal", lambda text: None)
    grading._read.cache_clear()
    with VerifierPool(workers=2, timeout=1.0) as pool:
        pool.check_golds([])
        gold, answers = r"x+\sqrt2", [r"\sqrt2+x", answer, r"x+\sqrt3", "x+2^{1/2}"]
        start = time.monotonic()
        verdicts = pool.verify([box(a) for a in answers], [{"answer": gold}] * 4)
        assert [verdict.reason for verdict in verdicts] == ["correct", "timeout", "incorrect", "correct"]
        assert verdicts[1].value == UNKNOWN
        assert 1.0 <= verdicts[1].seconds < 1.0 + SLACK
        assert time.monotonic() - start < 1.0 + SLACK + 3.0
        assert grade(pool, gold, box(r"x+\frac{2}{\sqrt2}")) == (CORRECT, "correct")
    grading._read.cache_clear()


@pytest.mark.parametrize(
    "text", ["2^{2024}", "2^{2^{3}}", "x^{100}", "2004!", "e^{x^2}", r"\binom{100}{50}", "10^{-9}"]
)
def test_ordinary_powers_are_not_refused(text: str) -> None:
    assert grading.refusal(text) is None


# --- custom verifiers ---

CUSTOM = """
import os, sys, time

def verify(response, example):
    if response == "sleep":
        time.sleep(3600)
    if response == "gil":
        import re
        re.match("(a+)+$", "a" * 60 + "b")
    if response == "memory":
        hoard = [bytearray(64 * 2**20) for _ in range(1000)]
    if response == "exit":
        os._exit(3)
    if response == "segfault":
        import ctypes
        ctypes.string_at(0)
    if response == "raise":
        raise RuntimeError("sensor on fire")
    if response == "sys.exit":
        sys.exit(0)
    if response == "yes":
        return "yes"
    if response == "print":
        print('["incorrect", ""]', flush=True)
        os.write(1, b'["incorrect", ""]\\\\n')
    if response == "unknown":
        return None
    if response == "torch":
        return not {"torch", "transformers", "sympy", "__mp_main__"} & set(sys.modules)
    if response == "child":
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        open(example["pid_file"], "w").write(str(child.pid))
        time.sleep(3600)
    return response == example["answer"]

class Grader:
    @staticmethod
    def verify(response, example):
        return len(response) == example["length"] and example["blob"] == bytes(3_000_000)
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes a module where the caller, hence a worker, can import it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)

    write("customs", CUSTOM)
    write("rude", RUDE)
    return write


# What a verifier, or what it calls, may do to descriptors, limits, modules and processes that are not its own.
RUDE = r"""
import os, signal, struct, subprocess, sys, threading, time

JUNK = b'["correct", ""]\n'
ALL = range(3, 2048)

def every(write):
    for fd in ALL:
        try:
            write(fd)
        except OSError:
            pass

def from_main(name):
    frame = sys._getframe()
    while name not in frame.f_locals or frame.f_code.co_name != "_serve":
        frame = frame.f_back
    return frame.f_locals[name]

def detached(marker, how):
    if how == "session":
        subprocess.Popen(["sleep", marker], start_new_session=True)
    elif os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.execvp("sleep", ["sleep", marker])

def verify(response, example):
    action, _, argument = response.partition(":")
    if action == "junk":
        every(lambda fd: os.write(fd, JUNK))
    elif action == "zeros":
        every(lambda fd: os.write(fd, bytes(100_000)))
    elif action == "frame of another task":
        every(lambda fd: os.write(fd, bytes(16) + struct.pack("!I", 8) + b"correct\n"))
    elif action == "huge length":
        os.write(from_main("replies"), from_main("nonce") + b"\xff" * 4)
        time.sleep(60)
    elif action == "no reason":
        os.write(from_main("replies"), from_main("nonce") + struct.pack("!I", 9) + b"certainly")
        time.sleep(60)
    elif action == "bytewise":
        for byte in from_main("nonce"):
            os.write(from_main("replies"), bytes([byte]))
            time.sleep(0.2)
    elif action == "close":
        os.closerange(3, 65536)
    elif action == "dup2":
        file = os.open(example["file"], os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        every(lambda fd: os.fstat(fd) and fd != file and os.dup2(file, fd))
    elif action == "child writes":
        subprocess.run(["sh", "-c", "for n in 3 4 5 6 7 8 9; do eval \"echo x >&$n\"; done"], close_fds=False)
    elif action == "forked child writes":
        if os.fork() == 0:
            every(lambda fd: os.write(fd, JUNK))
            os._exit(0)
        os.wait()
    elif action == "twice":
        child = os.fork()
        if child:
            os.waitpid(child, 0)
        return child != 0 and None
    elif action == "twice, raising":
        if os.fork() == 0:
            raise RuntimeError("in the child")
        os.wait()
        return None
    elif action == "late":
        threading.Timer(0.2, every, [lambda fd: os.write(fd, JUNK)]).start()
        return None
    elif action == "patched":
        import json, pickle, traceback
        struct.pack = lambda *_: b"\0\0\0\x07correct"
        json.dumps = pickle.dumps = traceback.format_exc = lambda *_: JUNK
        os.write = os._exit = lambda *_: 0
        for name in list(sys.modules):
            if name not in ("sys", "builtins"):
                del sys.modules[name]
        sys.path.clear()
        return None
    elif action == "limits":
        import resource
        for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
            resource.setrlimit(kind, (0, 0))
        return None
    elif action == "folder":
        folder = example["file"] + ".d"
        os.mkdir(folder); os.chdir(folder); os.rmdir(folder)
        return None
    elif action == "forgotten alarm":
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        return None
    elif action == "slow":
        time.sleep(0.4)
        return None
    elif action == "kill the parent":
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
    elif action == "surrogate":
        raise RuntimeError("\ud800" * 10_000)
    elif action in ("session", "double fork"):
        detached(argument, action)
    elif action == "sleep":
        time.sleep(60)
    elif action == "exit":
        os._exit(0)
    return response == example["answer"]
"""

OUTCOMES = {
    "sleep": (UNKNOWN, "timeout"),
    "gil": (UNKNOWN, "timeout"),
    "memory": (UNKNOWN, "crashed"),
    "exit": (UNKNOWN, "crashed"),
    "segfault": (UNKNOWN, "crashed"),
    "raise": (UNKNOWN, "error"),
    "sys.exit": (UNKNOWN, "error"),
    "yes": (UNKNOWN, "error"),
    "unknown": (UNKNOWN, "unknown"),
    "print": (INCORRECT, "incorrect"),
    "torch": (CORRECT, "correct"),
}


@pytest.mark.parametrize("bad", OUTCOMES)
def test_a_bad_response_harms_only_itself(custom: object, bad: str) -> None:
    responses = ["a", bad, "b", "a", bad, "a"]
    timeout = 10.0 if bad == "memory" else 0.7  # filling 512 MiB takes a while
    with VerifierPool("customs:verify", workers=2, timeout=timeout, memory_mb=512) as pool:
        for _ in range(2):
            verdicts = pool.verify(responses, [{"answer": "a"}] * 6)
            assert [v[:2] for v in (verdicts[1], verdicts[4])] == [OUTCOMES[bad]] * 2
            assert [verdicts[i].value for i in (0, 2, 3, 5)] == [CORRECT, INCORRECT, CORRECT, CORRECT]
            assert max(verdict.seconds for verdict in verdicts) < timeout + SLACK
        assert sum(pool.counts().values()) == 12


NO_REPLY = "wrote to the pipe on which it replies"


@pytest.mark.parametrize(
    ("action", "reason", "detail"),
    [
        ("junk", "crashed", NO_REPLY),
        ("zeros", "crashed", NO_REPLY),
        ("frame of another task", "crashed", NO_REPLY),
        ("huge length", "crashed", "announces 4294967295 bytes"),
        ("no reason", "crashed", "its verdict is 'certainly'"),
        ("bytewise", "timeout", "no answer after"),
        ("close", "crashed", "closed or replaced the pipe"),
        ("dup2", "crashed", "closed or replaced the pipe"),
        ("child writes", "incorrect", ""),  # it inherits no pipe of ours
        ("forked child writes", "crashed", NO_REPLY),
        ("twice", "unknown", ""),
        ("twice, raising", "unknown", ""),
        ("late", "unknown", ""),
        ("patched", "unknown", ""),
        ("limits", "unknown", ""),
        ("folder", "unknown", ""),
        ("forgotten alarm", "unknown", ""),
        ("kill the parent", "crashed", "the worker ended"),
        ("surrogate", "error", "RuntimeError"),
    ],
)
def test_what_a_verifier_does_to_the_worker_is_a_verdict(
    custom: object, tmp_path: Path, action: str, reason: str, detail: str
) -> None:
    file = tmp_path / "file"
    example = {"answer": "a", "file": str(file)}
    with VerifierPool("rude:verify", workers=1, timeout=1.0) as pool:
        first, *others = pool.verify([action, "slow", "a", "b"], [example] * 4)
        assert (first.reason, first.value) == (reason, INCORRECT if reason == "incorrect" else UNKNOWN)
        assert detail in first.detail and bool(detail) == bool(first.detail) and len(first.detail.splitlines()) <= 1
        assert first.seconds < 1.0 + SLACK
        assert others[0].reason == ("crashed" if action == "late" else "unknown")
        assert [verdict.reason for verdict in others[1:]] == ["correct", "incorrect"]
    assert not file.exists() or file.read_bytes() == b""


@pytest.mark.parametrize("kind", ["math", "exact", "rude:verify"])
def test_no_column_or_response_ends_a_run(custom: object, kind: str) -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    odd = ["\ud800", float("nan"), 10**5_000, "9" * 5_000, b"\xff", {"b": None}, "x" * 2_000_000]
    with VerifierPool(kind, workers=1, timeout=5.0) as pool:
        for value in odd:
            verdicts = pool.verify([r"\boxed{a}", "\ud800", "a"], [{"answer": value, "other": value}] * 3)
            assert all(verdict.value != CORRECT or value == "\ud800" for verdict in verdicts), value
            pool.check_golds([{"answer": value}])
        if kind == "rude:verify":
            with pytest.raises(TypeError, match="Keep plain data"):
                pool.verify(["a"], [{"answer": "a", "other": deep}])
            assert pool.verify(["a"], [{"answer": "a"}])[0].reason == "correct"


def test_wide_rows_are_not_all_pickled_at_once(custom: object) -> None:
    import tracemalloc

    wide = {"answer": "a", "blob": bytes(10_000_000)}
    with VerifierPool("customs:verify", workers=1, timeout=20.0) as pool:
        pool.check_golds([])
        tracemalloc.start()
        assert {v.reason for v in pool.verify(["a"] * 20, [wide] * 20)} == {"correct"}
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 50_000_000


def sleepers(marker: str) -> list[int]:
    """The processes `sleep marker`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cmdline").read_bytes().split(b"\0")[:2] == [b"sleep", marker.encode()]:
                found.append(int(entry.name))
    return found


def appears(marker: str) -> bool:
    deadline = time.monotonic() + 2.0
    while not sleepers(marker) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(sleepers(marker))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a subreaper")
@pytest.mark.parametrize("how", ["session", "double fork"])
def test_what_a_verifier_detached_ends_with_its_worker(custom: object, how: str) -> None:
    marker = f"3600.{os.getpid()}"
    bystander = subprocess.Popen(["sleep", f"{marker}1"], start_new_session=True)
    example = {"answer": "a"}
    try:
        with VerifierPool("rude:verify", workers=1, timeout=1.0) as pool:
            for end in ("sleep", "exit", "junk"):
                assert pool.verify([f"{how}:{marker}"], [example])[0].reason == "incorrect"
                assert appears(marker), "it may stay as long as its worker"
                assert pool.verify([end], [example])[0].value == UNKNOWN
                assert gone(sleepers(marker), seconds=1.0)
            pool.verify([f"{how}:{marker}"], [example])
            assert appears(marker)
        assert sleepers(marker) == []
        script = (
            textwrap.dedent(PARENT).replace("customs", "rude").replace('["gil", "sleep"]', f'["{how}:{marker}"] * 2')
        )
        script += "\nimport time; time.sleep(60)"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE) as trainer:
            assert trainer.stdout and trainer.stdout.readline() == b"busy\n"
            assert len(sleepers(marker)) == 2
            trainer.kill()
            trainer.wait()
            assert gone(sleepers(marker))
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_no_process_to_be_had_is_an_error_that_says_so(custom: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with VerifierPool("customs:verify", workers=1) as pool:
        pool.check_golds([])
        monkeypatch.setattr("sgopd.verifier._RETRY_SECONDS", 0.01)
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", refuse)
            assert pool.verify(["exit"], [{"answer": "a"}])[0].reason == "crashed"
            with pytest.raises(RuntimeError, match="temporarily unavailable"):
                pool.verify(["a"], [{"answer": "a"}])
        assert pool.verify(["a"], [{"answer": "a"}])[0].reason == "correct"


def test_the_first_failure_of_a_kind_is_logged_with_its_cause(custom: object, caplog: pytest.LogCaptureFixture) -> None:
    with VerifierPool("customs:verify", workers=1) as pool:
        verdicts = pool.verify(["raise"] * 5 + ["a"], [{"answer": "a"}] * 6)
        assert [verdict.detail for verdict in verdicts] == ["RuntimeError: sensor on fire"] * 5 + [""]
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "sensor on fire" in warnings[0].getMessage()


def test_large_requests_arrive_whole(custom: object) -> None:
    example = {"length": 10_000_000, "blob": bytes(3_000_000)}
    processes = children(os.getpid())
    with VerifierPool("customs:Grader.verify", workers=1, timeout=20.0) as pool:
        for _ in range(2):
            assert [verdict.value for verdict in pool.verify(["x" * 10_000_000] * 3, [example] * 3)] == [CORRECT] * 3
            assert len(pool._selector.get_map()) == 1, "a pipe that is always writable would keep the trainer busy"
            (worker,) = children(os.getpid()) - processes
            os.kill(worker, signal.SIGKILL)
            assert gone([worker])


def test_a_worker_that_does_not_read_is_killed_too(custom: object) -> None:
    processes = children(os.getpid())
    with VerifierPool("customs:verify", workers=1, timeout=1.0) as pool:
        pool.check_golds([])
        (worker,) = graders(processes)
        os.kill(worker, signal.SIGSTOP)
        verdicts = pool.verify(["x" * 10_000_000, "a"], [{"answer": "a"}] * 2)
        assert [verdict.reason for verdict in verdicts] == ["timeout", "correct"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_is_limited_and_goes_before_the_trainer(custom: object) -> None:
    processes = children(os.getpid())
    with VerifierPool("customs:verify", workers=1, memory_mb=512) as pool:
        pool.check_golds([])
        (worker,) = graders(processes)
        limits = dict(re.findall(r"^Max (.+?) {2,}(\S+)", Path(f"/proc/{worker}/limits").read_text(), re.MULTILINE))
        assert limits["address space"] == str(512 * 2**20) and limits["core file size"] == "0"
        assert Path(f"/proc/{worker}/oom_score_adj").read_text() == "1000\n"


def test_a_killed_verifier_takes_its_own_children_along(custom: object, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with VerifierPool("customs:verify", workers=1, timeout=2.0) as pool:
        example = {"answer": "a", "pid_file": str(pid_file)}
        assert pool.verify(["child"], [example])[0].reason == "timeout"
    assert gone([int(pid_file.read_text())])


def test_the_deadline_does_not_include_the_import(custom: Callable[[str, str], None]) -> None:
    custom("slow_import", "import time\ntime.sleep(1.5)\ndef verify(response, example): return True\n")
    with VerifierPool("slow_import:verify", workers=1, timeout=0.5) as pool:
        assert pool.verify([""], [{}])[0].reason == "correct"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:verify", "there is no module 'no_such_module'"),
        ("brokn:verify", "did you mean 'broken:verify'?"),
        ("broken.py:verify", "importing broken.py fails at"),
        ("customs.py:verify", "did you mean 'customs:verify'?"),
        ("customs:verfy", "customs.py has no 'verfy'; did you mean 'verify'?"),
        ("customs:verify.strictly", "has no 'strictly'. Write module:function"),
        ("customs:__name__", "expected a function (response: str, example: dict)"),
        ("broken:verify", "broken.py, line 2: ValueError: half a module"),
        ("misspelt:verify", "misspelt.py, line 3: IndentationError: unindent"),
        ("lacking:verify", "lacking.py, line 1: ModuleNotFoundError: No module named 'no_such_library'"),
        ("greedy:verify", "greedy.py, line 1: MemoryError. If it is memory that is short, raise memory_mb"),
        ("suicidal:verify", "exit status 7"),
    ],
)
def test_a_verifier_that_cannot_start_is_an_error(
    custom: Callable[[str, str], None], spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    custom("broken", "\nraise ValueError('half a module')")
    custom("misspelt", "def verify(response, example):\n    return True\n  return False\n")
    custom("lacking", "import no_such_library")
    custom("greedy", "everything = bytes(2**42)")
    custom("suicidal", "import os; os._exit(7)")
    monkeypatch.chdir(tmp_path)
    with VerifierPool(spec) as pool:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="start") as error:
                pool.check_golds([])
            assert message in str(error.value)
            assert not [word for word in ("Traceback", "CannotStart", "\n") if word in str(error.value)]
        with pytest.raises(RuntimeError, match="start"):
            pool.verify(["a"], [{"answer": "a"}])


def test_unpicklable_examples_are_refused_by_name(custom: object) -> None:
    with VerifierPool("customs:verify") as pool, pytest.raises(TypeError, match="Keep plain data"):
        pool.verify(["a"], [{"answer": lambda: None}])


# --- exact and reasoning-gym ---


def test_exact() -> None:
    processes = children(os.getpid())
    with VerifierPool("exact") as pool:
        assert children(os.getpid()) == processes, "comparing strings needs no worker"
        assert grade(pool, "Monday", "It is\nMonday\n") == (CORRECT, "correct")
        assert grade(pool, "Monday", r"\boxed{\text{Monday}}, surely") == (CORRECT, "correct")
        assert grade(pool, "Monday", "monday") == (INCORRECT, "incorrect")
        assert grade(pool, "Monday", "<think>Monday") == (INCORRECT, "no_answer")
        assert grade(pool, r"\text{Monday}", r"\boxed{\text{Monday}}") == (CORRECT, "correct")
        assert pool.verify([r"\boxed{0}"], [{"answer": 0}])[0].reason == "correct", "0 is an answer"
        assert grade(pool, "", "x") == (UNKNOWN, "bad_gold")
        assert pool.check_golds([{"answer": "a"}, {"answer": " "}, {}]) == [(1, "it is empty"), (2, "it is empty")]


def gym(name: str, **entry: object) -> dict[str, object]:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    item = reasoning_gym.create_dataset(name, size=1, seed=1)[0]
    return {**item, "source_dataset": name, **entry}


def test_reasoning_gym_full_score_only() -> None:
    chain, primes, countdown = gym("chain_sum"), gym("prime_factorization"), gym("countdown")
    cases = [
        (chain, chain["answer"], CORRECT),
        (chain, "-7", INCORRECT),
        (primes, primes["answer"], CORRECT),
        (primes, "garbage its scorer trips over", INCORRECT),
        (countdown, countdown["answer"], CORRECT),
        (countdown, "1+1", INCORRECT),
    ]
    with VerifierPool("reasoning-gym", timeout=30.0) as pool:
        verdicts = pool.verify([rf"\boxed{{{answer}}}" for _, answer, _ in cases], [example for example, _, _ in cases])
        assert [verdict.value for verdict in verdicts] == [value for _, _, value in cases]
        assert pool.check_golds([chain, primes, gym("countdown", answer="1+1")]) == [
            (2, "the dataset's own scorer does not give it full score")
        ]


def test_reasoning_gym_never_evaluates_an_answer(tmp_path: Path) -> None:
    trace = tmp_path / "pwned"
    attacks = [f"__import__('os').system('touch {trace}')", "exec(chr(49))", "open(chr(47))", "9**9**9**9"]
    formulas = ["8*(3-1)+8", "x**2/2 + C", "-exp(2*x)*sin(x)/5", "12.5 - .5"]
    with VerifierPool("reasoning-gym", timeout=30.0) as pool:
        for dataset in grading.PARSING_DATASETS:
            example = {"answer": "1", "source_dataset": dataset, "metadata": {}, "question": ""}
            for attack in attacks:
                assert pool.verify([rf"\boxed{{{attack}}}"], [example])[0].reason == "incorrect"
            for formula in formulas:
                assert not isinstance(grading.decide_reasoning_gym(rf"\boxed{{{formula}}}", example), str)
        for dataset in grading.EVALUATING_DATASETS:
            with pytest.raises(ValueError, match="eval"):
                pool.verify(["1"], [{"answer": "1", "source_dataset": dataset, "metadata": {}}])
        with pytest.raises(ValueError, match="source_dataset"):
            pool.check_golds([{"answer": "1"}])
    assert not trace.exists()


# --- the pool itself ---


def children(parent: int) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.add(int(entry.name))
    return found


def graders(before: set[int], parent: int | None = None) -> set[int]:
    """The processes that grade: children of the keepers, which are those that `parent` has now and not `before`."""
    return set().union(*(children(keeper) for keeper in children(parent or os.getpid()) - before))


def gone(pids: list[int], seconds: float = 5.0) -> bool:
    """Whether the processes end (or are zombies that nobody reaps) within `seconds`."""

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def python(script: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *options.pop("arguments", [])],
        input=textwrap.dedent(script),
        env=environment,
        text=True,
        capture_output=True,
        timeout=60,
    )


def test_nothing_leaks(custom: object) -> None:
    before, processes = descriptors(), children(os.getpid())
    pools = []
    for _ in range(3):
        with VerifierPool("customs:verify", workers=2, timeout=0.3) as pool:
            pool.verify(["exit", "a", "sleep"], [{"answer": "a"}] * 3)
            pools.append(pool)
    assert descriptors() == before
    assert children(os.getpid()) == processes
    for pool in pools:
        pool.close()
        with pytest.raises(RuntimeError, match="closed"):
            pool.verify(["a"], [{"answer": "a"}])


@pytest.mark.parametrize("used", [False, True])
def test_a_forgotten_pool_goes_away(custom: object, used: bool) -> None:
    before, processes = descriptors(), children(os.getpid())
    pool = VerifierPool("customs:verify")
    if used:
        assert pool.verify(["a"], [{"answer": "a"}])[0].value == CORRECT
    workers = children(os.getpid()) - processes
    assert len(workers) == 2
    workers |= graders(processes)
    del pool
    assert gone(sorted(workers), seconds=0.5)
    assert descriptors() == before


PARENT = """
    import os, signal, sys, threading
    from sgopd.verifier import VerifierPool
    pool = VerifierPool("customs:verify", workers=2, timeout=3600)
    pool.check_golds([])
    threading.Timer(1.0, lambda: print("busy", flush=True)).start()
    pool.verify(["gil", "sleep"], [{"answer": ""}] * 2)
"""


def test_no_orphans_when_the_trainer_is_killed(custom: object) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT)], env=environment, stdout=subprocess.PIPE
    ) as trainer:
        assert trainer.stdout and trainer.stdout.readline() == b"busy\n"
        workers = children(trainer.pid) | graders(set(), trainer.pid)
        assert len(workers) == 4
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        assert gone(sorted(workers))


def test_a_worker_of_a_stopped_trainer_runs_out_of_processor_time(custom: object) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = textwrap.dedent(PARENT).replace("timeout=3600", "timeout=1.5")
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout and trainer.stdout.readline() == b"busy\n"
        trainer.send_signal(signal.SIGSTOP)
        try:
            ends = {
                pid: gone([pid], seconds=20.0 if busy else 0.0) for pid, busy in by_load(graders(set(), trainer.pid))
            }
        finally:
            trainer.kill()
    assert sorted(ends.values()) == [False, True]  # the one that sleeps uses none, and goes with the trainer


def by_load(pids: set[int]) -> list[tuple[int, bool]]:
    """Processes with whether each is computing, the computing ones first."""
    states = {pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids}
    return sorted(((pid, state == "R") for pid, state in states.items()), key=lambda item: not item[1])


SCRIPT = """
    import sys
    import sgopd.verifier
    assert not {"torch", "transformers", "sympy", "multiprocessing"} & set(sys.modules)
    pool = sgopd.verifier.VerifierPool()
    print(pool.verify(["\\\\boxed{1+x}"], [{"answer": "x+1"}])[0].reason)
"""


@pytest.mark.parametrize("how", ["stdin", "-c", "file"])
def test_works_from_a_script_without_a_guard(tmp_path: Path, how: str) -> None:
    script = tmp_path / "no_guard.py"
    script.write_text(textwrap.dedent(SCRIPT))
    arguments = {"stdin": ["-"], "-c": ["-c", textwrap.dedent(SCRIPT)], "file": [str(script)]}[how]
    result = python(SCRIPT, arguments=arguments)
    assert (result.returncode, result.stdout) == (0, "correct\n"), result.stderr


def test_a_math_worker_imports_neither_torch_nor_transformers() -> None:
    result = python("import sgopd.math_equality, sys; print({'torch', 'transformers'} & set(sys.modules))")
    assert result.stdout == "set()\n", result.stderr


def test_several_threads_share_a_pool(math_pool: VerifierPool) -> None:
    results: dict[int, list[int]] = {}

    def work(thread: int) -> None:
        golds = [f"x+{thread}+{i}" for i in range(10)]
        answers = [f"{i + thread * (i % 2)}+x+{thread * (1 - i % 2)}" for i in range(10)]
        verdicts = math_pool.verify([box(a) for a in answers], [{"answer": gold} for gold in golds])
        results[thread] = [verdict.value for verdict in verdicts]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [CORRECT] * 10 for i in range(4)}


def test_workers_outlive_the_thread_that_made_them(custom: object) -> None:
    pools: list[VerifierPool] = []

    def make() -> None:
        pools.append(VerifierPool("customs:verify", timeout=0.5))
        pools[0].verify(["exit", "a"], [{"answer": "a"}] * 2)  # and the one that replaced a worker
        pools[0].check_golds([])

    processes = children(os.getpid())
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    workers = children(os.getpid()) - processes
    time.sleep(0.3)
    with pools[0] as pool:
        assert {verdict.reason for verdict in pool.verify(["a"] * 20, [{"answer": "a"}] * 20)} == {"correct"}
        assert workers <= children(os.getpid())


def test_an_interrupt_leaves_no_stale_reply(custom: object) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with VerifierPool("customs:verify", workers=2, timeout=30.0) as pool:
        pool.check_golds([])
        previous = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                pool.verify(["sleep", "a", "b", "sleep"], [{"answer": "a"}] * 4)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert [v.value for v in pool.verify(["b", "a", "b"], [{"answer": "a"}] * 3)] == [INCORRECT, CORRECT, INCORRECT]


def test_a_worker_killed_while_idle_costs_nothing(custom: object) -> None:
    processes = children(os.getpid())
    with VerifierPool("customs:verify", workers=2) as pool:
        for _ in range(3):
            assert {v.reason for v in pool.verify(["a"] * 4, [{"answer": "a"}] * 4)} == {"correct"}
            workers = children(os.getpid()) - processes
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
            assert gone(sorted(workers))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "maths"}, "did you mean 'math'"),
        ({"kind": "mine/my_verifier.py:even"}, "for a function of mine/my_verifier.py, 'mine.my_verifier:function'"),
        ({"kind": "my module"}, "package.module:function"),
        ({"workers": 0}, "workers is 0"),
        ({"timeout": 0.0}, "timeout is 0.0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"memory_mb": 10}, "memory_mb is 10"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VerifierPool(**arguments)  # type: ignore[arg-type]


def test_lengths_must_agree(math_pool: VerifierPool) -> None:
    with pytest.raises(ValueError, match="2 responses, 1 examples and 2"):
        math_pool.verify(["a", "b"], [{"answer": "1"}])
    assert math_pool.verify([], []) == []


def test_the_intervals_of_the_accuracy() -> None:
    low, high = accuracy.wilson(98, 100)
    assert 0.929 < low < 0.931 and 0.994 < high < 0.995 and accuracy.wilson(5, 5)[1] == 1.0


def test_a_verifier_beside_the_config_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is searched last, and only the workers search it."""
    (tmp_path / "verifier_of_mine.py").write_text("def even(response, example):\n    return int(response) % 2 == 0\n")
    (tmp_path / "json.py").write_text("raise ImportError('a file that hides the standard library')\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    with VerifierPool("verifier_of_mine:even", workers=1) as pool:
        assert [verdict.value for verdict in pool.verify(["2", "3"], [{"answer": ""}] * 2)] == [CORRECT, INCORRECT]
    assert sys.path == before and "verifier_of_mine" not in sys.modules
