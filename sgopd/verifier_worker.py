"""A verifier process: takes work from its standard input, grades it, answers on its standard output.

Started by `sgopd.verifier.VerifierPool` alone. There are two processes: the grader, and its parent, the keeper. On
Linux the keeper adopts whatever the grader starts and lets go of (a double fork, a session of its own), and when the
grader ends, the pool says so, or the trainer dies, it kills all of it and ends as the grader did. Elsewhere the keeper
can only kill the grader's process group.

A request is a nonce of 16 bytes, a length and a pickle (it comes from the trainer); a reply is the same nonce, a length
and the reason and a detail as text, since what a grader touches is not to be unpickled there. The first nonce stands
alone, and is the one that "ready" or "failed" is said with.

Imports what its kind needs and nothing else: never torch, never transformers.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import fcntl
import functools
import importlib
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
from typing import Any, BinaryIO, NoReturn

from sgopd.grading import Example
from sgopd.verifier_pipe import LOST_PIPE, describe

_KILL_SECONDS = 5.0  # for all that a grader started to be gone
_PIPES_FROM = 1_000  # descriptors of the pipes: above those that `os.closerange(3, 256)` and the like close
_MAX_DETAIL = 4_000  # bytes; a reply is written at once (PIPE_BUF), so that nothing gets in between


def main() -> None:
    kind, parent, timeout, memory_mb = sys.argv[2:6]
    signal.pthread_sigmask(signal.SIG_BLOCK, _KEEPER_SIGNALS)
    _die_with(int(parent), signal.SIGTERM)
    _adopt_orphans()
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, int(memory_mb) * 2**20)
    keeper, grader = os.getpid(), os.fork()
    if grader:
        _keep(grader)
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _KEEPER_SIGNALS)
    _die_with(keeper, signal.SIGKILL)
    with contextlib.suppress(OSError):  # where memory runs out, this process goes before the trainer
        Path("/proc/self/oom_score_adj").write_text("1000")
    _serve(kind, float(timeout), f"out of memory: the limit is {memory_mb} MiB")


# --- the grader ---


def _serve(kind: str, timeout: float, out_of_memory: str) -> None:
    requests, replies = _take_pipes()
    me, pipes = os.getpid(), {fd: _identity(fd) for fd in (requests.fileno(), replies)}
    # Bound now: a verifier that patches modules is not to turn one verdict into another.
    getpid, leave, write, pack, load = os.getpid, os._exit, os.write, struct.pack, pickle.loads

    def reply(nonce: bytes, reason: str, detail: str = "") -> None:
        if getpid() != me:  # a child that the grader forked, and that came back as well
            leave(0)
        if any(_identity(fd) != pipe for fd, pipe in pipes.items()):
            leave(LOST_PIPE)  # not a word into a file that took its place
        body = reason.encode() + b"\n" + detail.encode(errors="backslashreplace")[-_MAX_DETAIL:]
        write(replies, nonce + pack("!I", len(body)) + body)

    nonce = requests.read(16)
    try:
        grade = load_grader(kind)
    except CannotStart as error:
        return reply(nonce, "failed", str(error))
    except BaseException as error:
        return reply(nonce, "failed", describe(error))
    reply(nonce, "ready")
    while nonce := requests.read(16):
        (length,) = struct.unpack("!Q", requests.read(8))
        # The pool's own kill comes first; this one holds where the pool itself is stopped.
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + timeout) + 1)
        signal.alarm(0)  # one that the last answer's grading forgot is not for this one
        try:
            reason, detail = grade(*load(requests.read(length))), ""
        except MemoryError:  # caches may hold the memory still: make room for a fresh process
            return reply(nonce, "crashed", out_of_memory)
        except BaseException as error:  # a SystemExit too is the grader's failure, not ours
            reason, detail = "error", describe(error)
        reply(nonce, reason, detail)


class CannotStart(Exception):
    """What the user can put right, with the remedy: no traceback of ours would say more."""


def load_grader(kind: str) -> Callable[..., str]:
    """The function that turns one piece of work, as `sgopd.grading` decided it, into a reason."""
    if kind == "math":
        from sgopd.math_equality import grade

        return grade
    if kind == "reasoning-gym":
        _import_module("reasoning_gym", "; pip install reasoning-gym")
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
        raise TypeError(
            f"the verifier returned {verdict!r:.200} ({type(verdict).__name__}); expected True, False or None"
        )
    return {True: "correct", False: "incorrect", None: "unknown"}[verdict]


def _import_function(spec: str) -> Callable[..., Any]:
    name, _, path = spec.partition(":")
    files = [file.stem for file in Path().glob("*.py")]
    near = difflib.get_close_matches(name.removesuffix(".py"), files, n=1)
    hint = f"; did you mean '{near[0]}:{path}'?" if near else "."
    looked = f"It is looked for on Python's path, then in the working directory ({Path.cwd()})"
    found = _import_module(name, f"{hint} {looked}: start from the folder that has it, or set PYTHONPATH")
    for part in path.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, vars(found), n=1) if hasattr(found, "__dict__") else []
            hint = f"; did you mean {near[0]!r}?" if near else ". Write module:function"
            raise CannotStart(f"{getattr(found, '__file__', None) or found} has no {part!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise CannotStart(f"it is {found!r:.200}; expected a function (response: str, example: dict) -> bool | None")
    return found


def _import_module(name: str, remedy: str) -> Any:
    """The module.

    Raises:
        CannotStart: there is none, with the remedy; or the line of it at which its import fails.
    """
    try:
        return importlib.import_module(name)
    except BaseException as error:  # SystemExit too
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise CannotStart(f"there is no module {name!r}{remedy}") from error
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        theirs = [one for one in frames if one[0] not in (__file__, importlib.__file__) and one[0][:1] != "<"]
        said = describe(error).splitlines()[-1]
        if isinstance(error, SyntaxError):
            theirs, said = [(error.filename or name, error.lineno)], f"{type(error).__name__}: {error.msg}"
        where = f" at {theirs[0][0]}, line {theirs[0][1]}" if theirs else ""
        short = isinstance(error, (MemoryError, OSError, ImportError)) and not isinstance(error, ModuleNotFoundError)
        hint = ". If it is memory that is short, raise memory_mb (in a config: verifier_memory_mb)" if short else ""
        raise CannotStart(f"importing {name} fails{where}: {said}{hint}") from error


# --- the keeper ---

_KEEPER_SIGNALS = {signal.SIGTERM, signal.SIGCHLD}


def _keep(grader: int) -> NoReturn:
    """Waits for the grader's end or a SIGTERM, kills all that is left of it, and ends with the grader's status."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # the pipes are the grader's: the pool is to see it when they close
        os.dup2(null, descriptor)
    status: int | None = None
    while status is None and signal.sigwait(_KEEPER_SIGNALS) == signal.SIGCHLD:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == grader:
                status = ended[1]
                break
    if status is None:
        os.kill(grader, signal.SIGKILL)
        _, status = os.waitpid(grader, 0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(grader, signal.SIGKILL)
    deadline = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < deadline and _has_children():
        for pid in _descendants():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


def _has_children() -> bool:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _descendants() -> list[int]:
    """All processes below this one; none where there is no /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    found = [os.getpid()]
    for pid in found:  # grows meanwhile
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def _adopt_orphans() -> None:
    if sys.platform == "linux":
        PR_SET_CHILD_SUBREAPER = 36
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


# --- both ---


def _die_with(parent: int, number: signal.Signals) -> None:
    """Has the kernel send `number` when the parent dies, even by SIGKILL and while the GIL is held."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before that call
        os._exit(1)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses RLIMIT_AS
        resource.setrlimit(kind, (soft, hard))


def _take_pipes() -> tuple[BinaryIO, int]:
    """Moves the protocol away from descriptors 0 and 1, so that a grader may print (to standard error)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = min(_PIPES_FROM, max(soft - 8, 3))
    # Closed in what it executes: a subprocess holds no end of them.
    requests, replies = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest) for fd in (0, 1))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return os.fdopen(requests, "rb"), replies


def _identity(descriptor: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino
