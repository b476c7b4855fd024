"""The SkyRL trainer against SkyRL's contract: the registry's decorator, and the method that `train` calls.

SkyRL itself needs Ray and GPUs. The contract is that of skyrl/train/trainer.py and ppo_utils.py, August 2026.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ADAPTER = "sgopd.integrations.skyrl"
PARENTS = ("skyrl", "skyrl.train", "skyrl.backends", "skyrl.backends.skyrl_train", "skyrl.backends.skyrl_train.utils")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    estimators: dict[str, Any] = {}

    class RayPPOTrainer:
        def __init__(self, cfg: Any) -> None:
            self.cfg, self.all_metrics = cfg, {}

        def step(self, data: Any) -> Any:
            """What `train` does from the rewards on."""
            algorithm = self.cfg.trainer.algorithm
            if algorithm.use_kl_in_reward:
                data = self.apply_reward_kl_penalty(data)  # type: ignore[attr-defined]
            data["advantages"], data["returns"] = estimators[algorithm.advantage_estimator](
                token_level_rewards=data["rewards"], response_mask=data["loss_mask"], index=[], values=None, config=None
            )
            return data

    def register_advantage_estimator(name: str) -> Any:
        return lambda function: estimators.setdefault(name, function)

    for name in PARENTS:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    contents = {
        "skyrl.train.trainer": {"RayPPOTrainer": RayPPOTrainer},
        "skyrl.backends.skyrl_train.utils.ppo_utils": {"register_advantage_estimator": register_advantage_estimator},
    }
    for name, names in contents.items():
        made = ModuleType(name)
        vars(made).update(names)
        monkeypatch.setitem(sys.modules, name, made)
    sys.modules.pop(ADAPTER, None)
    adapter = importlib.import_module(ADAPTER)
    yield SimpleNamespace(estimators=estimators, Trainer=adapter.SGOPDTrainer)
    sys.modules.pop(ADAPTER, None)


def config(step_wise: bool = False, **algorithm: Any) -> Any:
    defaults = {"advantage_estimator": "sg_opd", "use_kl_in_reward": True, "advantage_batch_normalize": False}
    return SimpleNamespace(
        trainer=SimpleNamespace(algorithm=SimpleNamespace(**{**defaults, **algorithm})),
        generator=SimpleNamespace(step_wise_trajectories=step_wise),
    )


def batch(**changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 5)
    mask[0, 3:] = mask[1, 1] = 0
    rewards = torch.zeros(3, 5)
    rewards[0, 2], rewards[2, 4] = 1.0, math.nan
    data = {
        "loss_mask": mask,
        "rewards": rewards,
        "base_action_log_probs": -3 * torch.rand(3, 5, generator=g),
        "action_log_probs": -3 * torch.rand(3, 5, generator=g),
    }
    return {**data, **changes}


def test_advantages_are_the_gated_log_ratios(host: Any) -> None:
    trainer, data = host.Trainer(config()), batch()
    data["action_log_probs"][1, 1] = -math.inf  # outside the mask
    data = trainer.step(data)
    d, mask = data["base_action_log_probs"] - data["action_log_probs"], data["loss_mask"].bool()
    verdict = torch.tensor([[1], [-1], [0]])
    weight = torch.where(d * verdict > 0, 1.8, 1.0)
    torch.testing.assert_close(data["advantages"], torch.where(mask, weight * d, 0.0))
    assert data["returns"] is data["advantages"]
    tested = mask & (verdict != 0)
    agreed = float((d * verdict > 0)[tested].double().mean())
    metrics = trainer.all_metrics
    assert metrics["sg_opd/agree_fraction"] == pytest.approx(agreed) and 0 < agreed < 1
    assert metrics["sg_opd/gate_mean"] == pytest.approx(float(weight[mask].mean()))
    assert metrics["sg_opd/logratio_abs_mean"] == pytest.approx(float(d[mask].abs().mean()))
    assert metrics["sg_opd/rollout_accuracy"] == pytest.approx(1 / 3) == metrics["sg_opd/rollout_unknown"]


def test_equal_models_and_another_gate(host: Any) -> None:
    data = batch()
    data = host.Trainer(config()).step({**data, "base_action_log_probs": data["action_log_probs"].clone()})
    assert torch.equal(data["advantages"], torch.zeros(3, 5))

    class Protected(host.Trainer):  # type: ignore[misc]
        gate, correct_at = "protect", 1.0

    data = Protected(config()).step(batch())
    assert float(data["advantages"][0].min()) == 0 and float(data["advantages"][1].min()) < 0
    Protected.correct_at = 0.0  # the second is correct too
    assert float(Protected(config()).step(batch())["advantages"][:2].min()) == 0


def test_settings_that_change_the_method(host: Any) -> None:
    for name, value in (
        ("advantage_estimator", "grpo"),
        ("use_kl_in_reward", False),
        ("advantage_batch_normalize", True),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            host.Trainer(config(**{name: value}))
    with pytest.raises(ValueError, match="step_wise"):
        host.Trainer(config(step_wise=True))
    with pytest.raises(ValueError, match="teacher"):
        host.Trainer(config()).step(batch(base_action_log_probs=None))
