"""The public calls: checks at the door, then one op. Formulas: docs/method.md."""

from __future__ import annotations

import difflib
import numbers
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends
from ._checks import FLOATS, INTEGERS, constant, integer, number, one_of, positive, require, scale, tensor
from .gate import Gate, cell_weights, choose, draw_agreement, resolve_gate
from .ops import TENSORS, fused_loss, problem_of, refuse_transforms, scale_of
from .oracle import STATS, token_values
from .plans.base import KEPT, PLANS
from .plans.calibration import budget_of
from .problem import Spec
from .values import check_logprob, check_sampled, check_values

Divergence = str | tuple[str, float]
# Tensors whose values the reference looks at on the host.
_VALUES = ("token_ids", "verdict", "reliability", "teacher_logprob", "topk_ids", "topk_logprob", "behaviour_logprob")


@dataclass(frozen=True)
class Stats:
    """What a call measured on the way, detached; tensors are shaped like token_ids, float32, 0 where ignored.

    Attributes:
        kl: the chosen divergence before the gate, in nats (reverse KL unless `divergence` says otherwise; the
            reverse KL under estimator="sampled"). NaN where the teacher gave no distribution.
        student_logprob: log pi_S(y) of the sampled token under the loss's temperature.
        teacher_logprob: log pi_T(y).
        logratio: d = teacher_logprob - student_logprob, subtracted in float64.
        student_entropy, teacher_entropy: in nats. Teacher's NaN where it gave no distribution.
        gate: the weight w.
        agree: bool, d * verdict > tolerance.
        backend: which backend computed it: "cpu", "triton", "torch", "cuda" or "reference".
        plan: the cheapest plan that ran on a part of the call: "blocks", "quantized", "filtered", "exact", or
            "reference".
        kept: share of the gradient's [tokens, vocabulary] entries that entered its products one by one, or ("blocks")
            with 16 bits in place of 8; 1 for exact. NaN where no gradient was made.
        error_estimate: estimated relative error of loss and gradients, of the worst chunk. 0 for exact, unless its
            products round the gradient to bf16 (Triton, where the precision allows it).

    reduction="none" makes its gradients in the backward, by a plan of its own: until that has run, plan and
    error_estimate are those of the losses, and kept is NaN; from then on they cover both (plan the cheaper,
    error_estimate the larger). Not where the call is compiled, or its backward batched (`is_grads_batched`,
    `vectorize`): there they stay those of the losses.
    """

    kl: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor
    logratio: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    gate: Tensor
    agree: Tensor
    backend: str
    # [3] float64, plans.base.Report; None: the reference backend. Read late: torch.compile has no values yet.
    report: Tensor | None = None

    @property
    def plan(self) -> str:
        return "reference" if self.report is None else PLANS[int(self.report[0])]

    @property
    def kept(self) -> float:
        return 1.0 if self.report is None else float(self.report[KEPT])

    @property
    def error_estimate(self) -> float:
        return 0.0 if self.report is None else float(self.report[2])


