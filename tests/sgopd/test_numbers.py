"""Numbers that go wrong, in the real trainer: what is left out and counted, and what ends a run with which words."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from sgopd.config import Config, UserError
from sgopd.rollout import Sampling, generate
from sgopd.startup import check_prompts
from sgopd.trainer import Trainer

NAN, INF = math.nan, math.inf


def state_of(trainer):
    """Weights and optimiser state, as copies."""
    return copy.deepcopy((trainer.student.state_dict(), trainer.optimizer.state_dict()["state"]))


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@contextlib.contextmanager
def poisoned(trainer, where, value):
    """One `value` in a position's hidden state, or in one gradient, while it lasts."""
    if where == "gradient":
        parameter = trainer.student.model.layers[0].mlp.up_proj.weight
        handle = parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), value))
    else:

        def spoil(module, arguments, output):
            hidden = output.last_hidden_state.clone()
            hidden[-1, -2, 1] = value  # the last row is the longest: this position predicts its last token
            output.last_hidden_state = hidden
            return output

        model = trainer.student if where == "student" else trainer.teacher.model
        handle = model.base_model.register_forward_hook(spoil)
    yield
    handle.remove()


def records(run_dir: Path, kind: str = "train") -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture
def verdicts(monkeypatch, tmp_path):
    """The names of verifiers that say one thing of every response, for real workers."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "verdicts.py").write_text(
        textwrap.dedent(
            """
            def correct(response, example):
                return True

            def incorrect(response, example):
                return False

            def unknown(response, example):
                return None
            """
        )
    )
    return lambda name: {"verifier": f"verdicts:{name}", "verifier_workers": 1, "truncated_is_incorrect": False}


# --- NaN and infinity ---


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("whose", ["model", "teacher_model", "reference_model"])
def test_weights_that_are_not_finite_are_refused_by_name(settings, tiny, tmp_path, whose, value):
    model = tiny.make_model(2, 24, 2)
    with torch.no_grad():
        model.lm_head.weight[5, 7] = value
    model.save_pretrained(tmp_path / "broken")
    tiny.make_tokenizer().save_pretrained(tmp_path / "broken")
    setting = f"{whose}_name_or_path"
    with pytest.raises(UserError, match=rf"{setting}: 1 weights of .*not finite .*Use an earlier one"):
        Trainer(Config.load(None, settings(**{setting: str(tmp_path / "broken")})))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"divergence": "forward-kl"},
        {"divergence": "jsd"},
        {"estimator": "sampled"},
        {"bf16": True},
        {"backend": "torch", "divergence": "jsd"},
    ],
)
def test_an_update_that_is_not_finite_is_left_out_and_counted(trainer, changes):
    """Wherever the number comes from: weights and optimiser state stay to the bit, and the next update is as ever."""
    one = trainer(max_steps=100, **changes)
    said = []
    one.say = said.append
    rollouts, _ = one.make_batch()
    one.update(rollouts, fresh=True)
    before = state_of(one)
    cases = [(where, value) for where in ("student", "teacher", "gradient") for value in (NAN, INF, -INF)]
    for count, (where, value) in enumerate(cases, start=1):
        with poisoned(one, where, value):
            record = one.update(rollouts, fresh=False)
        assert same(state_of(one), before), (where, value)
        assert record["optim/skipped"] == count == one.state.skipped
        finite = [math.isfinite(record[name]) for name in ("loss", "optim/grad_norm")]
        assert finite[1] is False and finite[0] is (where == "gradient"), (where, value, record)
        what = "gradient" if where == "gradient" else "loss and gradient"
        assert f"update {one.state.step} is left out, since its {what} is not finite" in said[-1]
        assert f"{count} so far, and the run stops at 10" in said[-1]
        assert all(p.grad is None for p in one.engine.parameters)
    record = one.update(rollouts, fresh=False)
    assert math.isfinite(record["loss"]) and record["optim/skipped"] == len(cases)
    assert not same(state_of(one)[0], before[0]) and all(p.isfinite().all() for p in one.engine.parameters)


def test_the_run_stops_at_the_limit_and_its_checkpoint_goes_on(trainer, settings):
    one = trainer(max_steps=9, save_steps=1, max_skipped_steps=3)
    update = one.update

    def sometimes(rollouts, fresh):
        with poisoned(one, "student", NAN) if one.state.step >= 2 else contextlib.nullcontext():
            return update(rollouts, fresh)

    one.update = sometimes
    with pytest.raises(UserError) as error:
        one.train()
    assert "stopped at step 5: 3 updates had a loss or gradient that was not finite" in str(error.value)
    assert "resume from one with a lower learning_rate" in str(error.value)
    train = records(one.run_dir)
    assert [record["optim/skipped"] for record in train] == [0, 0, 1, 2, 3]
    assert [record["loss"] is None for record in train] == [False, False, True, True, True]
    assert not (one.run_dir / "final").exists()
    newest = max((one.run_dir / "checkpoints").iterdir())
    assert newest.name == "step-000004"
    weights = load_file(newest / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())

    changes = {"max_steps": 9, "max_skipped_steps": 3, "resume_from_checkpoint": "auto"}
    resumed = Trainer(Config.load(None, settings(**changes)), say=lambda line: None)
    assert (resumed.state.step, resumed.state.skipped) == (4, 2)
    resumed.train()
    train = records(one.run_dir)
    assert len(train) == 9 and all(record["loss"] is not None for record in train[4:])


def test_a_finite_update_that_breaks_the_weights_ends_the_run_before_they_are_saved(trainer):
    one = trainer(learning_rate=1e37, weight_decay=30.0, save_steps=1, max_steps=5)
    with pytest.raises(UserError, match=r"update 1 made weights that are not finite .* learning_rate 1e\+37.* a lower"):
        one.train()
    assert not any((one.run_dir / "checkpoints").iterdir()) and not (one.run_dir / "final").exists()


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_model_without_finite_logits_has_no_rollouts(tiny, temperature):
    model, tokenizer = tiny.make_model(1), tiny.make_tokenizer()
    sampling = Sampling(4, (1,), 24, temperature=temperature)
    for value in (NAN, INF):
        with torch.no_grad():
            model.lm_head.weight[3] = value
        with pytest.raises(UserError, match=r"the logits after 2 of 2 texts are not finite .* lower learning_rate"):
            generate(model, tokenizer, [[3], [4, 5]], sampling, seed=0)
    with torch.no_grad():  # a token that can never come is no fault
        model.lm_head.weight[3] = 0.0
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(32))
        model.lm_head.bias[3] = -INF
    completions = generate(model, tokenizer, [[3], [4, 5]], sampling, seed=0)
    assert len(completions) == 2 and not any((c.ids == 3).any() for c in completions)


def test_weights_too_large_for_a_forward_pass_end_the_run_in_words(trainer):
    one = trainer(max_steps=5)
    with torch.no_grad():
        one.student.lm_head.weight.fill_(1e38)
    with pytest.raises(UserError, match=r"logits .* not finite .*no token can be sampled"):
        one.train()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", INF, "a finite number"),
        ("temperature", NAN, "a finite number"),
        ("gate_agree", [1.0, INF], "a finite number"),
        ("max_grad_norm", INF, "a finite number"),
        ("verifier_timeout", INF, "a finite number"),
        ("adam_epsilon", 0.0, "> 0"),
    ],
)
def test_settings_that_make_no_finite_numbers_are_refused(settings, name, value, expected):
    with pytest.raises(UserError, match=f"{name}: got .*, expected {expected}"):
        Config.load(None, settings(**{name: value}))


# --- spikes ---


def test_a_spike_is_clipped_and_one_that_overflows_is_left_out(trainer, tmp_path):
    after, norms = [], []
    for number, factor in enumerate((1e2, 1e9)):
        one = trainer(output_dir=str(tmp_path / str(number)))
        rollouts, _ = one.make_batch()
        original = one.loss_of
        one.loss_of = lambda *arguments, f=factor, loss_of=original: loss_of(*arguments) * f
        record = one.update(rollouts, fresh=True)
        assert record["optim/clipped_share"] == 1 and record["optim/skipped"] == 0
        norms.append(record["optim/grad_norm"])
        after.append(one.student.state_dict())
    assert norms[1] == pytest.approx(1e7 * norms[0], rel=1e-3)
    for name, weight in after[0].items():  # clipped to one norm, both steps are the same
        assert torch.allclose(weight, after[1][name], atol=1e-6), name

    before = state_of(one)
    one.loss_of = lambda *arguments: original(*arguments) * 1e38
    record = one.update(rollouts, fresh=False)
    assert record["optim/skipped"] == 1 and same(state_of(one), before)
    one.loss_of = original
    assert math.isfinite(one.update(rollouts, fresh=False)["loss"]) and one.state.skipped == 1


# --- empty, one-token, over-long ---


def test_a_vocabulary_of_one_token(settings, tiny, tmp_path):
    """Nothing to choose: every completion ends at once, and the loss and its gradient are 0 but for rounding."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"e": 0}, unk_token="e")),
        eos_token="e",
        unk_token="e",
        pad_token="e",
    )
    changes = {"vocab_size": 1, "pad_token_id": None, "eos_token_id": 0}
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny.make_model(seed, **changes).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    paths = {
        f"{'teacher_' * (name == 'teacher')}model_name_or_path": str(tmp_path / name) for name in ("student", "teacher")
    }
    one = Trainer(Config.load(None, settings(**paths, save_steps=4)), say=lambda line: None)
    before = copy.deepcopy(one.student.state_dict())
    one.train()
    train = records(one.run_dir)
    assert len(train) == 4 and all(record["rollout/length_mean"] == 1 for record in train)
    for name in ("loss", "optim/grad_norm", "kl", "entropy/student"):
        assert all(abs(record[name]) < 1e-6 for record in train), name
    assert all(torch.allclose(weight, before[name]) for name, weight in one.student.state_dict().items())


