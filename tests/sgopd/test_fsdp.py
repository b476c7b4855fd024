"""The student in shards over the processes of this machine (gloo): the same training as in one process, resumed on any
number of them, ended in words where one is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sgopd import checkpoint

STEPS = 4


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sgopd.engines.fsdp", "sgopd.trainer", "sgopd.cli"])
    return context


def train(rank: int, count: int, port: int, config: Path, fixed: bool) -> None:
    """One of the processes that torchrun would start."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stderr = sys.stdout = open(config.with_suffix(f".{rank}.txt"), "a", buffering=1)  # noqa: SIM115
    import sgopd.trainer
    from sgopd.cli import main

    sgopd.trainer.write_report = lambda run_dir: None  # drawing takes longer than training
    if fixed:
        sgopd.trainer.Trainer.make_batch = fixed_batch
    sys.exit(main(["train", str(config)]))


def fixed_batch(trainer):
    """This process's share of rollouts that depend on the step alone."""
    from sgopd.rollout import Completion, Rollout

    generator = torch.Generator().manual_seed(trainer.state.step)
    rollouts = []
    for number in range(8):
        length = 1 if number in (2, 3) else int(torch.randint(2, 12, (), generator=generator))
        ids = torch.randint(3, 20, (length,), generator=generator)
        source = "teacher" if number == 7 else "student"
        completion = Completion(ids, -torch.rand(length, generator=generator), False, "")
        told = {"weight": 0.5 + number / 8, "advantage": 0.0 if source == "teacher" else number / 4 - 1}
        rollouts.append(Rollout(0, [5, 6, 7 + number], completion, source, False, number % 3 - 1, "", **told))
    share = 8 // trainer.processes.count
    return rollouts[trainer.processes.rank * share :][:share], {}