def gated_kl_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_ids: Tensor,
    verdict: Tensor | int,
    *,
    gate: str | Gate = "sg-opd",
    reliability: Tensor | float | None = None,
    estimator: Literal["full", "sampled"] = "full",
    divergence: Divergence = "reverse-kl",
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    reference_logit_scale: float = 1.0,
    reference_softcap: float | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items: Tensor | float | None = None,
    precision: str | float = "auto",
    backend: str = "auto",
    generator: torch.Generator | None = None,
    process_group: dist.ProcessGroup | None = None,
    workspace: int | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Sign-gated distillation loss of a student towards a frozen teacher, from hidden states.

    The [tokens, vocabulary] logits are never made as a whole. With p the student's and q the teacher's
    distribution over the shared vocabulary, y the sampled token, d = log q(y) - log p(y) and w the gate's weight
    (a constant for the gradient), a token's loss is

        estimator="full":     w * divergence(p, q)           reverse KL: sum_v p (log p - log q)
        estimator="sampled": -w * d * log p(y)               d detached

    (arXiv 2606.09304; docs/method.md section 2). Gradients flow to student_hidden, student_weight, student_bias.

    Args:
        student_hidden: [..., Hs] last hidden states at the positions that predict `token_ids`. fp32, bf16, fp16
            (or fp64, served by the reference backend).
        student_weight: [V_S, Hs] output head; may be tied to the embedding. May differ in dtype from the hidden.
        teacher_hidden: [..., Ht], same leading shape. Constant.
        teacher_weight: [V_T, Ht]. V_S != V_T: both distributions are over the first min(V_S, V_T) rows.
        token_ids: [...] int64, the sampled tokens; `ignore_index` leaves a position out.
        verdict: the verifier's word on each rollout: 1 correct, -1 incorrect, 0 unknown. A number, or a tensor
            with as many dimensions as token_ids that broadcasts to it ([B, 1] for [B, T]).
        gate: a preset's name (`sgopd_kernels.PRESETS`) or a `Gate`.
        reliability: in [0, 1], shaped like `verdict`: how far the teacher is trusted in conflicts; the conflict
            weight becomes r + (1 - r) * conflict. None: 0.
        estimator: "full" (sum over the vocabulary) or "sampled" (policy gradient on the sampled token).
        divergence: "reverse-kl", "forward-kl", or ("jsd", beta) with TRL's and GKD's meaning: beta * KL(q || m) +
            (1 - beta) * KL(p || m), m = beta q + (1 - beta) p, 0 < beta < 1. Of the full estimator.
        student_bias, teacher_bias: [V_S], [V_T].
        temperature: divides both models' logits (after softcap). 1e-6 to 1e6.
        student_logit_scale, teacher_logit_scale: multiply projection plus bias. 1e-6 to 1e6.
        student_softcap, teacher_softcap: c > 0: logits become c * tanh(logits / c). None: no cap.
        reference_hidden, reference_weight, reference_bias, reference_logit_scale, reference_softcap: a third head
            pi_R. The target becomes log pi* = w log pi_T + (1 - w) log pi_R (G-OPD, arXiv 2602.12125;
            renormalised under "full"), in place of the weight on the loss.
        ignore_index: positions with this token id have loss, stats and gradient 0.
        reduction: "mean" divides the sum by the number of valid tokens, or by `num_items`; "sum"; "none" returns
            the loss per token, shaped like token_ids (its backward computes the logits again).
        num_items: the mean's denominator: valid tokens of the whole optimizer step, over micro-batches and ranks. A
            number > 0 or a tensor of one, a constant for the gradient.
        precision: the relative error of loss and gradients that may be traded for speed. "exact": none (fp32 products
            throughout). "auto": 1.5e-3, what rounding a gradient to bf16 costs. "bf16": 2^-8. Or a number. A budget:
            each chunk of tokens takes the cheapest plan whose error, estimated from what was measured on that chunk,
            keeps within it (docs/loss.md). It holds for a chunk's gradient as a whole: one token's row of the hidden
            gradient may be off by a few per cent, one that is small against the others' by nearly all of it; where
            single rows matter pass "exact". `Stats.plan` and `Stats.error_estimate` say what came of it. The CPU
            backend has such plans for calls of 2^31.5 multiply-adds a projection or more (105 tokens of SmolLM2), with
            AMX of 2^28. The Triton backend, from 2^33, filters columns where few matter, and rounds a bf16 head's
            gradient to bf16 for its products (docs/gpu.md). All else is exact.
        backend: "auto", "cpu" (native), "triton" (CUDA devices), "torch" (any device), "reference" (plain autograd in
            float64, O(N V) memory, twice differentiable).
        generator: of the gate's controls ("random", "shuffled"). None: torch's default generator.
        process_group: vocabulary-parallel mode: each rank passes its slice of every head (and bias), contiguous in the
            order of ranks and of one width in all heads, with the same hidden states, global token_ids and settings.
            Loss, stats and the hidden gradient are equal on all ranks, the heads' gradients are the slice's. Torch
            backend. Random draws are the first rank's.
        workspace: bytes held above inputs and gradients. None: 256 MiB, 2 GiB with the Triton backend.
        return_stats: also return `Stats`.

    Returns:
        The loss, float32 (float64 for float64 inputs): a scalar, or token_ids' shape for reduction="none".
        With return_stats, (loss, Stats).

    Raises:
        ValueError, TypeError: an argument is out of its domain; the message names it, and the remedy.
        NotImplementedError: a combination that is not built.

    A column where a target's logit is -inf is outside the shared vocabulary: it leaves the student's distribution
    too. A student's -inf logit has probability 0. Equal models give loss 0 and gradient 0.
    A sampled token in a column that a target masks has both log-probabilities -inf and no log-ratio (NaN): its gate is
    neutral, and its divergence counts. In a column that the student alone masks its log-ratio is +inf. The sampled
    estimator refuses both, unless their gate is 0. A NaN in an operand makes the loss and its gradients NaN.
    On a CUDA device values are asserted there, without a wait: torch reports a device-side assert.

    Reverse-mode autograd, once. torch.func's derivatives, forward mode and second derivatives are refused:
    backend="reference" has them. Under torch.func.vmap calls run one after the other.
    """
    call = _Call("gated_kl_loss", student_hidden, student_weight, student_bias, token_ids, verdict, reliability)
    teacher = call.head("teacher", teacher_hidden, teacher_weight, teacher_bias)
    reference: dict[str, Tensor | None] = {}
    if (reference_hidden is None) != (reference_weight is None):
        raise ValueError("reference_hidden and reference_weight come together: pass both or neither")
    if reference_hidden is not None:
        assert reference_weight is not None
        reference = call.head("reference", reference_hidden, reference_weight, reference_bias)
    elif reference_bias is not None or reference_logit_scale != 1.0 or reference_softcap is not None:
        raise ValueError("reference_bias, reference_logit_scale, reference_softcap need reference_hidden and _weight")
    name, beta = _divergence(divergence)
    one_of("estimator", estimator, ("full", "sampled"))
    if estimator == "sampled" and name != "reverse-kl":
        raise ValueError(
            f"divergence={divergence!r} belongs to estimator='full'; the sampled estimator is the policy gradient "
            "of the reverse KL: use divergence='reverse-kl'"
        )
    return call.run(
        gate=gate,
        choices={
            "estimator": estimator,
            "divergence": name,
            "beta": beta,
            "temperature": scale("temperature", temperature),
            **_head("student", student_logit_scale, student_softcap),
            **_head("teacher", teacher_logit_scale, teacher_softcap),
            **_head("reference", reference_logit_scale, reference_softcap),
            "ignore_index": ignore_index,
        },
        tensors={**teacher, **reference},
        reduction=reduction,
        num_items=num_items,
        precision=precision,
        backend=backend,
        generator=generator,
        process_group=process_group,
        workspace=workspace,
        return_stats=return_stats,
    )


def gated_logprob_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    token_ids: Tensor,
    teacher_logprob: Tensor,
    verdict: Tensor | int,
    *,
    gate: str | Gate = "sg-opd",
    reliability: Tensor | float | None = None,
    behaviour_logprob: Tensor | None = None,
    ratio_clip: float = 2.0,
    student_bias: Tensor | None = None,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items: Tensor | float | None = None,
    precision: str | float = "auto",
    backend: str = "auto",
    generator: torch.Generator | None = None,
    workspace: int | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """The sampled estimator for a teacher that gives only log pi_T(y): a server, another engine.

    A token's loss is -w * d * rho * log pi_S(y), with d = teacher_logprob - log pi_S(y), w the gate's weight and
    rho = min(pi_S(y) / pi_behaviour(y), ratio_clip), all three constant for the gradient (truncated importance
    sampling; rho = 1 without `behaviour_logprob`). docs/method.md, section 2.

    Args:
        student_hidden: [..., Hs]; student_weight: [V, Hs]; token_ids: [...] int64, as in `gated_kl_loss`.
        teacher_logprob: [...] log pi_T of token_ids, in nats, at the same temperature. A constant, as are all but the
            student's. At most 0 (a rounding of 1e-3 is forgiven). -inf, a token that the teacher cannot produce, is
            refused unless the token's gate is 0: its advantage would be infinite.
        verdict, gate, reliability: as in `gated_kl_loss`.
        behaviour_logprob: [...] log-probabilities of the policy that sampled token_ids, for stale rollouts. Finite
            (or NaN, which the loss shows), at most 0.
        ratio_clip: > 0, the importance ratio's upper bound. Used with behaviour_logprob.
        The others: as in `gated_kl_loss`.

    Returns: as `gated_kl_loss`; `Stats.kl` and `Stats.teacher_entropy` are NaN (0 where ignored).
    """
    call = _Call("gated_logprob_loss", student_hidden, student_weight, student_bias, token_ids, verdict, reliability)
    tensors: dict[str, Tensor | None] = {
        "teacher_logprob": call.per_token("teacher_logprob", teacher_logprob),
        "behaviour_logprob": None
        if behaviour_logprob is None
        else call.per_token("behaviour_logprob", behaviour_logprob),
    }
    return call.run(
        gate=gate,
        choices={
            "estimator": "sampled",
            "temperature": scale("temperature", temperature),
            **_head("student", student_logit_scale, student_softcap),
            "ratio_clip": positive("ratio_clip", ratio_clip),
            "ignore_index": ignore_index,
        },
        tensors=tensors,
        reduction=reduction,
        num_items=num_items,
        precision=precision,
        backend=backend,
        generator=generator,
        workspace=workspace,
        return_stats=return_stats,
    )


def gated_topk_kl_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    token_ids: Tensor,
    topk_ids: Tensor,
    topk_logprob: Tensor,
    verdict: Tensor | int,
    *,
    gate: str | Gate = "sg-opd",
    reliability: Tensor | float | None = None,
    student_bias: Tensor | None = None,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items: Tensor | float | None = None,
    precision: str | float = "auto",
    backend: str = "auto",
    generator: torch.Generator | None = None,
    workspace: int | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Gated reverse KL towards a teacher that gives its top-k log-probabilities: a server, another engine.

    The vocabulary is divided into the k given columns and one bucket for all others:

        KL = sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail)  >= 0

    with p_tail and q_tail what is left of 1. A lower bound of the full reverse KL, equal to it for k = V. (Leaving the
    tail out, as top-k losses often do, can be negative and rewards mass outside the top k.)

    Args:
        student_hidden, student_weight, token_ids, verdict: as in `gated_kl_loss`.
        topk_ids: [..., K] int64 columns in [0, V), distinct in a row. Put the sampled token among them where the
            teacher gives it: beyond the top k its d is the bucket's, log q_tail - log p_tail.
        topk_logprob: [..., K] the teacher's log-probabilities, in nats, normalised over its whole vocabulary, at the
            same temperature. Their sum must not exceed 1 (a rounding of 1e-3 is forgiven, and divided out). -inf: the
            teacher masks the column, which leaves the student's distribution too, as in `gated_kl_loss`; where the
            rest of the mass is 0 (q_tail), so do all columns beyond the top k. It is no padding: cut K instead.
        The others: as in `gated_kl_loss`.

    Returns: as `gated_kl_loss`; `Stats.teacher_entropy` is NaN.

    Raises:
        ValueError: also for repeated ids in a row, probabilities that sum to more than 1.
    """
    call = _Call("gated_topk_kl_loss", student_hidden, student_weight, student_bias, token_ids, verdict, reliability)
    if isinstance(topk_ids, Tensor) and topk_ids.dtype not in INTEGERS:
        raise ValueError(f"topk_ids must be integers of shape {(*call.shape, 'K')}, got {topk_ids.dtype}")
    tensor("topk_ids", topk_ids, INTEGERS, call.device)
    tensor("topk_logprob", topk_logprob, FLOATS, call.device)
    if topk_ids.shape[:-1] != call.shape or topk_ids.ndim != len(call.shape) + 1 or topk_ids.shape[-1] < 1:
        raise ValueError(f"topk_ids must be of shape {(*call.shape, 'K')}, K >= 1, got {tuple(topk_ids.shape)}")
    if topk_logprob.shape != topk_ids.shape:
        raise ValueError(
            f"topk_logprob must have topk_ids' shape {tuple(topk_ids.shape)}, got {tuple(topk_logprob.shape)}"
        )
    k = topk_ids.shape[-1]
    return call.run(
        gate=gate,
        choices={
            "temperature": scale("temperature", temperature),
            **_head("student", student_logit_scale, student_softcap),
            "ignore_index": ignore_index,
        },
        tensors={
            "topk_ids": topk_ids.reshape(-1, k).long(),
            "topk_logprob": topk_logprob.detach().reshape(-1, k),
        },
        reduction=reduction,
        num_items=num_items,
        precision=precision,
        backend=backend,
        generator=generator,
        workspace=workspace,
        return_stats=return_stats,
    )


