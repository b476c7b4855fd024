"""tools/gpu_suite.py: the whole of it on the CPU, and what must survive when parts of it don't."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import candidates as c
import gpu_suite as suite
import pytest
import torch


def test_dry_run(root: Path, tmp_path: Path) -> None:
    """The same code path as on a device, tiny: every stage, every candidate, both files."""
    command = [sys.executable, str(root / "tools" / "gpu_suite.py"), "--dry-run", "--minutes", "20"]
    command += ["--output", str(tmp_path)] + (["--source"] if os.environ.get("SGOPD_TEST_SOURCE") == "1" else [])
    done = subprocess.run(command, capture_output=True, text=True, timeout=1300)
    logs = "\n".join(p.read_text()[-3000:] for p in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:] + logs
    data = json.loads((tmp_path / "results.json").read_text())
    assert {s["status"] for s in data["stages"].values()} == {"done"}
    assert data["tests"]["passed"] > 20 and not data["tests"]["failed"]
    target = data["tables"]["target"]["rows"]
    for name, row in target.items():
        installed = row["status"] != "not installed"
        assert row["status"] == "done" or not installed, (name, row)
        if row["group"] == "ours" and "dH error" in row:
            assert row["dH error"] < 2**-8 and row["dW error"] < 2**-8 and row["loss error"] < 1e-4
    assert {r["group"] for r in target.values()} == {"ours", "peer", "floor"}
    assert set(data["tables"]) == {"pieces", "target", "trace", "near", "flat", "sweep"}
    alone = data["tables"]["pieces"]["rows"]
    assert len(alone) == 13 and all(r["status"] == "done" and r["bytes"] > 0 for r in alone.values())
    assert data["tables"]["trace"]["facts"]["kernels"] > 50 and (tmp_path / "trace.json.gz").stat().st_size > 1000
    assert "compiled chunks, addmm(out_dtype)" in target
    text = (tmp_path / "results.md").read_text()
    assert "Not measured on a device" in text and "| default / the sum of its stages |  | ≤ 1.03 | –" not in text
    for name in target:
        assert f"| {name} |" in text


def child(tmp_path: Path, body: str) -> list[str]:
    """A child of our making in place of the measuring one."""
    path = tmp_path / "child.py"
    head = """
        import json, os, sys, time
        without = [sys.argv[i + 1] for i, a in enumerate(sys.argv) if a == "--without"]
        def say(kind, **fields):
            print("@@ " + json.dumps({"kind": kind, **fields}), flush=True)
        def row(name, **fields):
            if "target:" + name not in without:
                say("row", table="target", name=name, group="ours", status="running")
                say("running", table="target", name=name)
                return True
    """
    path.write_text(textwrap.dedent(head) + textwrap.dedent(body))
    return [sys.executable, str(path)]


DIES = """
    say("stage", name="target", status="running")
    row("good") and say("row", table="target", name="good", status="done", ms=1.0, min=1.0, max=1.0, host=1.0)
    row("bad") and (print("illegal address", flush=True), os._exit(7))
    row("last") and say("row", table="target", name="last", status="done", ms=2.0, min=2.0, max=2.0, host=2.0)
    say("stage", name="target", status="done", seconds=1)
"""


def test_a_candidate_that_kills_the_process_loses_only_its_own_row(tmp_path: Path) -> None:
    results = suite.Results(tmp_path, {"dry run": True})
    suite.measure(results, child(tmp_path, DIES), ["target"], dict(os.environ), time.time() + 60)
    rows = json.loads((tmp_path / "results.json").read_text())["tables"]["target"]["rows"]
    assert rows["good"]["ms"] == 1.0 and rows["last"]["ms"] == 2.0
    assert "died (7)" in rows["bad"]["status"] and "illegal address" in rows["bad"]["status"]
    assert results.data["stages"]["target"]["status"] == "done" and not suite.good(results.data)


def test_a_candidate_that_hangs_is_killed_and_what_was_read_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "SILENCE", 5.0)
    results = suite.Results(tmp_path, {"dry run": True})
    command = child(tmp_path, DIES.replace("os._exit(7)", "time.sleep(60)"))
    suite.measure(results, command, ["target"], dict(os.environ), time.time() + 60)
    rows = results.data["tables"]["target"]["rows"]
    assert "nothing heard" in rows["bad"]["status"] and rows["last"]["ms"] == 2.0


def test_over_its_time_a_child_ends_and_the_stage_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "GRACE", 0.5)
    results = suite.Results(tmp_path, {"dry run": True})
    command = child(tmp_path, DIES.replace("os._exit(7)", "time.sleep(60)"))
    suite.measure(results, command, ["target", "sweep"], dict(os.environ), time.time() + 5)
    assert results.data["tables"]["target"]["rows"]["good"]["ms"] == 1.0
    assert results.data["stages"]["target"]["status"] == results.data["stages"]["sweep"]["status"] == "cut"
    assert "over its time" in (tmp_path / "results.md").read_text()


def test_tests_are_summed_up_from_their_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.gpu.a" name="x"/>'
        '<testcase classname="tests.gpu.a" name="y"><failure message="assert 1 &lt;= 0&#10;more"/></testcase>'
        '<testcase classname="tests.gpu.a" name="z"><skipped message="no tool"/></testcase></testsuite></testsuites>'
    )
    found = suite.summary(report)
    assert found == {"run": 3, "passed": 1, "failed": {"a::y": "assert 1 <= 0"}, "skipped": {"no tool": 1}}


def test_inputs_and_truth() -> None:
    """The distributions are what their names say, and the truth is autograd's."""
    shape = c.Shape(64, 4096, 256, 512)
    found = {d.name: c.truth(c.inputs(shape, d, torch.float64, "cpu"), rows=24) for d in c.DISTRIBUTIONS}
    assert found["usual"].entropy < 3 < 7 < found["flat"].entropy
    assert float(found["near"].loss) < 2e-3 < float(found["usual"].loss)
    o = c.inputs(shape, c.USUAL, torch.float64, "cpu")
    h, w = o.hidden.requires_grad_(), o.weight.requires_grad_()
    log_p, log_q = torch.log_softmax(h @ w.T, -1), torch.log_softmax(o.teacher_hidden @ o.teacher_weight.T, -1)
    loss = (log_p.exp() * (log_p - log_q)).sum() / 64
    d_hidden, d_weight = torch.autograd.grad(loss, (h, w))
    exact = found["usual"]
    assert torch.allclose(loss.detach(), exact.loss) and torch.allclose(d_hidden, exact.d_hidden)
    assert torch.allclose(d_weight, exact.d_weight)
