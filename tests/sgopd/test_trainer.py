from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sgopd.checkpoint
import sgopd.trainer
from sgopd.config import Config, UserError
from sgopd.metrics import MetricsFile, Sums, add_token_metrics, finite, repetition
from sgopd.processes import Processes
from sgopd.trainer import Trainer
from sgopd_kernels import Stats


def capture_gradients(trainer):
    """The gradients of the next updates, in place of their steps."""
    captured = []
    trainer.optimizer.step = lambda: captured.append(
        {name: parameter.grad.clone() for name, parameter in trainer.student.named_parameters()}
    )
    return captured


def expected_loss(trainer, rollouts, agree=1.8, conflict=1.0, teacher_loss="same"):
    """The loss from full logits, one rollout at a time, in plain torch; gradients are left in a copy of the student."""
    student, temperature = copy.deepcopy(trainer.student), trainer.config.temperature
    student.zero_grad()
    total, tokens = 0.0, 0
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion.ids.tolist()])
        start = len(rollout.prompt_ids)
        log_p = torch.log_softmax(student(ids).logits[0, start - 1 : -1] / temperature, -1)
        with torch.no_grad():
            log_q = torch.log_softmax(trainer.teacher.model(ids).logits[0, start - 1 : -1] / temperature, -1)
        y = rollout.completion.ids[:, None]
        d = (log_q.gather(-1, y) - log_p.detach().gather(-1, y)).squeeze(-1)
        signed = d * rollout.verdict
        weight = torch.where(signed > 0, agree, torch.where(signed < 0, conflict, 1.0))
        loss = weight * (log_p.exp() * (log_p - log_q)).sum(-1)
        if rollout.source == "teacher" and teacher_loss == "nll":
            loss = -log_p.gather(-1, y).squeeze(-1)
        if rollout.source == "teacher" and teacher_loss == "forward-kl":
            loss = weight * (log_q.exp() * (log_q - log_p)).sum(-1)
        total, tokens = total + loss.sum(), tokens + len(y)
    (total / tokens).backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    return (total / tokens).item(), gradients


def assert_gradients(ours, expected):
    for name, gradient in expected.items():
        scale = gradient.norm().clamp(min=1e-3)
        assert (ours[name] - gradient).norm() / scale < 1e-4, name


# --- the loss and its gradient ---


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4},
        {"temperature": 0.7, "gradient_checkpointing": True},
        {"gate_agree": 2.5, "gate_conflict": 0.25},
    ],
)
def test_an_update_is_the_gradient_of_the_gated_kl_per_token_of_the_whole_batch(trainer, changes):
    one = trainer(max_grad_norm=0.0, **changes)
    rollouts, _ = one.make_batch()
    assert len(rollouts) == 8 and {r.verdict for r in rollouts} >= {1, -1}
    assert len({len(r) for r in rollouts}) > 2, "rollouts of one length would hide a wrong denominator"
    gradients = capture_gradients(one)
    loss, expected = expected_loss(one, rollouts, changes.get("gate_agree", 1.8), changes.get("gate_conflict", 1.0))
    record = one.update(rollouts, fresh=True)
    assert record["loss"] == pytest.approx(loss, rel=1e-5)
    assert record["tokens"] == sum(len(r.completion.ids) for r in rollouts)
    assert_gradients(gradients[0], expected)


