"""Rollouts from a server: what a run makes of one that is right, slow, broken, keeps old weights, or dies."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("httpx_retries", reason="the extra `server` is not installed")

from sgopd import servers
from sgopd.cli import main
from sgopd.config import Config, UserError
from sgopd.rollout import Completion, Rollout, batch_of
from sgopd.teachers import Hidden
from sgopd.trainer import Trainer

sys.path.append(str(Path(__file__).resolve().parent.parent))
from vllm_stub import Stub


@pytest.fixture
def student(tiny, tmp_path):
    """Tied embeddings, whose head a server may keep."""
    tiny.make_model(1, tie_word_embeddings=True).save_pretrained(tmp_path / "student")
    tiny.make_tokenizer().save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def stub(student):
    with Stub(student).serving() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting between tries, no report."""
    monkeypatch.setattr(servers.Retry, "_calculate_backoff", lambda self: 0.0, raising=False)
    monkeypatch.setattr(servers, "TRIES", 3)
    monkeypatch.setattr("sgopd.trainer.write_report", lambda run_dir: None)


@pytest.fixture
def served(settings, student, stub, tmp_path):
    """A trainer that samples by the stub."""

    def make(name="served", **changes):
        values = {"model_name_or_path": str(student), "sampler": "vllm", "sampler_url": stub.url, "save_steps": 1}
        values |= {"sampler_tolerance": 1e-4, "output_dir": str(tmp_path / name), **changes}
        records: list[dict] = []
        trainer = Trainer(Config.load(None, settings(**values)), say=lambda line: None, on_record=records.append)
        trainer.records = records
        return trainer

    return make


def train_records(trainer):
    trainer.train()
    return [record for record in trainer.records if record["kind"] == "train"]


def test_a_run_samples_from_its_present_weights_whatever_fails_for_a_moment(served, stub, tiny, tmp_path):
    evaluated = {"eval_dataset_name": str(tiny.data), "eval_dataset_size": 3, "eval_steps": 2, "eval_temperature": 0.0}
    one = served(temperature=0.7, importance_clip=2.0, **evaluated)
    assert not one.sampler.exact and any("not to the same bits" in line for line in one.findings)
    stub.faults = ["", "500", "slow", "cut"]
    records = train_records(one)
    assert not stub.faults and stub.loaded == [f"step-{step:06d}" for step in range(5)]
    assert not list((tmp_path / "served" / "sampler").glob("step-*"))
    for record in records:
        assert record["sampler/gap_mean"] <= record["sampler/gap_max"] < 1e-4 and record["time/sync"] > 0
        assert record["engine/logprob_gap_max"] < 1e-4
        assert record["importance/mean"] == pytest.approx(1, abs=1e-3) and record["importance/clipped"] == 0
    assert any(record["rollout/length_clipped"] < 1 for record in records), "some ended"


def test_evaluation_alone_takes_the_same_sampler(served, stub, tmp_path, tiny, capsys):
    changes = {"eval_dataset_name": str(tiny.data), "eval_dataset_size": 3, "eval_temperature": 0.0}
    one = served(max_steps=1, **changes)
    one.train()
    stub.loaded.clear()
    assert main(["evaluate", str(tmp_path / "served")]) == 0
    found, *_ = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    (ours,) = (record for record in one.records if record["kind"] == "eval")
    assert found["eval/correct"] == ours["eval/correct"] and stub.loaded == ["step-000000"]


def test_adapters_are_merged_for_the_server(served):
    pytest.importorskip("peft", reason="the extra `peft` is not installed")
    records = train_records(served(use_peft=True, learning_rate=0.1))
    assert all(record["sampler/gap_max"] < 1e-4 for record in records)


def test_a_server_that_keeps_the_old_head_is_noticed_and_its_run_goes_on(served, stub, monkeypatch):
    monkeypatch.setattr("sgopd.samplers.vllm.tied_head", lambda model: None)
    with pytest.raises(UserError, match=r"after the sync of step 1, .* other log-probabilities than the trainer: by"):
        served().train()
    monkeypatch.undo()
    assert [record["step"] for record in train_records(served(resume_from_checkpoint="auto"))] == [2, 3, 4]


def test_a_server_that_dies_ends_the_run_in_words_and_it_goes_on(served, stub):
    one = served()
    one.on_record = lambda record: stub.faults.extend(["500"] * 99 * (record["step"] == 2))
    with pytest.raises(
        UserError, match=r"sampler_url: .* answers 500: .*engine is dead.*, in 3 tries. See the server's"
    ):
        one.train()
    stub.faults = []
    assert [record["step"] for record in train_records(served(resume_from_checkpoint="auto"))] == [3, 4]


def changed(**changes):
    return lambda choices: [{**choices[0], **changes}, *choices[1:]]


