"""examples/accelerate_loop.py, as it is run, on the shipped checkpoints."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def example(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("accelerate_loop", root / "examples" / "accelerate_loop.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def models(example: ModuleType) -> tuple[Any, Any]:
    return tuple(AutoModelForCausalLM.from_pretrained(example.QUICKSTART / name) for name in ("student", "teacher"))  # type: ignore[return-value]


def step(example: ModuleType, student: Any, teacher: Any, batch: Any) -> tuple[float, float]:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    result: tuple[float, float] = example.train_step(Accelerator(), student, teacher, optimizer, batch)
    return result


def test_it_learns(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    history = example.main(["--steps", "16"])
    kl, gate, correct = zip(*history)
    assert sum(kl[-4:]) / 4 < 0.5 * kl[0]
    assert sum(correct[-4:]) / 4 > 2 * correct[0] > 0
    assert all(1 < value < 1.8 for value in gate)
    assert capsys.readouterr().out.count("KL") == 16


def test_rollouts_end_at_the_end_of_sequence(example: ModuleType, models: tuple[Any, Any]) -> None:
    student, _ = models
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(example.QUICKSTART / "student")
    (batch,) = example.rollouts(student, tokenizer, 32, 1)
    ids, mask, labels, verdict = batch
    assert set(verdict.tolist()) == {1, -1}
    width = int((labels != -100).int().argmax(1).min())
    own = labels != -100
    assert torch.equal(labels[own], ids[own]) and mask[own].all() and mask[:, :width].all()
    for row in range(32):
        completion, rest = ids[row, width:][own[row, width:]], ids[row, width:][~own[row, width:]]
        assert own[row, width : width + len(completion)].all()  # without a gap
        assert (completion[:-1] != 2).all() and (rest == 0).all()
        assert completion[-1] == 2 or len(rest) == 0


def test_equal_models_differ_by_nothing(example: ModuleType, models: tuple[Any, Any]) -> None:
    student, _ = models
    torch.manual_seed(0)
    (batch,) = example.rollouts(student, AutoTokenizer.from_pretrained(example.QUICKSTART / "student"), 8, 1)
    kl, gate = step(example, student, student, batch)
    assert kl == 0 and gate == 1


def test_padding_on_the_left_changes_nothing(example: ModuleType, models: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    (batch,) = example.rollouts(models[0], AutoTokenizer.from_pretrained(example.QUICKSTART / "student"), 8, 1)
    ids, mask, labels, verdict = batch
    pad = torch.nn.functional.pad
    padded = pad(ids, (5, 0)), pad(mask, (5, 0)), pad(labels, (5, 0), value=-100), verdict
    # Rotary models do not mind a shift of all positions; others do, so the positions are looked at themselves.
    seen: list[torch.Tensor] = []
    models[0].base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    assert step(example, *models, padded) == pytest.approx(step(example, *models, batch), rel=1e-4)
    assert torch.equal(seen[0][:, 5:], seen[1]) and (seen[1][:, 0] == 0).all()