def test_forward_passes_by_tokens_are_the_update_of_fixed_ones(trainer, tmp_path):
    changes = {"max_grad_norm": 0.0, "precision": "exact", "cold_start_steps": 4, "seed": 1}
    one = trainer(**changes)
    rollouts, _ = one.make_batch()
    expected, record = capture_gradients(one), one.update(rollouts, fresh=True)
    limit = max(map(len, rollouts)) + 12
    other = trainer(**changes, max_tokens_per_device_batch=limit, output_dir=str(tmp_path / "other"))
    sizes, forward = [], other.engine.forward
    other.engine.forward = lambda batch, *rest: sizes.append(batch.inputs[0].shape) or forward(batch, *rest)
    found, again = capture_gradients(other), other.update(rollouts, fresh=True)
    assert all(rows * longest <= limit for rows, longest in sizes) and len({rows for rows, _ in sizes}) > 1, sizes
    assert again["update/forward_passes"] == len(sizes) > 2
    tokens = sum(map(len, rollouts))
    assert again["update/padding"] == pytest.approx(1 - tokens / sum(rows * longest for rows, longest in sizes))
    assert again["loss"] == pytest.approx(record["loss"], rel=1e-6)
    for name, gradient in expected[0].items():
        assert (found[0][name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.parametrize("teacher_loss", ["same", "forward-kl", "nll"])
def test_the_loss_on_teacher_rollouts_is_the_chosen_one(trainer, teacher_loss):
    one = trainer(
        max_grad_norm=0.0,
        cold_start_steps=4,
        teacher_share=0.75,
        teacher_rollout_loss=teacher_loss,
        seed=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    rollouts, _ = one.make_batch()
    assert {r.source for r in rollouts} == {"student", "teacher"}
    gradients = capture_gradients(one)
    loss, expected = expected_loss(one, rollouts, teacher_loss=teacher_loss)
    record = one.update(rollouts, fresh=True)
    assert record["loss"] == pytest.approx(loss, rel=1e-5)
    assert_gradients(gradients[0], expected)
    theirs = [r for r in rollouts if r.source == "teacher"]
    assert record["loss/teacher_rollouts"] == pytest.approx(
        expected_loss(one, theirs, teacher_loss=teacher_loss)[0], rel=1e-5
    )


def test_training_moves_the_student_towards_the_teacher_and_leaves_the_teacher_alone(trainer):
    one = trainer(max_steps=30, gate="opd")
    teacher = copy.deepcopy(one.teacher.model.state_dict())
    kl = []
    for _ in range(30):
        rollouts, _ = one.make_batch()
        kl.append(one.update(rollouts, fresh=True)["kl"])
    assert sum(kl[-5:]) < 0.8 * sum(kl[:5])
    assert all(torch.equal(teacher[name], weight) for name, weight in one.teacher.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in one.teacher.model.parameters())


def test_a_reference_changes_the_target(trainer, tiny, tmp_path):
    plain = trainer()
    rollouts, _ = plain.make_batch()
    gradients = capture_gradients(plain)
    plain.update(rollouts, fresh=True)
    referred = trainer(reference_model_name_or_path=str(tiny.student), output_dir=str(tmp_path / "b"))
    other = capture_gradients(referred)
    referred.update(rollouts, fresh=True)
    # with the reference equal to the student, extrapolating from it is the weight itself (method.md, section 2)
    assert_gradients(other[0], gradients[0])
    tiny.make_model(9).save_pretrained(tmp_path / "reference")
    tiny.make_tokenizer().save_pretrained(tmp_path / "reference")
    third = trainer(reference_model_name_or_path=str(tmp_path / "reference"), output_dir=str(tmp_path / "c"))
    other = capture_gradients(third)
    third.update(rollouts, fresh=True)
    with pytest.raises(AssertionError):
        assert_gradients(other[0], gradients[0])


def test_low_precision_is_near_full_precision(trainer, tmp_path):
    full, low = trainer(), trainer(bf16=True, output_dir=str(tmp_path / "low"))
    rollouts, _ = full.make_batch()
    a, b = capture_gradients(full), capture_gradients(low)
    losses = [one.update(rollouts, fresh=True)["loss"] for one in (full, low)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    for name, gradient in a[0].items():
        assert b[0][name].dtype == torch.float32
        assert (b[0][name] - gradient).norm() < 0.15 * gradient.norm(), name
    pure = trainer(dtype="bfloat16", teacher_dtype="bfloat16", output_dir=str(tmp_path / "pure"))
    assert pure.update(rollouts, fresh=True)["loss"] == pytest.approx(losses[0], rel=0.1)


def test_shuffled_verdicts_are_permuted_over_the_rollouts(trainer, tmp_path):
    honest, shuffled = trainer(), trainer(gate="shuffled", output_dir=str(tmp_path / "s"))
    rollouts, _ = honest.make_batch()
    seen = []
    original = shuffled.loss_of
    shuffled.loss_of = lambda part, verdicts, *rest: seen.append(verdicts) or original(part, verdicts, *rest)
    honest_record, record = (one.update(rollouts, fresh=True) for one in (honest, shuffled))
    true = [r.verdict for r in sorted(rollouts, key=len)]
    assert sorted(seen[0].tolist()) == sorted(true) and seen[0].tolist() != true
    assert record["kl"] == pytest.approx(honest_record["kl"]) and record["loss"] != honest_record["loss"]


def test_the_teacher_is_trusted_in_conflicts_as_far_as_it_was_endorsed(trainer, tmp_path):
    changes = {"gate": "opdvr", "num_generations": 2}
    off = trainer(**changes)
    changes["teacher_probes"] = 2
    trust = trainer(teacher_reliability="all", output_dir=str(tmp_path / "b"), **changes)
    incorrect = trainer(teacher_reliability="incorrect", output_dir=str(tmp_path / "c"), **changes)
    batches = [one.make_batch() for one in (off, trust, incorrect)]
    assert all(r.reliability == 0 for r in batches[0][0])
    expected = [trust.state.phases.reliability(r.example) for r in batches[1][0]]
    assert [r.reliability for r in batches[1][0]] == expected and {0.0, 0.5} & set(expected) and max(expected) > 0
    assert [r.reliability for r in batches[2][0]] == [
        0.0 if r.verdict == 1 else reliability for r, reliability in zip(batches[2][0], expected)
    ]
    assert all(sum(trust.state.phases.probes[r.example]) for r in batches[0][0])
    gate = [one.update(batch[0], fresh=True)["gate/mean"] for one, batch in zip((off, trust, incorrect), batches)]
    assert gate[0] < gate[2] <= gate[1], "conflicts weigh 0 under opdvr, and their reliability under trust"


# --- rollouts and phases ---


def test_only_endorsed_teacher_rollouts_enter_and_the_batch_never_changes_size(trainer):
    one = trainer(cold_start_steps=2, teacher_share=0.5, num_generations=4, max_steps=3)
    rollouts, record = one.make_batch()
    theirs = [r for r in rollouts if r.source == "teacher"]
    assert len(rollouts) == 8 and record["phase/teacher_proposed"] == 4
    assert record["phase/teacher_endorsed"] == record["phase/teacher_rollouts"] == len(theirs)
    assert 0 < len(theirs) < 4, "some endorsed and some not: the case of interest"
    assert all(r.verdict == 1 and r.in_teacher_slot for r in theirs)
    assert record["phase/acceptance"] == len(theirs) / 4 and record["phase/teacher_share"] == 0.5
    counts = {example: sum(r.example == example for r in rollouts) for example in {r.example for r in rollouts}}
    assert list(counts.values()) == [4, 4]
    assert sum(r.in_teacher_slot for r in rollouts) == 4
    assert (one.state.phases.proposed, one.state.phases.endorsed) == (4, len(theirs))
    # accuracy is taken over the slots that the teacher was never offered
    free = [r.verdict == 1 for r in rollouts if not r.in_teacher_slot]
    assert record["rollout/accuracy"] == sum(free) / 4

    one.update(rollouts, fresh=True)
    one.update(one.make_batch()[0], fresh=True)
    rollouts, record = one.make_batch()
    assert {r.source for r in rollouts} == {"student"} and record["phase/teacher_share"] == 0


@pytest.mark.parametrize(("endorse", "source"), [(True, "teacher"), (False, "student"), (None, "student")])
def test_a_full_share(trainer, endorse, source):
    one = trainer(rule=lambda response: endorse, cold_start_steps=1, teacher_share=1.0)
    rollouts, _ = one.make_batch()
    assert {r.source for r in rollouts} == {source} and len(rollouts) == 8
    record = one.update(rollouts, fresh=True)  # no student tokens at all in one of the two cases
    assert math.isfinite(record["loss"]) and record["loss"] > 0
    assert ("kl" in record) == (source == "student")
    assert one.state.phases.endorsed == (8 if endorse else 0), "what is unknown is no endorsement"
    assert {one.state.phases.reliability(r.example) for r in rollouts} == {float(endorse is True)}


def test_prompts_follow_the_shared_order(trainer, tiny):
    one = trainer(num_generations=2)
    examples = [[r.example for r in one.make_batch()[0]] for _ in range(3)]
    flat = [e for batch in examples for e in batch[::2]]
    assert flat == sgopd.trainer.take(0, 12, 48, one.config.seed) and one.state.position == 12
    assert all(batch[::2] == batch[1::2] for batch in examples)


def test_several_updates_on_one_batch(trainer):
    one = trainer(num_iterations=2)
    path = run_in(one)
    records = [r for r in read(path) if r["kind"] == "train"]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert ["rollout/accuracy" in r for r in records] == [True, False, True, False]
    assert ["engine/logprob_gap_mean" in r for r in records] == [True, False, True, False]
    assert one.state.position == 16


def run_in(trainer):
    trainer.train()
    return trainer.run_dir / "metrics.jsonl"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what can go wrong ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "sg_opd"}, "unknown gate 'sg_opd'; did you mean 'sg-opd'"),
        ({"gate_conflict": [1.0, 2.0, 3.0]}, "pair"),
        ({"max_tokens_per_device_batch": 16}, "max_tokens_per_device_batch: got 16, expected 17 or more"),
        ({"backend": "gpu"}, "the loss refuses these settings: backend must be one of"),
        ({"precision": "rough"}, "the loss refuses these settings: precision"),
        ({"report_to": "wandbb"}, "report_to: 'wandbb' is not installed"),
        (
            {"teacher_model_name_or_path": "/none"},
            "teacher_model_name_or_path: cannot load a model from '/none'",
        ),
    ],
)
def test_refused_at_the_start(trainer, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        trainer(**changes)


def test_a_verifier_that_does_not_exist(trainer):
    for kind, message in (("maths", "did you mean 'math'"), ("no.such:verifier", "no module|No module")):
        with pytest.raises(UserError, match=message):
            trainer(verifier=kind).train()


# --- a whole run ---


@pytest.fixture(scope="module")
def whole_run(tiny, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    config = Config(
        model_name_or_path=str(tiny.student),
        teacher_model_name_or_path=str(tiny.teacher),
        dataset_name=str(tiny.data),
        eval_dataset_name=str(tiny.data),
        output_dir=str(run_dir),
        use_cpu=True,
        num_threads=1,
        verifier="math",
        max_completion_length=6,
        max_steps=8,
        cold_start_steps=4,
        teacher_reliability="all",
        logging_steps=3,
        num_completions_to_log=5,
        save_steps=2,
        eval_steps=4,
        eval_on_start=True,
        eval_teacher=True,
        num_generations_eval=2,
        eval_dataset_size=4,
        learning_rate=1e-2,
    )
    sgopd.trainer.train(config, say=lambda line: None)
    return config, run_dir


def test_the_run_directory(whole_run, tiny):
    config, run_dir = whole_run
    assert {path.name for path in run_dir.iterdir()} == {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "completions",
        "checkpoints",
        "final",
        "report.html",
    }
    assert Config.load(run_dir / "config.yaml") == config
    checkpoints = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert {"step-000006", "step-000008"} <= checkpoints and len(checkpoints) <= 3
    final = AutoModelForCausalLM.from_pretrained(run_dir / "final")
    last = AutoModelForCausalLM.from_pretrained(run_dir / "checkpoints" / "step-000008")
    start = AutoModelForCausalLM.from_pretrained(tiny.student)
    for name, weight in final.state_dict().items():
        assert torch.equal(weight, last.state_dict()[name])
        assert not torch.equal(weight, start.state_dict()[name])
    assert AutoTokenizer.from_pretrained(run_dir / "final").get_vocab() == tiny.make_tokenizer().get_vocab()


def test_the_records(whole_run):
    records = read(whole_run[1] / "metrics.jsonl")
    evals = [(r["step"], r["model"]) for r in records if r["kind"] == "eval"]
    assert evals == [(0, "teacher"), (0, "student"), (4, "student"), (8, "student")]
    train = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train] == list(range(1, 9))
    assert [r["optim/lr"] for r in train] == pytest.approx([1e-2 * (1 - i / 8) for i in range(8)])
    assert records[0]["kind"] == "config" and records[0]["seed"] == 0 and records[-1]["kind"] == "end"
    for r in train:
        assert r["engine/logprob_gap_max"] < 1e-4
        cells = sum(v for k, v in r.items() if k.startswith("cell/") and k.endswith("/share"))
        assert cells <= 1 + 1e-6
        assert r["rollout/correct"] + r["rollout/incorrect"] + r["rollout/unknown"] + r["phase/teacher_rollouts"] == 8


@pytest.fixture(scope="module")
def weighted_run(whole_run, tmp_path_factory):
    """The settings that have metrics of their own."""
    config = dataclasses.replace(
        whole_run[0],
        output_dir=str(tmp_path_factory.mktemp("weighted") / "run"),
        prompt_weight=[1, 1],
        reward_weight=1.0,
        importance_clip=2.0,
        num_generations=2,
        max_tokens_per_device_batch=40,
        max_steps=1,
        eval_on_start=False,
    )
    sgopd.trainer.train(config, say=lambda line: None)
    return config, Path(config.output_dir)


def test_every_metric_is_defined_in_the_docs(whole_run, weighted_run, root):
    text, _, _ = (root / "docs" / "metrics.md").read_text().partition("## Completions")
    defined = set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE))
    expanded = set()
    for name in defined:
        options = [part.split(",") for part in re.findall(r"\{([^}]*)\}", name)]
        names = [name]
        for choice in options:
            names = [n.replace("{" + ",".join(choice) + "}", c, 1) for n in names for c in choice]
        expanded |= set(names)
    written = {
        key
        for _, run_dir in (whole_run, weighted_run)
        for record in read(run_dir / "metrics.jsonl")
        for key in record
        if record["kind"] != "config" and key not in ("step", "kind")
    }
    assert written - expanded == set()
    sometimes = {"loss/teacher_rollouts", "phase/acceptance", "phase/reliability", "time/total"}
    sometimes |= {"sampler/gap_mean", "sampler/gap_max", "time/sync"}  # of a server: test_samplers.py reads them
    sometimes |= {f"teacher/name/{what}" for what in ("share", "kl", "logratio_mean")}  # test_routed.py reads them
    conditional = {name for name in expanded if name.startswith("cell/")}
    assert expanded - written - sometimes - conditional == set(), "defined, and never written"