SPOILT = {
    "lost": (lambda choices: choices[1:], "choices for 8 prompts"),
    "truncated": (lambda choices: [{**one, "token_ids": one["token_ids"][:-1]} for one in choices], "tokens with"),
    "aborted": (changed(token_ids=[5, 5], logprobs={"token_logprobs": [-1, -1]}), "neither ended by"),
    "none": (changed(token_ids=[]), "IndexError"),
    "NaN": (changed(token_ids=[5] * 12, logprobs={"token_logprobs": [math.nan] * 12}), "not finite"),
    "null": (changed(token_ids=[5] * 12, logprobs={"token_logprobs": [None] * 12}), "TypeError"),
    "beyond the vocabulary": (
        changed(token_ids=[40] * 12, logprobs={"token_logprobs": [-1] * 12}),
        "from 40 to 40 of 32",
    ),
    "no list": (lambda choices: None, "TypeError"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_an_answer_that_is_none_is_refused(served, stub, name):
    stub.spoil, said = SPOILT[name]
    with pytest.raises(UserError, match=rf"sampler_url: .*did not answer as vLLM does: .*{said}"):
        served().train()


def test_what_cannot_work_is_refused_with_the_remedy(served, stub):
    for changes, said in (
        ({"sampler_url": None}, "sampler_url: got None, expected http://HOST:PORT with sampler vllm"),
        ({"sampler": "plain"}, "sampler_url: got .*, null with another"),
        ({"sampler_url": "host:8000"}, "expected http://HOST:PORT"),
        ({"top_p": 0.9}, "top_p: got 0.9, expected 1 with sampler vllm: it gives log-probabilities of what is left"),
        ({"top_k": 9}, "top_k: got 9, expected 0 with sampler vllm"),
        ({"importance_clip": 0}, "importance_clip: got 0.0, expected > 0"),
        (
            {"max_completion_length": 300},
            "can have 30. tokens, and .* takes 256. Start it with a longer --max-model-len",
        ),
    ):
        with pytest.raises(UserError, match=said):
            served(**changes)
    stub.dev = False
    with pytest.raises(UserError, match=r"/is_paused answers 404.* a server of vLLM with VLLM_SERVER_DEV_MODE=1"):
        served()
    stub.dev, stub.mode = True, "raw"
    with pytest.raises(UserError, match=r"at temperature 0.7, by .*Start it with --logprobs-mode processed_logprobs"):
        served(temperature=0.7).train()


def test_rows_that_the_teacher_lacks_are_never_sampled(served, tiny, tmp_path):
    tiny.make_model(2, 24, 2, vocab_size=25).save_pretrained(tmp_path / "teacher")
    tiny.make_tokenizer().save_pretrained(tmp_path / "teacher")
    one = served(teacher_model_name_or_path=str(tmp_path / "teacher"), sampler_tolerance=9, max_completion_length=40)
    assert one.vocabulary == 25 and len(one.sampler.never) == 7
    train_records(one)


@pytest.mark.parametrize("gate", ["opd", "sg-opd", "r2-opd"])
def test_importance_makes_of_anothers_rollouts_the_mean_over_ones_own(trainer, tiny, gate):
    """All completions of two tokens of a vocabulary of eight: the gradient weighted by μ is that of π."""
    one = trainer(importance_clip=1e9, gate=gate, precision="exact", bf16=False)
    other = tiny.make_model(7)
    prompt, V = [5, 6, 7], 8
    completions = list(itertools.product(range(V), repeat=2))
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *tokens] for tokens in completions])
        logprobs = [
            torch.log_softmax(model(ids).logits[:, 2:4, :], -1).gather(-1, ids[:, 3:, None]).squeeze(-1)
            for model in (one.student, other)
        ]
    own, theirs = logprobs
    verdicts = torch.tensor([1 if sum(tokens) % 2 else -1 for tokens in completions])
    generator = torch.Generator()
    found = []
    for behaviour, sampled_by, clip in ((own, own, None), (theirs, theirs, 1e9)):
        object.__setattr__(one.config, "importance_clip", clip)
        total = [torch.zeros_like(p) for p in one.engine.parameters]
        for row, tokens in enumerate(completions):
            completion = Completion(torch.tensor(tokens), behaviour[row], False, "")
            batch = batch_of([Rollout(0, prompt, completion, "student", False)], one.device)
            targets = one.teacher.score(batch)
            assert isinstance(targets, Hidden)
            loss, _ = one.engine.forward(batch, verdicts[row : row + 1], targets, None, 2, generator)
            share = sampled_by[row].sum().exp()
            for sum_, gradient in zip(total, torch.autograd.grad(loss, one.engine.parameters)):
                sum_ += share * gradient
        found.append(torch.cat([part.flatten() for part in total]))
    assert (found[0] - found[1]).norm() < 1e-4 * found[0].norm()


def test_the_weight_of_a_rollout_is_clipped(trainer):
    one = trainer(importance_clip=1.5)
    tokens = torch.tensor([5, 9, 4])
    for behaviour, expected in ((-30.0, 1.5), (-1e-3, None)):
        completion = Completion(tokens, torch.full((3,), behaviour), False, "")
        batch = batch_of([Rollout(0, [5, 6], completion, "student", False)], one.device)
        _, measured = one.engine.forward(batch, torch.tensor([1]), one.teacher.score(batch), None, 3, torch.Generator())
        now = one.engine.logprobs(batch, 1.0)[-3:].sum()
        assert measured.importance.item() == pytest.approx(expected or (now - 3 * behaviour).exp().item(), rel=1e-4)
