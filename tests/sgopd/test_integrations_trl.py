"""The TRL adapter in TRL's own trainer, on tiny models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

trl = pytest.importorskip("trl", reason="TRL is not installed (extra: trl)")

from sgopd.integrations.trl import SGOPDTrainer  # noqa: E402
from sgopd.verifier import VerifierPool  # noqa: E402

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(6) for b in range(4)]


OWN = ("verifier", "gate", "estimator", "cold_start_steps", "teacher_share", "teacher_share_schedule")


def make(cls: Any, tiny: SimpleNamespace, folder: Path, teacher_seed: int = 2, **changes: Any) -> Any:
    own = {k: changes.pop(k) for k in OWN if k in changes}
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_completion_length=10,
        learning_rate=1e-2,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=5,
    )
    config = trl.DistillationConfig(**(settings | changes))
    return cls(
        tiny.make_model(1),
        tiny.make_model(teacher_seed),
        args=config,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny.make_tokenizer(padding_side="left"),
        **own,
    )


def always(word: bool | None) -> Any:
    return lambda completion, example: word if example["answer"] else None


def test_it_trains_and_logs_the_gate(tiny: SimpleNamespace, tmp_path: Path) -> None:
    trainer = make(SGOPDTrainer, tiny, tmp_path, verifier=always(False))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])]
    assert "lm_head.weight" in changed and len(changed) == len(before)
    logs = [entry for entry in trainer.state.log_history if "gate/mean" in entry]
    assert len(logs) == 2
    for entry in logs:
        # One verdict everywhere: the mean gate is between the two weights, as the agreement says.
        assert entry["gate/mean"] == pytest.approx(1 + 0.8 * entry["gate/agree_fraction"], abs=1e-3)
        assert entry["rollout/accuracy"] == 0 and entry["rollout/unknown"] == 0 and entry["kl"] > 0


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_without_a_gate_it_is_trl(tiny: SimpleNamespace, tmp_path: Path, beta: float) -> None:
    """The same batches, losses and weights as TRL's own trainer; completions are ragged."""
    ours = make(SGOPDTrainer, tiny, tmp_path / "a", verifier=always(True), gate="opd", beta=beta)
    theirs = make(trl.DistillationTrainer, tiny, tmp_path / "b", beta=beta)
    for trainer in (ours, theirs):
        torch.manual_seed(0)  # the completions are sampled
        trainer.train()
    for a, b in zip(ours.state.log_history, theirs.state.log_history):
        for key in ("loss", "grad_norm", "entropy"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-4), key
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters()):
        assert float((a - b).norm() / b.norm()) < 1e-4, name


def test_equal_models_lose_nothing_and_the_pool_gives_verdicts(tiny: SimpleNamespace, tmp_path: Path) -> None:
    with VerifierPool("exact") as pool:
        trainer = make(SGOPDTrainer, tiny, tmp_path, teacher_seed=1, verifier=pool, max_steps=1)
        trainer.train()
        assert sum(pool.counts().values()) == 8
    (entry,) = [entry for entry in trainer.state.log_history if "gate/mean" in entry]
    assert entry["loss"] == 0 and entry["kl"] == 0


def test_verdicts_follow_their_rows(tiny: SimpleNamespace, tmp_path: Path) -> None:
    trainer = make(SGOPDTrainer, tiny, tmp_path, verifier=lambda text, example: len(example["answer"]) == 1)
    batch = trainer._generate_and_score_completions(ROWS[:8])
    assert batch["verdict"].tolist() == [1 if len(row["answer"]) == 1 else -1 for row in ROWS[:8]]
    assert set(trainer._verdicts(["x"], ROWS[:1], [False]).tolist()) == {1}
    trainer.verifier = always(None)
    assert trainer._verdicts(["x"], ROWS[:1], [False]).tolist() == [0]


def test_endorsed_teacher_rollouts_take_their_slots(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """All slots offered, all endorsed: the batch is the teacher's, judged correct, and counted anew."""
    phase = dict(cold_start_steps=2, teacher_share=1.0, teacher_share_schedule="constant")
    trainer = make(SGOPDTrainer, tiny, tmp_path, verifier=always(True), **phase)
    with torch.no_grad():  # a teacher that always says 3 and a student that never does
        for model, bias in ((trainer.teacher_model, 50.0), (trainer.model, -50.0)):
            model.lm_head.weight.zero_()
            model.lm_head.bias = torch.nn.Parameter(torch.zeros(32))
            model.lm_head.bias[3] = bias
    trainer.model.train()
    batch = trainer._generate_and_score_completions(ROWS[:8])
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    assert bool((ids[mask == 1] == 3).all()) and batch["verdict"].tolist() == [1] * 8
    assert ids.shape == mask.shape == (8, 10) and int(batch["num_items_in_batch"]) == 80
    trainer.verifier = always(False)
    batch = trainer._generate_and_score_completions(ROWS[:8])
    assert not bool((batch["completion_ids"] == 3).any()) and batch["verdict"].tolist() == [-1] * 8
    assert trainer._metrics["train"]["phase/acceptance"] == [1.0, 0.0]
    assert int(batch["num_items_in_batch"]) == int(batch["completion_mask"].sum())


def test_the_cold_start_ends(tiny: SimpleNamespace, tmp_path: Path) -> None:
    trainer = make(
        SGOPDTrainer, tiny, tmp_path, verifier=always(True), cold_start_steps=2, teacher_share=0.5, max_steps=3
    )
    trainer.train()
    shares = [entry.get("phase/teacher_share") for entry in trainer.state.log_history if "gate/mean" in entry]
    assert shares == [0.5, 0.25, None]


def test_refusals(tiny: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="remove_unused_columns"):
        make(SGOPDTrainer, tiny, tmp_path, verifier=always(True), remove_unused_columns=True)
    with pytest.raises(ValueError, match="beta"):
        make(SGOPDTrainer, tiny, tmp_path, verifier=always(True), estimator="sampled", beta=0.5)
