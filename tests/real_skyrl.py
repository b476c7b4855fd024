"""The SkyRL adapter in SkyRL's own trainer, as far as that goes without GPUs: from log-probabilities to the gradient.

    python tests/real_skyrl.py        # `make long ONLY=skyrl` prepares the environment; a minute

SkyRL's configuration is checked by SkyRL, its trainer is made, and a made-up batch goes through its methods in the
order in which `train` calls them, and through its policy loss. The gradient with respect to each token's
log-probability must be -w d over the tokens, to 1e-6. Not run: Ray's workers and the inference engine, which need GPUs.
"""

from __future__ import annotations

import sys
import typing

import torch
import typing_extensions

if sys.version_info < (3, 12):
    typing.TypedDict = typing_extensions.TypedDict  # SkyRL's models of messages are refused by pydantic otherwise

from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch
from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.utils.utils import validate_cfg

from sgopd.integrations.skyrl import SGOPDTrainer
from sgopd_kernels import gated_advantage

B, T = 8, 12
WORDS = [
    "trainer.policy.model.path=student",
    "trainer.ref.model.path=teacher",
    "trainer.algorithm.advantage_estimator=sg_opd",
    "trainer.algorithm.policy_loss_type=importance_sampling",
    "trainer.algorithm.use_kl_in_reward=true",
    "trainer.algorithm.use_kl_loss=false",
    f"trainer.train_batch_size={B}",
    f"trainer.policy_mini_batch_size={B}",
    "generator.n_samples_per_prompt=1",
    "trainer.placement.policy_num_gpus_per_node=1",
    "trainer.placement.ref_num_gpus_per_node=1",
    "trainer.placement.colocate_all=false",
    "trainer.logger=console",
    "generator.inference_engine.enable_ray_prometheus_stats=false",
    "trainer.enable_ray_gpu_monitor=false",
]


def batch(generator: torch.Generator) -> TrainingInputBatch:
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    mask = (torch.arange(T) < lengths[:, None]).long()
    rewards = torch.zeros(B, T)
    rewards[torch.arange(B), lengths - 1] = torch.randint(0, 2, (B,), generator=generator).float()
    data = TrainingInputBatch(
        {
            "sequences": torch.zeros(B, 2 * T, dtype=torch.long),
            "response_mask": mask,
            "loss_mask": mask,
            "rewards": rewards,
            "values": None,
            "action_log_probs": -torch.rand(B, T, generator=generator),
            "base_action_log_probs": -torch.rand(B, T, generator=generator),
        }
    )
    data.metadata = {"uids": [str(n) for n in range(B)], "avg_response_length": float(lengths.float().mean())}
    return data


def main() -> None:
    config = SkyRLTrainConfig.from_cli_overrides(WORDS)
    validate_cfg(config)
    trainer = SGOPDTrainer(config, None, None, None, None, None)
    data = batch(torch.Generator().manual_seed(0))
    student, teacher = data["action_log_probs"].clone(), data["base_action_log_probs"].clone()
    correct, mask = data["rewards"].sum(-1) > 0.5, data["loss_mask"].bool()

    data = trainer.apply_reward_kl_penalty(data)
    data = trainer.compute_advantages_and_returns(data)
    data = trainer._normalize_advantages(data, [(0, B)])
    leaf = student.clone().requires_grad_()
    loss, _ = PolicyLossRegistry.get(config.trainer.algorithm.policy_loss_type)(
        leaf, student, data["advantages"], config.trainer.algorithm, loss_mask=data["loss_mask"]
    )
    loss.backward()

    verdict = torch.where(correct, 1, -1)[:, None]
    advantage, _ = gated_advantage(student, teacher, verdict, gate="sg-opd")
    expected = torch.where(mask, -advantage / mask.sum(), 0.0)
    assert leaf.grad is not None
    error = float((leaf.grad - expected).abs().max())
    print(f"SkyRL's gradient with respect to log-probabilities, beside -w d / tokens: {error:.2g} (at most 1e-6)")
    print({name: round(value, 3) for name, value in trainer.all_metrics.items() if name.startswith("sg_opd/")})
    sys.exit(not error <= 1e-6)


if __name__ == "__main__":
    main()