def test_prompts_of_no_length_or_too_much_are_left_out_and_counted(settings, tiny, tmp_path):
    rows = [{"prompt": p, "answer": "1"} for p in ("", "1+1=", "0" * 300, [], "2+2=", "7" * 31)]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    changes = {"dataset_name": str(data), "max_prompt_length": 30}
    one = Trainer(Config.load(None, settings(**changes)), say=said.append)
    assert len(one.prompts) == 2 and one.prompts.dropped == {"empty": 2, "over-long": 2}
    one.train()
    assert "warning: dropped 2 empty and 2 over-long prompts, 2 are left" in said
    assert len(records(one.run_dir)) == 4

    data.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], rows[2])))
    with pytest.raises(UserError, match=r"no usable prompt in the train data \(1 empty, 1 over-long\)"):
        Trainer(Config.load(None, settings(**changes, output_dir=str(tmp_path / "b"))))


def test_prompts_beyond_what_the_models_were_made_for(settings, tiny, tmp_path):
    """Rotary positions go on, with a warning; a table of positions has an end, and the run is refused at the start."""
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"prompt": "1" * n, "answer": "1"}) + "\n" for n in (3, 250, 5, 240)))
    said = []
    one = Trainer(Config.load(None, settings(dataset_name=str(data), max_steps=2)), say=said.append)
    one.train()
    assert any("can have 262 tokens, the student was made for 256" in line for line in said)
    assert all(record["loss"] > 0 for record in records(one.run_dir))

    for name in ("student", "teacher"):
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=32, n_positions=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=1)
        )
        model.save_pretrained(tmp_path / name)
        tiny.make_tokenizer().save_pretrained(tmp_path / name)
    paths = {"model_name_or_path": str(tmp_path / "student"), "teacher_model_name_or_path": str(tmp_path / "teacher")}
    paths["dataset_name"] = str(data)
    refused = settings(**paths, output_dir=str(tmp_path / "g"))
    with pytest.raises(UserError, match="2 of 4 prompts leave no room for an answer: they have up to 250 tokens"):
        Trainer(Config.load(None, refused))
    data.write_text(data.read_text() + json.dumps({"prompt": "1" * 60, "answer": "1"}))
    with pytest.raises(UserError, match=r"can have 72 tokens, the student was made for 64: lower .*a table of 64 rows"):
        Trainer(Config.load(None, {**refused, "max_prompt_length": 60}))
    fitting = settings(**paths, max_prompt_length=52, output_dir=str(tmp_path / "h"), max_steps=1)
    assert records(Trainer(Config.load(None, fitting), say=said.append).train())[0]["loss"] > 0


