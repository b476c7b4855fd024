r"""Verdicts on rollouts, from worker processes that can be killed.

    with VerifierPool("math", workers=2, timeout=3.0) as verifier:
        verdicts = verifier.verify(responses, examples, truncated)

Checking mathematics means running sympy on what a language model wrote, and `\boxed{10^{10^{10}}}` is enough
to freeze a Python process for good. So the trainer's process only extracts answers and settles the plain
ones (`sgopd.grading`); the rest goes to processes that import neither torch nor the caller's `__main__`,
take one piece of work at a time, and are killed and replaced when it runs past its deadline. Nothing that such a
process does, or that it writes to descriptors of ours, reaches the caller as anything but a verdict.

What is not known is `UNKNOWN`, and an unknown verdict never pushes the gate:

| reason | value | |
|---|---|---|
| correct, incorrect | +1, −1 | graded |
| no_answer | −1 | the response ended without an answer |
| truncated | −1 | the response was cut off, and was not read (`truncated_is_incorrect`) |
| unknown | 0 | equality rests on text that only one side has; or a custom verifier returned None |
| timeout | 0 | grading ran past the deadline; the worker was killed |
| crashed | 0 | the worker died (out of memory, a segmentation fault, `os._exit`), or its reply is none |
| error | 0 | the grader raised |
| bad_gold | 0 | the reference answer cannot be read, and the response is not spelled like it |
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import pickle
import re
import reprlib
import secrets
import select
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

from sgopd import grading
from sgopd.grading import Example, Work
from sgopd.verifier_pipe import LOST_PIPE, describe

logger = logging.getLogger(__name__)

CORRECT, INCORRECT, UNKNOWN = 1, -1, 0
VALUES = {
    "correct": CORRECT,
    "incorrect": INCORRECT,
    "no_answer": INCORRECT,
    "truncated": INCORRECT,
    "unknown": UNKNOWN,
    "timeout": UNKNOWN,
    "crashed": UNKNOWN,
    "error": UNKNOWN,
    "bad_gold": UNKNOWN,
}
KINDS = ("math", "exact", "reasoning-gym")

_START_SECONDS = 120.0  # to import what a kind needs, on a busy machine
_START_ATTEMPTS = 3
_RETRY_SECONDS = 0.5
_END_SECONDS = 10.0  # for a worker's keeper to kill all that it started
_HEAD = struct.Struct("!16sI")  # of a reply: the nonce of its task, and the length of what follows
_MAX_REPLY = 4_096
# The caller's search path, not the folder it happens to run in; nothing but `sys` is imported before it is set.
_WORKER = r"import sys; sys.path[:] = sys.argv[1].split('\n'); import sgopd.verifier_worker as w; w.main()"
_WORKER_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",  # sympy's ordering, hence sometimes its answer, follows the hashes of names
    "OMP_NUM_THREADS": "1",  # a worker is one core, and thread stacks count as address space
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class Verdict(NamedTuple):
    """What the verifier says of one response."""

    value: int  # CORRECT, INCORRECT or UNKNOWN
    reason: str  # a key of VALUES
    seconds: float  # from dispatch to the answer; 0 if no worker was needed
    detail: str = ""  # of timeout, crashed and error: one line that says what happened, such as the exception's last


class _Outcome(NamedTuple):
    reason: str
    detail: str = ""  # the last line is the verdict's; those before it are a traceback
    seconds: float = 0.0

    def last_line(self) -> str:
        return (self.detail.strip().splitlines() or [""])[-1]


class VerifierPool:
    r"""Grades responses; see the module's docstring for verdicts and reasons.

    A verdict does not depend on the number of workers or on what else is graded (only a timeout depends on
    how busy the machine is). `verify` may be called from several threads; they take turns.

    Args:
        kind: how a response is compared with `example["answer"]`.
            "math": the last balanced `\boxed{}` outside thoughts, by spelling or by what it is
            (`sgopd.answers`); sympy compares formulae. Gold: LaTeX, or a solution that ends in `\boxed{}` or `#### 72`.
            "exact": string equality of the box, else of `<answer>…</answer>`, else of the last line. Needs no workers.
            "reasoning-gym": the scorer of `example["source_dataset"]` on that same answer, full score only.
            "package.module:function": `function(response: str, example: dict) -> bool | None`, given the whole
            response, imported in the workers only, from the caller's `sys.path` or the working directory. None means
            unknown.
        workers: processes, ≥ 1. They start at once, in the background.
        timeout: seconds for one response, from dispatch to a ready worker. Past it the worker is killed.
        memory_mb: MiB of address space of a worker, its imports included (sympy 60, reasoning_gym 200).
        truncated_is_incorrect: call a truncated response incorrect without reading it; otherwise grade it like any.
        thought_tags: (open, close) pairs; what stands between is not read for an answer. A custom verifier gets it all.

    Raises:
        ValueError: an argument out of range, or an unknown kind.
        RuntimeError: (first use) the workers cannot start, for instance because a custom verifier cannot be imported.
    """

    def __init__(
        self,
        kind: str = "math",
        *,
        workers: int = 2,
        timeout: float = 3.0,
        memory_mb: int = 2048,
        truncated_is_incorrect: bool = True,
        thought_tags: grading.Tags = grading.THOUGHT_TAGS,
    ) -> None:
        if kind not in KINDS and not re.fullmatch(r"[\w.]+:[\w.]+", kind):
            near = difflib.get_close_matches(kind, KINDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            if file := re.match(r"([\w./]+)\.py\b", kind):
                hint = f"; for a function of {file[0]}, '{file[1].replace('/', '.').strip('.')}:function'"
            raise ValueError(f"kind is {kind!r}; expected one of {KINDS} or 'package.module:function'{hint}")
        if workers < 1:
            raise ValueError(f"workers is {workers}; expected one process or more")
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; expected seconds above 0")
        if memory_mb < 256:
            raise ValueError(f"memory_mb is {memory_mb}; expected 256 MiB or more: importing reasoning_gym takes 200")
        self.kind = kind
        self.timeout = timeout
        self.memory_mb = memory_mb
        self.truncated_is_incorrect = truncated_is_incorrect
        self.thought_tags = thought_tags
        self._worker_count = 0 if kind == "exact" else workers
        entries = [*sys.path, "."] if ":" in kind else sys.path  # last: a file there hides no package
        self._search_path = "\n".join(os.path.abspath(entry) for entry in entries)
        self._workers: list[_Worker] = []
        self._started = False  # whether a worker was ever ready
        self._failed_starts = 0
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        # Linux sends a worker its death signal when the *thread* that started it ends: let one outlive them all.
        self._spawner = ThreadPoolExecutor(1, thread_name_prefix="sgopd-verifier")
        self._logged: set[str] = set()
        self._closed = False
        self._finalizer = weakref.finalize(self, _end_all, self._workers, self._selector, os.getpid())
        self._fill()

    def verify(
        self, responses: Sequence[str], examples: Sequence[Example], truncated: Sequence[bool] | None = None
    ) -> list[Verdict]:
        """One verdict a response, in order.

        Args:
            responses: B completions, without their prompts.
            examples: B dicts with "answer" and whatever columns the kind reads.
            truncated: B flags, true where generation stopped at its length limit; None: nowhere.

        Raises:
            ValueError: lengths differ, or an example lacks what the kind needs.
            TypeError: an example holds something that cannot be pickled.
            RuntimeError: the pool is closed, or its workers cannot start.
        """
        flags = [False] * len(responses) if truncated is None else truncated
        if not len(responses) == len(examples) == len(flags):
            raise ValueError(
                f"verify got {len(responses)} responses, {len(examples)} examples and {len(flags)} truncated flags; "
                "expected as many of each"
            )
        decisions: list[_Outcome | Work] = []
        for response, example, cut in zip(responses, examples, flags):
            skip = cut and self.truncated_is_incorrect
            decisions.append(_Outcome("truncated") if skip else self._decide(response, example))
        works = [decision for decision in decisions if not isinstance(decision, _Outcome)]
        outcomes = iter(self._run(works))
        verdicts = []
        for decision in decisions:
            outcome = decision if isinstance(decision, _Outcome) else next(outcomes)
            verdicts.append(Verdict(VALUES[outcome.reason], outcome.reason, outcome.seconds, outcome.last_line()))
        with self._lock:
            self._counts.update(verdict.reason for verdict in verdicts)
        return verdicts

    def check_golds(self, examples: Sequence[Example]) -> list[tuple[int, str]]:
        """Indices of examples whose reference answer is of no use, each with the reason. To be called before training.

        Runs in the workers like any grading, so a hostile reference answer costs its deadline and no more. A
        custom verifier's examples are not looked at, but that it can be imported is.

        Raises:
            RuntimeError: the workers cannot start.
            ValueError: reasoning-gym examples that lack columns or whose scorer is left out.
        """
        golds = [self._decide_gold(example) for example in examples]
        # Golds repeat: each is looked at once.
        keys = [None if isinstance(gold, str) else pickle.dumps(gold) for gold in golds]
        unique = {key: gold for key, gold in zip(keys, golds) if not isinstance(gold, str)}
        outcomes = dict(zip(unique, self._run(list(unique.values()), wait_for_start=True)))
        bad = []
        for index, (key, gold) in enumerate(zip(keys, golds)):
            reason = gold if isinstance(gold, str) else self._complaint(outcomes[key])
            if reason:
                bad.append((index, reason))
        return bad

    def counts(self) -> dict[str, int]:
        """Verdicts given since the start, by reason; every reason is present."""
        return {reason: self._counts[reason] for reason in VALUES}

    def close(self) -> None:
        """Kills the workers. Idempotent; waits for a `verify` under way in another thread."""
        with self._lock:
            self._closed = True
            self._finalizer()  # once; a pool that is forgotten or lives to the exit ends by it too
            self._spawner.shutdown()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- per kind: what is decided here, what a worker gets, what it means for a gold ---

    def _decide(self, response: str, example: Example) -> _Outcome | Work:
        decision: str | Work = response, example
        if self.kind == "reasoning-gym":
            grading.reasoning_gym_entry(example)  # what it has to say of the data set is the caller's mistake
        try:
            if self.kind == "math":
                decision = grading.decide_math(response, example, self.thought_tags)
            elif self.kind == "exact":
                decision = grading.decide_exact(response, example, self.thought_tags)
            elif self.kind == "reasoning-gym":
                decision = grading.decide_reasoning_gym(response, example, self.thought_tags)
        except Exception as error:  # whatever a model may write, it does not end a run
            level = logging.DEBUG if "deciding" in self._logged else logging.WARNING
            self._logged.add("deciding")
            logger.log(level, "verifier: error while reading %s", _short(response[-2_000:]), exc_info=True)
            return _Outcome("error", describe(error))
        return _Outcome(decision) if isinstance(decision, str) else decision

    def _decide_gold(self, example: Example) -> str | Work:
        """A complaint ("" if there is none), or the work that will tell."""
        if self.kind == "reasoning-gym":
            dataset, entry = grading.reasoning_gym_entry(example)
            has_answer = entry["answer"] not in (None, "None")  # some puzzles have a scorer only
            return (dataset, entry["answer"], entry) if has_answer else ""
        try:
            if self.kind == "math":
                return grading.decide_gold(example)
            if self.kind == "exact":
                return "" if grading.stated_gold(example) else "it is empty"
        except Exception as error:  # such as a number of 5,000 digits, which Python does not write out
            return f"it cannot be read: {error}"
        return ""

    def _complaint(self, outcome: _Outcome) -> str:
        if outcome.reason == "bad_gold":
            return "math-verify cannot parse it: only an answer spelled the same would be correct"
        if outcome.reason == "incorrect" and self.kind == "reasoning-gym":
            return "the dataset's own scorer does not give it full score"
        if outcome.reason in ("timeout", "crashed", "error"):
            return f"checking it ended with {outcome.reason}: {outcome.last_line()}"
        return ""

    # --- the pool ---

    def _run(self, works: Sequence[Work], wait_for_start: bool = False) -> list[_Outcome]:
        """Has the workers do `works`; outcomes in the same order. May wait for a first worker even without work."""
        waiting = deque(enumerate(works))
        outcomes: dict[int, _Outcome] = {}
        with self._lock:
            if self._closed:
                raise RuntimeError("the verifier pool is closed; make a new one")
            try:
                must_start = wait_for_start and self._worker_count > 0
                while len(outcomes) < len(works) or (must_start and not self._started):
                    self._fill()
                    for worker in self._workers:
                        if waiting and worker.is_idle():
                            task, work = waiting.popleft()
                            # Pickled when its turn comes: a batch of wide rows is not held twice.
                            worker.dispatch(task, _pickled(work), self.timeout)
                            self._send(worker)
                    outcomes.update(self._wait())
            finally:
                # After an interrupt or a failed start: nobody would collect these replies.
                for worker in [worker for worker in self._workers if worker.task is not None]:
                    self._discard(worker)
        ordered = [outcomes[index] for index in range(len(works))]
        for work, outcome in zip(works, ordered):
            if outcome.detail:
                first = outcome.reason not in self._logged
                self._logged.add(outcome.reason)
                message = "verifier: %s (%s)\n  while grading %s%s"
                more = "; further ones are only counted" if first else ""
                level = logging.WARNING if first else logging.DEBUG
                logger.log(level, message, outcome.reason, outcome.detail.strip(), _short(work), more)
        return ordered

    def _fill(self) -> None:
        """Starts processes until all are there, without waiting for them to be ready."""
        while len(self._workers) < self._worker_count:
            arguments = self._search_path, self.kind, str(os.getpid()), str(self.timeout), str(self.memory_mb)
            try:
                process = self._spawner.submit(
                    subprocess.Popen,
                    [sys.executable, "-c", _WORKER, *arguments],
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, **_WORKER_ENVIRONMENT},
                    start_new_session=True,  # Ctrl-C is for the trainer
                ).result()
            except OSError as error:  # no process or no memory to be had: perhaps for what a verifier started
                self._count_failed_start(f"it could not be started: {error}")
                time.sleep(_RETRY_SECONDS)
                return
            worker = _Worker(process)
            self._workers.append(worker)
            self._selector.register(worker.replies, selectors.EVENT_READ, worker)
            self._send(worker)

    def _discard(self, worker: _Worker) -> int:
        """Ends a worker; returns its exit status. `_fill` makes the next one."""
        self._workers.remove(worker)
        self._selector.unregister(worker.replies)
        if worker.outbox:
            self._selector.unregister(worker.requests)
        return worker.end()

    def _send(self, worker: _Worker) -> None:
        """Writes as much of the request as the pipe takes; the selector asks for the rest."""
        waiting = worker.requests in self._selector.get_map()
        try:
            worker.outbox = worker.outbox[os.write(worker.requests, worker.outbox) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # the end of its replies will say that it died
            worker.outbox = worker.outbox[:0]
        if worker.outbox and not waiting:
            self._selector.register(worker.requests, selectors.EVENT_WRITE, worker)
        elif waiting and not worker.outbox:
            self._selector.unregister(worker.requests)

    def _wait(self) -> dict[int, _Outcome]:
        """Waits for the next reply or deadline; outcomes by index of the work."""
        outcomes: dict[int, _Outcome] = {}
        if not self._workers:
            return outcomes
        deadline = min(worker.deadline for worker in self._workers)
        pause = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        for key, events in self._selector.select(pause):
            worker = key.data
            if worker not in self._workers:
                continue
            if events & selectors.EVENT_WRITE:
                self._send(worker)
                continue
            task, outcome = worker.task, self._receive(worker)
            if outcome and task is not None:
                outcomes[task] = outcome
        for worker in [worker for worker in self._workers if worker.deadline <= time.monotonic()]:
            self._discard(worker)
            if not worker.ready:
                self._count_failed_start(f"it was not ready after {_START_SECONDS:g} s")
            elif worker.task is not None:
                detail = f"no answer after {self.timeout:g} s"
                outcomes[worker.task] = _Outcome("timeout", detail, worker.seconds())
        return outcomes

    def _receive(self, worker: _Worker) -> _Outcome | None:
        """Reads from a worker that has something to say, or has died."""
        data = os.read(worker.replies, 65_536)
        worker.inbox += data
        if not data:
            status = self._discard(worker)
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            if status in (-signal.SIGKILL, LOST_PIPE):
                how += ": something closed or replaced the pipe on which it replies"
                how += ", or killed it, as the kernel does when memory runs out" if status < 0 else ""
            if not worker.ready:
                self._count_failed_start(f"it ended with {how}")
            reason = "timeout" if status == -signal.SIGXCPU else "crashed"
            return _Outcome(reason, f"the worker ended with {how}", worker.seconds())
        try:
            reply = worker.reply()
        except ValueError as error:
            self._discard(worker)
            what = f"something that it ran wrote to the pipe on which it replies ({error})"
            if not worker.ready:
                self._count_failed_start(what)
            return _Outcome("crashed", f"the worker was killed: {what}", worker.seconds())
        if reply is None:
            return None
        reason, detail = reply
        if reason == "failed":
            self._discard(worker)
            raise RuntimeError(f"{self.kind!r} cannot start: {detail}")
        outcome = _Outcome(reason, detail, worker.seconds())
        worker.ready, worker.task, worker.deadline = True, None, math.inf
        self._started, self._failed_starts = True, 0
        if reason == "crashed" or worker.inbox:  # out of memory, and it leaves; or more than a reply: it has a ghost
            self._discard(worker)
        return outcome

    def _count_failed_start(self, what: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= _START_ATTEMPTS:
            raise RuntimeError(
                f"verifier workers for kind={self.kind!r} do not start: the last {self._failed_starts} failed, and of "
                f"the last one, {what}. Its standard error says more; if memory is short, raise memory_mb, in "
                f"a config verifier_memory_mb ({self.memory_mb})"
            )


class _Worker:
    """A process and what the pool knows of it. `task` is the index of its work, None while it has none.

    The process is a keeper; the one that grades is its child (see `sgopd.verifier_worker`).
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin and process.stdout
        self.process = process
        self.pipes = process.stdin, process.stdout
        self.requests, self.replies = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(self.requests, False)
        self.ready = False
        self.task: int | None = None
        self.sent_at = time.monotonic()
        self.deadline = self.sent_at + _START_SECONDS
        self.nonce = secrets.token_bytes(16)  # of what it is to reply to next: at first, to being started
        self.outbox = memoryview(self.nonce)
        self.inbox = bytearray()
        self._poll = select.poll()
        self._poll.register(self.replies, select.POLLIN)

    def end(self) -> int:
        """Kills the grader and all it started; returns its exit status, its own if it had ended by itself."""
        self.process.terminate()  # the keeper, which kills before it goes
        try:
            status = self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        for pipe in self.pipes:
            pipe.close()
        return status

    def is_idle(self) -> bool:
        """Whether it can take work. If not, and it has none either, then it has died or said what nobody asked for."""
        alive = self.process.poll() is None  # a keeper that was killed takes its grader along, a moment later
        return self.ready and self.task is None and alive and not self._poll.poll(0)

    def dispatch(self, task: int, payload: bytes, timeout: float) -> None:
        self.nonce = secrets.token_bytes(16)
        self.task, self.outbox = task, memoryview(self.nonce + struct.pack("!Q", len(payload)) + payload)
        self.sent_at = time.monotonic()
        self.deadline = self.sent_at + timeout

    def reply(self) -> tuple[str, str] | None:
        """Takes the reply to what was asked, a reason and a detail, off the inbox; None while it is not whole.

        Raises:
            ValueError: what is there is no such reply.
        """
        asked = self.task is not None or not self.ready
        if not asked or not self.nonce.startswith(self.inbox[: len(self.nonce)]):
            raise ValueError(f"it begins with {bytes(self.inbox[:40])!r}")
        if len(self.inbox) < _HEAD.size:
            return None
        _, length = _HEAD.unpack_from(self.inbox)
        if length > _MAX_REPLY:
            raise ValueError(f"it announces {length} bytes")
        end = _HEAD.size + length
        if len(self.inbox) < end:
            return None
        reason, _, detail = self.inbox[_HEAD.size : end].decode(errors="replace").partition("\n")
        if reason not in (VALUES if self.ready else ("ready", "failed")):
            raise ValueError(f"its verdict is {reason!r:.40}")
        del self.inbox[:end]
        return reason, detail

    def seconds(self) -> float:
        return time.monotonic() - self.sent_at


def _end_all(workers: list[_Worker], selector: selectors.BaseSelector, owner: int) -> None:
    if os.getpid() == owner:  # not the exit of a forked child
        selector.close()
        for worker in workers:
            worker.process.terminate()  # all at once, and only then each is waited for
        for worker in workers:
            worker.end()


def _pickled(work: Work) -> bytes:
    try:
        return pickle.dumps(work)
    except Exception as error:  # whatever a column's __reduce__ raises
        raise TypeError(
            f"an example cannot be sent to a verifier process: {error}. Keep plain data in its columns: {_short(work)}"
        ) from error


def _short(value: Any) -> str:
    """At most some hundred characters of a value, whatever it is: long, nested deep, with a `repr` that raises."""
    try:
        return _shortener.repr(value)
    except Exception as error:
        return f"a {type(value).__name__} that cannot be written out ({error})"


_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = 200
