"""Runs through the command: what a resumed one may change, what a run directory may be, verifiers that fail."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import shutil
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from sgopd import checkpoint
from sgopd.cli import main
from sgopd.config import Config, UserError
from sgopd.run_dir import compare_settings
from sgopd.trainer import Trainer


@pytest.fixture
def train(settings, tmp_path, capsys):
    """`sgopd train` with changes: (status, what it said)."""

    def run(*flags: str, **changes) -> tuple[int, str]:
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(settings(**{"logging_steps": 1, "max_completion_length": 6, **changes})))
        status = main(["train", str(path), *flags])
        out, err = capsys.readouterr()
        return status, out + err

    return run


def records(run: Path, kind: str = "train") -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The settings and folder of a run of two updates, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(tiny.data, folder / "data.jsonl")
    for name in ("student", "teacher"):
        shutil.copytree(getattr(tiny, name), folder / name)
    values = {
        "model_name_or_path": str(folder / "student"),
        "teacher_model_name_or_path": str(folder / "teacher"),
        "dataset_name": str(folder / "data.jsonl"),
        "eval_dataset_name": str(folder / "data.jsonl"),
        "eval_dataset_size": 3,
        "num_generations_eval": 1,
        "use_cpu": True,
        "num_threads": 1,
        "verifier": "exact",
        "max_completion_length": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "save_steps": 1,
        "seed": 3,
    }
    Trainer(Config.load(None, {**values, "output_dir": str(folder / "run")}), say=lambda line: None).train()
    return folder, values


@pytest.fixture
def resume(finished, tmp_path, capsys):
    """Goes on with a copy of the finished run, with changes: (status, what it said, its folder)."""
    folder, values = finished

    def run(**changes) -> tuple[int, str, Path]:
        copy = tmp_path / "run"
        if not copy.exists():
            shutil.copytree(folder / "run", copy)
        settings = {**values, "output_dir": str(copy), "resume_from_checkpoint": "auto", "max_steps": 3, **changes}
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(settings))
        status = main(["train", str(path)])
        out, err = capsys.readouterr()
        return status, out + err, copy

    return run


# --- what a resumed run may change ---


def another(field: dataclasses.Field, value):
    """Another value of a setting's type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 2
    return {"x": 1} if isinstance(value, dict) else [["a", "b"]] if isinstance(value, list) else f"{value}-other"