def test_evaluation_questions_need_room_too(trainer):
    one = trainer()
    questions = copy.copy(one.prompts)
    questions.ids = [[3] * 250]
    line = check_prompts(one.config, one.prompts, questions, one.tokenizer, {"student": one.student})[-1]
    assert line.startswith("warning: prompt and completion can have 262 tokens")


# --- verdicts that are all the same ---


@pytest.mark.parametrize(
    "gate", ["sg-opd", "opdvr", "protect", "half", "inverse", "verified-only", "failure-only", "shuffled"]
)
def test_batches_of_one_verdict(trainer, tmp_path, gate):
    """Unknown verdicts give plain distillation, or nothing; correct and incorrect ones what the gate's table says."""
    plain = trainer(gate="opd", output_dir=str(tmp_path / "plain"), max_grad_norm=0.0)
    rollouts, _ = plain.make_batch()
    base = plain.update(copy.deepcopy(rollouts), fresh=True)
    for word, verdict in (("correct", 1), ("incorrect", -1), ("unknown", 0)):
        one = trainer(gate=gate, output_dir=str(tmp_path / word), max_grad_norm=0.0)
        batch = copy.deepcopy(rollouts)
        for rollout in batch:
            rollout.verdict = verdict
        record = one.update(batch, fresh=True)
        assert one.state.skipped == 0 and record["kl"] == pytest.approx(base["kl"])
        d = record["logratio/mean"]
        assert d == pytest.approx(base["logratio/mean"])
        if verdict == 0:
            neutral = one.gate.neutral * (one.gate.keep == "all")
            assert record["gate/mean"] == neutral and record["gate/agree_fraction"] == 0
            assert record["loss"] == pytest.approx(neutral * base["loss"])
            assert record["optim/grad_norm"] == pytest.approx(neutral * base["optim/grad_norm"], rel=1e-5)
            if neutral == 1:
                assert same(one.student.state_dict(), plain.student.state_dict())
        else:
            agree, conflict = (record[f"cell/{word}_{cell}/share"] for cell in ("agree", "conflict"))
            assert 0 < agree < 1 and agree + conflict == pytest.approx(1)
            at = 0 if verdict == 1 else 1
            expected = agree * one.gate.agree_pair[at] + conflict * one.gate.conflict_pair[at]
            expected *= one.gate.keep in ("all", word)
            assert record["gate/mean"] == pytest.approx(expected, rel=1e-5)
            assert (record["loss"] == 0) == (expected == 0) == (record["optim/grad_norm"] == 0)


