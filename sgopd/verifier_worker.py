"""A verifier process: takes work from its standard input, grades it, answers on its standard output.

Started by `sgopd.verifier.VerifierPool` alone. Requests are length-prefixed pickles (they come from the
trainer); replies are JSON lines of [reason, detail], since what a grader touches is not to be unpickled there.
Imports what its kind needs and nothing else: never torch, never transformers.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import json
import math
import os
import pickle
import resource
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from sgopd.grading import Example


def main() -> None:
    kind, parent, timeout, memory_mb = sys.argv[2:6]
    _die_with(int(parent))
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, int(memory_mb) * 2**20)
    with contextlib.suppress(OSError):  # where memory runs out, this process goes before the trainer
        Path("/proc/self/oom_score_adj").write_text("1000")
    requests, replies = _take_pipes()

    def reply(reason: str, detail: str = "") -> None:
        replies.write(json.dumps([reason, detail[-4000:]]).encode() + b"\n")

    try:
        grade = load_grader(kind)
    except BaseException:
        return reply("failed", traceback.format_exc())
    reply("ready")
    while header := requests.read(8):
        (length,) = struct.unpack("!Q", header)
        # The pool's own kill comes first; this one holds where the pool itself is stopped.
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + float(timeout)) + 1)
        try:
            reply(grade(*pickle.loads(requests.read(length))))
        except MemoryError:  # caches may hold the memory still: make room for a fresh process
            return reply("crashed", f"out of memory: the limit is {memory_mb} MiB")
        except BaseException:  # a SystemExit too is the grader's failure, not ours
            reply("error", traceback.format_exc())


def load_grader(kind: str) -> Callable[..., str]:
    """The function that turns one piece of work, as `sgopd.grading` decided it, into a reason."""
    if kind == "math":
        from sgopd.math_equality import grade

        return grade
    if kind == "reasoning-gym":
        import reasoning_gym  # noqa: F401

        return _grade_reasoning_gym
    return functools.partial(_grade_custom, _import_function(kind))


def _grade_reasoning_gym(dataset: str, answer: str, entry: dict[str, Any]) -> str:
    # Partial credit (0.01 for any garbage, 0.5 for a start) is not a verdict.
    score = _scorer(dataset)
    try:
        return "correct" if score(answer, entry) >= 1 - 1e-6 else "incorrect"
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        # Some scorers trip over answers they cannot read. If the reference passes, the answer is at fault.
        if score(entry["answer"], entry) >= 1 - 1e-6:
            return "incorrect"
        raise


@functools.cache
def _scorer(dataset: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym.factory import get_score_answer_fn

    return get_score_answer_fn(dataset)


def _grade_custom(function: Callable[[str, Example], bool | None], response: str, example: Example) -> str:
    verdict = function(response, example)
    if verdict is not None and not isinstance(verdict, bool):
        raise TypeError(f"the verifier returned {verdict!r} ({type(verdict).__name__}); expected True, False or None")
    return {True: "correct", False: "incorrect", None: "unknown"}[verdict]


def _import_function(spec: str) -> Callable[..., Any]:
    module_name, _, path = spec.partition(":")
    function = functools.reduce(getattr, path.split("."), importlib.import_module(module_name))
    if not callable(function):
        raise TypeError(f"{spec} is {function!r}; expected a function (response: str, example: dict) -> bool | None")
    return function


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when the pool's process dies, even by SIGKILL and while the GIL is held."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that call
        os._exit(1)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses RLIMIT_AS
        resource.setrlimit(kind, (soft, hard))


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Moves the protocol away from descriptors 0 and 1, so that a grader may print (to standard error)."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests, replies
