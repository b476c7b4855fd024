"""The short form of tests/chaos.py, in a process of its own: what it forks must have computed nothing before."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys

import pytest

from sgopd import files


@pytest.fixture(scope="module")
def chaos(root):
    spec = importlib.util.spec_from_file_location("chaos", root / "tests" / "chaos.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = module  # its dataclasses ask for it
    spec.loader.exec_module(module)
    return module


def test_the_plan_covers_every_stage_and_both_numbers_of_processes(chaos):
    cases = chaos.plan()
    for kind in ("kill", "sigterm", "sigint", "full", "unwritable", "second"):
        mine = [case for case in cases if case.kind == kind]
        assert {(case.stage, case.processes) for case in mine if case.stage} == {
            (stage, processes) for stage in chaos.STAGES for processes in (1, 2)
        }
    assert {case.kind for case in cases} == chaos.KINDS.keys() and len(cases) > 300
    few = chaos.chosen(0, 10, None)
    assert len({case.kind for _, case in few}) == len(chaos.KINDS) and len(few) == 10
    assert few == chaos.chosen(0, 10, None) != chaos.chosen(1, 10, None)
    assert len(chaos.chosen(0, None, None)) == len(cases)


def test_a_power_cut_keeps_what_was_synced_and_nothing_impossible(chaos, tmp_path):
    """The model of the disk, on a rename that was and one that was not preceded by an fsync."""
    root = tmp_path / "tree"
    root.mkdir()
    (root / "old").write_text("old")
    seen = set()
    disk = chaos.Disk(root, tmp_path / "state", 1)
    for name in ("synced", "loose"):
        (root / f".{name}").write_text("new")
        disk.look()
        if name == "synced":
            with open(root / f".{name}") as file:
                disk.contents[os.fstat(file.fileno()).st_ino] = b"new"  # as fsync does
        os.rename(root / f".{name}", root / name)
        disk.look()
    disk.write()
    for handle in disk.handles.values():
        os.close(handle)
    assert not (root / ".synced").exists()
    state = chaos.pickle.loads((tmp_path / "state").read_bytes())
    for seed in range(200):
        chaos.after_the_cut(state, root, random.Random(seed))
        seen.add(tuple(sorted((path.name, path.read_bytes()) for path in root.iterdir())))
    names = {tuple(name for name, _ in tree) for tree in seen}
    assert names == {
        ("old",),
        (".synced", "old"),
        ("old", "synced"),
        (".loose", "old", "synced"),
        ("loose", "old", "synced"),
    }
    contents = {(name, data) for tree in seen for name, data in tree}
    assert {data for name, data in contents if name in ("old", "synced")} == {b"old", b"new"}
    assert {b"", b"new"} < {data for name, data in contents if name == "loose"}


def test_a_power_cut_takes_nothing_that_the_run_found(chaos, tmp_path):
    """It was read from the disk, whether or not this process or one before it has synced it."""
    root = tmp_path / "tree"
    (root / "checkpoints" / "step-000002").mkdir(parents=True)
    (root / "checkpoints" / "step-000002" / "weights").write_text("old")
    disk, seen = chaos.Disk(root, tmp_path / "state", 1), set()
    (root / "checkpoints" / ".step-000004.tmp").mkdir()
    disk.look()
    disk.write()
    for handle in disk.handles.values():
        os.close(handle)
    for seed in range(100):
        chaos.after_the_cut(chaos.pickle.loads((tmp_path / "state").read_bytes()), root, random.Random(seed))
        seen.add(tuple(sorted(path.name for path in (root / "checkpoints").iterdir())))
        assert (root / "checkpoints" / "step-000002" / "weights").read_text() == "old"
    assert seen == {("step-000002",), (".step-000004.tmp", "step-000002")}


def test_what_a_power_cut_leaves_is_drawn_alike_on_every_file_system(chaos, tmp_path):
    """Neither the order of a folder's entries nor a file's length, in which times are written, moves later draws."""
    (tmp_path / "tree").mkdir()
    for seed in range(20):
        drawn = set()
        for order in (1, -1):
            for length in (0, 1, 1000):
                entries = dict([("folder", 2), ("loose", 3), ("longer", 4)][::order])
                data = b"x" * length
                state = {
                    "root": 1,
                    "folders": {1: [entries], 2: [{}, {"file": 5}]},
                    "files": {3: (None, data), 4: (b"x", b"x" + data), 5: (data, data)},
                }
                rng = random.Random(seed)
                chaos.after_the_cut(state, tmp_path / "tree", rng)
                drawn.add((rng.random(), (tmp_path / "tree" / "folder" / "file").exists()))
        assert len(drawn) == 1


def test_what_is_replaced_is_whole_wherever_the_power_is_cut(chaos, tmp_path, monkeypatch):
    """Between any two operations the old or the new, and the new once `new_file` and `new_folder` have returned."""
    root, output = tmp_path / "tree", tmp_path / "state"
    root.mkdir()

    def write(word):
        with files.new_file(root / "file") as path:
            path.write_text(word)
        with files.new_folder(root / "folder") as path:
            (path / "weights").write_text(word)

    write("before")
    disk, states = chaos.Disk(root, output, 1), []

    def cut():
        disk.look()
        disk.write()
        states.append(output.read_bytes())

    def around(original):
        def wrapper(*arguments, **options):
            cut()
            original(*arguments, **options)
            cut()

        return wrapper

    monkeypatch.setattr(disk, "tick", cut)
    monkeypatch.setattr(os, "fsync", disk.fsync)
    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, around(getattr(os, name)))
    write("after")
    cut()
    monkeypatch.undo()
    for handle in disk.handles.values():
        os.close(handle)
    seen = []
    for state in states:
        for seed in range(20):
            chaos.after_the_cut(chaos.pickle.loads(state), root, random.Random(seed))
            seen.append(tuple((root / name).read_text() for name in ("file", "folder/weights")))
    assert set(seen) == {("before", "before"), ("after", "before"), ("after", "after")}
    assert set(seen[-20:]) == {("after", "after")}


def test_a_few_runs_are_broken_and_lose_nothing(root, tmp_path):
    output = tmp_path / "chaos.json"
    command = [sys.executable, str(root / "tests" / "chaos.py"), "--few", "9", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    summary = json.loads(output.read_text())
    assert summary["failures"] == []
    assert sum(row["tried"] for row in summary["kinds"].values()) == 9 == len(summary["kinds"])