@pytest.mark.parametrize("word", ["correct", "incorrect", "unknown"])
def test_whole_runs_of_one_verdict(settings, tiny, verdicts, word):
    changes = {
        "eval_dataset_name": str(tiny.data),
        "eval_dataset_size": 4,
        "eval_on_start": True,
        "cold_start_steps": 2,
        "num_generations": 2,
        "teacher_reliability": "all",
        **verdicts(word),
    }
    one = Trainer(Config.load(None, settings(**changes)), say=lambda line: None)
    one.train()
    train = records(one.run_dir)
    endorsed = sum(record["phase/teacher_endorsed"] for record in train)
    assert (endorsed > 0) == (word == "correct") and sum(record["phase/teacher_proposed"] for record in train) > 0
    for record in train:
        assert record["optim/skipped"] == 0 and record["loss"] > 0
        assert record.get("rollout/accuracy") == {"correct": 1, "incorrect": 0, "unknown": None}[word]
        assert record[f"rollout/{word}"] + record["phase/teacher_rollouts"] == 8
    for record in records(one.run_dir, "eval"):
        assert record["eval/unknown"] == (word == "unknown")
        score = {"correct": 1, "incorrect": 0, "unknown": None}[word]
        assert record["eval/avg_at_k"] == record["eval/pass_at_k"] == score
        assert record["eval/avg_at_k_se"] == (None if word == "unknown" else 0)
    assert (one.run_dir / "report.html").stat().st_size > 0


# --- nothing to learn ---


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"estimator": "sampled"},
        {"divergence": "jsd"},
        {"divergence": "forward-kl"},
        {"divergence": "skew-reverse-kl"},
        {"backend": "torch"},
    ],
)
def test_a_teacher_identical_to_the_student_moves_nothing(trainer, tiny, changes):
    one = trainer(teacher_model_name_or_path=str(tiny.student), **changes)
    before = copy.deepcopy(one.student.state_dict())
    record = one.update(one.make_batch()[0], fresh=True)
    assert record["loss"] == record["optim/grad_norm"] == record["kl"] == record["optim/skipped"] == 0
    assert same(one.student.state_dict(), before)


def test_a_whole_run_with_nothing_to_learn(settings, tiny, verdicts):
    changes = {"teacher_model_name_or_path": str(tiny.student), "save_steps": 2, **verdicts("correct")}
    one = Trainer(Config.load(None, settings(**changes)), say=lambda line: None)
    before = copy.deepcopy(one.student.state_dict())
    one.train()
    assert all(r["loss"] == r["optim/grad_norm"] == r["optim/skipped"] == 0 for r in records(one.run_dir))
    assert same(load_file(one.run_dir / "final" / "model.safetensors"), {k: before[k] for k in before})
    assert "teacher" in (one.run_dir / "report.html").read_text()
