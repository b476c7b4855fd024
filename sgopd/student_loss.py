"""The student's forward and the loss as one module, so that a head that lies in shards is whole inside `forward`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import PreTrainedModel

from sgopd.config import Config
from sgopd.models import head_arguments, head_of, hidden_states
from sgopd.rollout import Batch
from sgopd.teachers import Hidden, Routed, Targets, TopK
from sgopd.weights import Rule, token_weights, weigh
from sgopd_kernels import Gate, Stats, gated_kl_loss, gated_logprob_loss, gated_topk_kl_loss


class Measured(NamedTuple):
    """What a forward tells beside its loss."""

    own: Tensor  # [n] which of the batch's N positions are in the student's own rollouts
    stats: Stats  # of these, each [n]
    teacher_rollouts: Tensor | None  # the loss on the others, if there are any; in the loss already
    teacher_stats: Stats | None  # of the others, where their loss has any
    importance: Tensor | None  # weights of the student's own rollouts, where they are corrected
    reward: Tensor | None  # the task reward's term before its weight, where there is one; in the loss already


class StudentLoss(nn.Module):
    """The loss of micro-batches of B rollouts with N positions.

    Args:
        vocabulary: tokens that can be sampled.
        rule: of a gate that needs whole rollouts.
    """

    def __init__(
        self, student: PreTrainedModel, config: Config, gate: Gate, vocabulary: int, rule: Rule | None = None
    ) -> None:
        super().__init__()
        self.student, self.config, self.vocabulary, self.rule = student, config, vocabulary, rule
        self.takes_reliability = gate.needs_reliability or config.teacher_reliability != "off"
        self.settings: dict[str, Any] = {
            # Verdicts are shuffled over the rollouts of the whole batch, before they come here.
            "gate": dataclasses.replace(gate, control=None) if gate.control == "shuffled" else gate,
            "temperature": config.temperature,
            "precision": config.precision,
            "backend": config.backend,
        }

    def forward(
        self,
        batch: Batch,
        verdict: Tensor,
        targets: Targets,
        reference: Hidden | None,
        num_items: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Measured]:
        """The loss divided by `num_items`. `verdict` is [B]; targets and reference are of the N positions."""
        config, rows = self.config, batch.rows
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=config.bf16):
            hidden_NH = hidden_states(self.student, *batch.inputs)[batch.at]
        reliability = torch.tensor([rollout.reliability for rollout in batch.rollouts], device=rows.device)[rows]
        from_teacher = torch.tensor([one.source == "teacher" for one in batch.rollouts], device=rows.device)[rows]
        verdict = verdict[rows]
        weights = token_weights(batch, config)

        def gated(part: Tensor, **choices: Any) -> tuple[Tensor, Stats]:
            if self.takes_reliability:
                choices["reliability"] = reliability[part]
            theirs = None if reference is None else reference.part(part)
            given = hidden_NH[part], targets.part(part), theirs, batch.token_ids[part], verdict[part]
            if self.rule is not None:
                with torch.no_grad():  # estimator sampled refuses an infinite d, which the rule may weigh 0
                    _, stats = self.gated(*given, gate="opd", estimator="full")
                weight = weigh(self.rule, stats, rows[part], verdict[part], batch.rollouts, config)
                if self.rule.argument == "token_weight":
                    weight = weight * choices.get("token_weight", 1.0)  # the rollouts' importance
                choices[self.rule.argument] = weight
            if weights is not None:
                choices["token_weight"] = weights[part] * choices.get("token_weight", 1.0)
            return self.gated(*given, **(choices | {"num_items": num_items, "generator": generator}))

        own, theirs = (~from_teacher).nonzero().squeeze(-1), from_teacher.nonzero().squeeze(-1)
        importance, choices = None, {}
        if config.importance_clip is not None:
            importance = self.importance(hidden_NH.detach(), batch, config.importance_clip)
            choices["token_weight"] = importance[rows[own]]
        loss, stats = gated(own, **choices)
        reward = None
        if config.reward_weight:
            advantage = torch.tensor([one.advantage for one in batch.rollouts], device=rows.device)
            advantage = (advantage if importance is None else advantage * importance)[rows]
            reward = self.nll(hidden_NH, batch.token_ids, advantage.nonzero().squeeze(-1), advantage) / num_items
            loss, reward = loss + config.reward_weight * reward, reward.detach()
        if importance is not None:
            importance = importance[rows[own].unique()]
        if not len(theirs):
            return loss, Measured(own, stats, None, None, importance, reward)
        their_stats = None
        if config.teacher_rollout_loss == "nll":
            their_loss = self.nll(hidden_NH, batch.token_ids, theirs) / num_items
        elif config.teacher_rollout_loss == "forward-kl":
            their_loss, their_stats = gated(theirs, estimator="full", divergence="forward-kl")
        else:
            their_loss, their_stats = gated(theirs)
        return loss + their_loss, Measured(own, stats, their_loss.detach(), their_stats, importance, reward)

    @torch.no_grad()
    def logprobs(self, batch: Batch, temperature: float) -> Tensor:
        """[N] log-probabilities of the batch's tokens, without dropout."""
        was_training = self.student.training
        self.student.eval()
        with torch.autocast(batch.rows.device.type, torch.bfloat16, enabled=self.config.bf16):
            hidden_NH = hidden_states(self.student, *batch.inputs)[batch.at]
        self.student.train(was_training)
        return self.token_logprobs(hidden_NH, batch.token_ids, temperature)

    def token_logprobs(self, hidden_NH: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
        """[N], as the loss computes them, without a gradient."""
        head = head_of(self.student)
        weight = head.weight.detach()[: self.vocabulary]
        if self.config.bf16:
            hidden_NH, weight = hidden_NH.bfloat16(), weight.bfloat16()
        nothing = torch.zeros(len(token_ids), device=token_ids.device)
        _, stats = gated_logprob_loss(
            *(hidden_NH, weight, token_ids, nothing, nothing.long()),
            gate="opd",
            temperature=temperature,
            precision="exact",
            backend=self.config.backend,
            student_bias=None if head.bias is None else head.bias.detach()[: self.vocabulary],
            student_logit_scale=head.logit_scale,
            student_softcap=head.softcap,
            return_stats=True,
        )
        return stats.student_logprob

    def importance(self, hidden_NH: Tensor, batch: Batch, clip: float) -> Tensor:
        """[B] min(π(completion) / μ(completion), clip), μ being what sampled it.

        A token's loss depends on all tokens before it, its gate through the verdict on the whole completion. So the
        weight that makes the mean over μ's completions the mean over π's is that of the whole completion; the clip
        bounds its variance, at the price of a bias (truncated importance sampling: Ionides 2008).
        """
        now = self.token_logprobs(hidden_NH, batch.token_ids, self.config.temperature)
        then = torch.cat([rollout.completion.logprobs for rollout in batch.rollouts]).to(now)
        total = now.new_zeros(len(batch.rollouts)).index_add(0, batch.rows, now - then)
        return total.clamp(max=math.log(clip)).exp()

    def nll(self, hidden_NH: Tensor, token_ids: Tensor, part: Tensor, factor: Tensor | None = None) -> Tensor:
        """Sum over the positions `part` of -log pi_S(token), times factor [N]. With an advantage for a factor, its
        gradient is the policy gradient. 1,024 tokens at a time; the backward pass makes the logits again."""
        head = head_of(self.student)

        def piece(hidden: Tensor, ids: Tensor, factor: Tensor | None) -> Tensor:
            logits = head.logits(hidden)[:, : self.vocabulary].float() / self.config.temperature
            if factor is None:
                return nn.functional.cross_entropy(logits, ids, reduction="sum")
            return (factor * nn.functional.cross_entropy(logits, ids, reduction="none")).sum()

        pieces = [
            recomputed(piece, hidden_NH[at], token_ids[at], None if factor is None else factor[at], use_reentrant=False)
            for at in part.split(1024)
        ]
        return torch.stack(pieces).sum()

    def gated(
        self,
        hidden_NH: Tensor,
        targets: Targets,
        reference: Hidden | None,
        token_ids: Tensor,
        verdict: Tensor,
        **choices: Any,
    ) -> tuple[Tensor, Stats]:
        """The loss of sgopd_kernels for this kind of targets, with this run's settings, and its statistics.

        `choices` are arguments of that call; tensors of them are of the N positions. Targets that are not a whole
        distribution have an estimator of their own, whatever is chosen.
        """
        if isinstance(targets, Routed):
            return self.gated_by_several(hidden_NH, targets, reference, token_ids, verdict, **choices)
        config, head = self.config, head_of(self.student)
        weight = head.weight
        if config.bf16:  # as autocast treats a head: bf16 operands (the kernel keeps its logits in fp32)
            hidden_NH, weight = hidden_NH.bfloat16(), weight.bfloat16()
        if reference is not None:
            choices |= {
                "reference_hidden": reference.hidden_NH,
                "reference_weight": reference.head.weight,
                "reference_bias": reference.head.bias,
                "reference_logit_scale": reference.head.logit_scale,
                "reference_softcap": reference.head.softcap,
            }
        if not isinstance(targets, Hidden):
            choices.pop("estimator", None)
            own = {
                "student_bias": head.bias,
                "student_logit_scale": head.logit_scale,
                "student_softcap": head.softcap,
                "return_stats": True,
            }
            if isinstance(targets, TopK):
                given: tuple[Tensor, ...] = token_ids, targets.ids_NK, targets.logprob_NK, verdict
                loss, stats = gated_topk_kl_loss(hidden_NH, weight, *given, **(self.settings | own | choices))
            else:
                given = token_ids, targets.logprob_N, verdict
                loss, stats = gated_logprob_loss(hidden_NH, weight, *given, **(self.settings | own | choices))
            assert isinstance(stats, Stats)
            return loss, stats
        settings = self.settings | {
            "estimator": config.estimator,
            "divergence": config.divergence_argument,
            **head_arguments(head, targets.head),
        }
        heads = hidden_NH, weight, targets.hidden_NH, targets.head.weight
        loss, stats = gated_kl_loss(*heads, token_ids, verdict, return_stats=True, **(settings | choices))
        assert isinstance(stats, Stats)
        return loss, stats

    def gated_by_several(
        self,
        hidden_NH: Tensor,
        targets: Routed,
        reference: Hidden | None,
        token_ids: Tensor,
        verdict: Tensor,
        **choices: Any,
    ) -> tuple[Tensor, Stats]:
        """`gated`, one call a teacher: the sum of their losses, and their statistics in the order of the positions."""
        places = [(targets.which_N == number).nonzero().squeeze(-1) for number in range(len(targets.targets))]
        told: list[tuple[Tensor, Stats]] = []
        for place, theirs in zip(places, targets.targets):
            if len(place) or not (len(token_ids) or told):  # without any position, one call for a loss of 0
                own = {
                    name: value[place] if isinstance(value, Tensor) and value.shape == token_ids.shape else value
                    for name, value in choices.items()
                }
                theirs_reference = None if reference is None else reference.part(place)
                given = hidden_NH[place], theirs, theirs_reference, token_ids[place], verdict[place]
                told.append(self.gated(*given, **own))
        losses, stats = zip(*told)
        order = torch.cat(places).argsort()
        return torch.stack(losses).sum(), Stats.joined(stats, order)