def test_every_setting_says_what_a_resumed_run_makes_of_another_value(finished, root):
    _, values = finished
    config = Config.load(None, {**values, "output_dir": "o"})
    kinds = {field.name: field.metadata.get("resume") for field in dataclasses.fields(Config)}
    assert set(kinds.values()) == {"free", "fixed", "content", "launch"}, "a new setting needs a decision"
    text = (root / "docs" / "reliability.md").read_text()
    for kind in ("fixed", "content"):
        [listed] = re.findall(rf"^\| {kind} \| (.*?) \|", text, re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", listed)) == {name for name, one in kinds.items() if one == kind}
    path = Path("step-000002")
    for field in dataclasses.fields(Config):
        state = {"step": 1, "config": config.to_yaml()}
        assert compare_settings(config, state, path) == []
        before = {**yaml.safe_load(state["config"]), field.name: another(field, getattr(config, field.name))}
        state["config"] = yaml.safe_dump(before)
        if kinds[field.name] == "fixed":
            with pytest.raises(
                UserError, match=rf"cannot change this: {field.name} was .* Leave it as it was; or start"
            ):
                compare_settings(config, state, path)
        else:
            said = [f"warning: {field.name} was {before[field.name]!r} and is {getattr(config, field.name)!r}"]
            expected = [] if kinds[field.name] == "launch" else [f"{said[0]} from here on"]
            assert compare_settings(config, state, path) == expected


def test_the_optimiser_goes_on_with_the_settings_of_the_resumed_run(resume):
    changes = {"learning_rate": 0.5, "lr_scheduler_type": "cosine", "max_steps": 5, "weight_decay": 0.1}
    changes |= {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-4}
    status, said, run = resume(**changes)
    assert status == 0
    for name in changes:
        assert f"warning: {name} was " in said, name
    rates = [record["optim/lr"] for record in records(run)]
    assert rates == pytest.approx([0.01, 0.005] + [0.25 * (1 + math_cos(step / 5)) for step in (2, 3, 4)])
    state = torch.load(run / "checkpoints" / "step-000005" / "optimizer.pt", weights_only=True)
    for group, decay in zip(state["optimizer"]["param_groups"], (0.1, 0.0)):
        assert (tuple(group["betas"]), group["eps"], group["weight_decay"]) == ((0.5, 0.6), 1e-4, decay)
        assert group["initial_lr"] == 0.5


def math_cos(progress: float) -> float:
    return torch.cos(torch.tensor(progress * torch.pi, dtype=torch.float64)).item()


def test_no_more_updates_than_are_done(resume, finished):
    status, said, run = resume(max_steps=1)
    assert status == 1
    assert "max_steps: got 1, but" in said and "step-000002 has 2 updates behind it. Raise max_steps, or resume" in said
    shutil.rmtree(run / "final")
    assert resume(max_steps=2)[0] == 0
    assert (run / "final" / "model.safetensors").is_file() and len(records(run)) == 2


@pytest.mark.parametrize("what", ["rows", "template", "column", "teacher", "reference"])
def test_other_data_and_models_are_refused(resume, finished, tmp_path, tiny, what):
    folder, _ = finished
    changes, named = {}, "the prompts (dataset_name and what is made of it"
    if what in ("rows", "column"):
        rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
        rows = rows[::-1] if what == "rows" else [{**row, "hint": "x"} for row in rows]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = {"dataset_name": str(tmp_path / "data.jsonl")}
    elif what == "template":
        changes = {"apply_chat_template": True}
    else:
        tiny.make_model(7, 24, 2).save_pretrained(tmp_path / "model")
        tiny.make_tokenizer().save_pretrained(tmp_path / "model")
        changes = {f"{what}_model_name_or_path": str(tmp_path / "model")}
        named = f"the weights of {what}_model_name_or_path"
    shutil.copytree(folder / "run", tmp_path / "run")
    before = {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"
    }
    status, said, _ = resume(**changes)
    assert status == 1 and "Traceback" not in said
    assert f"resume_from_checkpoint: {named}" in said and "Put it back as it was; or start a new run" in said
    assert all(path.read_bytes() == content for path, content in before.items())


def test_what_has_only_moved_is_the_same(resume, finished, tmp_path):
    folder, _ = finished
    for name in ("teacher", "data.jsonl"):
        (shutil.copytree if name == "teacher" else shutil.copy)(folder / name, tmp_path / name)
    data = str(tmp_path / "data.jsonl")
    changes = {"teacher_model_name_or_path": str(tmp_path / "teacher"), "teacher_dtype": "bfloat16"}
    status, said, run = resume(dataset_name=data, eval_dataset_size=2, **changes)
    assert status == 0 and len(records(run)) == 3
    assert "warning: teacher_model_name_or_path was" in said and "warning: dataset_name was" in said
    assert "warning: the evaluation questions are not those of before: avg@k and pass@k" in said


def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_warning(resume, finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-000002"
    state, manifest = (json.loads((newest / name).read_text()) for name in ("state.json", "manifest.json"))
    del state["config"], state["contents"]
    (newest / "state.json").write_text(json.dumps(state))
    file = newest / "state.json"
    manifest["state.json"] = {"size": file.stat().st_size, "sha256": checkpoint.digest(file)}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    status, said, run = resume()
    assert status == 0 and len(records(run)) == 3
    assert f"warning: {newest} is of an earlier version: which settings, data and models it had is not known" in said


def test_a_fixed_setting_is_refused_with_the_remedy(resume):
    status, said, run = resume(seed=4, eval_on_start=True)
    assert status == 1 and len(records(run)) == 2
    assert "a resumed run cannot change this: seed was 3 and is 4; eval_on_start was False and is True. Leave" in said


# --- what a run directory may be ---


@pytest.mark.parametrize("what", ["final", "model", "data", "home", "locked"])
def test_a_folder_with_other_files_is_not_taken(train, tmp_path, tiny, monkeypatch, what):
    folder = tmp_path / "mine"
    folder.mkdir()
    changes, flags = {}, []
    if what == "final":
        (folder / "final").mkdir()
        (folder / "final" / "thesis.tex").write_text("years of work")
    elif what == "model":
        shutil.copytree(tiny.student, folder, dirs_exist_ok=True)
        changes = {"model_name_or_path": str(folder)}
    elif what == "data":
        shutil.copy(tiny.data, folder)
        changes = {"dataset_name": str(folder / tiny.data.name)}
    elif what == "home":
        (folder / "config.yaml").write_text("mine: 1\n")
        (folder / "metrics.jsonl").write_text('{"epoch": 1, "loss": 0.5}\n')
        monkeypatch.chdir(folder)
        flags = ["--resume_from_checkpoint", "auto"]
    else:
        (folder / ".lock").write_text("held by apt")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status, said = train(*flags, output_dir="." if what == "home" else str(folder), **changes)
    assert status == 1 and "has files that are no run's: " in said and "Choose an empty or a new folder" in said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_leftovers_before_the_first_record_are_taken(train, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / ".config.yaml.tmp").write_text("half")
    for name in (".lock", ".writable", "config.yaml"):
        (run / name).touch()
    assert train(max_steps=1)[0] == 0
    assert main(["report", str(run)]) == 0


@pytest.mark.parametrize("gone", ["checkpoints", "content", "metrics too"])
def test_a_run_whose_checkpoints_are_gone_is_not_started_over(resume, finished, tmp_path, gone):
    folder, _ = finished
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    shutil.rmtree(run / "checkpoints")
    if gone == "content":
        (run / "checkpoints").mkdir()
    if gone == "metrics too":
        (run / "metrics.jsonl").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    status, said, _ = resume()
    assert status == 1 and "has no checkpoint, but" in said and "Put " in said and "choose another output_dir" in said
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_killed_before_its_first_checkpoint_starts_again(resume, finished, tmp_path):
    folder, _ = finished
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]) + '{"step": 2, "ki')
    (run / ".lock").write_text("process 1 on here")
    status, said, _ = resume(max_steps=1)
    assert status == 0 and "no whole checkpoint" in said and len(records(run)) == 1


