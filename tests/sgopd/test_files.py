"""What is written is whole or not there, and a failure to write says so."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sgopd import checkpoint, files
from sgopd.config import Config, LostProcess, UserError
from sgopd.metrics import MetricsFile, lost_records
from sgopd.processes import together
from sgopd.run_dir import lock_run_dir


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "config.yaml"
    target.write_text("before")
    with pytest.raises(KeyError), files.new_file(target) as path:
        path.write_text("half")
        raise KeyError
    with (
        pytest.raises(UserError, match=r"cannot write .*config.yaml.*No space.*Free some space"),
        files.new_file(target),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_text() == "before" and os.listdir(tmp_path) == ["config.yaml"]
    with files.new_file(target) as path:
        path.write_text("after")
        assert target.read_text() == "before"
    assert target.read_text() == "after" and os.listdir(tmp_path) == ["config.yaml"]


@pytest.mark.parametrize(
    "swaps", [pytest.param(True, marks=pytest.mark.skipif(sys.platform != "linux", reason="renameat2")), False]
)
def test_a_folder_is_replaced_and_the_old_one_goes(tmp_path, monkeypatch, swaps):
    target, there, rename = tmp_path / "final", [], Path.rename
    if not swaps:  # a system or a file system without it
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *args, **kwargs: object())

    def watched(self, to):
        rename(self, to)
        there.append(target.exists())

    monkeypatch.setattr(Path, "rename", watched)
    for content in ("one", "two"):
        with files.new_folder(target) as path:
            (path / content).write_text(content)
    assert [path.name for path in tmp_path.rglob("*")] == ["final", "two"]
    assert all(there) is swaps, "where folders can be swapped, the name is never without one"


def test_folders_are_entered_in_their_parents(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync", synced.append)
    files.make_folder(tmp_path / "a" / "b")
    assert set(synced) == {tmp_path, tmp_path / "a"}
    files.make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2, "nothing new, nothing to sync"


def test_a_folder_that_goes_loses_its_name_first(tmp_path, monkeypatch):
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000002" / "state.json").write_text("{}")

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            files.remove_folder(tmp_path / "step-000002")
    assert os.listdir(tmp_path) == [".step-000002.tmp"]
    (tmp_path / ".config.yaml.tmp").touch()
    files.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_folder_is_one_process_s_and_free_when_that_has_ended(tmp_path):
    take = (
        "import sys; from pathlib import Path; from sgopd.files import FolderLock; lock = FolderLock(Path(sys.argv[1]))"
    )
    wait = f"{take}; print('taken', flush=True); sys.stdin.read()"
    child = [sys.executable, "-c", wait, str(tmp_path)]
    with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(UserError, match=rf"at work in {tmp_path} \(process {other.pid} on .*another output_dir"):
            files.FolderLock(tmp_path)
        other.kill()
        other.wait()
        lock = files.FolderLock(tmp_path)
        refused = subprocess.run([sys.executable, "-c", take, str(tmp_path)], capture_output=True, text=True)
        assert refused.returncode == 1 and f"(process {os.getpid()} on " in refused.stderr
        # A fork, such as a data loader's worker, neither has it nor keeps it.
        if (pid := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        try:
            lock.release()
            subprocess.run([sys.executable, "-c", take, str(tmp_path)], check=True)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_file_system_without_locks_is_said_and_other_failures_end_the_run(settings, tmp_path, monkeypatch):
    config = Config.load(None, settings())

    def failing(number):
        def lockf(file, operation):
            raise OSError(number, os.strerror(number))

        return lockf

    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        monkeypatch.setattr(files.fcntl, "lockf", failing(number))
        lock, said = lock_run_dir(config)
        assert not lock.held and ["has no locks" in line for line in said] == [True]
        lock.release()
    monkeypatch.setattr(files.fcntl, "lockf", failing(errno.EIO))
    with pytest.raises(UserError, match=r"cannot write in .*: Input/output error"):
        lock_run_dir(config)


def test_a_full_disk_is_a_message_whichever_library_meets_it(tmp_path):
    """In a process of its own, whose files may not grow: each library raises something else."""
    program = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from sgopd.checkpoint import save_tensors
from sgopd.config import UserError
from sgopd.files import writing
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
folder, tensors = Path(sys.argv[1]), {"a": torch.zeros(100_000)}
tokenizer = Tokenizer(models.WordLevel({str(n): n for n in range(100)}, unk_token="0"))
for write in (
    lambda: save_tensors(tensors, folder / "a.pt"),
    lambda: save_file(tensors, folder / "a.safetensors"),
    lambda: tokenizer.save(str(folder / "a.json")),
    lambda: (folder / "a.txt").write_text("a" * 1000),
):
    try:
        with writing(folder):
            write()
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert len(said) == 4 and all(f"cannot write {tmp_path}: " in line and "File too large" in line for line in said)


def test_other_errors_stay_what_they_are(tmp_path):
    for kind in (KeyError, RuntimeError, ValueError):
        with pytest.raises(kind), files.writing(tmp_path):
            raise kind("ours")
    with pytest.raises(RuntimeError, match="not the disk"):  # torch's own, where no write failed
        checkpoint.save_tensors(_Unsaveable(), tmp_path / "a.pt")


class _Unsaveable:
    def __reduce__(self):
        raise RuntimeError("not the disk")


def test_the_records_of_a_checkpoint_are_known_by_their_sum(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write({"step": 1})
    state = {"metrics_position": file.position, "metrics_sha256": file.sha256}
    file.write({"step": 2})
    file.close()
    assert lost_records(path, state) is None
    again = MetricsFile(path, state["metrics_position"])
    assert (again.position, again.sha256) == tuple(state.values()), "opening counts what is there"
    again.close()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"1", b"7"))
    assert "have changed (SHA-256)" in lost_records(path, state)
    first_version = {"metrics_position": state["metrics_position"]}
    assert lost_records(path, first_version) is None
    path.write_bytes(whole[:5])
    assert lost_records(path, state) == lost_records(path, first_version) == f"it has 5 bytes of {len(whole)}"
    path.unlink()
    assert "it has 0 bytes" in lost_records(path, state)


def test_a_lost_process_is_named():
    with (
        pytest.raises(LostProcess, match=r"lost another process .*Connection closed.*resume_from_checkpoint auto"),
        together(),
    ):
        raise RuntimeError("Connection closed by peer\n at gloo/transport")


def of(*names):
    return json.dumps({name: {"size": 2, "sha256": "0"} for name in names})


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{}", "has no"),
        ("[]", "cannot be read"),
        ('{"state.json": 1}', "cannot be read"),
        ('{"state.json": {"size": 2}}', "cannot be read"),
        ('{"model.safetensors": {"size": 2, "sha256": "0"}}', "has no state.json"),
        (of("model.safetensors", "state.json", "random.pt"), "has no optimizer.pt"),
        (of("model.safetensors", "state.json", "optimizer.pt"), "has no random.pt"),
        (of("state.json", "optimizer.pt", "random.pt"), "has no *.safetensors"),
    ],
)
def test_a_manifest_that_says_too_little_is_a_fault(tmp_path, manifest, message):
    (tmp_path / "manifest.json").write_text(manifest)
    assert message in checkpoint.fault(tmp_path)


def test_what_cannot_be_read_is_not_taken_for_damage(tmp_path, monkeypatch):
    path = tmp_path / "step-000002"
    path.mkdir()
    (tmp_path / "step-000002-copy").mkdir()  # somebody's own

    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path / "manifest.json"))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "fault", refused)
        with pytest.raises(UserError, match=r"cannot read .*manifest.json: Permission denied. Put that right"):
            checkpoint.find("auto", tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint of this run is whole: .*step-000002: its manifest"):
        checkpoint.find("auto", tmp_path)
    (path / "manifest.json").write_text(json.dumps({}))
    assert [one.name for one in checkpoint.saved(tmp_path)] == ["step-000002"]


def test_tensors_come_back(tmp_path):
    checkpoint.save_tensors({"a": torch.arange(3)}, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["a"].tolist() == [0, 1, 2]
