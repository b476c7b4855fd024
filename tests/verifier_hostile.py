r"""The verifier under attack: hostile and hard answers among ordinary neighbours, as a Markdown table of what was held.

    python tests/verifier_hostile.py               every answer, pools of 1, 2 and 4 workers (`make long ONLY=hostile`)
    python tests/verifier_hostile.py --every 8     one in eight, as the tests do

An answer may be called incorrect or unknown, never correct. What is checked of every one: its verdict comes within the
deadline and half a second; neither deciding it in the caller's process nor anything a worker does with it takes more
memory than allowed; its neighbours, which need a worker each, get their right verdicts; nothing it says is executed;
no process is left behind; and the verdict is the same whatever the number of workers (a timeout aside, which depends
on how busy the machine is).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Example = dict[str, Any]


class Case(NamedTuple):
    family: str
    response: str
    kind: str  # of the pool that grades it
    example: Example


def box(answer: str) -> str:
    return rf"So the answer is $\boxed{{{answer}}}$."


# --- answers of mathematics ---

GOLDS = (
    r"5",
    r"\sqrt{2}",
    r"x+1",
    r"\{1,2\}",
    r"(0,1]",
    r"x^2+y^2=1",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    r"\text{Monday}",
    r"\frac{7}{3}",
    r"2^{100}",
    r"x>3",
    r"12\text{ cm}",
)


def towers() -> Iterator[str]:
    for b in ("2", "9", "10", "99", "1.5", "e", r"\pi", "x", "n", "-3"):
        for form in (
            "B^{B^{B}}",
            "B^{B^{B^{B}}}",
            "B^B^B^B",
            "B**B**B",
            r"\left(B^{10^{6}}\right)^{10^{6}}",
            "B^{10^{10}}",
            "B^{-99999999}",
            r"\sqrt{B^{9^{9}}}",
            r"\frac{1}{B^{B^{B^{9}}}}",
            r"\exp(\exp(\exp(B^{9^9})))",
            "(B^{9999})^{9999}",
            r"\log(B^{10^{12}})",
        ):
            yield form.replace("B", b)


def factorials() -> Iterator[str]:
    yield from ("10^9!", "(10^9)!", "1000000!", "5001!", "4999!", "4999!^{2}", "((10!)!)!", "3!!!!!!!", "10!^{10!}")
    yield from (r"\Gamma(10^{9})", r"\binom{10^9}{5\cdot10^8}", r"\binom{9999}{5000}^{99}", r"\prod_{k=1}^{10^9} k")
    yield from (r"\frac{4000!}{3999!}^{4000!}", "4000!" * 20, r"4000!\cdot" * 20 + "1", "(4000!)^{4000}", "!" * 400)
    yield from (
        "9" * 400 + "!",
        "(" + "9" * 30 + ")!",
        "x!" * 100,
        r"\sum_{k=1}^{10^{9}} k^k",
        r"\sum_{k=0}^{\infty} k!",
    )
    yield from (r"\sum_{n=1}^{99999} \frac{1}{n}", r"\prod_{n=1}^{9999}(1+\frac{x}{n})", r"\binom{n}{k}!" * 20)


def numbers() -> Iterator[str]:
    yield from ("9" * n for n in (100, 400, 511, 5_000, 100_000))
    yield from ("0." + "3" * n for n in (100, 500, 5_000))
    yield from ("1e999", "1e-999", "9e99999999", "1E400", "-1e400", "0x" + "f" * 400, "1" * 250 + "/" + "7" * 250)
    yield from (
        r"0.\overline{" + "1" * 400 + "}",
        r"0." + "1" * 200 + r"\overline{" + "3" * 200 + "}",
        "1" + ",000" * 120,
    )
    yield from (
        r"\frac{" + "1" * 240 + "}{" + "3" * 240 + "}",
        "1/" * 200 + "1",
        "1." * 250,
        "1 " * 250,
        "1," * 250 + "1",
    )
    yield from (
        "1:" * 200 + "1",
        "0:0:0",
        "+-" * 200 + "1",
        "--5",
        "5..",
        ".",
        "-",
        "1e",
        "5e+",
        "1_000_000",
        "NaN",
        "inf",
    )
    yield from (
        r"\infty-\infty",
        r"\frac{0}{0}",
        r"\frac{1}{0}",
        r"0^0",
        r"0^{-1}",
        r"\frac{\infty}{\infty}",
        r"\infty^0",
    )
    yield from (
        r"6\times10^{999}",
        r"6\times10^{-999}",
        r"6\times10^{9999999}",
        "F" * 300 + "_{16}",
        "1011_{99999999999}",
    )


def nesting() -> Iterator[str]:
    shells = {
        "{": "}",
        r"\frac{1}{": "}",
        r"\sqrt{": "}",
        r"\left(": r"\right)",
        "[": "]",
        r"\{": r"\}",
        r"\text{": "}",
        r"\boxed{": "}",
        r"x^{": "}",
        r"\sin(": ")",
        r"\begin{pmatrix}": r"\end{pmatrix}",
        "|": "|",
    }
    for depth in (20, 100, 3_000, 30_000):
        yield from (start * depth + "3" + end * depth for start, end in shells.items())
    yield from (start * 30_000 for start in ("{", "(", "[", r"\{", r"\frac{", r"\left(", "<"))
    yield from ("}" * 30_000, ")" * 500, r"\right)" * 80)


def characters() -> Iterator[str]:
    yield from ("5\x00", "\x00", "\x005\x00" * 50, "\ud800", "5\udfff", "\ufeff5\ufffe", "5\uffff", "\x1b[31m5\x1b[0m")
    yield from (
        "\u202e5\u202c6",
        "\u200b" * 300,
        "5\u200d6",
        "5" + "\u0301" * 400,
        "🙂" * 100,
        "👩‍👩‍👧‍👦" * 40,
        "𝟓𝟔",
        "٦",
        "५६",
        "⁵⁶",
    )
    yield from (
        "x⁵⁹",
        "x₁₂",
        "⅓",
        "¾⅞",
        "①②",
        "Ⅻ",
        "㊿",
        "ⅽ",
        "６／７",
        "5\r\n6",
        "5\u20286",
        "5\t6",
        "\\\x00",
        "五",
        "пять",
    )
    yield from (
        "а+1",
        "х>4",
        "−−5",
        "∑∏∫",
        "√√√3",
        "∛8",
        "2²³²³",
        "∞∞",
        "∅∪∅",
        "½½",
        "°" * 300,
        "²" * 300,
        "√" * 300,
        "½" * 200,
    )
    yield from (
        "İstanbul",
        "ß" * 200,
        "ﬁ" * 200,
        "\U0010ffff",
        "\x7f" * 100,
        "\x80\x81",
        "e\u0301" * 100,
        "\u1160" * 50,
    )


def macros() -> Iterator[str]:
    yield from (
        r"\def\a{\a\a}\a",
        r"\newcommand{\x}{\x\x}\x",
        r"\input{/etc/passwd}",
        r"\include{/dev/zero}",
        r"\relax" * 80,
    )
    yield from (r"\write18{touch TRACE}", r"\immediate\write18{touch TRACE}", r"\input|touch TRACE", r"\openout5=TRACE")
    yield from (
        r"\csname\endcsname",
        r"\loop\iftrue\repeat",
        r"\expandafter" * 50,
        r"\catcode`\{=12",
        r"\usepackage{shellesc}",
    )
    yield from (
        r"\href{file:///etc/passwd}{5}",
        r"\url{http://localhost/}",
        r"\includegraphics{/dev/random}",
        r"\special{ps:}",
    )
    yield from (
        r"\begin{" * 60,
        r"\end{pmatrix}" * 40,
        r"\begin{cases}1\\2",
        r"\left",
        r"\right",
        r"\frac",
        r"\frac\frac\frac",
    )
    yield from (
        r"\sqrt[",
        r"\sqrt[5]",
        r"^",
        "_",
        "^" * 400,
        "_" * 400,
        "&" * 400,
        r"\\" * 200,
        "\\",
        "\\" * 399,
        "$" * 301,
    )
    yield from (
        r"\operatorname{touch}(TRACE)",
        r"\mathrm{\mathrm{\mathrm{",
        r"\text{\text{and}}",
        r"\color{red}",
        r"\phantom{5}",
    )
    yield from (
        r"\overline{" * 100,
        r"\mbox{or}" * 60,
        r"\text{ or }" * 40,
        r"\text{and}" * 40,
        r"\pm" * 150,
        r"1\pm2\pm3\pm4",
    )
    yield from (
        r"\frac" * 120,
        r"\dfrac12" * 60,
        r"\circ" * 90,
        r"^\circ" * 90,
        r"\sin 1^\circ" * 40,
        r"\langle" * 70,
        "%" * 400,
    )
    yield from (
        r"\textbf{(A)}" * 40,
        r"(A) " * 100,
        r"\text{ is }" * 50,
        r"\approx" * 70,
        r"\boldsymbol{" * 40,
        r"\underline" * 50,
    )


def code() -> Iterator[str]:
    touch = "__import__('os').system('touch TRACE')"
    programs = [
        touch,
        f"exec({touch!r})",
        f"eval({touch!r})",
        f"S({touch!r})",
        f"sympify({touch!r})",
        f"parse_expr({touch!r})",
        f"lambda: {touch}",
        f"[{touch} for _ in range(3)]",
        f"({touch}, 5)[1]",
        f"f'{{{touch}}}'",
        f"5 if {touch} else 6",
        f"x:={touch}",
        f"Symbol('x').subs('x', {touch!r})",
        f"lambdify((), {touch!r})()",
        "open('TRACE','w')",
        "open('TRACE','w').close() or 5",
        "print(open('/etc/passwd').read())",
        "().__class__.__bases__[0].__subclasses__()",
        "().__class__.__mro__[1].__subclasses__()[100]",
        "(lambda f: f(f))(lambda f: f(f))",
        "[x for x in iter(int, 1)]",
        "[0]*10**12",
        "'a'*10**12",
        "bytearray(10**12)",
        "range(10**18).__len__()",
        "exit()",
        "quit()",
        "sys.exit(0)",
        "os._exit(0)",
        "os.kill(os.getppid(), 9)",
        "raise SystemExit",
        "while True: pass",
        "import os; os.system('touch TRACE')",
        "@touch TRACE",
        "{{7*7}}",
        "${7*7}",
        "#{7*7}",
        "`touch TRACE`",
        "$(touch TRACE)",
        "; touch TRACE",
        "| touch TRACE",
        "5 && touch TRACE",
        "!touch TRACE",
        "%run TRACE",
        "{0.__class__.__init__.__globals__}",
        "%(x)s %s %n %d",
        "<script>fetch('/')</script>",
        "'; DROP TABLE answers; --",
        "!!python/object/apply:os.system ['touch TRACE']",
        "cos\nsystem\n(S'touch TRACE'\ntR.",
        "gASVIAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAV0b3VjaJSFlFKULg==",
        '["correct", ""]',
        '["correct", ""]\n["correct", ""]',
        '{"reason": "correct"}',
        "correct",
        "True",
        "1 == 1",
        "gold",
        "answer",
    ]
    for program in programs:
        yield program
        yield rf"\text{{{program}}}"


def symbolic() -> Iterator[str]:
    for n in (30, 100, 1_000, 9_999):
        yield from (
            f"(x+y+1)^{{{n}}}",
            f"(x^{n}-1)(x^{n}+1)",
            rf"\frac{{x^{{{n}}}-1}}{{x-1}}",
            f"(x+1)^{{{n}}}=0",
            f"x^{{{n}}}+x+1=0",
        )
        yield from (
            f"(1+i)^{{{n}}}",
            rf"(\sqrt2+\sqrt3)^{{{n}}}",
            rf"\sin({n}x)",
            rf"\cos^{{{n}}} x",
            rf"\{{x^{{{n}}}, y^{{{n}}}\}}",
        )
        yield from (
            rf"x^{{{n}}}+y^{{{n}}}=1",
            rf"x^{{{n}}}>y",
            rf"x^{{{n}}}-x>1",
            rf"|x^{{{n}}}-2|<3",
            rf"\log_{{{n}}}(x^{{{n}}}+1)",
        )
    yield "".join(f"(x+{k})" for k in range(60))
    yield "".join(f"(x_{{{k}}}+{k})" for k in range(40))
    yield "+".join(rf"\sqrt{{{k}}}" for k in range(2, 40))
    yield "+".join(rf"\sqrt[{k}]{{{k}}}" for k in range(2, 25))
    yield "+".join(rf"\sin({k}x)\cos({k + 1}x)" for k in range(1, 20))
    yield "+".join(rf"\frac{{1}}{{x+{k}}}" for k in range(1, 30))
    yield r"\cup".join(f"({2 * k},{2 * k + 1})" for k in range(50))
    yield r"\text{ or }".join(f"x<{k}" for k in range(30))
    yield r"\text{ or }".join(f"x^2-{k}x>{k}" for k in range(1, 20))
    yield ",".join(rf"\frac{{{k}}}{{{k + 1}}}" for k in range(35))
    yield ",".join(f"x^{k}" for k in range(90))
    yield r"\sqrt{2+" * 20 + r"\sqrt{2}" + "}" * 20
    yield r"\frac{1}{1+" * 20 + "x" + "}" * 20
    yield r"\sin(" * 20 + "x" + ")" * 20
    yield r"\int_0^{\infty} e^{-x^{x^x}} dx"
    yield r"\int \frac{\sin x}{x^9+x+1} dx"
    yield r"\int\int\int\int x^{y^{z}} dx dy dz dw"
    yield r"\lim_{x\to 0} \frac{\sin(\tan x)-\tan(\sin x)}{x^{7}}"
    yield r"\frac{d}{dx} x^{x^{x^{x}}}"
    yield r"\frac{d^{9}}{dx^{9}} \tan(\tan(\tan x))"
    yield r"\det" + matrix(6, "x_{{{0}{1}}}")
    yield matrix(8, "{0}{1}")
    yield matrix(6, "x^{{{0}}}+{1}")
    yield matrix(3, r"\sqrt{{{0}+{1}}}") + r"^{-1}"
    yield matrix(2, "2") + "^{9999}"
    yield r"\gcd(2^{9999}-1, 3^{5000}-1)"
    yield r"e^{e^{e^{x}}}=\sin x"
    yield r"\sin x=x^{5}-\cos(x^{3})"
    yield r"x^{x}=2^{x^{2}}"
    yield r"\cos(\cos(\cos x))>\sin(\sin(\sin x))"
    yield r"\frac{(x+y)^{50}-(x-y)^{50}}{(x+y)^{25}}"
    yield r"\log(\log(\log(\log(x+y)+z)+w))"
    yield r"\arctan(\frac{1}{5})+\arctan(\frac{1}{7})+\arctan(\frac{1}{239})-\pi^{\pi^{\pi}}"


def matrix(size: int, entry: str) -> str:
    rows = ("&".join(entry.format(i, j) for j in range(size)) for i in range(size))
    return r"\begin{pmatrix}" + r"\\".join(rows) + r"\end{pmatrix}"


def memory() -> Iterator[str]:
    yield from ("10^{9999}" * n for n in (2, 20, 50))
    yield from (r"\cdot".join(["9^{9999}"] * n) for n in (2, 20, 45))
    yield from (
        "+".join([f"{b}^{{9999}}" for b in range(2, 50)]),
        "(2^{9999}+3^{9999})^{9}",
        "99^{9999}x+1",
        "(99^{9999})^{x}",
    )
    yield from (
        r"\{" + ",".join(f"{k}^{{5000}}" for k in range(2, 40)) + r"\}",
        matrix(5, "9^{{5000}}"),
        "(x+y+z+w)^{60}",
    )
    yield from (
        r"\binom{5000}{2500}\binom{5000}{2500}",
        "2^{9999}!",
        r"\frac{2^{9999}}{3^{9999}}",
        r"\sqrt{2^{9999}+1}",
        "7^{9999}",
    )
    yield from (
        r"\sum_{k=1}^{9999} x^k",
        r"\prod_{k=1}^{99}(x^k+y)",
        r"(1+x)^{9999}(1-x)^{9999}",
        r"10^{4000}\sqrt{10^{4000}+1}",
    )


def floods() -> Iterator[str]:
    """Whole responses of up to 10 MB: what a loop of the model would write."""
    pieces = (
        "{",
        "}",
        "\\",
        " ",
        r"\boxed{",
        r"\boxed{}",
        r"\boxed ",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "x ",
        "9",
        "\n",
    )
    yield from (piece * (10_000_000 // len(piece)) for piece in pieces)
    yield from (r"\boxed{" + piece * (2_000_000 // len(piece)) + "}" for piece in pieces if "box" not in piece)
    yield from (
        piece * 2_000 for piece in (r"\\boxed{1}", r"\boxed{<think>}</think>", r"\boxed{\boxed{", "####", r"\\\\boxed{")
    )
    yield "<think>" + r"\boxed{5}" * 1_000_000
    yield r"\boxed{5" * 500_000 + "}"


MATHEMATICS = {
    "towers": towers,
    "factorials": factorials,
    "numbers": numbers,
    "nesting": nesting,
    "characters": characters,
    "macros": macros,
    "code": code,
    "symbolic": symbolic,
    "memory": memory,
}


# --- answers to puzzles whose scorers parse ---

PUZZLES = ("chain_sum", "countdown", "simple_integration", "polynomial_multiplication", "prime_factorization")


def puzzles() -> Iterator[tuple[str, Example]]:
    try:
        import reasoning_gym
    except ImportError:
        return
    answers = [
        *itertools.islice(code(), 0, 40, 2),
        "9**9**9**9",
        "x**9999*y**9999",
        "1/0",
        "(" * 500,
        "9" * 400,
        "\x00",
        "1e999",
    ]
    for name in PUZZLES:
        item = reasoning_gym.create_dataset(name, size=1, seed=1)[0]
        for answer in answers:
            yield box(answer), {**item, "source_dataset": name}


# --- worker killers: what a faulty verifier of the user's own may do ---


def killer(response: str, example: Example) -> bool:
    """A verifier that does what the response names; any other response is compared with the answer."""
    if response not in KILLERS:
        return response == example["answer"]
    exec(KILLERS[response], {"os": os, "signal": signal, "sys": sys, "time": time, "threading": threading})
    return False


KILLERS = {
    "exit 0": "os._exit(0)",
    "exit 255": "os._exit(255)",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGSEGV": "os.kill(os.getpid(), signal.SIGSEGV)",
    "SIGABRT": "os.abort()",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "SIGSTOP": "os.kill(os.getpid(), signal.SIGSTOP)",
    "SIGPIPE": "os.kill(os.getpid(), signal.SIGPIPE)",
    "null pointer": "import ctypes; ctypes.string_at(0)",
    "deaf": "[signal.signal(s, signal.SIG_IGN) for s in (2, 15)]\nwhile True: time.sleep(1)",
    "sleep": "time.sleep(3600)",
    "spin": "while True: pass",
    "GIL": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
    "power": "10 ** 10 ** 9",
    "threads": "[threading.Thread(target=time.sleep, args=(3600,)).start() for _ in range(20)]\ntime.sleep(3600)",
    "alarm": "signal.signal(signal.SIGALRM, lambda *_: time.sleep(3600)); signal.alarm(1); time.sleep(3600)",
    "close everything": "os.closerange(0, 100)",
    "close and hang": "os.closerange(0, 100); time.sleep(3600)",
    "stdin": "sys.stdin.read(); time.sleep(3600)",
    "bytes": "hoard = [bytearray(2 ** 26) for _ in range(1000)]",
    "doubling": "s = 'x'\nwhile True: s += s",
    "list": "x = []\nwhile True: x.extend(range(100000))",
    "mmap": "import mmap; [mmap.mmap(-1, 2 ** 28) for _ in range(100)]",
    "one large": "bytearray(10 ** 13)",
    "recursion": "f = lambda: f()\nf()",
    "deep recursion": "sys.setrecursionlimit(10 ** 9)\nf = lambda: f()\nf()",
    "repr": "x = []\nfor _ in range(10 ** 5): x = [x]\nrepr(x)",
    "child": "import subprocess; subprocess.run(['sleep', '3600'])",
    "children": "for _ in range(10):\n    if os.fork() == 0: time.sleep(3600)\ntime.sleep(3600)",
    "orphan": "if os.fork() == 0: time.sleep(3600)\nos._exit(1)",
    "SystemExit": "sys.exit(0)",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "GeneratorExit": "raise GeneratorExit",
    "long message": "raise RuntimeError('x' * 10 ** 7)",
    "no message": "E = type('E', (Exception,), {'__str__': lambda self: 1 / 0})\nraise E",
    "forged reply": '[os.write(fd, b\'["correct", ""]\\n\') for fd in (0, 1)]',
    "forged print": 'print(\'["correct", ""]\', flush=True)',
    "MemoryError": "raise MemoryError",
    "foreign descriptors": "for fd in range(2000, 2, -1):\n"
    "    if os.path.exists(f'/proc/self/fd/{fd}'): os.write(fd, b'garbage')",
    "descriptors replaced": "f = os.open(os.devnull, os.O_RDWR)\n"
    "[os.dup2(f, fd) for fd in range(3, 2000) if os.path.exists(f'/proc/self/fd/{fd}')]",
    "returns twice": "os.fork()",
    "a session of its own": "import subprocess; subprocess.Popen(['sleep', '3600'], start_new_session=True)",
    "double fork": "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(3600)\n    os._exit(0)",
    "no streams": "sys.stdout = sys.stderr = None\nraise RuntimeError",
    "atexit": "import atexit; atexit.register(time.sleep, 3600); os.kill(os.getpid(), signal.SIGTERM)",
}


def cases(trace: str, every: int = 1) -> list[Case]:
    """One in `every` case of each family. Code in them would make the file `trace`."""
    result = []
    golds = itertools.cycle(GOLDS)
    for family, answers in MATHEMATICS.items():
        part = itertools.islice(answers(), 0, None, every)
        result += [Case(family, box(a.replace("TRACE", trace)), "math", {"answer": next(golds)}) for a in part]
    for response in itertools.islice(floods(), 0, None, every):
        result.append(Case("floods", response, "math", {"answer": "7"}))
    for response, example in itertools.islice(puzzles(), 0, None, every):
        result.append(Case("puzzles", response.replace("TRACE", trace), "reasoning-gym", example))
    for name in itertools.islice(KILLERS, 0, None, every):
        result.append(Case("worker killers", name, "verifier_hostile:killer", {"answer": ""}))
    return result


# --- ordinary answers ---


def neighbours(kind: str, count: int) -> list[tuple[str, Example, int]]:
    """Responses with their examples and right verdicts; each but a puzzle's needs a worker and takes milliseconds."""
    if kind == "math":
        return [(box(f"{k + k % 2}+x"), {"answer": f"x+{k}"}, 1 - 2 * (k % 2)) for k in range(count)]
    if kind == "reasoning-gym":
        import reasoning_gym

        items = [{**item, "source_dataset": "chain_sum"} for item in reasoning_gym.create_dataset("chain_sum", size=50)]
        rows = [(items[k % 50], k % 2) for k in range(count)]
        return [(box("x" if wrong else item["answer"]), item, -1 if wrong else 1) for item, wrong in rows]
    return [(f"{k + k % 2}", {"answer": f"{k}"}, 1 - 2 * (k % 2)) for k in range(count)]