def test_evaluate_wants_a_run(finished, tmp_path, tiny, capsys):
    folder, _ = finished
    assert main(["evaluate", str(tiny.student)]) == 1
    assert "it is no run directory, which has config.yaml and metrics.jsonl" in capsys.readouterr().err
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    assert main(["evaluate", str(tmp_path / "run")]) == 1
    assert "has no final/: its run is not finished" in (said := capsys.readouterr().err) and "step-000002" in said


def test_nothing_stays_open(settings, tmp_path):
    """metrics.jsonl and the lock are closed at the end, when the start fails, and when the run does."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        for number, changes in enumerate(({}, {"backend": "gpu"}, {"learning_rate": 1e37, "weight_decay": 30.0})):
            config = Config.load(None, settings(max_steps=1, output_dir=str(tmp_path / str(number)), **changes))
            try:
                Trainer(config, say=lambda line: None).train()
            except UserError:
                assert number > 0
            gc.collect()
    unclosed = [str(one.message) for one in caught if str(tmp_path) in str(one.message)]
    assert unclosed == []


# --- verifiers that fail ---


@pytest.fixture
def verifiers(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "failing.py").write_text(
        textwrap.dedent(
            """
            import os, time, pathlib
            def raises(response, example):
                raise KeyError("no column 'unit'")
            def hangs(response, example):
                time.sleep(100)
            def dies(response, example):
                os._exit(3)
            def later(response, example):
                count = pathlib.Path(__file__).with_name("count")
                count.write_text(count.read_text() + "x" if count.exists() else "x")
                if len(count.read_text()) > 8:
                    raise ConnectionError("the judge is gone")
                return True
            def nothing(response, example):
                return None
            def column(response, example):
                return example["tests"] == "x"
            """
        )
    )
    return lambda name: {
        "verifier": f"failing:{name}",
        "verifier_workers": 1,
        "verifier_timeout": 0.2 if name == "hangs" else 20,
        "truncated_is_incorrect": False,
        "per_device_train_batch_size": 8 if name == "later" else 2,
    }


@pytest.mark.parametrize(
    ("name", "updates", "said_last"),
    [
        (
            "raises",
            0,
            "(error 2), so there is nothing to train on or to measure. The last one: KeyError: \"no column 'unit'\"",
        ),
        ("hangs", 0, "(timeout 2), so there is nothing"),
        ("dies", 0, "(crashed 2), so there is nothing"),
        (
            "later",
            1,
            "(error 8), so there is nothing to train on or to measure. The last one: ConnectionError: the judge",
        ),
    ],
)
def test_a_verifier_that_only_fails_ends_the_run_at_that_batch(train, verifiers, tmp_path, name, updates, said_last):
    status, said = train(max_steps=4, **verifiers(name))
    assert status == 1 and "Traceback" not in said.split("sgopd: error:")[1]
    assert "verifier: no verdict on any of the " in said and said_last in said, said[-800:]
    assert len(records(tmp_path / "run")) == updates


def test_what_was_learned_outlives_an_evaluation_that_fails(train, verifiers, tiny, tmp_path):
    """Questions without a column that the verifier reads: the first evaluation, after the last update, ends the run."""
    rows = [json.loads(line) for line in tiny.data.read_text().splitlines()]
    prompts, questions = tmp_path / "prompts.jsonl", tmp_path / "questions.jsonl"
    prompts.write_text("".join(json.dumps({**row, "tests": "x"}) + "\n" for row in rows))
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    changes = {"dataset_name": str(prompts), "eval_dataset_name": str(questions), "num_generations_eval": 8}
    status, said = train(max_steps=2, **verifiers("column"), **changes)
    assert status == 1 and "no verdict on any of the 16 answers" in said and "KeyError: 'tests'" in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    questions.write_text(prompts.read_text())
    status, said = train(max_steps=2, **verifiers("column"), **changes, resume_from_checkpoint="auto")
    assert status == 0 and (tmp_path / "run" / "final").is_dir()
    assert len(records(tmp_path / "run")) == 2, "no update is made again"


def test_one_answer_that_fails_in_an_evaluation_ends_no_run(train, verifiers, tiny, tmp_path):
    row = json.loads(tiny.data.read_text().splitlines()[0])
    prompts, questions = tmp_path / "prompts.jsonl", tmp_path / "questions.jsonl"
    prompts.write_text(json.dumps({**row, "tests": "x"}) + "\n")
    questions.write_text(json.dumps(row) + "\n")
    changes = {"dataset_name": str(prompts), "eval_dataset_name": str(questions), "num_generations_eval": 1}
    status, said = train(max_steps=1, **verifiers("column"), **changes)
    assert status == 0, said[-800:]


def test_a_verifier_that_only_fails_ends_an_evaluation(settings, verifiers, tiny, tmp_path, capsys):
    changes = {"eval_dataset_name": str(tiny.data), "eval_dataset_size": 2, "max_completion_length": 4}
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(settings(**verifiers("raises"), **changes)))
    assert main(["evaluate", str(config)]) == 1
    assert "verifier: no verdict on any of the 4 answers" in capsys.readouterr().err
    config.write_text(yaml.safe_dump(settings(**verifiers("nothing"), **changes)))
    assert main(["evaluate", str(config)]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["eval/unknown"] == 1 and record["eval/avg_at_k"] is None
    assert "returned None for all 4 answers" in err


def test_no_verdict_at_all_is_no_accuracy(train, verifiers, tmp_path):
    status, said = train(max_steps=2, **verifiers("nothing"))
    assert status == 0 and said.count("returned None for all 2 answers of its first batch") == 1
    assert all("rollout/accuracy" not in record and record["loss"] > 0 for record in records(tmp_path / "run"))
    assert "accuracy" not in said.split("step 1/2")[1].splitlines()[0]
    assert "No rollout got a verdict" in (tmp_path / "run" / "report.html").read_text()