def test_completions_are_kept_for_some_steps_and_bounded(whole_run):
    files = sorted((whole_run[1] / "completions").iterdir())
    assert [path.name for path in files] == ["step-000001.parquet", "step-000003.parquet", "step-000006.parquet"]
    rows = pyarrow.parquet.read_table(files[0]).to_pylist()
    assert 0 < len(rows) <= 5
    assert {"prompt", "completion", "verdict", "reason", "source"} <= rows[0].keys()
    assert re.fullmatch(r"\d+\+\d+=", rows[0]["prompt"])


def test_records_are_on_the_disk_before_the_checkpoint_that_counts_them(trainer, monkeypatch):
    synced, seen, fsync, save = {}, [], os.fsync, sgopd.checkpoint.save

    def watched_fsync(handle):
        fsync(handle)
        facts = os.fstat(handle)
        synced[facts.st_ino] = facts.st_size

    def watched_save(*arguments, state, **options):
        seen.append((synced.get(metrics.stat().st_ino), state["metrics_position"]))
        return save(*arguments, state=state, **options)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(sgopd.checkpoint, "save", watched_save)
    one = trainer(max_steps=4, save_steps=2)
    metrics = one.run_dir / "metrics.jsonl"
    one.train()
    assert len(seen) == 2 and all(on_disk == counted for on_disk, counted in seen), seen


