"""The loss from its dataclasses: checks at the door, then one op. Formulas: docs/method.md."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, overload

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack  # a dependency of torch

from . import backends
from ._checks import FLOATS, INTEGERS, constant, number, positive, scale, tensor
from .gate import Gate, check_reliability, resolve_gate
from .ops import fused_loss, refuse_transforms, scale_of
from .options import Head, Options, SampledTeacher, TopKTeacher
from .oracle import STATS, token_values
from .plans.base import KEPT, PLANS
from .problem import Problem, encode
from .values import check_sampled, check_values

Teacher = Head | SampledTeacher | TopKTeacher
BEYOND = math.nextafter(torch.finfo(torch.float32).max, math.inf)  # what fp32 does not reach
# Tensors whose values the reference looks at on the host.
_VALUES = (
    "token_ids",
    "verdict",
    "reliability",
    "token_weight",
    "teacher_logprob",
    "topk_ids",
    "topk_logprob",
    "behaviour_logprob",
)


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
        plan: the cheapest plan that ran on a part of the call, of `PLANS`, which begin with "exact"; or "reference".
        kept: share of the gradient's [tokens, vocabulary] entries that entered its products one by one, or ("blocks")
            with 16 bits in place of 8; 1 for exact. NaN where no gradient was made.
        error_estimate: estimated relative error of loss and gradients, of the worst chunk. 0 for exact, unless its
            products round the gradient to bf16 (Triton, where the precision allows it).

    reduction="none" makes its gradients in the backward, by a plan of its own: until that has run, plan and
    error_estimate are those of the losses, and kept is NaN; from then on they cover both (plan the cheaper,
    error_estimate the larger). Not where the call is compiled: there they stay those of the losses. Its backward takes
    one gradient at a time: `is_grads_batched` and `vectorize` are refused.
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

    @classmethod
    def joined(cls, calls: Sequence[Stats], order: Tensor) -> Stats:
        """Of several calls as of one: the cheapest plan that any took, the worst error estimate.

        Args:
            calls: of calls on flat tokens, by one backend; at least one.
            order: [N] int64; token i of the one call is the order[i]-th of theirs, one call after another.
        """
        tensors = {
            field.name: torch.cat([getattr(one, field.name) for one in calls])[order]
            for field in fields(cls)
            if field.name not in ("backend", "report")
        }
        report = None
        if all(one.report is not None for one in calls):
            reports = torch.stack([one.report for one in calls if one.report is not None])
            tokens = torch.tensor([len(one.gate) for one in calls], dtype=torch.float64, device=reports.device)
            kept = (reports[:, KEPT] * tokens).sum() / tokens.sum().clamp(min=1)
            report = torch.stack([reports[:, 0].max(), kept, reports[:, 2].max()])
        return cls(**tensors, backend=calls[0].backend, report=report)


_DEFAULT = Options()


class Operands(TypedDict, total=False):
    """Keywords of every loss call."""

    reliability: Tensor | float | None
    token_weight: Tensor | float | None
    num_items: Tensor | float | None
    backend: str
    generator: torch.Generator | None


class _Others(Operands, total=False):
    reference: Head | None
    process_group: dist.ProcessGroup | None


@overload
def gated_loss(
    student: Head,
    teacher: Teacher,
    token_ids: Tensor,
    verdict: Tensor | int,
    options: Options = ...,
    *,
    return_stats: Literal[False] = False,
    **others: Unpack[_Others],
) -> Tensor: ...
@overload
def gated_loss(
    student: Head,
    teacher: Teacher,
    token_ids: Tensor,
    verdict: Tensor | int,
    options: Options = ...,
    *,
    return_stats: Literal[True],
    **others: Unpack[_Others],
) -> tuple[Tensor, Stats]: ...
@overload
def gated_loss(
    student: Head,
    teacher: Teacher,
    token_ids: Tensor,
    verdict: Tensor | int,
    options: Options = ...,
    *,
    return_stats: bool,
    **others: Unpack[_Others],
) -> Tensor | tuple[Tensor, Stats]: ...
def gated_loss(
    student: Head,
    teacher: Teacher,
    token_ids: Tensor,
    verdict: Tensor | int,
    options: Options = _DEFAULT,
    *,
    reference: Head | None = None,
    reliability: Tensor | float | None = None,
    token_weight: Tensor | float | None = None,
    num_items: Tensor | float | None = None,
    backend: str = "auto",
    generator: torch.Generator | None = None,
    process_group: dist.ProcessGroup | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """The gated loss of `gated_kl_loss`, `gated_logprob_loss` and `gated_topk_kl_loss` in one call, from dataclasses.

        gated_loss(Head(h, w), Head(h_teacher, w_teacher), token_ids, verdict, Options(gate="opdvr"))

    Args:
        student: its last layer; gradients flow to hidden states, weight and bias.
        teacher: a `Head`, or what a server gives in place of one: `SampledTeacher` (which needs
            Options(estimator="sampled")) or `TopKTeacher`. Constant. Beside a `reference`, a `Head`.
        token_ids, verdict, reference, reliability, token_weight, num_items, backend, generator, process_group,
            return_stats: as in `gated_kl_loss`, where errors are named too: `student.weight` is its student_weight.
        options: the call's choices.

    Returns: as `gated_kl_loss`.
    """
    tensor("token_ids", token_ids, INTEGERS)
    if not isinstance(options, Options):
        raise TypeError(
            f"options must be an Options, got {type(options).__name__}: pass Options(gate=...), or call gated_kl_loss, "
            "which takes keywords"
        )
    shape, device, gate = token_ids.shape, token_ids.device, resolve_gate(options.gate)
    if num_items is not None and options.reduction != "mean":
        raise ValueError(f"num_items is the denominator of reduction='mean'; got reduction={options.reduction!r}")
    if not isinstance(return_stats, bool):
        raise TypeError(f"return_stats must be True or False, got {return_stats!r}")
    check_generator(generator)
    check_reliability(gate, reliability)
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup, got {type(process_group).__name__}; a rank "
            "outside the group makes no call"
        )

    def tokens(name: str, given: Tensor | float | None) -> Tensor | None:
        return None if given is None else per_rollout(name, given, shape, device).reshape(-1)

    if reference is not None and isinstance(teacher, (SampledTeacher, TopKTeacher)):
        raise NotImplementedError(
            "reference: the target between teacher and reference needs both distributions, and a "
            f"{type(teacher).__name__} gives none: pass the teacher's Head, or no reference"
        )
    student = _head("student", student, shape, device, constant=False)
    problem = Problem(
        options,
        student,
        token_ids.reshape(-1).long(),
        per_rollout("verdict", verdict, shape, device, gate, generator).reshape(-1),
        **_teacher(teacher, options, shape, device),
        reference=None if reference is None else _head("reference", reference, shape, device),
        reliability=tokens("reliability", reliability),
        token_weight=tokens("token_weight", token_weight),
        uniform=uniform(token_ids.numel(), device, generator) if gate.control == "random" else None,
        num_items=None if num_items is None else _num_items(num_items, device),
    )
    leaves = (student.hidden, student.weight, student.bias)
    double = any(
        t is not None and t.dtype == torch.float64 for h in problem.heads for t in (h.hidden, h.weight, h.bias)
    )
    name = backends.resolve(backend, device, torch.float64 if double else student.hidden.dtype)
    if process_group is not None:
        name = _sharded(backend, name, problem)
    if name == "reference":
        loss, table = _reference(problem)
        loss = loss.reshape(shape) if options.reduction == "none" else loss
        return (loss, _stats(table, shape, name, None)) if return_stats else loss
    refuse_transforms("the gated loss")
    needs_grad = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in leaves]
    group = process_group.group_name if process_group is not None else ""
    loss, table, *_, report = fused_loss(*leaves, None, *encode(problem), name, group, needs_grad)
    loss = loss.reshape(shape) if options.reduction == "none" else loss
    return (loss, _stats(table.detach(), shape, name, report.detach())) if return_stats else loss


def _head(side: str, head: Head, shape: torch.Size, device: torch.device, constant: bool = True) -> Head:
    """Checked, and flattened to [N, H]."""
    if not isinstance(head, Head):
        raise TypeError(f"{side} must be a Head, got {type(head).__name__}")
    hidden, weight, bias = head.hidden, head.weight, head.bias
    for what, given in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if given is None and what == "bias":
            continue
        if type(given).__name__ == "DTensor" and given is not None and given.requires_grad and not constant:
            raise NotImplementedError(
                f"{side}_{what} is a DTensor that requires a gradient, and how that is reduced over ranks is its "
                "wrapper's to say: call the loss inside the wrapper's forward (FSDP2 has gathered the head "
                "there), or pass full_tensor(grad_placements=...)"
            )
        tensor(f"{side}_{what}", given, FLOATS, device)
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"{side}_weight must be [V, H], not empty, got {tuple(weight.shape)}")
    if hidden.shape != (*shape, weight.shape[1]):
        raise ValueError(
            f"{side}_hidden must be {(*shape, weight.shape[1])}: token_ids' shape {tuple(shape)} and "
            f"{side}_weight's width {weight.shape[1]}; got {tuple(hidden.shape)}. Pass the hidden states of the "
            "positions that predict token_ids (shifted by one)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{side}_bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    # A frozen head that is sharded (FSDP2) is gathered: without a gradient there is nothing to reduce.
    hidden, weight, bias = (
        hidden.reshape(-1, weight.shape[1]),
        _gathered(weight),
        None if bias is None else _gathered(bias),
    )
    if constant:
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    softcap = None if head.softcap is None else positive(f"{side}_softcap", head.softcap)
    return Head(hidden, weight, bias, scale(f"{side}_logit_scale", head.logit_scale), softcap)


def _teacher(teacher: Teacher, options: Options, shape: torch.Size, device: torch.device) -> dict[str, Any]:
    """Fields of `Problem`."""
    if isinstance(teacher, SampledTeacher):
        if options.estimator != "sampled":
            raise ValueError(
                f"estimator={options.estimator!r} needs the teacher's distribution, and a SampledTeacher gives the "
                "sampled token's log-probability alone: pass Options(estimator='sampled')"
            )
        behaviour = teacher.behaviour_logprob
        return {
            "teacher_logprob": _per_token("teacher_logprob", teacher.logprob, shape, device),
            "behaviour_logprob": None
            if behaviour is None
            else _per_token("behaviour_logprob", behaviour, shape, device),
        }
    if isinstance(teacher, TopKTeacher):
        if options.estimator != "full" or options.divergence != "reverse-kl":
            raise NotImplementedError(
                "a TopKTeacher serves the full estimator's reverse KL; got "
                f"estimator={options.estimator!r}, divergence={options.divergence!r}"
            )
        ids, logprob = teacher.ids, teacher.logprob
        if isinstance(ids, Tensor) and ids.dtype not in INTEGERS:
            raise ValueError(f"topk_ids must be integers of shape {(*shape, 'K')}, got {ids.dtype}")
        tensor("topk_ids", ids, INTEGERS, device)
        tensor("topk_logprob", logprob, FLOATS, device)
        if ids.shape[:-1] != shape or ids.ndim != len(shape) + 1 or ids.shape[-1] < 1:
            raise ValueError(f"topk_ids must be of shape {(*shape, 'K')}, K >= 1, got {tuple(ids.shape)}")
        if logprob.shape != ids.shape:
            raise ValueError(f"topk_logprob must have topk_ids' shape {tuple(ids.shape)}, got {tuple(logprob.shape)}")
        k = ids.shape[-1]
        return {"topk_ids": ids.reshape(-1, k).long(), "topk_logprob": logprob.detach().reshape(-1, k)}
    if not isinstance(teacher, Head):
        raise TypeError(f"teacher must be a Head, a SampledTeacher or a TopKTeacher, got {type(teacher).__name__}")
    return {"teacher": _head("teacher", teacher, shape, device)}


def _per_token(name: str, given: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    tensor(name, given, FLOATS, device)
    if given.shape != shape:
        raise ValueError(f"{name} must have token_ids' shape {tuple(shape)}, got {tuple(given.shape)}")
    return given.detach().reshape(-1).float()


def _sharded(asked: str, name: str, problem: Problem) -> str:
    if asked not in ("auto", "torch") or name == "reference":
        raise NotImplementedError(
            "process_group: the vocabulary-parallel mode is the torch backend's, for float32, bfloat16 and "
            f"float16; got backend={asked!r}{' and float64 inputs' if name == 'reference' else ''}"
        )
    if problem.teacher is None:
        raise NotImplementedError("process_group: the vocabulary-parallel mode takes a teacher's Head")
    widths = [head.weight.shape[0] for head in problem.heads]
    if len(set(widths)) > 1:
        raise ValueError(f"process_group: this rank's slices must have one width in all heads, got {widths}")
    return "torch"


def _reference(problem: Problem) -> tuple[Tensor, Tensor]:
    """(loss, statistics [N, 8]) of the reference backend."""
    given = [getattr(problem, name) for name in _VALUES]
    if any(t is not None and torch._C._functorch.is_batchedtensor(t) for t in given):
        raise NotImplementedError(
            f"backend='reference' reads {', '.join(_VALUES)} on the host, and torch.func.vmap hides "
            "them: pass the batch as leading dimensions, or use another backend"
        )
    n, device, rows = problem.token_ids.numel(), problem.token_ids.device, problem.valid_rows()
    check_values(problem, rows, problem.vocabulary)
    values = token_values(problem, torch.float64)
    loss = torch.zeros(n, dtype=torch.float64, device=device).index_put((rows,), values.loss)
    if problem.options.reduction != "none":
        loss = (loss * scale_of(problem)).sum()
    loss = loss.to(torch.float64 if problem.student.hidden.dtype == torch.float64 else torch.float32)
    table = torch.zeros(n, len(STATS), dtype=torch.float64, device=device)
    table = table.index_put((rows,), torch.stack([v.detach().double() for v in values], -1))
    check_sampled(problem, table)
    return loss, table


def _stats(table: Tensor, shape: torch.Size, backend: str, report: Tensor | None) -> Stats:
    columns = dict(zip(STATS, table.unbind(-1)))
    logratio = columns["teacher_logprob"] - columns["student_logprob"]
    fields = {k: v.float().reshape(shape) for k, v in columns.items() if k not in ("loss", "agree")}
    return Stats(
        **fields,
        logratio=logratio.float().reshape(shape),
        agree=(columns["agree"] != 0).reshape(shape),
        backend=backend,
        report=report,
    )


def _gathered(tensor: Any) -> Tensor:
    return tensor.full_tensor() if type(tensor).__name__ == "DTensor" else tensor


def _num_items(value: Tensor | float, device: torch.device) -> Tensor:
    """The denominator, float64 []; a tensor's value is checked where the loss reads it (ops.scale_of)."""
    expected = "a finite number > 0 of valid tokens"
    if not isinstance(value, Tensor):
        # Filled in on the device: a copy from the host would make it wait, and can't be captured.
        return torch.full((), number("num_items", value, expected, 0.0), dtype=torch.float64, device=device)
    value = constant("num_items", value, FLOATS + INTEGERS, device)
    if value.numel() != 1:
        raise ValueError(f"num_items must be {expected}, got a tensor of shape {tuple(value.shape)}: pass its sum")
    return value.double().reshape(())


def check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}; for a seed pass "
            "torch.Generator().manual_seed(seed)"
        )


def per_rollout(
    name: str,
    value: Tensor | float,
    shape: torch.Size,
    device: torch.device,
    gate: Gate | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A per-rollout quantity -> float32, shaped like token_ids; permuted over rollouts for gate.control "shuffled"."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
            raise TypeError(f"{name} must be a tensor or a number, got {type(value).__name__}")
        given = number(name, value, "a tensor or a number that float32 holds", -BEYOND, BEYOND)
        value = torch.full((1,) * len(shape), given, dtype=torch.float32, device=device)
    if value.dtype == torch.bool:
        remedy = "2 * correct.int() - 1" if name == "verdict" else f"{name}.float()"
        raise TypeError(f"{name} must be numeric, got bool: pass {remedy}")
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
            order = torch.randperm(value.shape[0], device="cpu")
        else:
            order = torch.randperm(value.shape[0], generator=generator, device=generator.device)
        value = value[order.to(device)]
    return value.expand(shape)


def uniform(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return torch.rand(count, dtype=torch.float32, device=device)
    return torch.rand(count, generator=generator, dtype=torch.float32, device=generator.device).to(device)
