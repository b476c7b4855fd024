"""The GRPO recipe in TRL's own trainer, on tiny models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

trl = pytest.importorskip("trl", reason="TRL is not installed (extra: trl)")

from sgopd.integrations.trl_grpo import SGOPDGRPOTrainer  # noqa: E402
from sgopd.models import head_of, hidden_states  # noqa: E402
from sgopd_kernels import gated_kl_loss  # noqa: E402

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(6) for b in range(4)]


def word_of(completion: str) -> float | None:
    """A verdict that varies over random completions: 1, 0 or None."""
    return (1.0, 0.0, None)[sum(map(ord, completion)) % 3]


def judge(completions: list[str], **columns: Any) -> list[float | None]:
    return [word_of(text) for text in completions]


def length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def make(tiny: SimpleNamespace, folder: Path, teacher_seed: int = 2, reward_funcs: Any = judge, **changes: Any) -> Any:
    own = {k: changes.pop(k) for k in ("gate", "correct_at", "verifier", "task_weight") if k in changes}
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=10,
        learning_rate=1e-2,
        max_grad_norm=1e9,
        temperature=0.8,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=5,
    )
    return SGOPDGRPOTrainer(
        tiny.make_model(1),
        reward_funcs=reward_funcs,
        args=trl.GRPOConfig(**(settings | changes)),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny.make_tokenizer(padding_side="left"),
        teacher=tiny.make_model(teacher_seed),
        **own,
    )


def keep_batches(trainer: Any) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    inner = trainer._generate_and_score_completions

    def outer(inputs: Any) -> Any:
        output = inner(inputs)
        kept.append(output | {"rewards": trainer._raw_rewards})
        return output

    trainer._generate_and_score_completions = outer
    return kept


def expected(tiny: SimpleNamespace, batch: dict[str, Any], reward: torch.Tensor, **options: Any) -> Any:
    """The sampled estimator over the batch, from hidden states: (loss, student, stats)."""
    student, teacher = tiny.make_model(1), tiny.make_model(2)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    start = batch["prompt_ids"].shape[1] - 1
    ours, theirs = (hidden_states(m, ids, mask)[:, start:-1] for m in (student, teacher))
    loss, stats = gated_kl_loss(
        ours,
        head_of(student).weight,
        theirs,
        head_of(teacher).weight,
        batch["completion_ids"].masked_fill(batch["completion_mask"] == 0, -100),
        torch.where(reward > 0.5, 1, -1).masked_fill(reward.isnan(), 0)[:, None],
        estimator="sampled",
        temperature=0.8,
        return_stats=True,
        **options,
    )
    return loss, student, stats


def test_a_step_is_the_sampled_estimator(tiny: SimpleNamespace, tmp_path: Path) -> None:
    trainer = make(tiny, tmp_path)
    kept = keep_batches(trainer)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.lm_head.weight)
    (batch,) = kept
    reward = batch["rewards"][:, 0]
    assert (reward == 1).any() and (reward == 0).any() and reward.isnan().any()
    loss, student, stats = expected(tiny, batch, reward)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
    entry = trainer.state.log_history[0]
    assert entry["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    torch.testing.assert_close(batch["advantages"], stats.gate * stats.logratio, rtol=1e-4, atol=1e-5)

    valid = batch["completion_mask"].bool()
    tested = valid & ~reward.isnan()[:, None]
    assert entry["gate/mean"] == pytest.approx(float(stats.gate[valid].mean()), rel=1e-4)
    assert entry["gate/agree_fraction"] == pytest.approx(float(stats.agree[tested].float().mean()), rel=1e-4)
    assert entry["logratio/abs_mean"] == pytest.approx(float(stats.logratio[valid].abs().mean()), rel=1e-4)
    assert entry["rollout/accuracy"] == pytest.approx(float((reward == 1).float().mean()))
    assert entry["rollout/unknown"] == pytest.approx(float(reward.isnan().float().mean()))


def test_equal_models_move_nothing(tiny: SimpleNamespace, tmp_path: Path) -> None:
    trainer = make(tiny, tmp_path, teacher_seed=1, gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert entry["loss"] == 0 and entry["grad_norm"] == 0 and entry["logratio/abs_mean"] == 0


def test_accumulated_rollouts_keep_their_advantages(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """TRL shuffles and splits the batch after the advantages are made: the step is still the whole batch's."""
    trainer = make(tiny, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    kept = keep_batches(trainer)
    trainer.train()
    loss, student, _ = expected(tiny, kept[0], kept[0]["rewards"][:, 0])
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_the_verifier_among_several_rewards_and_the_task(tiny: SimpleNamespace, tmp_path: Path) -> None:
    trainer = make(tiny, tmp_path, reward_funcs=[length, judge], verifier=1, task_weight=0.5, num_iterations=2)
    kept = keep_batches(trainer)
    trainer.train()
    (batch,) = kept
    raw = batch["rewards"]
    task = raw.nansum(1).view(-1, 4)
    task = ((task - task.mean(1, keepdim=True)) / (task.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    _, _, stats = expected(tiny, batch, raw[:, 1])
    torch.testing.assert_close(batch["advantages"], stats.gate * stats.logratio + 0.5 * task, rtol=1e-4, atol=1e-4)


def test_refusals(tiny: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="verifier=1"):
        make(tiny, tmp_path, verifier=1)
    with pytest.raises(ValueError, match="sg-opd"):
        make(tiny, tmp_path, gate="sgopd")
