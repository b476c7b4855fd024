"""What nvcc makes of csrc/cuda/rows.cu for devices that are not here: registers, spills, the width of loads.

    python tests/cuda_host/sass.py            # the table; exit status 1 where a ceiling is broken (minutes)
    python tests/cuda_host/sass.py --plant    # with half of the registers a thread, which must break one

Nothing runs: these are no timings. Needs nvcc.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "rows.cu"
TARGETS = ("80", "90a", "100a", "120")
BOUNDS = "__launch_bounds__(kThreads, 2)"
REGISTERS = 128  # a thread: two blocks of 256 threads a multiprocessor
# Operations on float64 in the whole program, none of them in a loop over columns: sums of a row, what is made of them.
DOUBLES = 2800
KERNELS = {"rows_kernel": ("80", "90a", "100a", "120"), "staged_rows_kernel": ("90a", "100a")}  # and where they run


def tool(name: str) -> str:
    """The toolkit's, or Triton's own copy of it."""
    if found := shutil.which(name):
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compiled(target: str, source: Path, folder: Path) -> tuple[str, dict[str, list[str]]]:
    """(ptxas's words, kernel -> its instructions)"""
    cubin = folder / f"{target}.cubin"
    command = ["nvcc", "-std=c++17", "-O3", "-cubin", "-Xptxas=-v", f"-I{SOURCE.parent}"]
    command += ["-gencode", f"arch=compute_{target},code=sm_{target}"]
    done = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    listing = subprocess.run(
        [tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    kernels: dict[str, list[str]] = {}
    for line in listing.splitlines():
        if "Function :" in line:
            kernels[line.split(":")[1].strip()] = current = []
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            current.append(found[1])
    return done.stderr, kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plant", action="store_true", help="half of the registers: it must spill")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    chosen = parser.parse_args()
    broken = 0
    head = ("kernel", "target", "registers", "spills, bytes", "16-byte loads, of all", "float64", "")
    for line in (head, ("---",) * len(head)):
        print("| " + " | ".join(line) + " |")
    with tempfile.TemporaryDirectory() as folder:
        source = SOURCE
        if chosen.plant:  # -maxrregcount does nothing to a kernel with bounds of its own
            source = Path(folder) / SOURCE.name
            text = SOURCE.read_text(encoding="utf-8")
            assert BOUNDS in text
            source.write_text(text.replace(BOUNDS, BOUNDS.replace("2", "4")), encoding="utf-8")
        for target in chosen.targets:
            words, kernels = compiled(target, source, Path(folder))
            for mangled, operations in kernels.items():
                name = next(k for k in sorted(KERNELS, key=len, reverse=True) if k in mangled)
                if target not in KERNELS[name]:
                    continue
                part = words[words.index(f"Compiling entry function '{mangled}'") :]
                spills = int(re.findall(r"(\d+) bytes spill stores", part)[0])
                registers = int(re.findall(r"Used (\d+)", part)[0])
                count = Counter(operations)
                loads = {op: n for op, n in count.items() if op.startswith(("LDG", "LDGSTS"))}
                wide = sum(n for op, n in loads.items() if "128" in op)
                doubles = sum(n for op, n in count.items() if op.split(".")[0] in ("DFMA", "DADD", "DMUL", "DSETP"))
                over = registers > REGISTERS or spills > 0 or wide == 0 or doubles > DOUBLES
                broken += over
                cells = (name, f"sm_{target}", registers, spills, f"{wide} of {sum(loads.values())}", doubles)
                print("| " + " | ".join(map(str, (*cells, "OVER" if over else ""))) + " |", flush=True)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
