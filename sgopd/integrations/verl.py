"""The sign gate as a verl distillation loss, `loss_mode=sg_opd` (verl 0.10 development, August 2026).

verl loads this module by its entry point (`verl.plugins`) when it is imported itself. Then, in the run's configuration:

    distillation.distillation_loss.loss_mode=sg_opd
    distillation.distillation_loss.use_policy_gradient=True
    distillation.distillation_loss.use_task_rewards=False
    distillation.distillation_loss.loss_max_clamp=null

Another gate, under a name of its own, from a module named in VERL_USE_EXTERNAL_MODULES:

    from sgopd.integrations.verl import register

    register("sg_opd_protect", gate="protect")

verl takes the negative of the losses as advantages, so a loss of -w * d is the policy gradient of the `sampled`
estimator (docs/method.md, section 2).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from verl.trainer.distillation.losses import DistillationLossSettings, register_distillation_loss
from verl.workers.utils.padding import no_padding_2_padding

from sgopd.integrations.common import verdict_of
from sgopd_kernels import Gate, gated_advantage, resolve_gate


def register(name: str, gate: str | Gate = "sg-opd", correct_at: float = 0.5) -> None:
    """Adds a distillation loss to verl's registry, to be chosen by `loss_mode=<name>`.

    Args:
        name: not yet taken in the registry.
        gate: a preset's name or a `Gate`.
        correct_at: a rollout whose token scores sum to at least this is correct; below, incorrect; NaN, unknown.

    Raises:
        ValueError: by verl, if the name is taken; by the loss, if the batch has no scores or a setting would change
            the method.
    """
    chosen = resolve_gate(gate)

    @register_distillation_loss(DistillationLossSettings(names=[name], use_estimator=True))
    def sign_gated(
        config: Any, distillation_config: Any, model_output: Any, data: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        settings = distillation_config.distillation_loss
        if not settings.use_policy_gradient:
            raise ValueError(
                f"loss_mode={name} is a policy gradient: with use_policy_gradient=False its losses would have no "
                "gradient. Set distillation.distillation_loss.use_policy_gradient=True"
            )
        student = no_padding_2_padding(model_output["log_probs"], data).detach()
        teacher = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
        mask = _padded(data["response_mask"]).bool()
        verdict = _verdict(data, correct_at).to(student.device)
        # Padding holds whatever the engine left there: equal log-probabilities make it d = 0.
        student, teacher = student.masked_fill(~mask, 0.0), teacher.masked_fill(~mask, 0.0)
        advantage, weight = gated_advantage(student, teacher, verdict.unsqueeze(1), gate=chosen)
        losses = -advantage

        d = teacher.float() - student.float()
        tested = mask & (verdict != 0).unsqueeze(1)
        agree = tested & (d * verdict.unsqueeze(1) > chosen.tolerance)
        metrics = {
            "distillation/gate_mean": _mean(weight, mask),
            "distillation/agree_fraction": _mean(agree, tested),
            "distillation/logratio_abs_mean": _mean(d.abs(), mask),
            "distillation/rollout_accuracy": (verdict > 0).double().mean().item(),
            "distillation/rollout_unknown": (verdict == 0).double().mean().item(),
        }
        if settings.loss_max_clamp is not None:
            # verl clamps after this call, and says nothing of it: an extrapolated token is cut first.
            metrics["distillation/clamped_share"] = _mean(losses.abs() > settings.loss_max_clamp, mask)
        return losses, metrics


def _verdict(data: Any, correct_at: float) -> Tensor:
    """[B] int64 from the rollouts' scores: the verifier's word, before any KL term or baseline."""
    for key in ("token_level_scores", "rm_scores"):
        if key in data:
            score = _padded(data[key]).double().sum(-1)
            return verdict_of(score, correct_at)
    raise ValueError(
        f"the batch has neither token_level_scores nor rm_scores (it has {', '.join(sorted(map(str, data.keys())))}): "
        "the sign gate needs the verifier's score of each rollout. Configure a reward function, and see that the "
        "trainer hands its scores to the actor's update"
    )


def _padded(tensor: Tensor) -> Tensor:
    return tensor.to_padded_tensor(0) if tensor.is_nested else tensor


def _mean(values: Tensor, mask: Tensor) -> float:
    """Mean over the mask; 0 where a micro-batch has nothing to average (verl averages micro-batches)."""
    return (values.double() * mask).sum().div(mask.sum().clamp(min=1)).item()


register("sg_opd")
