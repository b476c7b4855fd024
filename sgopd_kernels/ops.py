"""The loss as one torch.library op: opaque to torch.compile, differentiable, with a fake for shapes.

For a scalar loss the gradients are made in the forward, where the logits are, and the backward only hands them
over (times the incoming scalar). For a per-token loss they depend on the incoming gradient, so the backward
runs the plan again with that gradient as the row scale.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from . import driver
from ._checks import require
from .backends import get
from .oracle import STATS
from .plans.base import KEPT, NeedsGrad
from .problem import Head, Problem, Spec
from .values import check_sampled

# Order of the op's tensor arguments; the first three take gradients.
TENSORS = (
    "student_hidden",
    "student_weight",
    "student_bias",
    "token_ids",
    "verdict",
    "denominator",
    "row_scale",
    "teacher_hidden",
    "teacher_weight",
    "teacher_bias",
    "teacher_logprob",
    "topk_ids",
    "topk_logprob",
    "behaviour_logprob",
    "reference_hidden",
    "reference_weight",
    "reference_bias",
    "reliability",
    "uniform",
)


def problem_of(spec: Spec, tensors: dict[str, Tensor | None]) -> Problem:
    def head(name: str) -> Head | None:
        weight = tensors[f"{name}_weight"]
        if weight is None:
            return None
        return Head(weight, tensors[f"{name}_bias"], getattr(spec, f"{name}_scale"), getattr(spec, f"{name}_softcap"))

    student = head("student")
    hidden, token_ids, verdict = (tensors[k] for k in ("student_hidden", "token_ids", "verdict"))
    assert student is not None and hidden is not None and token_ids is not None and verdict is not None
    return Problem(
        spec,
        hidden,
        student,
        token_ids,
        verdict,
        teacher=head("teacher"),
        reference=head("reference"),
        **{
            name: tensors[name]
            for name in (
                "teacher_hidden",
                "teacher_logprob",
                "topk_ids",
                "topk_logprob",
                "behaviour_logprob",
                "reference_hidden",
                "reliability",
                "uniform",
            )
        },
    )


def group_of(name: str) -> dist.ProcessGroup | None:
    """A process group crosses the op by its name; "" is none."""
    if not name:
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group  # absent from builds without distributed

    return _resolve_process_group(name)  # type: ignore[arg-type,unused-ignore]


def scale_of(problem: Problem, denominator: Tensor | None) -> Tensor:
    """[N] float64: what the reduction multiplies each token's loss by."""
    n, device = problem.token_ids.numel(), problem.token_ids.device
    if problem.spec.reduction != "mean":
        return torch.ones(n, dtype=torch.float64, device=device)
    if denominator is None:
        denominator = (problem.token_ids != problem.spec.ignore_index).sum().clamp(min=1)
    else:
        given = denominator
        require(
            (given > 0) & (given < torch.inf),
            "num_items must be a finite number > 0 of valid tokens",
            lambda: f"got a tensor of {float(given)}",
        )
    return denominator.double().reciprocal().expand(n)


def _makes_gradients(spec: Spec, row_scale: Tensor | None) -> bool:
    """Not the forward of a per-token loss: its gradients need the incoming one."""
    return spec.reduction != "none" or row_scale is not None


@torch.compiler.assume_constant_result
def _inside_derivative() -> bool:
    """Whether a level of forward mode, or of a derivative by torch.func, is open."""
    kinds = torch._C._functorch.TransformType
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(i.key() in (kinds.Grad, kinds.Jvp) for i in stack)


def refuse_transforms(name: str) -> None:
    """The op has no rule for tangents, and torch would take them for 0."""
    if _inside_derivative():
        raise NotImplementedError(
            f"{name} has reverse mode alone, and was called inside torch.func (grad, vjp, jvp, jacrev, jacfwd, "
            "hessian, ...) or forward_ad.dual_level: use loss.backward() or torch.autograd.grad, or "
            "backend='reference', which has all of them"
        )


