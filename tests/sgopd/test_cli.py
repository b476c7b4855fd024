from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sgopd import checkpoint
from sgopd.cli import free_folders, main, parse
from sgopd.config import Config, UserError


@pytest.fixture
def config(settings, tmp_path):
    """A config file with changes."""

    def make(**changes) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings(**changes)))
        return str(path)

    return make


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in text, field.name
        assert " ".join(field.metadata["help"].split())[:40] in text, field.name


def test_help_needs_no_torch():
    code = "import sys; from sgopd.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, stdout=subprocess.DEVNULL)


def test_flags():
    flags = ["--max_steps", "5", "--bf16", "--learning_rate=1e-4", "--gate_conflict", "[0, 1]", "--use_cpu", "false"]
    command, path, settings = parse(["train", "c.yaml", *flags])
    assert (command, path) == ("train", Path("c.yaml"))
    assert settings == {
        "max_steps": 5,
        "bf16": True,
        "learning_rate": "1e-4",
        "gate_conflict": [0, 1],
        "use_cpu": False,
    }
    with pytest.raises(UserError, match=r"unknown argument '--max_step'; did you mean '--max_steps'\?"):
        parse(["train", "c.yaml", "--max_step", "3"])
    with pytest.raises(UserError, match=r"unknown argument '--batch-size'; did you mean '--per_device_train_b"):
        parse(["train", "c.yaml", "--batch-size", "3"])


