"""The extension in many threads, after a fork, in a subinterpreter. Each has a time limit: the fault is a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import sgopd_kernels
from sgopd_kernels import gated_kl_loss


def backward(inputs: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """(loss, d_hidden, d_weight) on the CPU backend."""
    hidden = inputs.student_hidden.clone().requires_grad_()
    weight = inputs.student_weight.clone().requires_grad_()
    loss = gated_kl_loss(hidden, weight, *inputs.args()[2:], backend="cpu", **kwargs)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def equal(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected))


def exits_with(code: Callable[[], int], seconds: float) -> int:
    """The exit status of a forked child that runs `code`; killed, and a failure, after `seconds`."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = code()
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"the forked child did not finish in {seconds:.0f} s")


PLANS = [dict(precision="exact"), dict(precision=1e-2), dict(divergence=("jsd", 0.5)), dict(estimator="sampled")]


@pytest.mark.parametrize("threads", [1, 3])
def test_many_python_threads_give_the_bits_of_one(kit: Any, calibrate: Any, threads: int) -> None:
    """Forward and backward of different problems at once, dense and over pairs; each result is the serial one."""
    calibrate(pairs={"worthwhile": 0.0}, blocks={"worthwhile": 0.0})
    cases = [(kit.make_inputs(n=60, v=1500, peak=8.0, seed=seed), plan) for seed in range(2) for plan in PLANS]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        expected = [backward(inputs, **plan) for inputs, plan in cases]
        with ThreadPoolExecutor(8, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            got = list(pool.map(lambda case: backward(case[0], **case[1]), cases * 3, timeout=120))
    finally:
        torch.set_num_threads(before)
    assert all(equal(one, expected[i % len(cases)]) for i, one in enumerate(got))


def test_fork_after_use(kit: Any) -> None:
    """A child forked after the extension ran (and while it runs in other threads) computes the same bits.

    On one torch thread: it is libgomp's pool, which torch's own products use, that does not survive a fork.
    """
    inputs = kit.make_inputs(n=90, v=3000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = backward(inputs)
        with ThreadPoolExecutor(2) as pool:
            busy = [pool.submit(backward, inputs) for _ in range(20)]
            codes = [exits_with(lambda: 0 if equal(backward(inputs), expected) else 3, 30) for _ in range(3)]
            assert all(equal(one.result(60), expected) for one in busy)
    finally:
        torch.set_num_threads(before)
    assert codes == [0] * 3


def test_the_extensions_own_threads_survive_a_fork() -> None:
    """Several native threads before the fork, several after it: they are made for each call."""
    from sgopd_kernels import _cpu

    g = torch.randn(64, 3000)
    # Copies made before the fork: the child must not wait for torch's pool, which died with it.
    copies = [g.clone() for _ in range(2)]

    def count(gradient: torch.Tensor) -> int:
        pairs = _cpu.extract_top(
            gradient=gradient.data_ptr(), stride=3000, n=64, v=3000, budget=0.5, most=1.0, threads=4
        )
        return int(pairs.count)

    expected = count(copies[0])
    assert 0 < expected < g.numel()
    assert exits_with(lambda: 0 if count(copies[1]) == expected else 3, 30) == 0


SHORT_OF_MEMORY = """
    import resource
    import torch
    from sgopd_kernels import _cpu

    n, v = 8, 400_000
    g = torch.randn(n, v)

    def take():
        return _cpu.extract_top(gradient=g.data_ptr(), stride=v, n=n, v=v, budget=0.5, most=1.0, threads=8).count

    outcomes = set()
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    for megabytes in (1, 4, 12, 30, 60, 90, 130, 4000):
        resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, -1))
        try:
            outcomes.add("ran" if take() > 0 else "took nothing")
        except MemoryError:
            outcomes.add("refused")
    print(sorted(outcomes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on the address space")
def test_no_memory_and_no_threads_are_an_exception_or_fewer_threads() -> None:
    """It ended the process once: an exception in a native thread, or no thread to be had while others ran."""
    # The package under test first: another test may have put the checkout, which is not built, on this path.
    path = os.pathsep.join([str(Path(sgopd_kernels.__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(SHORT_OF_MEMORY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd="/")
    assert done.stdout.strip() == "['ran', 'refused']", (done.returncode, done.stderr[-2000:])


SUBINTERPRETER = """
    import sys
    {before}
    try:
        import _interpreters as interpreters
    except ImportError:
        import _xxsubinterpreters as interpreters
    code = '''if True:
        import sys
        sys.path[:] = {path!r}
        try:
            import {module}
        except ImportError as error:
            assert "main interpreter" in str(error), error
        else:
            raise SystemExit("imported")
    '''
    one = interpreters.create()
    failed = interpreters.run_string(one, code)
    assert failed is None, failed
    interpreters.destroy(one)
    print("refused")
"""


@pytest.mark.parametrize("before", ["", "import sgopd_kernels"])
@pytest.mark.parametrize("module", ["sgopd_kernels", "_cpu"])
def test_subinterpreters_are_refused(module: str, before: str) -> None:
    """By ImportError with the reason, whether or not the main interpreter has the extension; it hung once."""
    folder = Path(str(sgopd_kernels.__file__)).resolve().parent
    path = [str(folder.parent if module == "sgopd_kernels" else folder), *sys.path]
    script = textwrap.dedent(SUBINTERPRETER).format(before=before, path=path, module=module)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment, cwd="/"
    )
    assert done.stdout.strip() == "refused", done.stderr
