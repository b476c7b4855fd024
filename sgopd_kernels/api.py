"""The loss's keyword calls, the drop-in form over `gated_loss`; and the gated advantage. Formulas: docs/method.md."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack  # a dependency of torch

from ._checks import FLOATS, positive, require, scale, tensor
from .gate import Gate, cell_weights, check_reliability, choose, draw_agreement, resolve_gate
from .loss import Operands, Stats, check_generator, gated_loss, per_rollout, uniform
from .options import Head, Options, SampledTeacher, TopKTeacher
from .values import check_logprob, check_rollouts

Divergence = str | tuple[str, float]


class _Keywords(Operands, total=False):
    gate: str | Gate
    student_bias: Tensor | None
    temperature: float
    student_logit_scale: float
    student_softcap: float | None
    ignore_index: int
    reduction: Literal["mean", "sum", "none"]
    precision: str | float
    workspace: int | None


class _LogprobKeywords(_Keywords, total=False):
    behaviour_logprob: Tensor | None
    ratio_clip: float


class _KLKeywords(_Keywords, total=False):
    estimator: Literal["full", "sampled"]
    divergence: Divergence
    teacher_bias: Tensor | None
    teacher_logit_scale: float
    teacher_softcap: float | None
    reference_hidden: Tensor | None
    reference_weight: Tensor | None
    reference_bias: Tensor | None
    reference_logit_scale: float
    reference_softcap: float | None
    process_group: dist.ProcessGroup | None


@overload
def gated_kl_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_ids: Tensor,
    verdict: Tensor | int,
    *,
    return_stats: Literal[False] = False,
    **others: Unpack[_KLKeywords],
) -> Tensor: ...
@overload
def gated_kl_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_ids: Tensor,
    verdict: Tensor | int,
    *,
    return_stats: Literal[True],
    **others: Unpack[_KLKeywords],
) -> tuple[Tensor, Stats]: ...
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
    token_weight: Tensor | float | None = None,
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
        reliability: in [0, 1], shaped like `verdict`: how far the teacher is trusted; the conflict weight becomes
            r + (1 - r) * conflict. `Gate.reliability` has other ways, which the preset "trust" takes. None: 0, and
            refused by these.
        token_weight: a finite factor for each token, from wherever it comes (importance, position, a pass rate), a
            constant for the gradient. A number, or a tensor that broadcasts like `verdict`. It multiplies the gate's
            weight, and `Stats.gate` shows the product. With a reference head, where the gate moves the target, it
            multiplies the token's loss. None: 1.
        estimator: "full" (sum over the vocabulary) or "sampled" (policy gradient on the sampled token).
        divergence: "reverse-kl", "forward-kl", ("jsd", beta), ("skew-reverse-kl", alpha), ("skew-forward-kl", alpha) or
            ("alpha", alpha): formulas and ranges are in `Options`. Of the full estimator.
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
            AMX of 2^28. On CUDA devices operands go to tensor cores as 16-bit numbers: from 2^33 within the budget
            (3e-4 of fp32 ones), and of bf16 heads always, whose gradients are rounded to bf16, which costs eight
            times as much (docs/gpu.md). All else is exact.
        backend: "auto", "cpu" (native), "triton" (CUDA devices), "cuda" (CUDA devices, never by "auto"), "torch" (any
            device), "reference" (plain autograd in float64, O(N V) memory, twice differentiable).
        generator: of the gate's controls ("random", "shuffled"). None: torch's default generator.
        process_group: vocabulary-parallel mode: each rank passes its slice of every head (and bias), contiguous in the
            order of ranks and of one width in all heads, with the same hidden states, global token_ids and settings.
            Loss, stats and the hidden gradient are equal on all ranks, the heads' gradients are the slice's. Torch
            backend. Random draws are the first rank's.
        workspace: bytes held above inputs and gradients. None: 256 MiB, 3 GiB with the Triton backend.
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
    reference = None
    if (reference_hidden is None) != (reference_weight is None):
        raise ValueError("reference_hidden and reference_weight come together: pass both or neither")
    if reference_hidden is not None and reference_weight is not None:
        reference = Head(reference_hidden, reference_weight, reference_bias, reference_logit_scale, reference_softcap)
    elif (
        reference_bias is not None
        or reference_softcap is not None
        or scale("reference_logit_scale", reference_logit_scale) != 1.0
    ):
        raise ValueError("reference_bias, reference_logit_scale, reference_softcap need reference_hidden and _weight")
    return gated_loss(
        Head(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        Head(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap),
        token_ids,
        verdict,
        Options(
            gate=gate,
            estimator=estimator,
            divergence=divergence,
            temperature=temperature,
            ignore_index=ignore_index,
            reduction=reduction,
            precision=precision,
            workspace=workspace,
        ),
        reference=reference,
        reliability=reliability,
        token_weight=token_weight,
        num_items=num_items,
        backend=backend,
        generator=generator,
        process_group=process_group,
        return_stats=return_stats,
    )


@overload
def gated_logprob_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    token_ids: Tensor,
    teacher_logprob: Tensor,
    verdict: Tensor | int,
    *,
    return_stats: Literal[False] = False,
    **others: Unpack[_LogprobKeywords],
) -> Tensor: ...
@overload
def gated_logprob_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    token_ids: Tensor,
    teacher_logprob: Tensor,
    verdict: Tensor | int,
    *,
    return_stats: Literal[True],
    **others: Unpack[_LogprobKeywords],
) -> tuple[Tensor, Stats]: ...
def gated_logprob_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    token_ids: Tensor,
    teacher_logprob: Tensor,
    verdict: Tensor | int,
    *,
    gate: str | Gate = "sg-opd",
    reliability: Tensor | float | None = None,
    token_weight: Tensor | float | None = None,
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
        verdict, gate, reliability, token_weight: as in `gated_kl_loss`.
        behaviour_logprob: [...] log-probabilities of the policy that sampled token_ids, for stale rollouts. Finite
            (or NaN, which the loss shows), at most 0.
        ratio_clip: > 0, the importance ratio's upper bound. Used with behaviour_logprob.
        The others: as in `gated_kl_loss`.

    Returns: as `gated_kl_loss`; `Stats.kl` and `Stats.teacher_entropy` are NaN (0 where ignored).
    """
    return gated_loss(
        Head(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        SampledTeacher(teacher_logprob, behaviour_logprob),
        token_ids,
        verdict,
        Options(
            gate=gate,
            estimator="sampled",
            temperature=temperature,
            ratio_clip=ratio_clip,
            ignore_index=ignore_index,
            reduction=reduction,
            precision=precision,
            workspace=workspace,
        ),
        reliability=reliability,
        token_weight=token_weight,
        num_items=num_items,
        backend=backend,
        generator=generator,
        return_stats=return_stats,
    )


@overload
def gated_topk_kl_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    token_ids: Tensor,
    topk_ids: Tensor,
    topk_logprob: Tensor,
    verdict: Tensor | int,
    *,
    return_stats: Literal[False] = False,
    **others: Unpack[_Keywords],
) -> Tensor: ...
@overload
def gated_topk_kl_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    token_ids: Tensor,
    topk_ids: Tensor,
    topk_logprob: Tensor,
    verdict: Tensor | int,
    *,
    return_stats: Literal[True],
    **others: Unpack[_Keywords],
) -> tuple[Tensor, Stats]: ...
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
    token_weight: Tensor | float | None = None,
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
    return gated_loss(
        Head(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        TopKTeacher(topk_ids, topk_logprob),
        token_ids,
        verdict,
        Options(
            gate=gate,
            temperature=temperature,
            ignore_index=ignore_index,
            reduction=reduction,
            precision=precision,
            workspace=workspace,
        ),
        reliability=reliability,
        token_weight=token_weight,
        num_items=num_items,
        backend=backend,
        generator=generator,
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
    check_generator(generator)
    check_reliability(chosen, reliability)
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
    verdict_N = per_rollout("verdict", verdict, shape, device, chosen, generator).reshape(-1)
    reliability_N = None
    if reliability is not None:
        reliability_N = per_rollout("reliability", reliability, shape, device).reshape(-1)
    check_rollouts(verdict_N, reliability_N)
    weights = cell_weights(verdict_N, reliability_N, chosen)
    forced = None
    if chosen.control == "random":
        forced = draw_agreement(d, verdict_N, chosen.tolerance, uniform(d.numel(), device, generator))
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
