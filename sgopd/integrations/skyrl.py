"""The sign gate in SkyRL's trainer, in place of its KL penalty on the rewards (SkyRL of August 2026).

    from sgopd.integrations.skyrl import SGOPDTrainer

    class Exp(BasePPOExp):
        def get_trainer(self, *args, **kwargs):
            return SGOPDTrainer(*args, **kwargs)

with trainer.ref.model.path=<teacher>, and in trainer.algorithm: advantage_estimator=sg_opd,
policy_loss_type=importance_sampling, use_kl_in_reward=true, use_kl_loss=false. SkyRL computes the reference model's
log-probabilities, here the teacher's; the rewards become w * d a token, which the estimator passes on as advantages.
"""

from __future__ import annotations

from typing import Any

from skyrl.backends.skyrl_train.utils.ppo_utils import register_advantage_estimator
from skyrl.train.trainer import RayPPOTrainer
from torch import Tensor

from sgopd.integrations.common import verdict_of
from sgopd_kernels import Gate, gated_advantage, resolve_gate

ESTIMATOR = "sg_opd"


@register_advantage_estimator(ESTIMATOR)
def pass_on(token_level_rewards: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The gated rewards are advantages already: no return to go, no baseline, no whitening."""
    return token_level_rewards, token_level_rewards


class SGOPDTrainer(RayPPOTrainer):
    """`RayPPOTrainer` whose token rewards are the gated log-ratios.

    Attributes, to be changed in a subclass:
        gate: a preset's name or a `Gate`.
        correct_at: a rollout whose rewards sum to at least this is correct; below, incorrect; NaN, unknown.

    Logs, beside SkyRL's own: sg_opd/gate_mean, sg_opd/agree_fraction (of tokens with a verdict),
    sg_opd/logratio_abs_mean, sg_opd/rollout_accuracy, sg_opd/rollout_unknown.

    Raises:
        ValueError: a setting under which the advantages would not be the gated ones.
    """

    gate: str | Gate = "sg-opd"
    correct_at: float = 0.5

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        algorithm, self._gate = self.cfg.trainer.algorithm, resolve_gate(self.gate)
        wanted = (
            ("advantage_estimator", ESTIMATOR, "another would mix the tokens' advantages"),
            ("use_kl_in_reward", True, "without it the gate is never called"),
            ("advantage_batch_normalize", False, "whitening takes the gate's ratio away"),
        )
        for name, value, why in wanted:
            if getattr(algorithm, name) != value:
                raise ValueError(f"trainer.algorithm.{name} must be {value!r}, got {getattr(algorithm, name)!r}: {why}")
        if self.cfg.generator.step_wise_trajectories:
            raise ValueError(
                "generator.step_wise_trajectories: a step's row has no verdict of its own; set it to false"
            )

    def apply_reward_kl_penalty(self, data: Any) -> Any:
        """`rewards` [B, T], the environment's, become w * d on the loss mask and 0 elsewhere."""
        teacher = data["base_action_log_probs"]
        if teacher is None:
            raise ValueError("the batch has no base_action_log_probs: set trainer.ref.model.path to the teacher")
        mask = data["loss_mask"].bool()
        score = data["rewards"].double().sum(-1)
        verdict = verdict_of(score, self.correct_at).unsqueeze(1)
        student, teacher = data["action_log_probs"].masked_fill(~mask, 0.0), teacher.masked_fill(~mask, 0.0)
        advantage, weight = gated_advantage(student, teacher, verdict, gate=self._gate)
        data["rewards"] = advantage

        d = teacher.double() - student.double()
        tested = mask & (verdict != 0)
        self.all_metrics.update(
            {
                "sg_opd/gate_mean": _mean(weight, mask),
                "sg_opd/agree_fraction": _mean(d * verdict > self._gate.tolerance, tested),
                "sg_opd/logratio_abs_mean": _mean(d.abs(), mask),
                "sg_opd/rollout_accuracy": (verdict > 0).double().mean().item(),
                "sg_opd/rollout_unknown": (verdict == 0).double().mean().item(),
            }
        )
        return data


def _mean(values: Tensor, mask: Tensor) -> float:
    return (values.double() * mask).sum().div(mask.sum()).item()
