"""`sgopd plan`: what it counts is what there is, and what does not fit is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING

from sgopd import plan
from sgopd.cli import main
from sgopd.config import Config, UserError
from sgopd.models import hidden_states
from sgopd.rollout import batch_of, whole_texts

GB = 1e9


@pytest.fixture
def config(settings):
    return lambda **changes: Config.load(None, settings(**changes))


def qwen3(folder, layers, width, middle, heads, tied):
    """Qwen3's shapes, without weights."""
    shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": middle, "vocab_size": 151_936}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": tied}
    CONFIG_MAPPING["qwen3"](**shape).save_pretrained(folder)
    return str(folder)


def test_sizes_are_the_models_own(tiny, tmp_path, config):
    model = tiny.make_model(1, 32, 3, num_key_value_heads=1)
    model.save_pretrained(tmp_path / "model")
    sizes = plan.sizes_of(str(tmp_path / "model"), torch.float32, config(), "model_name_or_path")
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sizes.block == sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert sizes.body == sizes.parameters - 2 * sizes.head
    ids = torch.zeros(2, 9, dtype=torch.long)
    cache = model(ids, use_cache=True).past_key_values
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert sizes.cache * ids.numel() == numbers


def test_operations_of_a_forward_are_two_a_parameter(tiny, tmp_path, config):
    tiny.make_model(1, 64, 4).save_pretrained(tmp_path / "model")
    sizes = plan.sizes_of(str(tmp_path / "model"), torch.float32, config(), "model_name_or_path")
    ids = torch.zeros(4, 8, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        hidden_states(sizes.model, ids, torch.ones(4, 1, 8, 8, dtype=torch.bool, device="meta"))
    assert counter.get_total_flops() == pytest.approx(2 * sizes.body * ids.numel(), rel=0.1)


def test_what_is_kept_for_backward_is_what_a_forward_keeps(tiny):
    """Counted without data, beside the same count on a real forward with fused attention."""
    model = tiny.make_model(1, 32, 2)
    counted = plan.kept_for_backward(model.to("meta"), 3, 11)
    model, kept = tiny.make_model(1, 32, 2), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(3, 11, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = hidden_states(model, ids, torch.ones_like(ids))
        real = sum(storage.nbytes() for storage in kept.values())
    assert output.requires_grad and counted == pytest.approx(real, rel=0.15)


def test_large_students_fit_where_they_should_and_what_does_not_is_said(tmp_path, config):
    small = qwen3(tmp_path / "0.6B", 28, 1024, 3072, 16, True)
    large = qwen3(tmp_path / "32B", 64, 5120, 25_600, 64, False)
    changes = {"max_completion_length": 2048, "per_device_train_batch_size": 4, "dtype": "float32", "bf16": True}
    changes |= {"teacher_dtype": "bfloat16", "gradient_checkpointing": True, "teacher_model_name_or_path": large}
    one = config(model_name_or_path=small, **changes)
    device = plan.DEVICES["h100"]
    stages = plan.plan(one, device, 1, 256)
    assert stages[0].parts["student"] == pytest.approx(0.596 * 4 * GB, rel=0.01)
    assert stages[0].parts["teacher"] == pytest.approx(32.76 * 2 * GB, rel=0.01)
    assert stages[0].parts["copies in bfloat16"] == pytest.approx(0.596 * 2 * GB, rel=0.01)
    assert not plan.warnings_of(plan.plan(one, plan.DEVICES["h200"], 1, 256), plan.DEVICES["h200"], one, 1)
    both = config(model_name_or_path=large, **changes)
    (said,) = plan.warnings_of(plan.plan(both, device, 1, 256), device, both, 1)
    assert said.startswith("warning: ") and "does not fit: " in said and "teacher_url, " in said
    sharded = config(
        model_name_or_path=large, **changes, fsdp=True, fsdp_teacher=True, sampler="vllm", sampler_url="http://x"
    )
    many = plan.plan(sharded, device, 64, 256)
    assert [stage.name for stage in many] == ["sync", "rollout", "verify", "update"]
    assert not plan.warnings_of(many, device, sharded, 64)
    alone = plan.plan(both, device, 1, 256)
    assert many[1].memory < alone[0].memory / 8 and all(stage.seconds > 0 for stage in many if stage.name != "verify")


def test_an_adapters_folder_is_planned_as_its_base_with_adapters_of_its_rank(tiny, tmp_path, config):
    folder = tmp_path / "adapter"
    folder.mkdir()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({"base_model_name_or_path": str(tiny.student), "r": 4}))
    expected = plan.plan(config(use_peft=True, lora_r=4), plan.DEVICES["cpu"], 1, 6)
    found = plan.plan(config(use_peft=True, model_name_or_path=str(folder)), plan.DEVICES["cpu"], 1, 6)
    assert found == expected
    with pytest.raises(UserError, match=r"model_name_or_path: .* is an adapter \(LoRA\), expected a whole model"):
        plan.plan(config(model_name_or_path=str(folder)), plan.DEVICES["cpu"], 1, 6)
    file.write_text("{}")
    with pytest.raises(UserError, match=r"model_name_or_path: cannot read the adapter in "):
        plan.plan(config(use_peft=True, model_name_or_path=str(folder)), plan.DEVICES["cpu"], 1, 6)


def test_the_gradient_takes_the_place_of_what_was_kept_but_among_several_forward_passes(tiny, config):
    changes = {"max_completion_length": 100, "per_device_train_batch_size": 8, "backend": "cpu"}
    *_, one = plan.plan(config(**changes), plan.DEVICES["cpu"], 1, 10)
    *_, several = plan.plan(config(**changes, gradient_accumulation_steps=2), plan.DEVICES["cpu"], 1, 10)
    *_, halves = plan.plan(config(**changes, max_tokens_per_device_batch=440), plan.DEVICES["cpu"], 1, 10)
    kept = several.parts["kept for backward"]
    assert kept > several.parts["gradient"] == one.parts["gradient"]
    assert one.parts["kept for backward"] == kept - one.parts["gradient"]
    assert halves.parts["kept for backward"] == pytest.approx(kept / 2, rel=0.05)


@pytest.mark.parametrize(("attention", "heads"), [("sdpa", 1), ("eager", 2), ("flash_attention_2", 0)])
@pytest.mark.parametrize("padding_free", [False, True])
def test_what_attention_keeps_of_positions_by_positions(tiny, config, attention, heads, padding_free):
    """Of ragged texts, beside the tensors of a real forward; flash attention, which is not here, keeps none."""
    small = {"max_completion_length": 54, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    small |= {"padding_free": padding_free}
    none, some = (
        plan.plan(config(**small, attn_implementation=kind), plan.DEVICES["cpu"], 1, 13)[-1]
        for kind in ("flash_attention_2", attention)
    )
    counted = some.memory - none.memory
    assert counted == heads * 3 * 67**2 * (3 if padding_free else 1) * 4, "the student has one layer"
    if not heads:
        return
    batch = batch_of(
        whole_texts([[3] * 67, [4] * 60, [5] * (74 if padding_free else 40)]), torch.device("cpu"), padding_free
    )
    model, kept, side = tiny.make_model(1), {}, batch.inputs[0].shape[1]
    model.set_attn_implementation(attention)

    def pack(tensor):
        if tensor.shape[-2:] == (side, side):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = hidden_states(model, *batch.inputs)
        assert output.requires_grad and sum(storage.nbytes() for storage in kept.values()) == counted


def test_what_a_step_takes_can_be_measured(settings, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "tools")
    import plan_measured

    found = plan_measured.measure(settings(dataset_test_split=None, max_completion_length=6), steps=2)
    assert set(found["memory"]) == set(found["seconds"]) == {"rollout", "update"}
    assert all(value > 0 for what in ("memory", "seconds") for value in found[what].values())
    assert {name for row in plan_measured.ROWS.values() for name in row} <= set(vars(Config.load(None, settings())))


def test_probes_are_the_teachers_rollouts(tiny, tmp_path, config):
    """Those of a teacher as large as the student take as long, each; a larger one's cache is the peak."""
    tiny.make_model(1, 64, 4).save_pretrained(tmp_path / "small")
    tiny.make_model(1, 256, 8).save_pretrained(tmp_path / "large")
    changes = {"model_name_or_path": str(tmp_path / "small"), "per_device_train_batch_size": 8}

    def rollout(teacher, probes):
        one = config(**changes, teacher_model_name_or_path=str(tmp_path / teacher), teacher_probes=probes)
        return plan.plan(one, plan.DEVICES["cpu"], 1, 6)[0]

    none, same, twice, large = rollout("small", 0), rollout("small", 1), rollout("small", 2), rollout("large", 1)
    assert same.seconds == pytest.approx(2 * none.seconds, rel=1e-6)
    assert same.memory == none.memory and twice.memory > none.memory and twice.seconds > same.seconds
    assert large.seconds > same.seconds and large.parts["cache"] > 4 * same.parts["cache"]


def test_the_command_scales_by_a_run(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sgopd.trainer.write_report", lambda run_dir: None)
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings()))
    assert main(["train", str(path)]) == 0
    capsys.readouterr()
    words = ["plan", str(path), "--device", "cpu", "--prompt_tokens", "6"]
    assert main(words) == 0
    rollout, verify, update = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert rollout["source"] == "arithmetic" and verify["seconds"] is None and update["memory"] > 0
    measured = [*words, "--measured", str(tmp_path / "run")]
    assert main([*measured, "--max_completion_length", "24"]) == 0
    longer, verify, _ = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert main(measured) == 0
    same, *_ = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert 2 < longer["seconds"] / same["seconds"] < 3, "twice the steps, over a longer cache"
    assert verify["seconds"] is not None
    assert "scaled from" in same["source"]
    for flags, said in (
        (["--measured", str(tmp_path)], "expected the folder of a run, with its metrics.jsonl"),
        (["--processes", "0"], "--processes: got 0, expected >= 1"),
        (["--prompt_tokens", "0"], "--prompt_tokens: got 0, expected >= 1"),
    ):
        assert main([*words, *flags]) == 1
        assert said in capsys.readouterr().err
    assert main(["plan", str(path), "--device", "h10"]) == 1
    assert "unknown device 'h10'; did you mean 'h100'?" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot read the shape of"):
        plan.sizes_of(str(tmp_path), torch.float32, Config.load(path), "model_name_or_path")
