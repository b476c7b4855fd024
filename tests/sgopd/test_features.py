"""Every documented feature of a run through the command, several a run: what the trainer's own tests go round."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from sgopd.cli import main
from sgopd.config import Config

RUNS = {
    "several updates on a batch": {
        "num_iterations": 2,
        "gradient_accumulation_steps": 2,
        "num_generations": 2,
        "gradient_checkpointing": True,
        "padding_free": True,
        "gate": "protect",
        "divergence": "jsd",
        "jsd_beta": 0.3,
        "max_grad_norm": 0.5,
        "generation_batch_size": 3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "save_steps": 2,
        "save_total_limit": 1,
        "eval_steps": 2,
        "eval_on_start": True,
        "eval_teacher": True,
        "eval_k": 1,
        "per_device_eval_batch_size": 4,
    },
    "phases": {
        "cold_start_steps": 3,
        "teacher_share": 0.9,
        "teacher_share_schedule": "cosine",
        "teacher_rollout_loss": "nll",
        "teacher_reliability": "incorrect",
        "teacher_probes": 1,
        "teacher_reliability_source": "dealt",
        "teacher_reliability_prior": 0.5,
        "teacher_reliability_power": 2.0,
        "teacher_reliability_threshold": 0.5,
        "num_generations": 2,
        "verifier": "math",
        "truncated_is_incorrect": False,
        "verifier_workers": 1,
        "verifier_timeout": 20.0,
        "verifier_memory_mb": 1024,
        "thought_tags": [["[", "]"]],
        "eval_temperature": 0.0,
        "gate_agree": [1.5, 2.0],
        "gate_reliability": "conflict",
        "gate_conflict": 0.5,
        "gate_tolerance": 0.01,
        "gate_control": "random",
        "divergence": "skew-reverse-kl",
        "divergence_alpha": 0.2,
        "precision": "exact",
        "num_completions_to_log": 2,
        "num_tokens_to_log": 3,
        "temperature": 0.8,
        "top_k": 8,
        "top_p": 0.9,
        "apply_chat_template": True,
        "system_prompt": "1+1",
        "max_prompt_length": 12,
    },
    "task reward": {
        "gate": "diffgate",
        "gate_bound": 2.0,
        "reward_weight": 0.5,
        "num_generations": 4,
    },
    "forward KL on teacher rollouts": {
        "cold_start_steps": 2,
        "teacher_share_schedule": "constant",
        "teacher_rollout_loss": "forward-kl",
        "divergence": "forward-kl",
        "gate": "shuffled",
        "backend": "torch",
        "reference_model_name_or_path": "STUDENT",
        "bf16": True,
        "attn_implementation": "eager",
    },
    "sampled": {
        "estimator": "sampled",
        "gate": "r2-opd",
        "gate_sharpness": 0.5,
        "prompt_weight": [1.0, 0.5],
        "position_half_life": 4.0,
        "gate_margin": 0.5,
        "dtype": "bfloat16",
        "teacher_dtype": "bfloat16",
        "lr_scheduler_type": "constant_with_warmup",
        "weight_decay": 0.1,
        "report_to": "none",
        "gate_neutral": 0.5,
        "run_name": "a name",
        "max_skipped_steps": 3,
        "max_tokens_per_device_batch": 40,
        "dataset_test_split": None,
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_features_through_the_command(settings, tiny, tmp_path, capsys, name):
    changes = {key: str(tiny.student) if value == "STUDENT" else value for key, value in RUNS[name].items()}
    small = {"max_completion_length": 6, "eval_dataset_name": str(tiny.data), "eval_dataset_size": 3, "max_steps": 2}
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings(**{**small, **changes})))
    assert main(["train", str(path)]) == 0, capsys.readouterr().err
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2]
    assert records[-1]["kind"] == "end" and (run / "final").is_dir() and (run / "report.html").is_file()
    if name == "several updates on a batch":
        assert main(["train", str(path), "--resume_from_checkpoint", "auto", "--max_steps", "4"]) == 0
        assert main(["report", str(run)]) == main(["evaluate", str(run)]) == 0


# Set by every run of these tests, tried by others through the command, or (the last line) tried only below it.
ELSEWHERE = [
    "model_name_or_path",
    "teacher_model_name_or_path",
    "dataset_name",
    "output_dir",
    "use_cpu",
    "num_threads",
    "seed",
    "learning_rate",
    "max_steps",
    "max_completion_length",
    "per_device_train_batch_size",
    "logging_steps",
    "stop_on_warning",
    "num_generations_eval",
    "eval_dataset_name",
    "eval_dataset_size",
    "resume_from_checkpoint",
    "dataset_size",
    "answer_column",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "prompt_column",
    "dataset_config",
    "dataset_train_split",
    "dataset_kwargs",
    "chat_template_kwargs",
    "trust_remote_code",
    "sampler",
    "sampler_url",
    "sampler_folder",
    "sampler_timeout",
    "sampler_connections",
    "sampler_tolerance",
    "importance_clip",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "fsdp",
    "fsdp_teacher",
    "teacher_url",
    "teacher_column",
    "teacher_top_k",
    "teacher_copy",
    "teacher_timeout",
    "teacher_connections",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_strategy",
]


def test_every_setting_is_in_a_run_through_the_command():
    named = {name for changes in RUNS.values() for name in changes} | set(ELSEWHERE)
    assert {field.name for field in dataclasses.fields(Config)} == named