def test_a_model_with_dropout_resumes_to_the_same_weights(settings, tiny, tmp_path):
    """Dropout takes the global generators, which are the only random state that has to be kept."""
    tiny.make_model(1, attention_dropout=0.5).save_pretrained(tmp_path / "student")
    tiny.make_tokenizer().save_pretrained(tmp_path / "student")
    changes = {"model_name_or_path": str(tmp_path / "student"), "save_steps": 2, "max_tokens_per_device_batch": 30}

    def run(**more):
        return Trainer(Config.load(None, settings(**changes, **more)), say=lambda line: None).train()

    def weights(folder):
        return load_file(folder / "final" / "model.safetensors")

    whole = weights(run(output_dir=str(tmp_path / "whole")))
    once = run(output_dir=str(tmp_path / "other"), seed=4)
    assert any(not torch.equal(weight, whole[name]) for name, weight in weights(once).items())
    middle = str(tmp_path / "whole" / "checkpoints" / "step-000002")
    resumed = weights(run(output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=middle))
    assert all(torch.equal(weight, whole[name]) for name, weight in resumed.items())


def test_a_checkpoint_of_another_number_of_processes_is_refused(trainer, settings):
    one = trainer(max_steps=2, save_steps=2)
    one.train()
    one.metrics = MetricsFile(one.run_dir / "metrics.jsonl", 10**9)
    one.save_checkpoint([sgopd.checkpoint.random_state()] * 2)
    with pytest.raises(UserError, match=r"was written by 2 processes, this run has 1: launch as many, or start a new"):
        Trainer(Config.load(None, settings(max_steps=4, resume_from_checkpoint="auto")), say=lambda line: None)


