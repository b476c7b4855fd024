"""The short form of tests/soak.py, and whether its verdict can be a bad one."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def soak(root):
    spec = importlib.util.spec_from_file_location("soak", root / "tests" / "soak.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def samples(soak, count=90, **slopes):
    """Flat but for the `slopes`, in units a sample."""
    level = {"memory_mib": 650.0, "trainer_memory_mib": 600.0, "processes": 3, "descriptors": 9, "threads": 4}
    assert level.keys() == soak.ALLOWED.keys()
    noise = [(7 * i) % 3 - 1 for i in range(count)]
    return [
        {name: start + slopes.get(name, 0) * i + noise[i] * (name == "memory_mib") for name, start in level.items()}
        for i in range(count)
    ]


def test_growth_is_found_and_noise_is_not(soak):
    assert not any(values["grew"] for values in soak.growth(samples(soak)).values())
    for name, slope in (("memory_mib", 0.5), ("trainer_memory_mib", 0.5), ("processes", 0.05), ("descriptors", 0.05)):
        grown = soak.growth(samples(soak, **{name: slope}))
        assert {key for key, values in grown.items() if values["grew"]} == {name}
    once = samples(soak)  # a spike at either end is not growth
    once[0]["descriptors"], once[-1]["descriptors"], once[-1]["memory_mib"] = 2, 40, 900
    assert not any(values["grew"] for values in soak.growth(once).values())
    with pytest.raises(ValueError, match="14 samples are too few"):
        soak.growth(samples(soak, count=14))


def test_what_is_left_is_found(soak, tmp_path):
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    environment = {**os.environ, soak.MARK: "here"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True) as process:
        process.stdout.readline()
        assert [line.split()[0] for line in soak.left_behind("here")] == [str(process.pid)]
        assert soak.left_behind("elsewhere") == []
        process.kill()
    assert soak.left_behind("here") == []
    for name in ("torchinductor_me", "tmpabc"):
        (tmp_path / name).mkdir()
    assert soak.temporary_files(tmp_path) == ["tmpabc"]


def test_a_short_soak_is_flat(soak, tmp_path):
    summary = soak.soak(tmp_path, minutes=0.2)
    assert summary["faults"] == []
    assert summary["exit_status"] == 128 + signal.SIGTERM
    assert summary["updates"] > 5 and summary["samples"] > 50 and summary["workers_died"] > 0