def ordinary(count: int, seed: int = 0) -> tuple[list[str], list[Example]]:
    """Distinct answers in about the proportions of a set of competition problems: two thirds are plain numbers."""
    draw = random.Random(seed)
    responses, examples = [], []
    for _ in range(count):
        a, b, c = draw.randint(2, 99), draw.randint(2, 99), draw.randint(2, 99)
        form, wrong = draw.random(), draw.random() < 0.5
        d = a + 1 if wrong else a
        if form < 0.65:
            gold, answer = f"{a * b}", f"{d * b}"
        elif form < 0.80:
            gold, answer = rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{d}}}{{{b}}}"
        elif form < 0.87:
            gold, answer = rf"{a}\sqrt{{{b}}}", rf"{d}\sqrt{b if b < 10 else f'{{{b}}}'}"
        elif form < 0.92:
            gold, answer = f"({a}, {b})", rf"\left({d},{b}\right)"
        elif form < 0.96:
            gold, answer = f"{a}x^2+{b}x-{c}", f"{b}x+{d}x^2-{c}"
        else:
            gold, answer = rf"\text{{({'ABCDE'[a % 5]})}}", "ABCDE"[d % 5]
        responses.append(box(answer))
        examples.append({"answer": gold})
    return responses, examples


def surds(count: int, seed: int = 0) -> tuple[list[str], list[Example]]:
    """Distinct constants with radicals, half of them wrong, each spelled in another way than its gold."""
    draw = random.Random(seed)
    responses, examples = [], []
    for _ in range(count):
        a, b, c, k = draw.randint(2, 99), draw.randint(2, 40), draw.randint(2, 40), draw.randint(2, 12)
        d = a + draw.randint(0, 1)
        gold, answer = draw.choice(
            [
                (rf"\sqrt{{{a * k * k}}}", rf"{k}\sqrt{{{d}}}"),
                (rf"\frac{{{a}+\sqrt{{{b}}}}}{{{c}}}", rf"\frac{{\sqrt{{{b}}}}}{{{c}}}+\frac{{{d}}}{{{c}}}"),
                (rf"\sqrt[3]{{{k**3 * a}}}", rf"{k}\sqrt[3]{{{d}}}"),
                (rf"\frac{{{a}}}{{\sqrt{{{b}}}}}", rf"\frac{{{d}\sqrt{{{b}}}}}{{{b}}}"),
                (rf"\sqrt{{{a + b}+2\sqrt{{{a * b}}}}}", rf"\sqrt{{{d}}}+\sqrt{{{b}}}"),
                (rf"\frac{{1}}{{\sqrt{{{a}}}+{a}}}", rf"\frac{{{d}-\sqrt{{{a}}}}}{{{a * a - a}}}"),
                (rf"{a}\pi\sqrt{{{b}}}", rf"\sqrt{{{b}}}\cdot{d}\pi"),
                (rf"{a}+{b}\sqrt{{{c}}}-\sqrt{{{k}}}", rf"{b}\sqrt{{{c}}}+{d}-\sqrt{{{k}}}"),
            ]
        )
        responses.append(box(answer))
        examples.append({"answer": gold})
    return responses, examples


