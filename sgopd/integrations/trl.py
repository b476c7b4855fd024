"""TRL's DistillationTrainer with the sign gate and a verifier in the loop (TRL 1.16).

    from sgopd.integrations.trl import SGOPDTrainer

    trainer = SGOPDTrainer(model, teacher, args=DistillationConfig(...), train_dataset=prompts_and_answers,
                           verifier=lambda completion, example: completion.strip() == example["answer"])

TRL keeps generation, data order, accumulation and logging; this class adds a verdict to each completion and computes
the loss with `gated_kl_loss`. `DistillationConfig.beta` keeps its meaning: 1 is the reverse KL.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from trl import DistillationTrainer

from sgopd.grading import THOUGHT_TAGS
from sgopd.integrations.common import GATE_METRICS, gate_sums, log_ratios
from sgopd.models import head_arguments, head_of
from sgopd.phases import Phases
from sgopd.rollout import texts_of
from sgopd.verifier import CORRECT, INCORRECT, UNKNOWN, VerifierPool
from sgopd_kernels import Gate, gated_kl_loss

Verifier = VerifierPool | Callable[[str, dict[str, Any]], bool | None]


class SGOPDTrainer(DistillationTrainer):
    """`trl.DistillationTrainer` with a sign-gated loss.

    Args:
        verifier: a `sgopd.verifier.VerifierPool`, or `fn(completion, example) -> True | False | None` (None: unknown)
            called in this process; `example` is the dataset's row with all its columns.
        gate: a preset's name or a `Gate`.
        estimator: "full" or "sampled" (reverse KL only, beta = 1).
        cold_start_steps, teacher_share, teacher_share_schedule: phased teacher sampling, as in `sgopd train`: for the
            first updates this share of the completions, annealed to 0 ("linear", "cosine", "constant"), is offered to
            the teacher, and takes the student's place where the verifier endorses it. Default: off.
        The others: `trl.DistillationTrainer`'s.

    Logs, beside TRL's own: kl, gate/mean, gate/agree_fraction (of tokens with a verdict), logratio/abs_mean,
    rollout/accuracy, rollout/unknown; in the cold start phase/teacher_share (of the batch) and phase/acceptance.

    Raises:
        ValueError: a setting that would drop the answer column, or images in the data.
    """

    _tag_names = ("trl", "distillation", "sg-opd")

    def __init__(
        self,
        *args: Any,
        verifier: Verifier,
        gate: str | Gate = "sg-opd",
        estimator: str = "full",
        cold_start_steps: int = 0,
        teacher_share: float = 0.5,
        teacher_share_schedule: str = "linear",
        **kwargs: Any,
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
        # One completion a row here: each row is a group of its own. The share depends on the step alone, so a resumed
        # run needs no state of it.
        settings: Any = SimpleNamespace(
            cold_start_steps=cold_start_steps,
            teacher_share=teacher_share,
            teacher_share_schedule=teacher_share_schedule,
            num_generations=1,
        )
        self.phases = Phases(settings)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if "pixel_values" in output:
            raise ValueError("SGOPDTrainer reads text only; the batch has images: use trl.DistillationTrainer for them")
        if "tool_mask" in output and self.phases.config.cold_start_steps:
            raise ValueError("phased teacher sampling has no tool calls: set cold_start_steps=0, or drop the tools")
        taught: list[int] = []
        if self.model.training and self.phases.share(self.state.global_step) > 0:
            taught = self._offer_slots(output, inputs)
        prompts = [row[on.bool()].tolist() for row, on in zip(output["prompt_ids"], output["prompt_mask"])]
        verdict = self._judge(prompts, output["completion_ids"], output["completion_mask"], inputs)
        verdict[taught] = CORRECT
        output["verdict"] = verdict
        return output

    def _judge(self, prompts: list[list[int]], ids: Tensor, mask: Tensor, examples: list[dict[str, Any]]) -> Tensor:
        lengths = mask.sum(1)
        completions = [row[:n] for row, n in zip(ids.cpu(), lengths.tolist())]
        responses = texts_of(self.processing_class, prompts, completions, THOUGHT_TAGS)
        # A completion that was cut off ends with a token that is no end of sequence.
        last = ids.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        cut = ~torch.isin(last, torch.tensor(self.eos_token_ids, device=ids.device))
        return self._verdicts(responses, examples, cut.tolist()).to(ids.device)

    def _offer_slots(self, output: dict[str, Any], inputs: list[dict[str, Any]]) -> list[int]:
        """Puts endorsed teacher completions in the place of the student's; returns their rows."""
        step, processes = self.state.global_step, self.accelerator.num_processes
        seed = (self.args.seed * 1_000_003 + step) * processes + self.accelerator.process_index
        rows = [row for row, count in enumerate(self.phases.slots(step, len(inputs), seed)) if count]
        taught: list[int] = []
        if rows:
            prompts, attention = output["prompt_ids"][rows], output["prompt_mask"][rows]
            teacher = self.accelerator.unwrap_model(self.teacher_model).eval()
            with torch.no_grad():
                whole = teacher.generate(
                    input_ids=prompts, attention_mask=attention, generation_config=self.generation_config
                )
            ids = whole[:, prompts.shape[1] :]
            ended = torch.isin(ids, torch.tensor(self.eos_token_ids, device=ids.device)).int()
            mask = (ended.cumsum(1) - ended == 0).to(output["completion_mask"].dtype)  # up to the first end, with it
            told = [prompt[on.bool()].tolist() for prompt, on in zip(prompts, attention)]
            endorsed = self._judge(told, ids, mask, [inputs[row] for row in rows]) == CORRECT
            taught = [row for row, right in zip(rows, endorsed.tolist()) if right]
            if taught:
                ids, mask = ids[endorsed], mask[endorsed]
                width = max(ids.shape[1], output["completion_ids"].shape[1])
                pad = self.processing_class.pad_token_id
                for name, new, fill in (("completion_ids", ids, pad), ("completion_mask", mask, 0)):
                    grown = functional.pad(output[name], (0, width - output[name].shape[1]), value=fill)
                    grown[taught] = functional.pad(new, (0, width - new.shape[1]), value=fill)
                    output[name] = grown
                output["completion_ids"].masked_fill_(output["completion_mask"] == 0, pad)
        # The denominator counts the tokens that are there now, on every process.
        output["num_items_in_batch"] = self.accelerator.gather(output["completion_mask"].sum()).sum()
        metrics = self._metrics["train"]
        metrics["phase/teacher_share"].append(len(taught) / len(inputs))
        metrics["phase/acceptance"].append(len(taught) / len(rows) if rows else float("nan"))
        return taught

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
        loss, stats = gated_kl_loss(  # type: ignore[call-overload,unused-ignore]
            student_hidden,
            student_head.weight,
            teacher_hidden,
            teacher_head.weight,
            inputs["completion_ids"].masked_fill(mask == 0, -100),
            inputs["verdict"].unsqueeze(1),
            gate=self.gate,
            estimator=self.estimator,
            divergence=("jsd", self.beta),
            temperature=self.temperature,
            num_items=num_items_in_batch,
            return_stats=True,
            **head_arguments(student_head, teacher_head),
        )
        valid, verdict = mask != 0, inputs["verdict"].unsqueeze(1)
        kl = torch.stack([stats.kl.double().sum(), valid.sum().double()])
        gate = gate_sums(stats.logratio, stats.gate, stats.agree, verdict, valid)
        self._sums = torch.cat([kl.unsqueeze(0), gate])
        return loss, stats.student_entropy.sum(), valid.sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        log_ratios(self, ("kl", *GATE_METRICS), self._sums)
        return result
