"""Models that would give wrong numbers, or fail later, are refused at the start: through the command."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FalconH1Config, Gemma3Config, Llama4TextConfig, MambaConfig

from sgopd.cli import main
from sgopd.config import UserError
from sgopd.model_checks import check_head, check_sampling, check_save


@pytest.fixture
def command(settings, tiny, tmp_path, capsys):
    """Runs `sgopd train` for two updates on copies of the tiny models: (exit status, output, train records)."""
    folders = SimpleNamespace(student=tmp_path / "student", teacher=tmp_path / "teacher")
    for name, folder in vars(folders).items():
        shutil.copytree(tiny.folder / name, folder)

    def run(word="train", **changes):
        if word == "train":
            few = {"max_steps": 2, "max_completion_length": 6, "verifier_workers": 1}
            models = {"model_name_or_path": folders.student, "teacher_model_name_or_path": folders.teacher}
            changes = settings(**{**few, **models, **changes})
        flags = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
        status = main([word, *flags] if word == "train" else [word, str(tmp_path / "run"), *flags])
        metrics = tmp_path / "run" / "metrics.jsonl"
        records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        printed = capsys.readouterr()
        return status, printed.out + printed.err, [record for record in records if record["kind"] == "train"]

    run.folders = folders
    return run


def refused(result, *words):
    status, output, records = result
    assert status == 1 and not records, output
    assert "sgopd: error: " in output and "Traceback" not in output
    for word in words:
        assert word in output


def put(config, folder):
    """A random model in the place of the one in `folder`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).unlink()
    model.save_pretrained(folder)


COMMON = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
STATES = {
    "mamba": MambaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=1
    ),
    "falcon_h1": FalconH1Config(
        **COMMON, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4, mamba_chunk_size=4
    ),
    "gemma3": Gemma3Config(
        text_config={**COMMON, "sliding_window": 8},
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=31,
    ),
    "llama4_text": Llama4TextConfig(**COMMON, intermediate_size_mlp=24, num_local_experts=2, attention_chunk_size=64),
}


@pytest.mark.parametrize("kind", STATES)
def test_rollouts_of_models_with_other_states_than_keys_and_values_are_exact(command, kind):
    put(STATES[kind], command.folders.student)
    result = status, output, records = command()
    if status and Version(transformers.__version__) < Version("5.24"):  # some of the older ones cannot
        return refused(result, "model_name_or_path: ", "another version of transformers")
    assert status == 0 and len(records) == 2, output
    assert max(record["engine/logprob_gap_max"] for record in records) < 1e-4


def broken(tiny, change):
    """A Llama whose forward does one thing wrong."""

    class Broken(type(tiny.make_model(0))):
        def forward(self, input_ids=None, **kwargs):
            change(self, kwargs)
            return super().forward(input_ids=input_ids, **kwargs)

    model = Broken(tiny.make_model(3, layers=2).config).eval()
    model.load_state_dict(tiny.make_model(3, layers=2).state_dict())
    Broken.forward.__signature__ = inspect.signature(type(model).__mro__[1].forward)
    return model


def forget(model, kwargs):
    for name in ("cache", "past_key_values"):
        kwargs.pop(name, None)


def see_padding(model, kwargs):
    kwargs.pop("attention_mask", None)


def number_padding(model, kwargs):
    if (kwargs.get("position_ids") is not None) and kwargs["position_ids"].shape[1] == 1:
        kwargs["position_ids"] = kwargs["position_ids"] + 1


def keep_order(model, kwargs):
    for name in ("cache", "past_key_values"):
        if (cache := kwargs.get(name)) is not None:
            cache.reorder_cache = lambda keep: [layer.reorder_cache(keep.flip(0)) for layer in cache.layers]


@pytest.mark.parametrize("change", [forget, see_padding, number_padding, keep_order])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_steps_are_not_its_forward_is_refused(tiny, change, dtype):
    check_sampling(broken(tiny, lambda model, kwargs: None).to(dtype), "model_name_or_path")
    with pytest.raises(UserError, match=r"model_name_or_path: (what Broken .* computes token by|Broken .* cannot be)"):
        check_sampling(broken(tiny, change).to(dtype), "model_name_or_path")


