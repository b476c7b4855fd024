"""TRL's DistillationTrainer with the sign gate and a verifier in the loop (TRL 1.16).

    from sgopd.integrations.trl import SGOPDTrainer

    trainer = SGOPDTrainer(model, teacher, args=DistillationConfig(...), train_dataset=prompts_and_answers,
                           verifier=lambda completion, example: completion.strip() == example["answer"])

TRL keeps generation, data order, accumulation and logging; this class adds a verdict to each completion and computes
the loss with `gated_kl_loss`. `DistillationConfig.beta` keeps its meaning: 1 is the reverse KL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trl import DistillationTrainer

from sgopd.teacher import head_of
from sgopd.verifier import CORRECT, INCORRECT, UNKNOWN, VerifierPool
from sgopd_kernels import Gate, gated_kl_loss

Verifier = VerifierPool | Callable[[str, dict[str, Any]], bool | None]

# Summed per token or rollout, gathered over processes, logged as ratios: (name, numerator, denominator).
_SUMS = ("tokens", "kl", "gate", "tested", "agree", "logratio", "rollouts", "correct", "unknown")
_RATIOS = (
    ("kl", "kl", "tokens"),
    ("gate/mean", "gate", "tokens"),
    ("gate/agree_fraction", "agree", "tested"),
    ("logratio/abs_mean", "logratio", "tokens"),
    ("rollout/accuracy", "correct", "rollouts"),
    ("rollout/unknown", "unknown", "rollouts"),
)


class SGOPDTrainer(DistillationTrainer):
    """`trl.DistillationTrainer` with a sign-gated loss.

    Args:
        verifier: a `sgopd.verifier.VerifierPool`, or `fn(completion, example) -> True | False | None` (None: unknown)
            called in this process; `example` is the dataset's row with all its columns.
        gate: a preset's name or a `Gate`.
        estimator: "full" or "sampled" (reverse KL only, beta = 1).
        The others: `trl.DistillationTrainer`'s.

    Logs, beside TRL's own: kl, gate/mean, gate/agree_fraction (of tokens with a verdict), logratio/abs_mean,
    rollout/accuracy, rollout/unknown.

    Raises:
        ValueError: a setting that would drop the answer column, or images in the data.
    """

    _tag_names = ("trl", "distillation", "sg-opd")

    def __init__(
        self, *args: Any, verifier: Verifier, gate: str | Gate = "sg-opd", estimator: str = "full", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would drop the column that the verifier reads; set it to False "
                "(DistillationConfig's default)"
            )
        if estimator == "sampled" and self.beta != 1.0:
            raise ValueError(f"estimator='sampled' is the reverse KL's: set beta=1.0, got beta={self.beta}")
        self.verifier, self.gate, self.estimator = verifier, gate, estimator
        self._sums: dict[str, Tensor] = {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if "pixel_values" in output:
            raise ValueError("SGOPDTrainer reads text only; the batch has images: use trl.DistillationTrainer for them")
        ids, mask = output["completion_ids"], output["completion_mask"]
        lengths = mask.sum(1)
        responses = self.processing_class.batch_decode(
            [row[:n] for row, n in zip(ids.tolist(), lengths.tolist())], skip_special_tokens=True
        )
        # A completion that was cut off ends with a token that is no end of sequence.
        last = ids.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        cut = ~torch.isin(last, torch.tensor(self._end_tokens(), device=ids.device))
        output["verdict"] = self._verdicts(responses, inputs, cut.tolist()).to(ids.device)
        return output

    def _end_tokens(self) -> list[int]:
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        configured = self.accelerator.unwrap_model(self.model).generation_config.eos_token_id
        ids = [configured] if isinstance(configured, int) else list(configured or [])
        return [*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]

    def _verdicts(self, responses: list[str], examples: list[dict[str, Any]], cut: list[bool]) -> Tensor:
        if isinstance(self.verifier, VerifierPool):
            return torch.tensor([v.value for v in self.verifier.verify(responses, examples, cut)])
        words = {True: CORRECT, False: INCORRECT, None: UNKNOWN}
        said = [self.verifier(response, example) for response, example in zip(responses, examples)]
        return torch.tensor([words[None if word is None else bool(word)] for word in said])

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Runs inside the student wrapper's forward: no collectives here.
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        keep = inputs["completion_ids"].shape[1]
        student_hidden = self._get_last_hidden_state(unwrapped_student, ids, attention, keep)
        self.teacher_model.eval()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad():
            teacher_hidden = self._forward_redirection(
                self.teacher_model, teacher, self._get_last_hidden_state, teacher, ids, attention, keep
            )
        student_head, teacher_head = head_of(unwrapped_student), head_of(teacher)
        loss, stats = gated_kl_loss(
            student_hidden,
            student_head.weight,
            teacher_hidden,
            teacher_head.weight,
            inputs["completion_ids"].masked_fill(mask == 0, -100),
            inputs["verdict"].unsqueeze(1),
            gate=self.gate,
            estimator=self.estimator,  # type: ignore[arg-type,unused-ignore]
            divergence=("jsd", self.beta),
            student_bias=student_head.bias,
            teacher_bias=teacher_head.bias,
            temperature=self.temperature,
            student_logit_scale=student_head.logit_scale,
            teacher_logit_scale=teacher_head.logit_scale,
            student_softcap=student_head.softcap,
            teacher_softcap=teacher_head.softcap,
            num_items=num_items_in_batch,
            return_stats=True,
        )
        valid, verdict = mask != 0, inputs["verdict"]
        values = {
            "tokens": valid.sum(),
            "kl": stats.kl.sum(),
            "gate": stats.gate.sum(),
            "tested": (valid & (verdict != 0).unsqueeze(1)).sum(),
            "agree": stats.agree.sum(),
            "logratio": stats.logratio.abs().sum(),
            "rollouts": torch.tensor(len(verdict), device=valid.device),
            "correct": (verdict == CORRECT).sum(),
            "unknown": (verdict == UNKNOWN).sum(),
        }
        self._sums = {name: values[name].double() for name in _SUMS}
        return loss, stats.student_entropy.sum(), valid.sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mine = torch.stack([self._sums[name] for name in _SUMS]).unsqueeze(0)
        sums = dict(zip(_SUMS, self.accelerator.gather(mine).sum(0).tolist()))
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, top, bottom in _RATIOS:
            # TRL's log leaves NaN out of its averages: an empty cell is not a zero.
            metrics[name].append(sums[top] / sums[bottom] if sums[bottom] else float("nan"))
        return result