@torch.library.custom_op("sgopd::fused_loss", mutates_args=())
def fused_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    token_ids: Tensor,
    verdict: Tensor,
    denominator: Tensor | None,
    row_scale: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logprob: Tensor | None,
    topk_ids: Tensor | None,
    topk_logprob: Tensor | None,
    behaviour_logprob: Tensor | None,
    reference_hidden: Tensor | None,
    reference_weight: Tensor | None,
    reference_bias: Tensor | None,
    reliability: Tensor | None,
    uniform: Tensor | None,
    words: str,
    numbers: list[float],
    backend: str,
    group: str,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, stats [N, 8] float64, d_hidden, d_weight, d_bias, report [3]); gradients not needed are empty."""
    arguments = locals()
    refuse_transforms("the fused loss")  # of a graph that was compiled outside
    chosen = Spec.decode(words, numbers)
    problem = problem_of(chosen, {name: arguments[name] for name in TENSORS})
    wanted = NeedsGrad(*needs_grad) if _makes_gradients(chosen, row_scale) else NeedsGrad()
    scale = row_scale if row_scale is not None else scale_of(problem, denominator)
    result = driver.run(problem, get(backend), scale, wanted, group_of(group))
    check_sampled(problem, result.stats)
    if not wanted:
        result.report[KEPT] = torch.nan  # there is no gradient, or not yet
    losses = result.stats[:, STATS["loss"]]
    if chosen.reduction == "none":
        loss = losses.float()
    else:
        # Summed before it is scaled: the value doesn't depend on how the tokens were chunked.
        loss = losses.sum() if chosen.reduction == "sum" else losses.sum() * scale[:1].sum()
        loss = loss.float()
    empty = student_hidden.new_empty(0)
    return (
        loss,
        result.stats,
        empty if result.hidden is None else result.hidden,
        empty.clone() if result.weight is None else result.weight,
        empty.clone() if result.bias is None else result.bias,
        result.report,
    )


@fused_loss.register_fake
def _(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    token_ids: Tensor,
    verdict: Tensor,
    denominator: Tensor | None,
    row_scale: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logprob: Tensor | None,
    topk_ids: Tensor | None,
    topk_logprob: Tensor | None,
    behaviour_logprob: Tensor | None,
    reference_hidden: Tensor | None,
    reference_weight: Tensor | None,
    reference_bias: Tensor | None,
    reliability: Tensor | None,
    uniform: Tensor | None,
    words: str,
    numbers: list[float],
    backend: str,
    group: str,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = student_hidden.shape[0]
    chosen = Spec.decode(words, numbers)
    makes = _makes_gradients(chosen, row_scale)
    loss = student_hidden.new_empty((n,) if chosen.reduction == "none" else (), dtype=torch.float32)
    stats = student_hidden.new_empty((n, len(STATS)), dtype=torch.float64)
    gradients = [
        torch.empty_like(leaf, dtype=driver.gradient_dtype(leaf))
        if wanted and makes and leaf is not None
        else student_hidden.new_empty(0)
        for wanted, leaf in zip(needs_grad, (student_hidden, student_weight, student_bias))
    ]
    return loss, stats, gradients[0], gradients[1], gradients[2], torch.empty(3, dtype=torch.float64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (words, numbers, backend, group, needs_grad) = inputs[: len(TENSORS)], inputs[len(TENSORS) :]
    ctx.words, ctx.numbers, ctx.backend, ctx.group, ctx.needs_grad = words, numbers, backend, group, needs_grad
    ctx.per_token = Spec.decode(words, numbers).reduction == "none"
    ctx.gradients = None
    ctx.report = output[5].detach()
    ctx.dtypes = [None if t is None else t.dtype for t in tensors[:3]]
    if ctx.per_token:
        # Inference tensors (a teacher's) can't be saved, and can't change under autograd's eyes either.
        ctx.kept = [t if t is not None and t.is_inference() else None for t in tensors]
        ctx.save_for_backward(*(None if k is not None else t for t, k in zip(tensors, ctx.kept)))
    else:
        # Not save_for_backward: the backward hands these over without a copy, which only their last owner may do.
        # Detached, they hold no reference to this node.
        ctx.gradients = [g.detach() if wanted else None for wanted, g in zip(needs_grad, output[2:5])]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "gated_kl_loss is differentiable once: its gradient was asked for with create_graph=True; "
            "use backend='reference' for second derivatives"
        )
    nothing = (None,) * (len(TENSORS) - 3 + 5)
    if grad_loss is None:
        return (None, None, None, *nothing)
    if ctx.per_token:
        tensors = {
            name: saved if kept is None else kept for name, saved, kept in zip(TENSORS, ctx.saved_tensors, ctx.kept)
        }
        tensors["row_scale"] = grad_loss.contiguous()
        _, _, *gradients, report = fused_loss(
            *tensors.values(), ctx.words, ctx.numbers, ctx.backend, ctx.group, ctx.needs_grad
        )
        # `Stats` reads the same memory; but what is written to a compiled graph's outputs is lost.
        if not torch.compiler.is_compiling() and not _batched(report):
            torch.fmax(ctx.report, report, out=ctx.report)
        return (*(g.to(d) if wanted else None for wanted, g, d in zip(ctx.needs_grad, gradients, ctx.dtypes)), *nothing)
    if ctx.gradients is None:
        raise RuntimeError(
            "gated_kl_loss: backward was called twice; its gradients were handed over the first time. "
            "Call the loss again, or sum the losses before backward"
        )
    gradients, ctx.gradients = ctx.gradients, None
    if _batched(grad_loss):
        gradients = [None if g is None else g * grad_loss for g in gradients]
    elif not _is_one(grad_loss):
        gradients = [None if g is None else g.mul_(grad_loss) for g in gradients]
    return (*(None if g is None else g.to(d) for g, d in zip(gradients, ctx.dtypes)), *nothing)


def _batched(tensor: Tensor) -> bool:
    """By torch.func.vmap, or by autograd's `is_grads_batched`."""
    return torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)


def _is_one(grad: Tensor) -> bool:
    """Whether there is nothing to multiply by, where looking is free: real tensors on the CPU."""
    return (
        type(grad) is Tensor and grad.device.type == "cpu" and not torch.compiler.is_compiling() and float(grad) == 1.0
    )


fused_loss.register_autograd(_backward, setup_context=_setup_context)