@pytest.fixture
def start(processes, settings, tmp_path):
    """Starts a run on `count` processes: a function that gives these, and where they say what."""
    everyone = []

    def start(count, name, fixed=False, **changes):
        config = tmp_path / f"{name}.yaml"
        values = {"max_steps": STEPS, "save_steps": 2, "lr_scheduler_type": "constant", "output_dir": name}
        values |= {"save_total_limit": None, "verifier": "exact", "learning_rate": 1e-3, **changes}
        values["output_dir"] = str(tmp_path / values["output_dir"])
        config.write_text(yaml.safe_dump(settings(per_device_train_batch_size=8 // count, **values)))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = [processes.Process(target=train, args=(rank, count, port, config, fixed)) for rank in range(count)]
        everyone.extend(started)
        for process in started:
            process.start()
        return started, lambda: "".join(path.read_text() for path in sorted(tmp_path.glob(f"{name}.?.txt")))

    yield start
    for process in everyone:  # that wait for each other
        process.kill()


@pytest.fixture
def run(start, tmp_path):
    def run(count, name, status=0, **changes):
        started, said = start(count, name, **changes)
        deadline = time.monotonic() + 240
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        assert [process.exitcode for process in started] == [status] * count, said()[-3000:]
        return tmp_path / changes.get("output_dir", name)

    return run


def records(run: Path) -> list[dict]:
    """What was trained and evaluated, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith("time/") and k != "tokens_per_second"}
        for line in lines
        if line["kind"] in ("train", "eval")
    ]


def test_shards_train_as_one_process_does_and_go_on_with_another_number_of_them(run, tiny, tmp_path):
    tiny.make_model(1, tie_word_embeddings=True, num_hidden_layers=2).save_pretrained(tmp_path / "student")
    tiny.make_tokenizer().save_pretrained(tmp_path / "student")
    fixed = {"fixed": True, "model_name_or_path": str(tmp_path / "student"), "weight_decay": 0.1}
    one = run(1, "one", **fixed, max_steps=6)
    shards = {**fixed, "fsdp": True, "output_dir": "shards", "resume_from_checkpoint": "auto"}
    run(2, "two", **shards, max_steps=2)
    run(1, "again", **shards, max_steps=4)
    options = {"fsdp_teacher": True, "gradient_checkpointing": True, "report_to": "none"}
    options |= {"max_tokens_per_device_batch": 18}  # two forward passes of two short rollouts, or one
    several = run(4, "four", **shards, **options, max_steps=6)
    said = (tmp_path / "four.0.txt").read_text()
    assert "step-000004 was written by 1 processes, this run has 4: weights and optimiser go on, with other" in said
    for ours, theirs in zip(records(several), records(one), strict=True):
        assert ours["step"] == theirs["step"] and ours["tokens"] == theirs["tokens"]
        for name in ("loss", "kl", "optim/grad_norm", "loss/teacher_rollouts", "gate/mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (ours["step"], name)
    assert ours["optim/grad_norm"] > 0.01
    expected, found = (load_file(folder / "final" / "model.safetensors") for folder in (one, several))
    assert found.keys() == expected.keys()
    start = load_file(tmp_path / "student" / "model.safetensors")
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() <= 1e-5 < 1e-3 < (weight - start[name]).abs().max(), name
    model = AutoModelForCausalLM.from_pretrained(several / "final")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_adapters_in_shards_train_as_in_one_process_and_go_on_with_the_same_bits(run, tmp_path):
    pytest.importorskip("peft", reason="the extra `peft` is not installed")
    changes = {"fixed": True, "use_peft": True, "lora_r": 4, "dtype": "bfloat16", "bf16": False}
    one, several = run(1, "one", **changes), run(2, "shards", fsdp=True, **changes)
    run(2, "cut", fsdp=True, **changes, max_steps=2)
    resumed = run(2, "cut", fsdp=True, **changes, resume_from_checkpoint="auto")
    file = "final/adapter_model.safetensors"
    assert (resumed / file).read_bytes() == (several / file).read_bytes()
    expected, found = load_file(one / file), load_file(several / file)
    assert found.keys() == expected.keys() and all("lora_" in name for name in found)
    assert max(weight.abs().max() for name, weight in found.items() if "lora_B" in name) > 1e-3
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() <= 1e-5, name


def test_shards_are_whole_for_a_server_and_compared_with_it(run, tiny, tmp_path):
    pytest.importorskip("httpx_retries", reason="the extra `server` is not installed")
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from vllm_stub import Stub

    tiny.make_model(1, tie_word_embeddings=True).save_pretrained(tmp_path / "student")
    tiny.make_tokenizer().save_pretrained(tmp_path / "student")
    with Stub(tmp_path / "student").serving() as stub:
        changes = {"model_name_or_path": str(tmp_path / "student"), "sampler": "vllm", "sampler_url": stub.url}
        folder = run(2, "served", fsdp=True, **changes, sampler_tolerance=1e-4, learning_rate=1e-2, max_steps=2)
    assert stub.loaded == [f"step-{step:06d}" for step in range(2)]
    for record in records(folder):
        assert record["sampler/gap_max"] < 1e-4 and record["engine/logprob_gap_max"] < 1e-4


@pytest.mark.parametrize("fsdp", [False, True])
def test_weights_of_rollouts_and_the_reward_are_the_same_on_two_processes(run, fsdp):
    changes = {"gate": "r2-opd", "gate_sharpness": 0.5, "prompt_weight": [1.0, 1.0], "position_half_life": 5.0}
    changes |= {"reward_weight": 0.5, "num_generations": 2, "fixed": True}
    tokens = {"max_tokens_per_device_batch": 30, "padding_free": fsdp}
    one, two = run(1, "one", **changes), run(2, "two", fsdp=fsdp, **changes, **tokens)
    start, ours, theirs = (
        load_file(path / "model.safetensors")
        for path in (two / "checkpoints" / "step-000002", two / "final", one / "final")
    )
    assert any(not torch.equal(start[name], weight) for name, weight in ours.items())
    assert all((theirs[name] - weight).abs().max() < 1e-5 for name, weight in ours.items())
    for a, b in zip(records(one), records(two), strict=True):
        for name in ("loss", "loss/reward", "gate/mean", "optim/grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_what_is_known_of_prompts_is_shared_by_the_processes_and_kept(run, tmp_path):
    changes = {
        "gate": "tgopd",
        "teacher_probes": 1,
        "reward_weight": 1.0,
        "num_generations": 2,
        "max_completion_length": 3,
    }
    changes |= {"prompt_weight": [1.0, 1.0]}
    whole = run(2, "whole", **changes)
    state = json.loads((whole / "checkpoints" / f"step-{STEPS:06d}" / "state.json").read_text())["phases"]
    assert sum(tried for tried, _ in state["probes"].values()) == STEPS * 4  # prompts of both processes
    assert set(state["attempts"]) <= set(state["probes"])
    resumed = run(2, "resumed", resume_from_checkpoint=str(whole / "checkpoints" / "step-000002"), **changes)
    assert (resumed / "final" / "model.safetensors").read_bytes() == (
        whole / "final" / "model.safetensors"
    ).read_bytes()


def test_a_lost_process_ends_the_run_in_words_and_resuming_gives_the_same_bits(start, run, tiny, tmp_path):
    """With one question, so that a process evaluates none."""
    changes = {"fsdp": True, "eval_dataset_name": str(tiny.data), "eval_dataset_size": 1, "eval_on_start": True}
    changes |= {"cold_start_steps": 3, "teacher_share": 0.3, "max_steps": 8, "eval_steps": 2}
    whole = run(2, "whole", **changes)
    started, said = start(2, "lost", **changes)
    deadline = time.monotonic() + 60
    while not (tmp_path / "lost" / "checkpoints" / "step-000004").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(started[1].pid, signal.SIGKILL)
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [1, -signal.SIGKILL]
    assert re.search(r"lost another process of this run \(.*\): its own last words say why. Start all of them", said())
    assert "Traceback" not in said()
    resumed = run(2, "lost", **changes, resume_from_checkpoint="auto")
    assert records(resumed) == records(whole)
    for file in ("final/model.safetensors", "checkpoints/step-000008/optimizer/__1_0.distcp"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes(), file
    assert checkpoint.fault(whole / "checkpoints" / "step-000008") is None
    (whole / file).write_bytes((whole / file).read_bytes()[:-1])
    assert "optimizer/__1_0.distcp has" in str(checkpoint.fault(whole / "checkpoints" / "step-000008"))


def test_nothing_in_the_list_of_shards_is_executed(tmp_path):
    from sgopd.engines.fsdp import Reader

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'trace'}",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(pickle.UnpicklingError, match=r"it names \w+\.system"):
        Reader(str(tmp_path)).read_metadata()
    assert not (tmp_path / "trace").exists()
