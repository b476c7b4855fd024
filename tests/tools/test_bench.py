"""The benchmarks' own machinery: turns, ratios, what is stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from candidates import times_the_fastest


def test_ratios_are_of_the_same_round() -> None:
    seconds = {"ours": [1.0, 2.0, 4.0], "slow": [9.0, 9.0, 9.0], "fast": [2.0, 4.0, 8.0]}
    assert times_the_fastest(seconds, ["slow", "fast"])["ours"] == 2.0
    assert times_the_fastest(seconds, ["slow", "fast"])["fast"] == 1.0
    assert times_the_fastest(seconds, []) == {}


def test_readings_errors_and_ratios_are_stored_and_printed(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (extra: bench)")
    asked = ["bench/test_loss.py", "-k", "float32 and near and tiny and (sgopd or eager)", "--rounds", "3"]
    command = [sys.executable, "-m", "pytest", *asked, "--benchmark-json", str(tmp_path / "run.json")]
    # Not as a worker of this run: pytest-benchmark measures nothing in one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    runs = {
        one["extra_info"]["candidate"]: one for one in json.loads((tmp_path / "run.json").read_text())["benchmarks"]
    }
    assert set(runs) == {"sgopd", "sgopd exact", "sgopd exact torch", "eager"}
    for name, run in runs.items():
        assert run["stats"]["rounds"] == 3 and run["stats"]["min"] > 0
        assert {"dH error", "dW error", "loss error", "× fastest peer"} <= set(run["extra_info"])
        assert name in done.stdout
    assert runs["eager"]["extra_info"]["× fastest peer"] == 1.0
