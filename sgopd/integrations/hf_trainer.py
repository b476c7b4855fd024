"""The sign-gated loss in a transformers `Trainer`, for completions that are in the data set already.

    from transformers import Trainer
    from sgopd.integrations.hf_trainer import SGOPDMixin

    class MyTrainer(SGOPDMixin, Trainer): ...

    trainer = MyTrainer(student, args, train_dataset=rows, teacher=teacher, gate="sg-opd")

A batch has input_ids [B, T], attention_mask [B, T], labels [B, T] (-100 but on completion tokens; unshifted, as
transformers has them) and verdict [B] (1, -1, 0). Use remove_unused_columns=False, or the verdict is dropped. The data
are as old as their sampling: on-policy distillation samples anew (`sgopd train`, or the TRL adapter). Evaluation gives
`eval_loss` alone: there are no logits, so `compute_metrics` gets no predictions. One process: a model in a
data-parallel wrapper is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sgopd.models import head_arguments, head_of, hidden_states
from sgopd_kernels import Gate, gated_kl_loss


class SGOPDMixin:
    """Mix in before `transformers.Trainer`.

    Args:
        teacher: frozen causal language model with the student's tokenizer; moved to the trainer's device.
        gate: a preset's name or a `Gate`.
        loss_arguments: further keywords of `gated_kl_loss` (estimator, divergence, temperature, …).

    The mean is over the completion tokens of the whole optimizer step: `num_items_in_batch`, which transformers counts
    over accumulation steps.
    """

    accelerator: Any
    args: Any
    model: Any

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        gate: str | Gate = "sg-opd",
        loss_arguments: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.remove_unused_columns:
            raise ValueError("remove_unused_columns=True drops the verdict column: pass remove_unused_columns=False")
        self.teacher = teacher.eval().requires_grad_(False)
        nn.Module.to(self.teacher, self.accelerator.device)
        self.gate, self.loss_arguments = gate, loss_arguments or {}
        # Trainer then leaves the division over accumulation steps to num_items_in_batch.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        missing = {"input_ids", "labels", "verdict"} - inputs.keys()
        if missing:
            raise ValueError(
                f"the batch lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(inputs))}. Check the "
                "collator, and remove_unused_columns=False"
            )
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        student = self.accelerator.unwrap_model(model)
        if student is not model or not isinstance(student, PreTrainedModel):
            # Around the wrapper's forward its gradient hooks would not run, and the processes would drift apart.
            raise NotImplementedError(
                f"SGOPDMixin runs in one process on a PreTrainedModel, got {type(model).__name__}; for several "
                "processes use `torchrun -m sgopd train`, or sgopd.integrations.trl"
            )
        hidden = hidden_states(student, ids, mask)
        with torch.no_grad():
            teacher_hidden = hidden_states(self.teacher, ids, mask)
        student_head, teacher_head = head_of(student), head_of(self.teacher)
        loss = gated_kl_loss(
            hidden[:, :-1],
            student_head.weight,
            teacher_hidden[:, :-1],
            teacher_head.weight,
            inputs["labels"][:, 1:],
            inputs["verdict"].unsqueeze(1),
            gate=self.gate,
            num_items=num_items_in_batch,
            **head_arguments(student_head, teacher_head),
            **self.loss_arguments,
        )
        # Trainer's evaluation looks for logits in what comes second; the loss never makes them.
        return (loss, {}) if return_outputs else loss
