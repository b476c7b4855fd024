"""TRL's GRPOTrainer with gated advantages from a teacher (TRL 1.16).

    from sgopd.integrations.trl_grpo import SGOPDGRPOTrainer

    trainer = SGOPDGRPOTrainer(model, reward_funcs=is_correct, args=GRPOConfig(...), train_dataset=data,
                               teacher=teacher, gate="sg-opd")

TRL keeps generation (vLLM too), rewards, importance ratios, clipping and reduction. Each token's advantage becomes
w * d, plus `task_weight` times GRPO's own; the raw reward says whether a rollout is correct.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from sgopd.integrations.common import GATE_METRICS, gate_sums, log_ratios, verdict_of
from sgopd_kernels import Gate, gated_advantage, resolve_gate


class SGOPDGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose advantages are [B, T]: sign-gated log-ratios.

    Args:
        teacher: frozen causal language model with the student's tokenizer; moved to the trainer's device.
        gate: a preset's name or a `Gate`.
        correct_at: a completion whose raw reward is at least this is correct; below, incorrect; None, unknown.
        verifier: index among `reward_funcs` of the one that judges.
        task_weight: of GRPO's own advantage, which is added to every token. Default 0: distillation alone.
        The others: `trl.GRPOTrainer`'s.

    Logs, beside TRL's own: gate/mean, gate/agree_fraction (of tokens with a verdict), logratio/abs_mean,
    rollout/accuracy, rollout/unknown; averages over generation batches.

    Raises NotImplementedError for images, and for a teacher that would be sharded (DeepSpeed, FSDP).
    """

    _tag_names = ("trl", "grpo", "sg-opd")

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        gate: str | Gate = "sg-opd",
        correct_at: float = 0.5,
        verifier: int = 0,
        task_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= verifier < len(self.reward_funcs):
            raise ValueError(f"verifier={verifier} must be an index of the {len(self.reward_funcs)} reward_funcs")
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise NotImplementedError("the teacher is not sharded: run without DeepSpeed and FSDP (DDP is fine)")
        self.gate, self.correct_at, self.verifier, self.task_weight = (
            resolve_gate(gate),
            correct_at,
            verifier,
            task_weight,
        )
        # Temperature and softcap then act on the teacher as TRL has them act on the student.
        add_fused_lm_head(teacher.requires_grad_(False), self.temperature, self.args.cast_lm_head_to_fp32)
        self.teacher = self.accelerator.prepare_model(teacher.eval(), evaluation_mode=True)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        # [B over all processes, reward functions], before any weight or normalisation.
        self._raw_rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        return self._raw_rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if "pixel_values" in output:
            raise NotImplementedError("SGOPDGRPOTrainer reads text only; the batch has images")
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        mask = (output["completion_mask"] * output.get("tool_mask", 1)).bool()
        student = output.get("old_per_token_logps")
        if student is None:  # one step a rollout: TRL leaves it to the loss
            student = self._logprobs(self.model, ids, attention, mask.shape[1])
        teacher = self._logprobs(self.teacher, ids, attention, mask.shape[1])
        student, teacher = student.masked_fill(~mask, 0.0), teacher.masked_fill(~mask, 0.0)

        first = self.accelerator.process_index * len(ids)
        reward = self._raw_rewards[first : first + len(ids), self.verifier].to(ids.device)
        verdict = verdict_of(reward, self.correct_at).unsqueeze(1)
        advantage, weight = gated_advantage(student, teacher, verdict, gate=self.gate)
        output["advantages"] = advantage + self.task_weight * output["advantages"].unsqueeze(1)
        d = teacher.double() - student.double()
        log_ratios(self, GATE_METRICS, gate_sums(d, weight, d * verdict > self.gate.tolerance, verdict, mask))
        return output

    @torch.no_grad()
    def _logprobs(self, model: Any, ids: Tensor, attention: Tensor, keep: int) -> Tensor:
        size = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        logprobs: Tensor = self._get_per_token_logps_and_entropies(model, ids, attention, keep, batch_size=size)[0]
        return logprobs
