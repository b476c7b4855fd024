"""Builds the CPU extension under a sanitizer, in a copy of the checkout, and runs the kernel tests in it.

    python tests/sanitize.py                                  # both; `make long ONLY=sanitize`
    python tests/sanitize.py address,undefined                # one of them
    python tests/sanitize.py thread tests/kernels/test_native.py
    python tests/sanitize.py address,undefined --fuzz 10      # minutes of tests/fuzz_native.py in place of the tests
    python tests/sanitize.py --plant                          # one defect a sanitizer; each must be reported

Needs gcc with its sanitizer runtimes, the build requirements and pytest. The interpreter and torch are not built with a
sanitizer; what that takes away is written at the options below. Exit status: the number of failing runs; with --plant,
of defects that nobody reported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from checkout import copy_checkout

TESTS = ["native", "processes", "fuzz_native", "api", "parity", "sparse", "properties", "products", "blocks"]
OPTIONS = {
    # Leaks are not looked for: the interpreter and torch keep until the end what they took at the start.
    "address": {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:strict_init_order=1"},
    "undefined": {"UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"},
    # Torch's pool synchronises inside libgomp, which was not built for this: accesses and locks of modules without
    # instrumentation are not looked at. The extension itself uses std::thread and std::atomic alone, which are.
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:die_after_fork=0:halt_on_error=1:exitcode=66"},
}
# test_no_memory_...: a limit on the address space, which a sanitizer's shadow memory exceeds from the start.
# test_no_loop_..._scalar: instrumented loops are.
SKIP = "not no_memory and not cuda_extension and not peak_memory and not scalar"
# Its runtime gives a child's first thread the number of one that the fork did not take along, and ends ("dup thread").
SKIP_OF = {"thread": " and not survive_a_fork"}

# kind -> (file, before, after, the report): a read behind a tensor of torch's, an overflow, a count without a lock.
TASK = "part(i);"
PLANTS = {
    "address": ("csrc/rows.h", "a.verdict[n];", "a.verdict[n + 1];", "AddressSanitizer: heap-buffer-overflow"),
    "undefined": (
        "csrc/cpu/parallel.h",
        TASK,
        f"{{ volatile int most = 2147483647; most = most + 1; {TASK} }}",
        "overflow",
    ),
    "thread": (
        "csrc/cpu/parallel.h",
        TASK,
        f"{{ static volatile int calls = 0; calls = calls + 1; {TASK} }}",
        "data race",
    ),
}


def library(name: str) -> str:
    """The runtime's path: it has to be loaded before the interpreter."""
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(found.stdout.strip()).resolve())


def run(kind: str, tests: list[str], fuzz: str | None, plant: bool = False) -> bool:
    """Whether all is well: with `plant`, whether the planted defect was reported."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_checkout(Path(folder) / "checkout")
        if plant:
            name, before, after, report = PLANTS[kind]
            text = (copy / name).read_text()
            assert before in text, f"{before!r} is not in {name}"
            (copy / name).write_text(text.replace(before, after))
        plain = {**os.environ, "SGOPD_CUDA": "0", "SGOPD_SANITIZE": kind}
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=copy, env=plain, check=True, capture_output=True)
        runtime = library({"thread": "libtsan.so", "undefined": "libubsan.so"}.get(kind, "libasan.so"))
        environment = {
            **plain,
            "SGOPD_TEST_SOURCE": "1",
            "PYTHONPATH": str(copy),
            "LD_PRELOAD": f"{runtime} {library('libstdc++.so.6')}",
            "PYTHONMALLOC": "malloc",  # the interpreter's own pools would hide its blocks' edges
        }
        for part in kind.split(","):
            environment |= OPTIONS[part]
        if fuzz is not None:
            command = [sys.executable, "tests/fuzz_native.py", "--minutes", fuzz]
        else:
            chosen = tests or [f"tests/kernels/test_{name}.py" for name in TESTS]
            # Reports go to descriptor 2, past sys.stderr: pytest must not have it when the process is ended.
            skip = SKIP + SKIP_OF.get(kind, "")
            command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", "-k", skip]
            command += chosen
        began = time.monotonic()
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        output = done.stdout + done.stderr
        if plant:
            found = done.returncode != 0 and report in output
            print(f"{kind}: {'reported' if found else f'NOT REPORTED (status {done.returncode})'}: {after}", flush=True)
            return found
        reports = re.findall(r"ERROR: AddressSanitizer|WARNING: ThreadSanitizer|runtime error:", output)
        clean = done.returncode == 0 and not reports
        if not clean:
            print(output[-20000:])
        print(f"{kind}: {done.stdout.strip().splitlines()[-1] if done.stdout.strip() else 'no output'}")
        print(
            f"{kind}: {len(reports)} reports, exit status {done.returncode}, {time.monotonic() - began:.0f} s",
            flush=True,
        )
        return clean


def main() -> int:
    words = sys.argv[1:]
    if "--plant" in words:
        return sum(not run(kind, ["tests/kernels/test_native.py"], None, plant=True) for kind in PLANTS)
    fuzz = None
    if "--fuzz" in words:
        at = words.index("--fuzz")
        fuzz = words[at + 1]
        del words[at : at + 2]
    kinds = [word for word in words if set(word.split(",")) <= set(OPTIONS)] or ["address,undefined", "thread"]
    tests = [word for word in words if word not in kinds]
    return sum(not run(kind, tests, fuzz) for kind in kinds)


if __name__ == "__main__":
    sys.exit(main())
