"""LoRA students, by the real peft: adapters alone are trained, saved and resumed; refused where they can't stand."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

pytest.importorskip("peft", reason="the extra `peft` is not installed")
import peft

from sgopd import lora
from sgopd.cli import main
from sgopd.config import Config, UserError
from sgopd.report.run import read_metrics

LORA = {"use_peft": True, "lora_r": 2, "lora_alpha": 6, "save_steps": 2, "save_total_limit": None}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("sgopd.trainer.write_report", lambda run_dir: None)


@pytest.fixture
def student(tiny, tmp_path):
    """Two layers and tied embeddings."""
    tiny.make_model(1, layers=2, tie_word_embeddings=True).save_pretrained(tmp_path / "student")
    tiny.make_tokenizer().save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def trainer(trainer, student, tiny, tmp_path):
    evaluated = {"eval_dataset_name": str(tiny.data), "eval_dataset_size": 5, "model_name_or_path": str(student)}

    def make(name="run", **changes):
        return trainer(**{**LORA, **evaluated, "output_dir": str(tmp_path / name), **changes})

    return make


def trained(run, folder="final"):
    return load_file(run / folder / lora.WEIGHTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_alone_are_trained_saved_and_resumed_to_the_bit(trainer, student, tmp_path, dtype, capsys):
    changes = {"dtype": dtype, "gradient_checkpointing": True}
    one = trainer("whole", **changes)
    before = {name: weight.clone() for name, weight in one.student.state_dict().items()}
    assert {".lora_" in name for name, p in one.student.named_parameters() if p.requires_grad} == {True}
    assert all(parameter.dtype == torch.float32 for parameter in one.engine.parameters)
    whole = one.train()
    for name, weight in one.student.state_dict().items():
        assert torch.equal(weight, before[name]) == (".lora_" not in name), name
    assert {path.name for path in (whole / "final").glob("*.safetensors")} == {lora.WEIGHTS}

    trainer("cut", **changes, max_steps=2, lr_scheduler_type="constant").train()
    trainer("long", **changes, lr_scheduler_type="constant").train()
    resumed = trainer("cut", **changes, lr_scheduler_type="constant", resume_from_checkpoint="auto").train()
    for name, weight in trained(tmp_path / "long").items():
        assert torch.equal(trained(resumed)[name], weight), name
    assert (resumed / "final" / lora.CONFIG).read_bytes() == (tmp_path / "long" / "final" / lora.CONFIG).read_bytes()

    assert main(["evaluate", str(whole)]) == 0
    found = json.loads(capsys.readouterr().out)
    (ours,) = (record for record in read_metrics(whole / "metrics.jsonl")[0] if record["kind"] == "eval")
    assert found["eval/correct"] == ours["eval/correct"] and found["eval/length_mean"] == ours["eval/length_mean"]


def test_the_final_adapter_merges_with_peft_as_it_does_for_a_server(trainer, student):
    one = trainer(learning_rate=0.1)
    run = one.train()
    ids = torch.arange(3, 20)[None]
    expected = one.student.eval()(ids).logits
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(run / "final").merge_and_unload()
    base = AutoModelForCausalLM.from_pretrained(student)
    start = base(ids).logits
    base.load_state_dict(lora.merged(one.student, one.engine.weights()))
    for logits in (theirs(ids).logits, base(ids).logits):
        assert (logits - expected).abs().max() < 1e-4 < 0.1 < (start - expected).abs().max()


def test_training_goes_on_from_an_adapter_and_its_settings(trainer, tmp_path):
    run = trainer(max_steps=2).train()
    one = trainer("next", model_name_or_path=str(run / "final"), lora_r=5)
    assert any(line.startswith("LoRA: ") and "r 2, alpha 6, from " in line for line in one.findings)
    first = trained(run)
    assert all(torch.equal(p, first[lora.in_file(n)]) for n, p in one.student.named_parameters() if p.requires_grad)
    resumed = partial(trainer, "next", model_name_or_path=str(run / "final"), resume_from_checkpoint="auto")
    one.train()
    assert resumed(lora_r=5, max_steps=6).state.step == 4


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (
            ["q_proj", "lm_head"],
            "'lm_head' is the head, whose weight the loss reads as it is. Leave it out; all-linear",
        ),
        (
            ["embed_tokens"],
            "'model.embed_tokens' is of Embedding, expected linear layers .*Take some of q_proj, k_proj",
        ),
        (["q_proj", "query"], "LlamaForCausalLM has no module 'query'. Take some of q_proj, .*, or all-linear for all"),
        ("no_such.*", "no_such.* not found in the base model.*Take some of q_proj"),
    ],
)
def test_modules_that_cannot_have_adapters_are_refused_with_the_names_that_can(trainer, modules, said):
    with pytest.raises(UserError, match=f"lora_target_modules: .*{said}"):
        trainer(lora_target_modules=modules)


def test_a_base_that_changed_a_damaged_and_another_kind_of_adapter_are_refused(trainer, student, tiny, tmp_path):
    run = trainer(max_steps=2).train()
    final = run / "final"
    goes_on = partial(trainer, "next", model_name_or_path=str(final))

    def spoilt(change):
        shutil.copytree(final, tmp_path / "adapter", dirs_exist_ok=True)
        change(tmp_path / "adapter")
        return partial(trainer, "next", model_name_or_path=str(tmp_path / "adapter"))

    def edit(weights):
        return lambda folder: save_file({n: weights(n, w) for n, w in trained(run).items()}, folder / lora.WEIGHTS)

    with pytest.raises(UserError, match=r"lora_A.weight of the adapter in .* is not finite"):
        spoilt(edit(lambda name, weight: weight * torch.nan))()
    with pytest.raises(UserError, match=r"lora_A.weight of the adapter in .* is \[2, 15\] instead of \[2, 32\]"):
        spoilt(edit(lambda name, weight: weight[:, :15].contiguous()))()
    with pytest.raises(UserError, match=r"29 weights of the adapter in .* are missing or have no place in Llama"):
        spoilt(lambda folder: save_file({"one": torch.zeros(1)}, folder / lora.WEIGHTS))()
    with pytest.raises(UserError, match=r"cannot read the adapter in .*FileNotFoundError"):
        spoilt(lambda folder: (folder / lora.WEIGHTS).unlink())()
    config = json.loads((final / lora.CONFIG).read_text())
    changed = json.dumps({**config, "use_dora": True})
    with pytest.raises(UserError, match=r"has use_dora True, expected a plain LoRA on linear layers. Merge it"):
        spoilt(lambda folder: (folder / lora.CONFIG).write_text(changed))()
    with pytest.raises(UserError, match=r"is an adapter \(LoRA\), expected a whole model"):
        goes_on(use_peft=False)

    tiny.make_model(5, layers=2, tie_word_embeddings=True).save_pretrained(student)
    with pytest.raises(UserError, match=r"the weights of the model that the adapters stand on .*: not what"):
        trainer(resume_from_checkpoint="auto")


def test_without_peft_its_extra_is_named(trainer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"use_peft needs peft .*: pip install 'peft>=0.17'"):
        trainer()


@pytest.mark.parametrize("setting", ["lora_r", "lora_alpha"])
def test_sizes_are_at_least_one(settings, setting):
    with pytest.raises(UserError, match=f"{setting}: got 0, expected >= 1"):
        Config.load(None, settings(**{setting: 0}))