def gated_advantage(
    student_logprob: Tensor,
    teacher_logprob: Tensor,
    verdict: Tensor | int,
    *,
    gate: str | Gate = "sg-opd",
    reliability: Tensor | float | None = None,
    clip: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Elementwise: the gated advantage of each token, for trainers that own their policy-gradient loss.

    Args:
        student_logprob, teacher_logprob: [...] log-probabilities of the sampled tokens, in nats; at most 0 (a rounding
            of 1e-3 is forgiven). A NaN gives a NaN. -inf on one side, a token that one model cannot produce, is an
            infinite d: refused unless `clip` bounds it or its weight is 0. -inf on both: no sign, and NaN.
        verdict: 1, -1, 0; a number, or a tensor with as many dimensions that broadcasts ([B, 1] for [B, T]).
        gate, reliability, generator: as in `gated_kl_loss`.
        clip: bound on |w * d|, > 0. None: no bound.

    Returns:
        (advantage, weight), float32 [...], detached: advantage = w * d with d = teacher_logprob - student_logprob,
        to be maximised along log pi_S(y). Never whitened: the gate's ratio is the method.
    """
    chosen = resolve_gate(gate)
    tensor("student_logprob", student_logprob, FLOATS)
    tensor("teacher_logprob", teacher_logprob, FLOATS)
    if student_logprob.device != teacher_logprob.device:
        raise ValueError(
            f"teacher_logprob is on {teacher_logprob.device}, student_logprob on {student_logprob.device}: move one"
        )
    _generator(generator)
    if student_logprob.shape != teacher_logprob.shape:
        raise ValueError(
            f"teacher_logprob must have student_logprob's shape {tuple(student_logprob.shape)}, "
            f"got {tuple(teacher_logprob.shape)}"
        )
    if clip is not None:
        clip = positive("clip", clip)
    check_logprob("student_logprob", student_logprob.detach())
    check_logprob("teacher_logprob", teacher_logprob.detach())
    shape, device = student_logprob.shape, student_logprob.device
    d = (teacher_logprob.detach().double() - student_logprob.detach().double()).reshape(-1)
    verdict_N = _per_rollout("verdict", verdict, shape, device, chosen, generator).reshape(-1)
    reliability_N = None
    if reliability is not None:
        reliability_N = _per_rollout("reliability", reliability, shape, device, None, None).reshape(-1)
        require((reliability_N >= 0) & (reliability_N <= 1), "reliability: values must lie in [0, 1]")
    require(
        (verdict_N == 1) | (verdict_N == 0) | (verdict_N == -1),
        "verdict: values must be 1 (correct), -1 (incorrect) or 0 (unknown)",
    )
    weights = cell_weights(
        verdict_N, reliability_N, chosen.agree_pair, chosen.conflict_pair, chosen.neutral, chosen.keep
    )
    forced = None
    if chosen.control == "random":
        forced = draw_agreement(d, verdict_N, chosen.tolerance, _uniform(d.numel(), device, generator))
    weight, _ = choose(d, verdict_N, weights, chosen.tolerance, forced)
    advantage = torch.where(weight != 0, weight * d, 0.0)
    if clip is None:
        require(
            ~advantage.isinf(),
            "teacher_logprob, student_logprob: one of a token's is -inf, and its advantage infinite: pass clip, or "
            "leave out tokens that the teacher cannot produce",
        )
    else:
        advantage = advantage.clamp(-clip, clip)
    return advantage.float().reshape(shape), weight.float().reshape(shape)


class _Call:
    """The checks and the path that all fused calls share."""

    def __init__(
        self,
        name: str,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        verdict: Tensor | int,
        reliability: Tensor | float | None,
    ) -> None:
        self.name = name
        tensor("token_ids", token_ids, INTEGERS)
        self.token_ids, self.shape, self.device = token_ids, token_ids.shape, token_ids.device
        self.verdict, self.reliability = verdict, reliability
        self.tensors: dict[str, Tensor | None] = dict.fromkeys(TENSORS)
        self.tensors.update(self.head("student", hidden, weight, bias, detach=False))

    def head(
        self, side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, detach: bool = True
    ) -> dict[str, Tensor | None]:
        for what, given in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if given is None and what == "bias":
                continue
            if type(given).__name__ == "DTensor" and given is not None and given.requires_grad and not detach:
                raise NotImplementedError(
                    f"{side}_{what} is a DTensor that requires a gradient, and how that is reduced over ranks is its "
                    "wrapper's to say: call the loss inside the wrapper's forward (FSDP2 has gathered the head "
                    "there), or pass full_tensor(grad_placements=...)"
                )
            tensor(f"{side}_{what}", given, FLOATS, self.device)
        if weight.ndim != 2 or weight.numel() == 0:
            raise ValueError(f"{side}_weight must be [V, H], not empty, got {tuple(weight.shape)}")
        if hidden.shape != (*self.shape, weight.shape[1]):
            raise ValueError(
                f"{side}_hidden must be {(*self.shape, weight.shape[1])}: token_ids' shape {tuple(self.shape)} and "
                f"{side}_weight's width {weight.shape[1]}; got {tuple(hidden.shape)}. Pass the hidden states of the "
                "positions that predict token_ids (shifted by one)"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{side}_bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
        # A frozen head that is sharded (FSDP2) is gathered: without a gradient there is nothing to reduce.
        weight, bias = _gathered(weight), None if bias is None else _gathered(bias)
        tensors = {
            f"{side}_hidden": hidden.reshape(-1, hidden.shape[-1]),
            f"{side}_weight": weight,
            f"{side}_bias": bias,
        }
        return {k: t.detach() if detach and t is not None else t for k, t in tensors.items()}

    def per_token(self, name: str, given: Tensor) -> Tensor:
        tensor(name, given, FLOATS, self.device)
        if given.shape != self.shape:
            raise ValueError(f"{name} must have token_ids' shape {tuple(self.shape)}, got {tuple(given.shape)}")
        return given.detach().reshape(-1).float()

    def run(
        self,
        *,
        gate: str | Gate,
        choices: dict[str, object],
        tensors: dict[str, Tensor | None],
        reduction: str,
        num_items: Tensor | float | None,
        precision: str | float,
        backend: str,
        generator: torch.Generator | None,
        workspace: int | None,
        return_stats: bool,
        process_group: dist.ProcessGroup | None = None,
    ) -> Tensor | tuple[Tensor, Stats]:
        chosen = resolve_gate(gate)
        one_of("reduction", reduction, ("mean", "sum", "none"))
        if num_items is not None and reduction != "mean":
            raise ValueError(f"num_items is the denominator of reduction='mean'; got reduction={reduction!r}")
        if workspace is not None:
            workspace = integer("workspace", workspace, "a whole number > 0 of bytes", 1)
        if not isinstance(return_stats, bool):
            raise TypeError(f"return_stats must be True or False, got {return_stats!r}")
        _generator(generator)
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                f"process_group must be a torch.distributed.ProcessGroup, got {type(process_group).__name__}; a rank "
                "outside the group makes no call"
            )
        choices["ignore_index"] = integer(
            "ignore_index", choices["ignore_index"], "a whole number, at most 2^53 in size"
        )
        spec = Spec(
            agree=chosen.agree_pair,
            conflict=chosen.conflict_pair,
            neutral=chosen.neutral,
            tolerance=chosen.tolerance,
            keep=chosen.keep,
            reduction=reduction,
            workspace=workspace or 0,
            budget=budget_of(precision),
            **choices,  # type: ignore[arg-type]
        )
        all_tensors = {**self.tensors, **tensors}
        all_tensors["token_ids"] = self.token_ids.reshape(-1).long()
        verdict = _per_rollout("verdict", self.verdict, self.shape, self.device, chosen, generator)
        all_tensors["verdict"] = verdict.reshape(-1)
        if self.reliability is not None:
            all_tensors["reliability"] = _per_rollout(
                "reliability", self.reliability, self.shape, self.device, None, None
            ).reshape(-1)
        if chosen.control == "random":
            all_tensors["uniform"] = _uniform(self.token_ids.numel(), self.device, generator)
        if num_items is not None:
            all_tensors["denominator"] = _num_items(num_items, self.device)

        hidden, weight, bias = (all_tensors[k] for k in TENSORS[:3])
        assert hidden is not None and weight is not None
        operands = [t for k, t in all_tensors.items() if t is not None and k.endswith(("_hidden", "_weight", "_bias"))]
        double = any(t.dtype == torch.float64 for t in operands)
        name = backends.resolve(backend, self.device, torch.float64 if double else hidden.dtype)
        if process_group is not None:
            name = self._sharded(backend, name, all_tensors)
        if name == "reference":
            return self._reference(spec, all_tensors, return_stats)
        refuse_transforms(self.name)
        needs_grad = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        group = process_group.group_name if process_group is not None else ""
        loss, stats, *_, report = fused_loss(*all_tensors.values(), *spec.encode(), name, group, needs_grad)
        if reduction == "none":
            loss = loss.reshape(self.shape)
        return (loss, self._stats(stats.detach(), name, report.detach())) if return_stats else loss

    def _sharded(self, asked: str, name: str, tensors: dict[str, Tensor | None]) -> str:
        if asked not in ("auto", "torch") or name == "reference":
            raise NotImplementedError(
                "process_group: the vocabulary-parallel mode is the torch backend's, for float32, bfloat16 and "
                f"float16; got backend={asked!r}{' and float64 inputs' if name == 'reference' else ''}"
            )
        widths = {k: t.shape[0] for k, t in tensors.items() if t is not None and k.endswith("_weight")}
        if len(set(widths.values())) > 1:
            raise ValueError(f"process_group: this rank's slices must have one width in all heads, got {widths}")
        return "torch"

    def _reference(
        self, spec: Spec, tensors: dict[str, Tensor | None], return_stats: bool
    ) -> Tensor | tuple[Tensor, Stats]:
        if any(t is not None and torch._C._functorch.is_batchedtensor(t) for k, t in tensors.items() if k in _VALUES):
            raise NotImplementedError(
                f"{self.name}: backend='reference' reads {', '.join(_VALUES)} on the host, and torch.func.vmap hides "
                "them: pass the batch as leading dimensions, or use another backend"
            )
        problem = problem_of(spec, tensors)
        rows = problem.valid_rows()
        check_values(problem, rows, problem.vocabulary)
        values = token_values(problem, problem.student_hidden, problem.student, torch.float64)
        loss = torch.zeros(self.token_ids.numel(), dtype=torch.float64, device=self.device)
        loss = loss.index_put((rows,), values.loss)
        if spec.reduction == "none":
            loss = loss.reshape(self.shape)
        else:
            loss = (loss * scale_of(problem, tensors["denominator"])).sum()
        loss = loss.to(torch.float64 if problem.student_hidden.dtype == torch.float64 else torch.float32)
        table = torch.zeros(self.token_ids.numel(), len(STATS), dtype=torch.float64, device=self.device)
        table = table.index_put((rows,), torch.stack([v.detach().double() for v in values], -1))
        check_sampled(problem, table)
        if not return_stats:
            return loss
        return loss, self._stats(table, "reference", None)

    def _stats(self, table: Tensor, backend: str, report: Tensor | None) -> Stats:
        columns = dict(zip(STATS, table.unbind(-1)))
        logratio = columns["teacher_logprob"] - columns["student_logprob"]
        fields = {k: v.float().reshape(self.shape) for k, v in columns.items() if k not in ("loss", "agree")}
        return Stats(
            **fields,
            logratio=logratio.float().reshape(self.shape),
            agree=(columns["agree"] != 0).reshape(self.shape),
            backend=backend,
            report=report,
        )


def _gathered(tensor: Any) -> Tensor:
    return tensor.full_tensor() if type(tensor).__name__ == "DTensor" else tensor


def _num_items(value: Tensor | float, device: torch.device) -> Tensor:
    """The denominator, float64 []; a tensor's value is checked where the loss reads it (ops.scale_of)."""
    expected = "a finite number > 0 of valid tokens"
    if not isinstance(value, Tensor):
        return torch.tensor(number("num_items", value, expected, 0.0), dtype=torch.float64, device=device)
    value = constant("num_items", value, FLOATS + INTEGERS, device)
    if value.numel() != 1:
        raise ValueError(f"num_items must be {expected}, got a tensor of shape {tuple(value.shape)}: pass its sum")
    return value.double().reshape(())


def _generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}; for a seed pass "
            "torch.Generator().manual_seed(seed)"
        )