# --- the attack ---


class Watch:
    """The largest memory of this process's children, sampled every 10 ms: address space and resident, in MiB."""

    def __init__(self) -> None:
        self.address_space = self.resident = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            for pid in itertools.chain.from_iterable(map(children, children())):  # below their keepers
                with contextlib.suppress(OSError, ValueError, IndexError):
                    if b"verifier_worker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                        continue  # between fork and exec it is this process's memory
                    status = Path(f"/proc/{pid}/status").read_text()
                    peak, high = (int(status.partition(f"{key}:")[2].split()[0]) / 1024 for key in ("VmPeak", "VmHWM"))
                    self.address_space = max(self.address_space, peak)
                    self.resident = max(self.resident, high)


def children(parent: int | str = "self") -> set[int]:
    found = set()
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{parent}/task").iterdir():
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def marked(mark: str) -> set[int]:
    """Processes that were started with the environment variable HOSTILE_MARK=mark."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"HOSTILE_MARK={mark}".encode() in entry.read_bytes().split(b"\0"):
                found.add(int(entry.parent.name))
    return found


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


class Report(NamedTuple):
    answers: int
    reasons: dict[str, int]
    called_correct: list[Case]
    overrun: float  # seconds beyond the deadline, the worst
    deciding: float  # seconds in the caller's process, the worst
    address_space: float  # MiB of a worker, the largest
    resident: float
    caller_growth: float  # MiB that the caller's process grew by
    neighbours: int
    wrong_neighbours: int
    left_behind: int  # processes
    executed: bool
    verdicts: list[tuple[int, str]]


def attack(
    attackers: Sequence[Case], trace: Path, workers: int = 2, timeout: float = 1.0, memory_mb: int = 768
) -> Report:
    """Grades `attackers`, sixteen at a time with as many neighbours among them."""
    from sgopd.verifier import VerifierPool

    mark, memory_before = f"{os.getpid()}-{time.monotonic_ns()}", resident_mb()
    verdicts: dict[int, Any] = {}
    overrun, deciding, wrong, beside = -timeout, 0.0, 0, 0
    with Watch() as watch:
        for kind in dict.fromkeys(case.kind for case in attackers):
            mine = [(index, case) for index, case in enumerate(attackers) if case.kind == kind]
            os.environ["HOSTILE_MARK"] = mark  # what the pool's processes start inherits it, wherever it goes
            with VerifierPool(kind, workers=workers, timeout=timeout, memory_mb=memory_mb) as pool:
                pool.check_golds([])
                for start in range(0, len(mine), 16):
                    part = mine[start : start + 16]
                    for _, case in part:
                        began = time.perf_counter()
                        pool._decide(case.response, case.example)
                        deciding = max(deciding, time.perf_counter() - began)
                    friends = neighbours(kind, len(part))
                    rows = [(case.response, case.example) for _, case in part] + [row[:2] for row in friends]
                    order = random.Random(start).sample(range(len(rows)), len(rows))
                    graded = pool.verify([rows[i][0] for i in order], [rows[i][1] for i in order])
                    placed = dict(zip(order, graded))
                    for position, (index, _) in enumerate(part):
                        verdicts[index] = placed[position]
                    overrun = max(overrun, max(verdict.seconds for verdict in graded) - timeout)
                    beside += len(friends)
                    wrong += sum(placed[len(part) + i].value != right for i, (_, _, right) in enumerate(friends))
    time.sleep(0.2)
    ordered = [verdicts[index] for index in range(len(attackers))]
    return Report(
        answers=len(attackers),
        reasons=dict(Counter(verdict.reason for verdict in ordered)),
        called_correct=[case for case, verdict in zip(attackers, ordered) if verdict.value == 1],
        overrun=overrun,
        deciding=deciding,
        address_space=watch.address_space,
        resident=watch.resident,
        caller_growth=resident_mb() - memory_before,
        neighbours=beside,
        wrong_neighbours=wrong,
        left_behind=len(marked(mark)),
        executed=trace.exists(),
        verdicts=[verdict[:2] for verdict in ordered],
    )


def differences(first: Report, second: Report) -> list[int]:
    """Answers whose verdicts differ between two pools, timeouts and their like aside."""
    late = {"timeout", "crashed"}
    pairs = enumerate(zip(first.verdicts, second.verdicts))
    return [index for index, (x, y) in pairs if x != y and not {x[1], y[1]} & late]


def rate(
    workers: int = 2,
    count: int = 2_000,
    draw: Callable[[int, int], tuple[list[str], list[Example]]] = ordinary,
) -> float:
    """Answers graded a second, each new to the pool."""
    from sgopd.verifier import VerifierPool

    with VerifierPool("math", workers=workers) as pool:
        pool.verify(*draw(200, 1))  # all workers are there, and sympy is warm
        responses, examples = draw(count, 0)
        began = time.perf_counter()
        pool.verify(responses, examples)
        return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take one in so many answers of a family (default: 1)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="pools to compare (default: 1 2 4)")
    parser.add_argument("--timeout", type=float, default=1.0, help="seconds for an answer (default: 1)")
    parser.add_argument("--memory-mb", type=int, default=768, help="MiB of address space of a worker (default: 768)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "executed"
        attackers = cases(str(trace), arguments.every)
        families = Counter(case.family for case in attackers)
        print(f"{len(attackers)} answers: " + ", ".join(f"{n} {family}" for family, n in families.items()))
        print(f"deadline {arguments.timeout:g} s, {arguments.memory_mb} MiB a worker\n")
        print(
            "| workers | reasons | called correct | worst overrun, s | worst in the caller, s | largest worker, MiB "
            "(resident) | caller grew, MiB | wrong neighbours | processes left | code executed | verdicts that differ |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        reports: list[Report] = []
        for workers in arguments.workers:
            r = attack(attackers, trace, workers, arguments.timeout, arguments.memory_mb)
            reports.append(r)
            reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(r.reasons.items()))
            different = len(differences(reports[0], r))
            print(
                f"| {workers} | {reasons} | {len(r.called_correct)} | {r.overrun:.2f} | {r.deciding:.2f} "
                f"| {r.address_space:.0f} ({r.resident:.0f}) | {r.caller_growth:.0f} | {r.wrong_neighbours} of "
                f"{r.neighbours} | {r.left_behind} | {'yes' if r.executed else 'no'} | {different} |",
                flush=True,
            )
    for name, draw in ("ordinary answers", ordinary), ("surds and radicals", surds):
        print(f"\n{name} a second, two workers: {max(rate(draw=draw) for _ in range(3)):.0f}")
    failed = [
        r
        for r in reports
        if r.called_correct
        or r.overrun > 0.5
        or r.deciding > 0.5
        or r.address_space > arguments.memory_mb
        or r.wrong_neighbours
        or r.left_behind
        or r.executed
        or differences(reports[0], r)
    ]
    if failed:
        for case in {case for r in failed for case in r.called_correct}:
            print(f"called correct: {case.family}: {case.response!r:.200} against {case.example['answer']}")
        sys.exit("the verifier did not hold")


if __name__ == "__main__":
    main()
