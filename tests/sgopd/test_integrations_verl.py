"""The verl plugin against verl's contract: a registry and a padding helper with its signatures and shapes.

verl itself needs Ray and a GPU engine. The contract is that of verl/trainer/distillation/losses.py, August 2026.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sgopd_kernels import gated_advantage, gated_logprob_loss

ADAPTER = "sgopd.integrations.verl"


def module(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> None:
    parent, _, _ = name.rpartition(".")
    if parent and parent not in sys.modules:
        module(monkeypatch, parent)
    made = ModuleType(name)
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """verl's registry (which refuses a name twice), and the flat-to-padded helper over data["lengths"]."""
    losses: dict[str, Any] = {}
    settings: dict[str, Any] = {}

    def register_distillation_loss(loss_settings: Any) -> Any:
        def decorator(function: Any) -> Any:
            for name in loss_settings.names:
                if name in losses:
                    raise ValueError(f"'{name}' is already registered")
                losses[name], settings[name] = function, loss_settings
            return function

        return decorator

    def no_padding_2_padding(values: Any, data: Any) -> Any:
        rows = values.split(data["lengths"])
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    module(
        monkeypatch,
        "verl.trainer.distillation.losses",
        DistillationLossSettings=SimpleNamespace,
        register_distillation_loss=register_distillation_loss,
    )
    module(monkeypatch, "verl.workers.utils.padding", no_padding_2_padding=no_padding_2_padding)
    sys.modules.pop(ADAPTER, None)
    adapter = importlib.import_module(ADAPTER)
    yield SimpleNamespace(losses=losses, settings=settings, adapter=adapter)
    sys.modules.pop(ADAPTER, None)