def _per_rollout(
    name: str,
    value: Tensor | float,
    shape: torch.Size,
    device: torch.device,
    gate: Gate | None,
    generator: torch.Generator | None,
) -> Tensor:
    """A per-rollout quantity -> float32, shaped like token_ids; permuted over rollouts for gate.control "shuffled"."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
            raise TypeError(f"{name} must be a tensor or a number, got {type(value).__name__}")
        value = torch.full((1,) * len(shape), number(name, value, "a tensor or a finite number"), device=device)
    if value.dtype == torch.bool:
        raise TypeError(f"{name} must be numeric, got bool; for a verdict use 2 * correct.int() - 1")
    value = constant(name, value, FLOATS + INTEGERS, device).float()
    if value.ndim == 0:
        value = value.reshape((1,) * len(shape))
    broadcasts = value.ndim == len(shape) and all(a in (1, b) for a, b in zip(value.shape, shape))
    if not broadcasts:
        raise ValueError(
            f"{name} must broadcast to token_ids' shape {tuple(shape)} with as many dimensions; got "
            f"{tuple(value.shape)}. For one value a rollout pass [B, 1]: {name}[:, None]"
        )
    if gate is not None and gate.control == "shuffled" and value.ndim and value.shape[0] > 1:
        if generator is None:
            order = torch.randperm(value.shape[0])
        else:
            order = torch.randperm(value.shape[0], generator=generator, device=generator.device)
        value = value[order.to(device)]
    return value.expand(shape)


def _uniform(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return torch.rand(count, device=device)
    return torch.rand(count, generator=generator, device=generator.device).to(device)


def _divergence(divergence: Divergence) -> tuple[str, float]:
    if isinstance(divergence, str) and divergence in ("reverse-kl", "forward-kl"):
        return divergence, 0.5
    if isinstance(divergence, (tuple, list)) and len(divergence) == 2 and divergence[0] == "jsd":
        beta = number("divergence: beta of ('jsd', beta)", divergence[1], "a number in [0, 1]")
        if 0 < beta < 1:
            return "jsd", beta
        # TRL's and GKD's end points
        if beta in (0.0, 1.0):
            return ("reverse-kl" if beta == 1.0 else "forward-kl"), 0.5
        raise ValueError(f"divergence: beta of ('jsd', beta) must lie in [0, 1], got {beta}")
    names = ["reverse-kl", "forward-kl", "jsd"]
    close = difflib.get_close_matches(str(divergence), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close and close[0] != "jsd" else ""
    raise ValueError(
        f"divergence must be 'reverse-kl', 'forward-kl' or ('jsd', beta) with beta in [0, 1]; got {divergence!r}{hint}"
    )


def _head(side: str, logit_scale: float, softcap: float | None) -> dict[str, float | None]:
    """A head's choices, as fields of `Spec`."""
    return {
        f"{side}_scale": scale(f"{side}_logit_scale", logit_scale),
        f"{side}_softcap": None if softcap is None else positive(f"{side}_softcap", softcap),
    }