def test_evaluation_does_not_disturb_training(whole_run, tmp_path):
    import dataclasses

    quiet = dataclasses.replace(
        whole_run[0], output_dir=str(tmp_path / "quiet"), eval_dataset_name=None, save_steps=None
    )
    sgopd.trainer.train(quiet, say=lambda line: None)

    def training(path):
        return [
            {k: v for k, v in r.items() if not k.startswith("time/") and k != "tokens_per_second"}
            for r in read(path / "metrics.jsonl")
            if r["kind"] == "train"
        ]

    assert training(tmp_path / "quiet") == training(whole_run[1])


def test_trackers_get_the_settings_and_some_records(trainer):
    one = trainer(run_name="a run", max_steps=4, logging_steps=2)
    calls = []
    one.processes.accelerator.init_trackers = lambda *args, **kwargs: calls.append((args, kwargs))
    one.processes.accelerator.log = lambda values, step: calls.append((step, values))
    one.train()
    (project,), options = calls[0]
    assert project == "sgopd" and options["init_kwargs"]["wandb"] == {"name": "a run"}
    assert options["config"]["learning_rate"] == "0.01"
    assert [step for step, _ in calls[1:]] == [1, 2, 4]
    assert calls[1][1]["loss"] > 0 and all(isinstance(value, (int, float)) for value in calls[1][1].values())


