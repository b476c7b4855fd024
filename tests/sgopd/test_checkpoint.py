from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import sgopd
from sgopd import checkpoint
from sgopd.cli import main
from sgopd.config import Config, UserError
from sgopd.files import new_folder
from sgopd.processes import Interrupt
from sgopd.run_dir import open_run_dir
from sgopd.trainer import Trainer

STEPS = 12


@pytest.fixture(scope="module")
def processes():
    """Real processes, forked from one that has imported everything: they start in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sgopd.trainer", "sgopd.cli", "transformers.models.llama.modeling_llama"])
    return context


def start(processes, config, *flags):
    process = processes.Process(target=main, args=(["train", str(config), *flags],))
    process.start()
    return process


def finish(processes, config, *flags):
    """A run whose bits are compared: in a process of the reference's kind, since a forked process and this one may
    round the same CPU product differently."""
    process = start(processes, config, *flags)
    process.join(120)
    assert process.exitcode == 0


def write_config(folder: Path, settings) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    changes = {
        "output_dir": str(folder / "run"),
        "max_steps": STEPS,
        "save_steps": 2,
        "save_total_limit": 3,
        "eval_steps": 4,
        "eval_on_start": True,
        "eval_dataset_size": 4,
        "cold_start_steps": 8,
        "teacher_reliability": "all",
        "resume_from_checkpoint": "auto",
    }
    path.write_text(yaml.safe_dump(settings(**changes)))
    return path


def lines(run: Path) -> list[str]:
    try:
        return (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []


def comparable(run: Path) -> list[dict]:
    """All records but the config's, without what depends on the clock."""
    records = [json.loads(line) for line in lines(run)]
    return [
        {k: v for k, v in record.items() if not k.startswith("time/") and k != "tokens_per_second"}
        for record in records
        if record["kind"] != "config"
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def module_settings():
    """The quickstart's models: their rollouts are right often enough for every path to be taken."""
    assets = Path(sgopd.__file__).parent / "assets" / "quickstart"

    def make(**changes):
        return {
            "model_name_or_path": str(assets / "student"),
            "teacher_model_name_or_path": str(assets / "teacher"),
            "dataset_name": "task:three-sums",
            "dataset_size": 16,  # three epochs, so that what was learnt about a prompt comes back
            "verifier": "exact",  # without workers to start
            "use_cpu": True,
            "num_threads": 1,
            "max_completion_length": 20,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 2,
            "gate": "opdvr",
            "learning_rate": 1e-3,
            "logging_steps": 3,
            "num_generations_eval": 2,
            "seed": 3,
            **changes,
        }

    return make


@pytest.fixture(scope="module")
def uninterrupted(processes, module_settings, tmp_path_factory):
    """The run directory of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = start(processes, write_config(folder, module_settings))
    process.join(120)
    assert process.exitcode == 0
    train = [record for record in comparable(folder / "run") if record["kind"] == "train"]
    assert sum(record["phase/teacher_rollouts"] for record in train) > 4
    assert all(record["phase/reliability"] > 0 for record in train[8:]), "known from the cold start"
    return folder / "run"


def assert_same_run(run: Path, reference: Path) -> None:
    assert comparable(run) == comparable(reference)
    assert contents(run / "final") == contents(reference / "final")
    assert contents(run / "completions").keys() == contents(reference / "completions").keys()
    ours, theirs = (contents(path / "checkpoints" / f"step-{STEPS:06d}") for path in (run, reference))
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    optimizers = [
        torch.load(path / "checkpoints" / f"step-{STEPS:06d}" / "optimizer.pt", weights_only=True)
        for path in (run, reference)
    ]
    for a, b in zip(*(state["optimizer"]["state"].values() for state in optimizers)):
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_any_point_resumes_to_the_same_end(processes, module_settings, uninterrupted, tmp_path, seed):
    rng = random.Random(seed)
    config, run = write_config(tmp_path, module_settings), tmp_path / "run"
    kills = sorted(rng.sample(range(1, STEPS + 4), 2))  # lines of metrics.jsonl at which it is killed
    for count in kills:
        process = start(processes, config)
        deadline = time.monotonic() + 120
        while len(lines(run)) < count and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))  # anywhere inside an update, a checkpoint, an evaluation
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
    process = start(processes, config)
    process.join(120)
    assert process.exitcode == 0
    assert_same_run(run, uninterrupted)


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_gone(
    processes, module_settings, uninterrupted, tmp_path, capsys
):
    config, run = write_config(tmp_path, module_settings), tmp_path / "run"

    def there() -> dict[Path, tuple[int, bytes]]:
        return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in (run, *run.rglob("*"))}

    first = start(processes, config)
    while len(lines(run)) < 6:
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)  # so that whatever changes is the second one's doing
    before = there()
    for flags in ([], ["--resume_from_checkpoint", "null"]):
        assert main(["train", str(config), *flags]) == 1
        said = capsys.readouterr().err
        assert f"another run is at work in {run} (process {first.pid} on " in said and "another output_dir" in said
    assert there() == before
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    finish(processes, config)
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(processes, module_settings, uninterrupted, tmp_path, number):
    config, run = write_config(tmp_path, module_settings), tmp_path / "run"
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**values, "save_steps": None}))
    process = start(processes, config)
    while len(lines(run)) < 5:
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join(60)
    [saved] = checkpoint.saved(run / "checkpoints")
    assert checkpoint.fault(saved) is None
    records = comparable(run)
    assert records[-1]["step"] == int(saved.name[5:]) < STEPS
    assert not (run / "final").exists() and all(record["kind"] != "end" for record in records)
    process = start(processes, config)
    process.join(120)
    assert process.exitcode == 0
    assert_same_run(run, uninterrupted)


def test_a_signal_gives_the_conventional_exit_status(module_settings, tmp_path, monkeypatch, capsys):
    import sgopd.trainer

    def leave_early(self, record, rollouts):
        original(self, record, rollouts)
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    original = sgopd.trainer.Trainer.log
    monkeypatch.setattr(sgopd.trainer.Trainer, "log", leave_early)
    assert main(["train", str(write_config(tmp_path, module_settings))]) == 128 + signal.SIGTERM
    said = capsys.readouterr().out
    assert "stopped after 3 of 12 updates" in said and "--resume_from_checkpoint auto" in said
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "handlers are put back"


def test_a_second_signal_does_not_wait():
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # until the interpreter has looked


def test_a_finished_run_has_nothing_left_to_do(module_settings, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    assert main(["train", str(write_config(tmp_path, module_settings))]) == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_settings_that_change_on_resume_are_said(module_settings, uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path / "run")
    config = write_config(tmp_path, module_settings)
    assert main(["train", str(config), "--max_steps", "14", "--learning_rate", "0.002"]) == 0
    said = capsys.readouterr().out
    assert "warning: max_steps was 12 and is 14" in said and "warning: learning_rate was 0.001 and is 0.002" in said
    assert [r["step"] for r in comparable(tmp_path / "run") if r["kind"] == "train"] == list(range(1, 15))


def test_going_back_to_an_earlier_checkpoint_drops_what_came_after(processes, module_settings, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    config = str(write_config(tmp_path, module_settings))
    earlier, *later = checkpoint.saved(tmp_path / "run" / "checkpoints")
    assert later
    _, said = open_run_dir(Config.load(config, {"resume_from_checkpoint": str(earlier)}))
    assert f"what came after it goes: {', '.join(path.name for path in later)}" in said[-1]
    finish(processes, config, "--resume_from_checkpoint", str(earlier))
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_checkpoint_of_another_run_starts_a_branch(processes, module_settings, uninterrupted, tmp_path, capsys):
    config = str(write_config(tmp_path, module_settings))
    newest = checkpoint.saved(uninterrupted / "checkpoints")[-2]
    finish(processes, config, "--resume_from_checkpoint", str(newest))
    records = [json.loads(line) for line in lines(tmp_path / "run")]
    assert records[0]["kind"] == "config" and records[1]["step"] == checkpoint.step_of(newest) + 1
    assert contents(tmp_path / "run" / "final") == contents(uninterrupted / "final")
    before = lines(tmp_path / "run")
    assert main(["train", config, "--resume_from_checkpoint", str(newest)]) == 1
    assert "belongs to another run" in capsys.readouterr().err and lines(tmp_path / "run") == before


def test_what_came_after_the_checkpoint_goes_before_anything_is_written(module_settings, uninterrupted, tmp_path):
    """A run that is killed before its next checkpoint must not go on from one of the time that was given up."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    config = write_config(tmp_path, module_settings)
    earlier, *later = checkpoint.saved(run / "checkpoints")
    assert later
    one = Trainer(Config.load(config, {"resume_from_checkpoint": str(earlier)}), say=lambda line: None)
    one.start_writing()
    one.close()
    assert checkpoint.saved(run / "checkpoints") == [earlier]
    step = checkpoint.step_of(earlier)
    assert max(record["step"] for record in comparable(run)) == step
    assert max(int(path.stem.removeprefix("step-")) for path in (run / "completions").iterdir()) <= step


def test_a_resumed_run_is_checked_by_the_settings_that_it_has_now(module_settings, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    earlier, *_ = checkpoint.saved(tmp_path / "run" / "checkpoints")
    changes = {"resume_from_checkpoint": str(earlier), "position_half_life": 7.0}
    one = Trainer(Config.load(write_config(tmp_path, module_settings), changes), say=lambda line: None)
    one.start_writing()
    one.close()
    assert one.health.course.settings["position_half_life"] == 7.0


def test_records_that_changed_or_went_are_no_ground_to_go_on_from(module_settings, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    config = Config.load(write_config(tmp_path, module_settings))
    whole = (run / "metrics.jsonl").read_bytes()
    *_, before, newest = checkpoint.saved(run / "checkpoints")
    said = f"metrics.jsonl is not what {newest} was saved with: .*Put it back from a copy; "
    cut = whole[: checkpoint.state_of(before)["metrics_position"] + 10]
    for content, remedy in ((cut, f"resume from {before}, which has them all; "), (whole.replace(b"1", b"7"), "")):
        (run / "metrics.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=f"{said}{remedy}or go on without these records in a new output_dir"):
            open_run_dir(config)
        assert (run / "metrics.jsonl").read_bytes() == content
    (run / "metrics.jsonl").write_bytes(whole)
    assert open_run_dir(config)[0] == newest


def test_a_checkpoint_has_the_avg_at_k_of_its_own_step(module_settings, uninterrupted, tmp_path, monkeypatch):
    def measured(run: Path) -> dict[int, float]:
        evaluations = [record for record in comparable(run) if record["kind"] == "eval"]
        return {record["step"]: record["eval/avg_at_k"] for record in evaluations if record["model"] == "student"}

    def metrics(run: Path) -> dict[int, float | None]:
        return {checkpoint.step_of(p): checkpoint.state_of(p)["metric"] for p in checkpoint.saved(run / "checkpoints")}

    expected = measured(uninterrupted)
    assert metrics(uninterrupted) == {step: expected.get(step) for step in metrics(uninterrupted)}
    assert None in metrics(uninterrupted).values(), "a step without an evaluation: it has none, not an earlier one's"

    # A signal has a step saved before it is evaluated; when that has been made up for, the checkpoint has it too.
    def leave_early(self, record, rollouts):
        original(self, record, rollouts)
        if self.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    config, run = str(write_config(tmp_path, module_settings)), tmp_path / "run"
    original = Trainer.log
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "log", leave_early)
        assert main(["train", config]) == 128 + signal.SIGTERM
    assert metrics(run)[4] is None
    assert main(["train", config, "--max_steps", "4"]) == 0
    assert metrics(run)[4] == measured(run)[4] is not None


# --- damaged and stale checkpoints ---


def damage(path: Path, how: str) -> str:
    weights = path / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
        return "model.safetensors has .* bytes instead of"
    if how == "flipped":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        return "the content of model.safetensors has changed"
    if how == "missing":
        (path / "optimizer.pt").unlink()
        return "optimizer.pt is missing"
    (path / "manifest.json").write_text("{")
    return "its manifest.json cannot be read"


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "manifest"])
def test_damage_is_noticed(uninterrupted, tmp_path, how):
    folder = tmp_path / "checkpoints"
    shutil.copytree(uninterrupted / "checkpoints", folder)
    newest = checkpoint.saved(folder)[-1]
    assert checkpoint.fault(newest) is None
    message = damage(newest, how)
    with pytest.raises(UserError, match=f"is damaged: {message}"):
        checkpoint.find(str(newest), folder)
    path, [said] = checkpoint.find("auto", folder)
    assert path == checkpoint.saved(folder)[-2]
    assert said.startswith(f"warning: skipped the checkpoint {newest}: ")


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(
    processes, module_settings, uninterrupted, tmp_path, capsys
):
    shutil.copytree(uninterrupted, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / f"step-{STEPS:06d}"
    damage(newest, "truncated")
    (tmp_path / "run" / "checkpoints" / ".step-000014.tmp").mkdir()  # left by a run killed while saving
    config = write_config(tmp_path, module_settings)
    assert main(["train", str(config), "--resume_from_checkpoint", str(newest)]) == 1
    assert "use another one, or auto" in capsys.readouterr().err.lower()
    finish(processes, config)
    assert_same_run(tmp_path / "run", uninterrupted)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .* Checkpoints of this run: none"):
        checkpoint.find(str(tmp_path / "step-000001"), tmp_path)
    assert checkpoint.find("auto", tmp_path / "none") == (None, [])


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a" / "step-000001"
    with pytest.raises(KeyError), new_folder(target) as path:
        (path / "file").write_text("half")
        raise KeyError
    assert not target.exists() and checkpoint.saved(tmp_path / "a") == []
    with new_folder(target) as path:
        (path / "file").write_text("whole")
        assert not target.exists()
    assert (target / "file").read_text() == "whole"
    full = pytest.raises(UserError, match=r"cannot write .*No space left.*Free some space")
    with full, new_folder(target) as path:
        raise OSError(28, "No space left on device")
    assert (target / "file").read_text() == "whole" and len(list((tmp_path / "a").iterdir())) == 1


def fake(folder: Path, step: int, metric: float | None) -> None:
    path = folder / f"step-{step:06d}"
    path.mkdir()
    (path / "state.json").write_text(json.dumps({"metric": metric}))


def test_the_best_checkpoint_is_never_deleted(tmp_path):
    for step, metric in ((2, 0.1), (4, 0.9), (6, None), (8, 0.3), (1000000, 0.2)):
        fake(tmp_path, step, metric)
    checkpoint.prune(tmp_path, None)
    assert len(checkpoint.saved(tmp_path)) == 5
    checkpoint.prune(tmp_path, 2)
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["step-000004", "step-000008", "step-1000000"]
    (tmp_path / "step-000004" / "state.json").write_text("{")  # damaged: it may be the best
    checkpoint.prune(tmp_path, 1)
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["step-000004", "step-000008", "step-1000000"]
    (tmp_path / "step-000004" / "state.json").unlink()  # half deleted
    checkpoint.prune(tmp_path, 1)
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["step-000008", "step-1000000"]
    state = tmp_path / "step-000008" / "state.json"
    (tmp_path / "step-1000000" / "state.json").write_text('{"metric": 0.9}')  # a flipped digit: it only seems the best
    (tmp_path / "step-1000000" / "manifest.json").write_text('{"state.json": {"size": 15, "sha256": "0"}}')
    fake(tmp_path, 1000002, 0.0)
    checkpoint.prune(tmp_path, 1)
    assert [checkpoint.step_of(path) for path in checkpoint.saved(tmp_path)] == [8, 1000000, 1000002]
    assert json.loads(state.read_text()) == {"metric": 0.3}


def test_random_states_survive_a_file(tmp_path):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    np.random.standard_normal()  # leaves a cached second draw behind

    def draw():
        return random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(1).item()

    torch.save([checkpoint.random_state()], tmp_path / "r.pt")
    expected = draw()
    assert draw() != expected
    [state] = torch.load(tmp_path / "r.pt", weights_only=True)
    checkpoint.set_random_state(state)
    assert draw() == expected
