# ruff: noqa: E501
"""Plants one defect after another into a copy of the kernels and reports which test caught each.

    python tests/planted_defects.py            # a quarter of an hour; needs the build requirements, pytest and Triton
    python tests/planted_defects.py 3 17       # some of them

A defect that no test catches is a missing test. Exit status: the number of those.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Defect(NamedTuple):
    what: str
    file: str
    before: str
    after: str


ROWS = "csrc/cpu/rows.cpp"
TORCH = "sgopd_kernels/backends/torch.py"
TRITON = "sgopd_kernels/backends/triton_kernels.py"
# fmt: off
DEFECTS = [
    Defect("gate: the sign test turned round", "sgopd_kernels/gate.py", "signed > tolerance, signed <", "signed < tolerance, signed >"),
    Defect("gate: pair's sides swapped", "sgopd_kernels/gate.py", "conflict[0] * correct + conflict[1]", "conflict[1] * correct + conflict[0]"),
    Defect("gate: reliability's complement", "sgopd_kernels/gate.py", "reliability + (1 - reliability) *", "(1 - reliability) + reliability *"),
    Defect("gate: rejected rollouts kept", "sgopd_kernels/gate.py", "neutral)]) * kept", "neutral)])"),
    Defect("mean over all tokens, ignored ones too", "sgopd_kernels/ops.py", "(problem.token_ids != problem.spec.ignore_index).sum()", "(problem.token_ids == problem.token_ids).sum()"),
    Defect("num_items ignored", "sgopd_kernels/ops.py", "    if denominator is None:", "    if True:"),
    Defect("incoming gradient ignored", "sgopd_kernels/ops.py", "            g.mul_(grad_loss)", "            pass"),
    Defect("per-token incoming gradient ignored", "sgopd_kernels/ops.py", "= grad_loss.contiguous()", "= torch.ones_like(grad_loss)"),
    Defect("last chunk's weight gradient lost", "sgopd_kernels/plan.py", "if d_weight is not None:", "if d_weight is not None and chunk.stop < total:"),
    Defect("compacted rows not moved", TORCH, "            z[a].copy_(z[b])", "            pass"),
    Defect("teacher's logits from the student's chunk", "sgopd_kernels/plan.py", "problem.teacher_hidden[at], problem.teacher.weight", "problem.teacher_hidden[: at.numel()], problem.teacher.weight"),
    Defect("fp32 products left to the global setting", TORCH, 'torch.set_float32_matmul_precision("highest")', "pass"),
    Defect("torch: KL not subtracted in the gradient", TORCH, "p * (ratio - value.unsqueeze(-1))", "p * ratio"),
    Defect("torch: temperature missing in the gradient", TORCH, "(head.logit_scale / temperature)", "(head.logit_scale)"),
    Defect("torch: softcap's slope missing", TORCH, "dense = (dense * slope)", "dense = (dense * 1)"),
    Defect("torch: bias left out", TORCH, "    if head.bias is not None:\n        z +=", "    if False:\n        z +="),
    Defect("cpu: mean of z - t not subtracted", ROWS, "((zb[i] - tb[i]) - mean.hi) - mean.lo", "(zb[i] - tb[i])"),
    Defect("cpu: KL from first moments always", ROWS, "value < kPrecise", "value < 0"),
    Defect("cpu: statistics not rescaled at a new maximum", ROWS, "    sum *= factor;", ""),
    Defect("cpu: sampled token's 1 missing", ROWS, "zb[y - first] -= k.sampled;", "(void)y;"),
    Defect("cpu: advantage not in the sampled gradient", ROWS, "weight * advantage * a.row_scale[n]);", "weight * a.row_scale[n]);"),
    Defect("cpu: softcap's slope missing", ROWS, "scale * (1.f - th * th)", "scale"),
    Defect("cpu: -inf of the teacher not taken out", ROWS, "    if (t != nullptr) target(t, a.teacher_head);", "    if (t != nullptr && !head_is_plain(a.teacher_head, a.inverse_temperature)) transform(t, a.teacher_head, a.inverse_temperature, first, count);"),
    Defect("cpu: tail of a row beyond a block dropped", ROWS, "first < v; first += kBlock) s.add_block", "first < (v > kBlock ? v - kBlock : v); first += kBlock) s.add_block"),
    Defect("cpu: a NaN importance ratio clipped to a number", ROWS, "ratio > a.ratio_clip ? a.ratio_clip : ratio", "ratio < a.ratio_clip ? ratio : a.ratio_clip"),
    Defect("torch: a softcap unmasks a column", TORCH, "z = torch.where(z == -torch.inf, z, ", "z = torch.where(z == torch.inf, z, "),
    Defect("door: a stride shorter than the row accepted", "csrc/arguments.h", "if (stride < columns)", "if (false)"),
    Defect("pairs: squares of what is left in plain fp32", "csrc/cpu/sparse.cpp", "threshold > 1e-37f ? 1.f / threshold : 1e37f", "1.f"),
    Defect("screen: a NaN lost at a new maximum", "csrc/cpu/sparse.cpp", "sum *= std::exp(static_cast<double>(highest) - top);", "sum = sum > 0 ? sum * std::exp(static_cast<double>(highest) - top) : 0.0;"),
    Defect("triton: the sign test turned round", TRITON, "    signed = d *", "    signed = -d *"),
    Defect("triton: columns beyond the row not masked", TRITON, 'tl.where(inside, z * inverse_temperature, float("-inf"))', "z * inverse_temperature"),
    Defect("triton: last column lost where it begins a block", TRITON, "for first in range(0, V, BLOCK):", "for first in range(0, V - 1, BLOCK):"),
    Defect("triton: mean of z - t not subtracted", TRITON, "((delta - mean_hi) - mean_lo)\n                elif", "delta\n                elif"),
    Defect("triton: moments not centred at the sampled token", TRITON, "0.0, z_y - t_y)", "0.0, 0.0)"),
    Defect("triton: temperature missing in the gradient", TRITON, "scaled * student_scale * inverse_temperature", "scaled * student_scale"),
    Defect("triton: sums not rescaled at a new maximum", TRITON, "        sum_p *= factor", "        pass"),
    Defect("triton: a softcap unmasks a column", TRITON, 'tl.where(z == float("-inf"), z, softcap * _tanh(z / softcap))', "softcap * _tanh(z / softcap)"),
]
# fmt: on
KERNEL_TESTS = [f"tests/kernels/test_{name}.py" for name in ("parity", "api", "ops", "options", "fuzz_native")]
INTERPRETED = ["tests/triton/interpreted.py"]


def run(defect: Defect | None, tests: list[str]) -> str | None:
    """The first failing test, or None; `defect` None checks that the untouched copy is green."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        skip = shutil.ignore_patterns(".git", ".venv*", "build", "*.so", "__pycache__", "runs", "assets")
        shutil.copytree(ROOT, copy, ignore=skip)
        if defect is not None:
            path = copy / defect.file
            text = path.read_text()
            assert text.count(defect.before) >= 1, f"{defect.what}: {defect.before!r} is not in {defect.file}"
            path.write_text(text.replace(defect.before, defect.after, 1))
        environment = {**os.environ, "SGOPD_CUDA": "0", "SGOPD_TEST_SOURCE": "1", "PYTHONPATH": str(copy)}
        if tests is KERNEL_TESTS:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=copy, env=environment, check=True, capture_output=True)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-k", "not peak_memory", *tests]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        failed = [line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return failed[0] if failed else (None if done.returncode == 0 else "pytest itself failed")


def tests_of(defect: Defect) -> list[str]:
    return INTERPRETED if defect.file == TRITON else KERNEL_TESTS


def main() -> int:
    chosen = [int(word) for word in sys.argv[1:]] or list(range(1, len(DEFECTS) + 1))
    for tests in (KERNEL_TESTS, INTERPRETED):
        if any(tests_of(DEFECTS[number - 1]) is tests for number in chosen):
            broken = run(None, tests)
            if broken is not None:
                raise SystemExit(f"the untouched checkout is not green: {broken}")
    escaped = 0
    for number in chosen:
        defect = DEFECTS[number - 1]
        caught = run(defect, tests_of(defect))
        escaped += caught is None
        print(f"{number:3}  {defect.what:50}  {caught or 'NOT CAUGHT'}", flush=True)
    print(f"{len(chosen) - escaped} of {len(chosen)} caught")
    return escaped


if __name__ == "__main__":
    sys.exit(main())