# --- metrics ---


def test_sums_are_weighted_means_counts_and_maxima(settings):
    sums = Sums()
    sums.add("a", torch.tensor(6.0), 2)
    sums.add("a", 3.0, torch.tensor(1.0))
    sums.add("nothing", 0.0, 0)
    sums.count("n", 2)
    sums.count("n", torch.tensor(0.5))
    sums.largest("m", torch.tensor(1.0))
    sums.largest("m", 3.0)
    assert sums.reduced(Processes(Config.load(None, settings()))) == {"a": 3.0, "n": 2.5, "m": 3.0}


def test_token_metrics_by_hand(settings):
    d = torch.tensor([2.0, -1.0, 0.05, -3.0, 0.5, 4.0])
    verdict = torch.tensor([1, 1, 1, -1, -1, 0])
    gate = torch.tensor([1.8, 0.5, 1.0, 1.8, 0.5, 1.0])
    student = torch.full((6,), -1.0)
    stats = Stats(
        kl=torch.arange(6.0),
        student_logprob=student,
        teacher_logprob=student + d,
        logratio=d,
        student_entropy=torch.full((6,), 0.25),
        teacher_entropy=torch.full((6,), 0.75),
        gate=gate,
        agree=torch.tensor([True, False, False, True, False, False]),
        backend="torch",
    )
    sums = Sums()
    add_token_metrics(sums, stats, verdict, student + torch.tensor([0.0, 0, 0, 0, 0.3, -0.6]), tolerance=0.1)
    result = sums.reduced(Processes(Config.load(None, settings())))
    expected = {
        "kl": 2.5,
        "logratio/mean": 2.55 / 6,
        "logratio/abs_mean": 10.55 / 6,
        "gate/mean": 6.6 / 6,
        "gate/agree_fraction": 2 / 6,
        "gate/agree_fraction_weighted": 5 / 10.55,
        "entropy/student": 0.25,
        "entropy/teacher": 0.75,
        "engine/logprob_gap_mean": 0.15,
        "engine/logprob_gap_max": 0.6,
        "cell/correct_agree/logratio_mean": 2.0,
        "cell/correct_conflict/logratio_mean": -1.0,
        "cell/incorrect_agree/logratio_mean": -3.0,
        "cell/incorrect_agree/logratio_abs_mean": 3.0,
        "cell/incorrect_conflict/logratio_mean": 0.5,
        "cell/incorrect_agree/gate_mean": 1.8,
        "cell/incorrect_conflict/gate_mean": 0.5,
    }
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    assert all(result[name] == pytest.approx(1 / 6) for name in result if name.endswith("/share"))


def test_metrics_are_json_whatever_they_are(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", 0)
    file.write({"step": 1, "a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}})
    position = file.position
    file.write({"step": 2})
    file.close()
    assert finite((float("nan"),)) == [None]
    assert read(tmp_path / "m.jsonl")[0] == {"step": 1, "a": None, "b": [None, 1.5], "c": {"d": None}}
    again = MetricsFile(tmp_path / "m.jsonl", position)  # as on resume
    again.write({"step": 3})
    again.close()
    assert [r["step"] for r in read(tmp_path / "m.jsonl")] == [1, 3]


def test_repetition():
    assert repetition([1, 2, 3]) is None, "no 4-gram is no share of 0"
    assert repetition([1, 2, 3, 4, 5, 6]) == 0.0
    assert repetition([7] * 7) == pytest.approx(0.75)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(0.2)