def test_train_report_evaluate(config, tmp_path, tiny, capsys):
    run = tmp_path / "run"
    path = config(eval_dataset_name=str(tiny.data), eval_on_start=True, eval_teacher=True, eval_dataset_size=4)
    assert main(["train", path, "--max_steps", "3"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"step 3/3 +accuracy [\d.]+%", said)
    for row in ("student before", "student after", "teacher"):
        assert re.search(rf"{row} +│ +[\d.]+ ± [\d.]+ % │ +[\d.]+ ± [\d.]+ %", said), row
    assert "avg@2" in said and "pass@2" in said and str(run / "report.html") in said.replace("\n", "")

    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()
    capsys.readouterr()

    assert main(["evaluate", str(run), "--eval_teacher", "false"]) == 0
    [record] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"eval"' in line][-1]
    assert record["path"] == str(run / "final")
    assert record["eval/avg_at_k"] == last["eval/avg_at_k"] and record["eval/length_mean"] == last["eval/length_mean"]


def test_quickstart_takes_flags_and_a_new_folder_each_time(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--max_steps", "2", "--eval_dataset_size", "3", "--dataset_size", "200", "--save_steps", "null"]
    small += ["--per_device_train_batch_size", "8", "--num_generations_eval", "2"]
    for name in ("quickstart", "quickstart-2"):
        assert main(["quickstart", *small]) == 0
        run = tmp_path / "runs" / name
        assert (run / "report.html").is_file() and (run / "final" / "model.safetensors").is_file()
        resolved = Config.load(run / "config.yaml")
        assert resolved.max_steps == 2 and resolved.verifier == "math" and resolved.cold_start_steps > 0
    assert next(free_folders(tmp_path / "runs" / "quickstart")) == tmp_path / "runs" / "quickstart-3"


# --- what a user can get wrong: one message, a status above 0, nothing lost ---


def nan_weights(tiny, folder):
    model = tiny.make_model(0)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return {"model_name_or_path": str(folder)}


def short_head(tiny, folder):
    tiny.make_model(0, vocab_size=20).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return {"model_name_or_path": str(folder)}


def truncated_weights(tiny, folder):
    tiny.make_model(0).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    return {"teacher_model_name_or_path": str(folder)}


def under_a_file(tiny, folder):
    folder.write_text("not a folder")
    return {"output_dir": str(folder / "run")}


def missing_column(tiny, folder):
    return {"answer_column": "solution"}


def unknown_key(tiny, folder):
    return {"learning_rat": 1e-3}


def wrong_shape(tiny, folder):
    return {"gate_agree": [1.0]}


def missing_checkpoint(tiny, folder):
    return {"resume_from_checkpoint": str(folder)}


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (nan_weights, "model_name_or_path: 16 weights of lm_head.weight"),
        (short_head, "token ids up to 24, but the heads have 20 (student) and 32 (teacher) rows"),
        (truncated_weights, "teacher_model_name_or_path: cannot load"),
        (under_a_file, "output_dir: cannot write in"),
        (missing_column, "no column 'solution'; its columns are prompt, answer. Name the right one with answer_column"),
        (unknown_key, "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        (wrong_shape, "Gate.agree must be a number or a pair"),
        (missing_checkpoint, "resume_from_checkpoint: there is no folder"),
    ],
)
def test_mistakes(config, tiny, tmp_path, capsys, mistake, message):
    status = main(["train", config(**mistake(tiny, tmp_path / "thing"))])
    output = capsys.readouterr()
    assert status == 1
    errors = [line for line in output.err.splitlines() if line.startswith("sgopd: error: ")]
    assert len(errors) == 1 and message in output.err
    assert "Traceback" not in output.err + output.out
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "the corrected command must find a free folder"


def test_a_run_is_never_overwritten(config, tmp_path, capsys):
    path = config(max_steps=2)
    assert main(["train", path]) == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert main(["train", path]) == 1
    assert "already holds a run. Pass --resume_from_checkpoint auto" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "metrics.jsonl" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "cannot read the config file" in capsys.readouterr().err


# --- several processes ---


def start_two(config):
    """A run of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    for rank in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        }
        workers.append(subprocess.Popen([sys.executable, "-m", "sgopd", "train", config], env=environment))
    return workers


def test_a_signal_to_one_of_two_processes_ends_both(config, tmp_path):
    """The one that got it is not the one that writes: a checkpoint of both, and the signal's status from both."""
    run = tmp_path / "two"
    main_one, other = workers = start_two(config(output_dir=str(run), max_steps=100_000, logging_steps=1000))
    try:
        while not (run / "metrics.jsonl").exists() or b'"train"' not in (run / "metrics.jsonl").read_bytes():
            assert main_one.poll() is None
            time.sleep(0.01)
        other.send_signal(signal.SIGTERM)
        assert [worker.wait(120) for worker in workers] == [128 + signal.SIGTERM] * 2
    finally:
        for worker in workers:
            worker.kill()
    [saved] = checkpoint.saved(run / "checkpoints")
    assert checkpoint.fault(saved) is None
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert checkpoint.step_of(saved) == records[-1]["step"]


def test_two_processes_train_as_one_with_the_batch_of_both(config, tmp_path, capfd):
    """With sampling that leaves no choice (top_k 1) both see the same rollouts, so the weights must agree."""
    changes = {"top_k": 1, "max_steps": 3, "temperature": 0.8, "learning_rate": 1e-3}
    one = config(
        output_dir=str(tmp_path / "one"), per_device_train_batch_size=4, gradient_accumulation_steps=2, **changes
    )
    assert main(["train", one]) == 0
    two = config(
        output_dir=str(tmp_path / "two"), per_device_train_batch_size=2, gradient_accumulation_steps=2, **changes
    )
    workers = start_two(two)
    assert [worker.wait(120) for worker in workers] == [0, 0]
    assert capfd.readouterr().out.count("step 3/3") == 2, "only one process prints"

    def records(name):
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    assert records("two")[0]["processes"] == 2
    lengths = set()
    for a, b in zip(records("one")[1:4], records("two")[1:4]):
        for key in ("loss", "kl", "tokens", "rollout/accuracy", "gate/mean", "optim/grad_norm", "rollout/incorrect"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
        lengths.add(a["tokens"])
    assert len(lengths) > 1 or lengths.pop() % 8, "rollouts of one length would hide a wrong denominator"
    a, b = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-4)
