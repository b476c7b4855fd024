"""The mixin in transformers' own Trainer, on tiny models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from sgopd.integrations.hf_trainer import SGOPDMixin
from sgopd_kernels import gated_kl_loss


class GatedTrainer(SGOPDMixin, Trainer):
    pass


def rows(count: int = 8) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        ids = torch.randint(3, 20, (12,), generator=g)
        labels = ids.clone()
        labels[: 3 + i % 4] = -100  # prompts of different lengths
        made.append({"input_ids": ids, "labels": labels, "verdict": torch.tensor((1, -1, 0)[i % 3])})
    return made


def make(tiny: SimpleNamespace, folder: Path, student_seed: int = 1, teacher_seed: int = 2, **changes: Any) -> Any:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        max_grad_norm=1e9,
        seed=1,
    )
    return GatedTrainer(
        model=tiny.make_model(student_seed),
        args=TrainingArguments(**(settings | changes)),
        train_dataset=rows(4),
        eval_dataset=rows(4),
        teacher=tiny.make_model(teacher_seed),
    )


def test_an_accumulated_step_is_the_loss_of_the_whole_batch(tiny: SimpleNamespace, tmp_path: Path) -> None:
    trainer = make(tiny, tmp_path)
    student, teacher = tiny.make_model(1), tiny.make_model(2)
    batch = {key: torch.stack([row[key] for row in rows(4)]) for key in rows(1)[0]}
    hidden, other = (m.base_model(batch["input_ids"]).last_hidden_state[:, :-1] for m in (student, teacher))
    loss = gated_kl_loss(
        hidden,
        student.lm_head.weight,
        other,
        teacher.lm_head.weight,
        batch["labels"][:, 1:],
        batch["verdict"][:, None],
    )
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert entry["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert not torch.equal(before, trainer.model.lm_head.weight)


def test_equal_models_lose_nothing(tiny: SimpleNamespace, tmp_path: Path) -> None:
    trainer = make(tiny, tmp_path, teacher_seed=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0 and trainer.state.log_history[0]["grad_norm"] == 0


@pytest.mark.parametrize("loss_only", [False, True])
def test_evaluation_is_the_loss_without_an_update(tiny: SimpleNamespace, tmp_path: Path, loss_only: bool) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "prediction_loss_only": loss_only}
    trainer = make(tiny, tmp_path, per_device_eval_batch_size=4, **settings)
    before = trainer.evaluate()
    trainer.train()
    logged, after = trainer.state.log_history, trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(logged[0]["loss"], rel=1e-4), "the four rows trained on, before that"
    assert after["eval_loss"] == pytest.approx(logged[1]["eval_loss"]) and after["eval_loss"] < before["eval_loss"]
    several = make(tiny, tmp_path, per_device_eval_batch_size=1, **settings).predict(rows(4))
    assert several.metrics["test_loss"] > 0 and not several.predictions


def test_mistakes_are_named(tiny: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="remove_unused_columns"):
        make(tiny, tmp_path, remove_unused_columns=True)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="remove_unused_columns"):
        GatedTrainer(tiny.make_model(1), args, teacher=tiny.make_model(2))
    trainer = make(tiny, tmp_path)
    with pytest.raises(ValueError, match="lacks verdict"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.ones(1, 4).long(), "labels": torch.ones(1, 4).long()})
    with pytest.raises(NotImplementedError, match="one process"):
        trainer.compute_loss(torch.nn.Identity(), {**rows(1)[0]})