def test_a_model_without_a_cache_or_that_sees_later_tokens_is_refused(tiny):
    model = tiny.make_model(0)
    model.config.use_cache = False
    forward = model.forward
    model.forward = lambda input_ids, attention_mask: forward(input_ids, attention_mask)
    with pytest.raises(UserError, match="cannot be sampled from here: ValueError: its forward takes or gives"):
        check_sampling(model, "model_name_or_path")
    model = tiny.make_model(0, attention_bias=True)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.forward = lambda hidden_states, *args, **kwargs: (hidden_states.cumsum(1).flip(1), None)
    with pytest.raises(UserError, match=r"change by .* with the tokens or the padding after them: expected a causal"):
        check_head(model, "teacher_model_name_or_path")


@pytest.mark.parametrize("whose", ["student", "teacher", "reference"])
def test_weights_that_a_checkpoint_lacks_are_not_made_at_random(command, tiny, whose):
    setting = "model_name_or_path" if whose == "student" else f"{whose}_model_name_or_path"
    folder = command.folders.student if whose == "student" else command.folders.teacher
    changes = {"reference_model_name_or_path": folder, "teacher_model_name_or_path": folder.parent / "student"}
    changes = changes if whose == "reference" else {}
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    lost = weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(command(**changes), f"{setting}: 1 weights of LlamaForCausalLM are missing from", name)
    save_file({**weights, name: lost[:3].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    refused(command(**changes), f"{setting}: 1 weights", f"{name} is [3, ", "instead of")
    save_file({**weights, name: lost, "extra.weight": lost.clone()}, folder / "model.safetensors", {"format": "pt"})
    status, output, _ = command(**changes)
    assert status == 0 and f"warning: {setting}: 1 weights in" in output and "left out: extra.weight" in output
    if whose == "student":  # what a run wrote is read with the same care
        file = folder.parent / "run" / "final" / "model.safetensors"
        weights = load_file(file)
        del weights[name]
        save_file(weights, file, metadata={"format": "pt"})
        status, output, _ = command("evaluate", eval_dataset_name=tiny.data)
        assert status == 1 and "are missing from" in output


def test_tied_weights_are_not_missing(command, tiny):
    tiny.make_model(1, tie_word_embeddings=True).save_pretrained(command.folders.student)
    status, output, _ = command()
    assert status == 0 and "weights in" not in output


def test_a_tokenizer_that_cannot_be_read_is_not_taken_for_none(command):
    file = command.folders.teacher / "tokenizer.json"
    file.write_text(file.read_text()[:-9])
    refused(command(), "teacher_model_name_or_path: cannot load a tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (command.folders.teacher / name).unlink(missing_ok=True)
    status, output, _ = command()
    assert status == 0 and "warning: there is no tokenizer beside the teacher" in output


@pytest.mark.parametrize("eos", [[1, 63], [-1], "1", 1.0, [1, None]])
def test_an_end_of_sequence_that_is_no_token_is_refused(command, eos):
    file = command.folders.student / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": eos}))
    refused(command())


def test_an_adapter_is_refused_with_the_remedy(command):
    (command.folders.student / "adapter_config.json").write_text("{}")
    refused(command(), "model_name_or_path: ", "is an adapter (LoRA)", "merge_and_unload")


def test_what_cannot_be_saved_is_refused_before_the_run(command, tiny):
    file = command.folders.student / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 0.6, "top_p": 0.9, "do_sample": False}))
    result = status, *_ = command()
    if status:  # a transformers version that does not put it right itself
        refused(result, "could not be saved at a checkpoint", "generation_config.json")
    model = tiny.make_model(0)
    model.generation_config.save_pretrained = lambda *args, **kwargs: [][0]
    with pytest.raises(UserError, match="could not be saved at a checkpoint: IndexError"):
        check_save(model, tiny.make_tokenizer())


def test_prompts_longer_than_the_positions_are_refused_or_dropped(command, tmp_path):
    rows = [{"prompt": text, "answer": "3"} for text in ("1+2=", "1" * 100_000)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused(command(dataset_name=tmp_path / "long.jsonl"), "1 of 2 prompts leave no room", "max_prompt_length to 255")
    status, output, _ = command(dataset_name=tmp_path / "long.jsonl", max_prompt_length=200)
    assert status == 0 and "dropped 1 over-long prompts" in output


def test_a_run_prints_no_warning_of_a_library(settings):
    changes = settings(max_steps=2, save_steps=1, cold_start_steps=1, verifier_workers=1)
    flags = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-m", "sgopd", "train", *flags], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0
    assert done.stderr == ""