def batch(**changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    lengths = [4, 2, 3]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    scores = torch.zeros(3, 4)
    scores[0, 3], scores[2, 2] = 1.0, torch.nan
    data = {
        "lengths": lengths,
        "response_mask": mask.long(),
        "teacher_logprobs": -3 * torch.rand(9, 1, generator=g),
        "token_level_scores": scores,
    }
    return {**data, **changes}


def call(host: Any, data: Any, name: str = "sg_opd", student: Any = None, **settings: Any) -> Any:
    if student is None:
        student = -3 * torch.rand(9, generator=torch.Generator().manual_seed(1))
    loss = SimpleNamespace(**{"use_policy_gradient": True, "loss_max_clamp": None, **settings})
    return host.losses[name](
        config=None,
        distillation_config=SimpleNamespace(distillation_loss=loss),
        model_output={"log_probs": student.requires_grad_()},
        data=data,
    )


def test_it_registers_itself(host: Any) -> None:
    assert list(host.losses) == ["sg_opd"]
    assert vars(host.settings["sg_opd"]) == {"names": ["sg_opd"], "use_estimator": True}
    host.adapter.register("mine", gate="protect")
    with pytest.raises(ValueError, match="already registered"):
        host.adapter.register("mine")


def test_losses_are_the_gated_log_ratio(host: Any) -> None:
    data = batch()
    losses, metrics = call(host, data)
    student = -3 * torch.rand(9, generator=torch.Generator().manual_seed(1))
    d = torch.nn.utils.rnn.pad_sequence((data["teacher_logprobs"][:, 0] - student).split([4, 2, 3]), batch_first=True)
    verdict = torch.tensor([[1], [-1], [0]])
    weight = torch.where(d * verdict > 0, 1.8, 1.0)
    assert losses.shape == (3, 4) and not losses.requires_grad
    torch.testing.assert_close(losses, -weight * d)
    assert torch.equal(losses[1, 2:], torch.zeros(2))
    valid = data["response_mask"].bool()
    assert metrics["distillation/gate_mean"] == pytest.approx(float(weight[valid].mean()))
    tested = valid & (verdict != 0)
    agreed = float((d * verdict > 0)[tested].float().mean())
    assert metrics["distillation/agree_fraction"] == pytest.approx(agreed) and 0 < agreed < 1
    assert metrics["distillation/rollout_accuracy"] == pytest.approx(1 / 3)
    assert metrics["distillation/rollout_unknown"] == pytest.approx(1 / 3)
    assert "distillation/clamped_share" not in metrics
    other, _ = call(host, data | {"teacher_logprobs": student[:, None].clone()})
    assert torch.equal(other, torch.zeros(3, 4))


def test_its_policy_gradient_is_the_sampled_estimator(host: Any) -> None:
    """verl's on-policy step, sum of -advantages * ratio, has the gradient of gated_logprob_loss."""
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 6), torch.randn(11, 6, requires_grad=True)
    ids, data = torch.randint(0, 11, (9,)), batch()
    log_prob = (hidden @ head.T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    losses, _ = call(host, data, student=log_prob.detach().clone())
    flat = torch.cat([row[:n] for row, n in zip(-losses, data["lengths"])])
    (policy,) = torch.autograd.grad(-(flat * (log_prob - log_prob.detach()).exp()).sum(), head)
    verdict = torch.tensor([1] * 4 + [-1] * 2 + [0] * 3)
    loss = gated_logprob_loss(hidden, head, ids, data["teacher_logprobs"][:, 0], verdict, reduction="sum")
    assert isinstance(loss, torch.Tensor)
    (expected,) = torch.autograd.grad(loss, head)
    torch.testing.assert_close(policy, expected, rtol=1e-4, atol=1e-5)


def test_padding_weighs_nothing(host: Any) -> None:
    data = batch()
    data["response_mask"][0, 1] = 0  # a tool's token
    student = torch.zeros(9)
    student[1] = float("-inf")
    losses, metrics = call(host, data, student=student)
    assert losses[0, 1] == 0 and losses.isfinite().all()
    assert metrics["distillation/logratio_abs_mean"] < 3


def test_scores_from_either_key_nested_or_padded(host: Any) -> None:
    data = batch()
    scores, mask = data.pop("token_level_scores"), data.pop("response_mask")
    rows = lambda t: torch.nested.as_nested_tensor([r[:n] for r, n in zip(t, data["lengths"])], layout=torch.jagged)  # noqa: E731
    nested = {**data, "rm_scores": rows(scores), "response_mask": rows(mask)}
    assert torch.equal(call(host, nested)[0], call(host, batch())[0])
    with pytest.raises(ValueError, match="neither token_level_scores nor rm_scores"):
        call(host, {**data, "response_mask": mask})


def test_a_gate_of_ones_own(host: Any) -> None:
    host.adapter.register("mine", gate="protect", correct_at=2.0)
    losses, _ = call(host, batch(), "mine")
    student = -3 * torch.rand(9, generator=torch.Generator().manual_seed(1))
    pad = lambda t: torch.nn.utils.rnn.pad_sequence(t.split([4, 2, 3]), batch_first=True)  # noqa: E731
    verdict = torch.tensor([[-1], [-1], [0]])
    teacher = batch()["teacher_logprobs"][:, 0]
    torch.testing.assert_close(losses, -gated_advantage(pad(student), pad(teacher), verdict, gate="protect")[0])


def test_settings_that_change_the_method(host: Any) -> None:
    with pytest.raises(ValueError, match="use_policy_gradient=True"):
        call(host, batch(), use_policy_gradient=False)
    losses, metrics = call(host, batch(), loss_max_clamp=1.0)
    valid = batch()["response_mask"].bool()
    assert metrics["distillation/clamped_share"] == pytest.approx(float((losses.abs() > 1)[valid].float().mean()))
    assert metrics["distillation/clamped_share"] > 0


def test_in_verl_itself() -> None:
    """verl's own distillation_loss, on its nested tensors. Skipped where verl is not installed (it is not in CI)."""
    losses = pytest.importorskip("verl.trainer.distillation.losses", reason="verl is not installed")
    importlib.import_module(ADAPTER)
    from tensordict import TensorDict
    from verl.utils import tensordict_utils
    from verl.workers.config import DistillationLossConfig

    torch.manual_seed(0)
    prompts, responses = (3, 2, 4), (4, 2, 3)
    nested = lambda rows: torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)  # noqa: E731
    whole = [p + r for p, r in zip(prompts, responses)]
    student, teacher = [[-3 * torch.rand(n) for n in whole] for _ in range(2)]
    data = TensorDict(
        {
            "prompts": nested(torch.ones(n).long() for n in prompts),
            "responses": nested(torch.ones(n).long() for n in responses),
            "response_mask": nested(torch.ones(n).long() for n in responses),
            "teacher_logprobs": nested(row[:, None] for row in teacher),
            "old_log_probs": nested(row[p - 1 : -1] for p, row in zip(prompts, student)),
            "rm_scores": nested(torch.eye(n)[-1] * (i == 0) for i, n in enumerate(responses)),
        },
        batch_size=[3],
    )
    tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=9, global_batch_size=3)
    log_probs = nested(student).detach().requires_grad_()
    settings = DistillationLossConfig(loss_mode="sg_opd", loss_max_clamp=None, use_task_rewards=False)
    config = SimpleNamespace(loss_agg_mode="token-mean", global_batch_info={}, loss_scale_factor=None)
    loss, metrics = losses.distillation_loss(
        config, SimpleNamespace(distillation_loss=settings), {"log_probs": log_probs}, data
    )
    loss.backward()
    for p, verdict, a, b, row in zip(prompts, (1, -1, -1), student, teacher, log_probs.grad.unbind()):
        d = (b - a)[p - 1 : -1]  # the state before a token predicts it
        expected = torch.zeros(len(a))
        expected[p - 1 : -1] = -torch.where(d * verdict > 0, 1.8, 1.0) * d / 9
        torch.testing.assert_close(row, expected)
    assert metrics["distillation/rollout_accuracy"] == pytest.approx(1 / 3)
