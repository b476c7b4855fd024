"""`padding_free`: rollouts one after another in a row train as padded rows do, and models that would mix them are
refused."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    Lfm2Config,
    Llama4TextConfig,
    MambaConfig,
    Qwen3Config,
)

from sgopd.config import UserError
from sgopd.model_checks import check_packing
from sgopd.rollout import parts_by_tokens

SHAPE = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "eos_token_id": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
KINDS = ["sliding_attention", "full_attention"]
CONFIGS = {
    "qwen3": (Qwen3Config, HEADS),
    "gemma3": (Gemma3TextConfig, {**HEADS, "sliding_window": 6, "layer_types": KINDS, "pad_token_id": 0}),
    "llama4": (
        Llama4TextConfig,
        {**HEADS, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 16},
    ),
    "mamba": (MambaConfig, {"state_size": 4}),
    "bloom": (BloomConfig, {"n_head": 2}),
    "lfm2": (Lfm2Config, {**HEADS, "layer_types": ["conv", "full_attention"]}),
}


def model_of(kind: str, **changes):
    torch.manual_seed(0)
    cls, more = CONFIGS[kind]
    model = AutoModelForCausalLM.from_config(cls(**SHAPE | more), **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def gradients(trainer, rollouts):
    found = {}

    def keep():
        found.update({name: parameter.grad.clone() for name, parameter in trainer.student.named_parameters()})

    trainer.optimizer.step = keep
    return found, trainer.update(rollouts, fresh=True)


@pytest.mark.parametrize("student", ["llama", "qwen3", "gemma3"])
def test_packed_and_padded_rollouts_give_the_same_update(trainer, tiny, tmp_path, student):
    changes = {"max_grad_norm": 0.0, "precision": "exact", "cold_start_steps": 4, "teacher_share": 0.9, "seed": 1}
    changes |= {"teacher_rollout_loss": "nll", "gradient_accumulation_steps": 2, "position_half_life": 5.0}
    changes |= {"importance_clip": 2.0, "reward_weight": 0.5, "num_generations": 2}
    if student != "llama":
        model_of(student).save_pretrained(tmp_path / "student")
        tiny.make_tokenizer().save_pretrained(tmp_path / "student")
        changes |= {"model_name_or_path": str(tmp_path / "student"), "attn_implementation": "eager"}
    padded = trainer(**changes)
    rollouts, _ = padded.make_batch()
    assert {one.source for one in rollouts} == {"student", "teacher"} and len({len(one) for one in rollouts}) > 2
    expected, record = gradients(padded, rollouts)
    packed = trainer(**changes, padding_free=True, max_tokens_per_device_batch=64, output_dir=str(tmp_path / "packed"))
    shapes, forward = [], packed.engine.forward
    packed.engine.forward = lambda batch, *rest: shapes.append(batch.inputs[0].shape) or forward(batch, *rest)
    found, again = gradients(packed, rollouts)
    assert sum(tokens for _, tokens in shapes) == sum(map(len, rollouts)) and again["update/padding"] == 0
    assert all(rows == 1 and tokens <= 64 for rows, tokens in shapes) and again["update/forward_passes"] == len(shapes)
    for name in ("loss", "loss/teacher_rollouts", "loss/reward", "kl", "importance/mean", "engine/logprob_gap_max"):
        assert again[name] == pytest.approx(record[name], rel=1e-5, abs=1e-6), name
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_parts_without_padding_are_bounded_by_their_sums():
    assert parts_by_tokens([2, 2, 3, 5, 5, 9], 12, padding_free=True) == [slice(0, 4), slice(4, 5), slice(5, 6)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "llama4"])
def test_models_that_keep_texts_apart_pass(kind, attention):
    """Among them windows and chunks that are shorter than the texts."""
    model = model_of(kind, attn_implementation=attention)
    check_packing(model, "model")
    shape = CONFIGS[kind][1]
    for name in ("sliding_window", "attention_chunk_size"):
        assert name not in shape or getattr(model.config, name) == shape[name]


@pytest.mark.parametrize("kind", ["mamba", "bloom", "lfm2"])
def test_models_that_mix_texts_are_refused(kind):
    with pytest.raises(UserError, match=r"^padding_free: .*(does not keep texts in one row apart|cannot be given)"):
        check_packing(model_of(kind), "model")


def test_a_run_looks_at_the_start(trainer, monkeypatch):
    """At the teacher as well as at the student."""
    asked = []
    monkeypatch.setattr("sgopd.model_checks.check_packing", lambda model, setting, *rest: asked.append(setting))
    trainer(padding_free=True)
    assert asked == ["model_name_or_path", "teacher_model_name_or_path"]
