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
from .problem import Problem, decode
from .values import check_sampled


def group_of(name: str) -> dist.ProcessGroup | None:
    """A process group crosses the op by its name; "" is none."""
    if not name:
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group  # absent from builds without distributed

    return _resolve_process_group(name)  # type: ignore[arg-type,unused-ignore]


def scale_of(problem: Problem) -> Tensor:
    """[N] float64: what the reduction multiplies each token's loss by."""
    n, device, denominator = problem.token_ids.numel(), problem.token_ids.device, problem.num_items
    if problem.options.reduction != "mean":
        return torch.ones(n, dtype=torch.float64, device=device)
    if denominator is None:
        denominator = (problem.token_ids != problem.options.ignore_index).sum().clamp(min=1)
    else:
        given = denominator
        require(
            (given > 0) & (given < torch.inf),
            "num_items must be a finite number > 0 of valid tokens",
            lambda: f"got a tensor of {float(given)}",
        )
    return denominator.double().reciprocal().expand(n)


def _makes_gradients(problem: Problem, row_scale: Tensor | None) -> bool:
    """Not the forward of a per-token loss: its gradients need the incoming one."""
    return problem.options.reduction != "none" or row_scale is not None


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
    row_scale: Tensor | None,
    tensors: list[Tensor],
    numbers: list[float],
    form: str,
    backend: str,
    group: str,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, stats [N, 8] float64, d_hidden, d_weight, d_bias, report [3]); gradients not needed are empty.

    The first three take gradients. `row_scale`: the incoming gradient of a per-token loss. `tensors`, `numbers` and
    `form`: `problem.encode`.
    """
    refuse_transforms("the fused loss")  # of a graph that was compiled outside
    problem = decode((student_hidden, student_weight, student_bias), tensors, numbers, form)
    wanted = NeedsGrad(*needs_grad) if _makes_gradients(problem, row_scale) else NeedsGrad()
    unit, factor = row_scale if row_scale is not None else scale_of(problem), problem.loss_factor
    scale = unit if factor is None else unit * factor
    result = driver.run(problem, get(backend), scale, wanted, group_of(group))
    check_sampled(problem, result.stats)
    if not wanted:
        result.report[KEPT] = torch.nan  # there is no gradient, or not yet
    losses, reduction = result.stats[:, STATS["loss"]], problem.options.reduction
    if factor is not None:
        losses = torch.where(factor == 0, 0.0, losses * factor)
    if reduction == "none":
        loss = losses.float()
    else:
        # Summed before it is scaled: the value doesn't depend on how the tokens were chunked.
        loss = losses.sum() if reduction == "sum" else losses.sum() * unit[:1].sum()
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
    row_scale: Tensor | None,
    tensors: list[Tensor],
    numbers: list[float],
    form: str,
    backend: str,
    group: str,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    leaves, n = (student_hidden, student_weight, student_bias), student_hidden.shape[0]
    problem = decode(leaves, tensors, numbers, form)
    makes = _makes_gradients(problem, row_scale)
    loss = student_hidden.new_empty((n,) if problem.options.reduction == "none" else (), dtype=torch.float32)
    stats = student_hidden.new_empty((n, len(STATS)), dtype=torch.float64)
    gradients = [
        leaf.new_empty(leaf.shape, dtype=driver.gradient_dtype(leaf))  # contiguous, whatever the leaf is
        if wanted and makes and leaf is not None
        else student_hidden.new_empty(0)
        for wanted, leaf in zip(needs_grad, leaves)
    ]
    return loss, stats, gradients[0], gradients[1], gradients[2], torch.empty(3, dtype=torch.float64, device="cpu")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    leaves, _, constants, ctx.numbers, ctx.form, ctx.backend, ctx.group, ctx.needs_grad = inputs[:3], *inputs[3:]
    problem = decode(leaves, constants, ctx.numbers, ctx.form)
    ctx.per_token = problem.options.reduction == "none"
    ctx.gradients = None
    ctx.report = output[5].detach()
    ctx.dtypes = [None if t is None else t.dtype for t in leaves]
    ctx.constants = len(constants)
    if ctx.per_token:
        # Inference tensors (a teacher's) can't be saved, and can't change under autograd's eyes either.
        tensors = (*leaves, *constants)
        ctx.kept = [t if t is not None and t.is_inference() else None for t in tensors]
        ctx.save_for_backward(*(None if k is not None else t for t, k in zip(tensors, ctx.kept)))
    else:
        # Not save_for_backward: the backward hands these over without a copy, which only their last owner may do.
        # Detached, they hold no reference to this node.
        ctx.gradients = [g.detach() if wanted else None for wanted, g in zip(ctx.needs_grad, output[2:5])]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the gated loss is differentiable once: its gradient was asked for with create_graph=True; "
            "use backend='reference' for second derivatives"
        )
    nothing = (None, [None] * ctx.constants, None, None, None, None, None)
    if grad_loss is None:
        return (None, None, None, *nothing)
    if ctx.per_token:
        if torch._C._functorch.is_legacy_batchedtensor(grad_loss):
            raise NotImplementedError(
                "reduction='none' under is_grads_batched=True or vectorize=True: torch's batching of gradients has no "
                "rule for the op. Call backward once for each gradient, use torch.func.vmap over the call, or "
                "backend='reference'"
            )
        hidden, weight, bias, *constants = (s if k is None else k for s, k in zip(ctx.saved_tensors, ctx.kept))
        settings = (ctx.numbers, ctx.form, ctx.backend, ctx.group, ctx.needs_grad)
        _, _, *gradients, report = fused_loss(hidden, weight, bias, grad_loss.contiguous(), constants, *settings)
        # `Stats` reads the same memory; but what is written to a compiled graph's outputs is lost.
        if not torch.compiler.is_compiling() and not _batched(report):
            torch.fmax(ctx.report, report, out=ctx.report)
        return (*(g.to(d) if wanted else None for wanted, g, d in zip(ctx.needs_grad, gradients, ctx.dtypes)), *nothing)
    if ctx.gradients is None:
        raise RuntimeError(
            "the gated loss: backward was called twice; its gradients were handed over the first time. "
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


@fused_loss.register_vmap
def _(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """One call after another."""

    def at(value: Any, dim: Any, i: int) -> Any:
        if isinstance(dim, (list, tuple)):
            return [at(item, inner, i) for item, inner in zip(value, dim)]
        return value if dim is None else value.select(dim, i)

    calls = [fused_loss(*(at(x, dim, i) for x, dim in zip(arguments, dims))) for i in range(info.batch_size)]
    outputs = tuple(torch.stack(parts) for parts in zip(*calls))
    return outputs, (0,) * len(outputs)
