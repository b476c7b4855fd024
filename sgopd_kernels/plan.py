"""Plans: in which order the GEMMs and the row work run, and how much memory they may hold.

`exact` is the oracle of the others: token chunks; both models' logits of a chunk in fp32; one fused row pass that
leaves the gradient in the student's logits; two gradient GEMMs. Nothing is recomputed (6 Hs + 2 Ht FLOP for each of the
N V logits) and the memory is bounded by `workspace`, not by N. `filtered` and `screened` (sparse.py) replace steps of a
chunk where the backend has them and the error budget allows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ._checks import require
from .backends.torch import ShardedColumns, TorchBackend
from .gate import cell_weights, draw_agreement
from .problem import Problem
from .reference import TokenValues
from .sparse import Report, Screen

LOSS, STUDENT_LOGPROB, TEACHER_LOGPROB, GATE = (
    TokenValues._fields.index(name) for name in ("loss", "student_logprob", "teacher_logprob", "gate")
)
COLUMNS = len(TokenValues._fields)


@dataclass(frozen=True)
class Need:
    """Which gradients are wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass
class Result:
    stats: Tensor  # [N, 8] float64, columns as TokenValues; rows of ignored tokens are 0
    # Accumulated in fp32 and rounded once, to `gradient_dtype`.
    hidden: Tensor | None  # [N, Hs]
    weight: Tensor | None  # [V_S, Hs]
    bias: Tensor | None  # [V_S]
    report: Tensor  # [3] float64, Report.tensor


def gradient_dtype(leaf: Tensor) -> torch.dtype:
    """A leaf's dtype; fp32 for fp16, whose range a mean's gradient underflows before a loss scale has multiplied it."""
    return torch.float32 if leaf.dtype == torch.float16 else leaf.dtype


def chunk_rows(problem: Problem, backend: TorchBackend, valid: int, v: int, beside: tuple[int, int] = (0, 0)) -> int:
    """Tokens a chunk: as many as the workspace holds fp32 logits for, in chunks of equal size. `v` columns.

    `beside`: (bytes, bytes a token) that a sparse plan holds.
    """
    heads = sum(h is not None for h in (problem.student, problem.teacher, problem.reference))
    heads += 0 if problem.topk_ids is None else 3  # the completed teacher, and what completing it takes
    widest = max(h.weight.shape[1] for h in (problem.student, problem.teacher, problem.reference) if h is not None)
    fixed, row_bytes = backend.held_bytes(problem)
    row_bytes += 4 * (v * heads + 3 * widest)  # logits; gathered hidden states and a gradient row
    fixed, row_bytes = fixed + beside[0], row_bytes + beside[1]
    room = (problem.spec.workspace or backend.default_workspace) - fixed
    rows = max(1, room // row_bytes)
    if rows >= valid:
        return max(1, valid)
    unit = backend.row_multiple
    rows = rows // unit * unit if rows > unit else rows
    size = -(-valid // -(-valid // rows))
    return size if unit == 16 else min(rows, -(-size // unit) * unit)


# Rounding that is forgiven of a log-probability above 0, and of probabilities that sum to more than 1.
ROUNDING = 1e-3


def check_values(problem: Problem, rows: Tensor, v: int) -> None:
    """What only the values tell: ids in range, verdicts in {1, 0, -1}, reliability in [0, 1], log-probabilities."""
    ids, verdict, reliability = problem.token_ids[rows], problem.verdict[rows], problem.reliability_of(rows)
    ignored = ids == problem.spec.ignore_index  # while a graph is captured `rows` are all

    def bad(ok: Tensor, values: Tensor) -> float | int:
        return values[~ok][0].item()

    in_range = ((ids >= 0) & (ids < v)) | ignored
    require(
        in_range.all(),
        f"token_ids: ids must lie in the shared vocabulary [0, {v}) or be ignore_index={problem.spec.ignore_index}",
        lambda: (
            f"{int((~in_range).sum())} of {ids.numel()} lie outside, the first is {bad(in_range, ids)}. Mask them with "
            "ignore_index, or check that student and teacher share the tokenizer (heads have "
            f"{problem.student.weight.shape[0]} and "
            f"{problem.teacher.weight.shape[0] if problem.teacher else 'no'} rows)"
        ),
    )
    known = (verdict == 1) | (verdict == 0) | (verdict == -1) | ignored
    require(
        known.all(),
        "verdict: values must be 1 (correct), -1 (incorrect) or 0 (unknown)",
        lambda: f"got {bad(known, verdict)}",
    )
    if reliability is not None:
        within = ((reliability >= 0) & (reliability <= 1)) | ignored
        require(within, "reliability: values must lie in [0, 1]", lambda: f"got {bad(within, reliability)}")
    for name in ("teacher_logprob", "behaviour_logprob"):
        words = getattr(problem, name)
        if words is not None:
            check_logprob(name, words[rows], ignored)
    if problem.behaviour_logprob is not None:
        possible = (problem.behaviour_logprob[rows] != -torch.inf) | ignored
        require(possible, "behaviour_logprob: -inf, and yet its policy sampled the token: leave such a token out")
    if problem.topk_ids is not None:
        assert problem.topk_logprob is not None
        ids, log_q = problem.topk_ids[rows], problem.topk_logprob[rows].double()
        ids_ok = ((ids >= 0) & (ids < v)) | ignored.unsqueeze(-1)
        require(ids_ok, f"topk_ids: ids must lie in [0, {v})", lambda: f"got {bad(ids_ok, ids)}")
        top = ids.sort(-1).values
        distinct = (top[:, 1:] != top[:, :-1]) | ignored.unsqueeze(-1)
        require(
            distinct,
            "topk_ids: an id stands twice in a row, and its mass would count twice. Drop the duplicates; where rows "
            "have fewer candidates than K, cut K to the shortest",
        )
        mass = log_q.exp().sum(-1)
        require(
            ~(mass > 1 + ROUNDING) | ignored,  # a NaN goes on, and shows in the loss
            "topk_logprob: probabilities of a row sum to more than 1; pass natural logarithms, normalised over the "
            "whole vocabulary",
            lambda: f"got {float(mass.nan_to_num(0).max()):.4f}",
        )


def check_logprob(name: str, values: Tensor, ignored: Tensor | bool = False) -> None:
    """A NaN goes on, and shows in the loss."""
    ok = ~(values > ROUNDING) | ignored
    require(
        ok,
        f"{name}: values are natural logarithms of probabilities, at most 0 (a rounding of 1e-3 is forgiven)",
        lambda: f"got {float(values[~ok][0]):.4g}: pass log-probabilities, not probabilities or their negatives",
    )


def check_sampled(problem: Problem, stats: Tensor) -> None:
    """The sampled estimator needs a finite log-ratio: its advantage."""
    if problem.spec.estimator == "sampled":
        words = stats[:, [STUDENT_LOGPROB, TEACHER_LOGPROB]]
        ok = (words != -torch.inf) | (stats[:, [GATE]] == 0)
        name = "token_ids" if problem.teacher_logprob is None else "teacher_logprob"
        require(
            ok,
            f"{name}: a sampled token's log-probability is -inf, for the teacher or the student (a masked column), and "
            "the sampled estimator's advantage is infinite: leave the token out with ignore_index, or use "
            "gated_kl_loss with estimator='full'",
            lambda: f"{int((~ok).any(-1).sum())} such tokens, the first at position {int((~ok).any(-1).nonzero()[0])}",
        )


@dataclass(frozen=True)
class Shard:
    """This rank's part of a vocabulary that is spread over a group: equal work, in chunks of equal size, everywhere."""

    columns: ShardedColumns
    total: int  # vocabulary over all ranks
    widest: int  # the largest slice


def shard_of(problem: Problem, group: dist.ProcessGroup) -> Shard:
    """Slices are contiguous in the order of ranks; every rank learns every width."""
    width = torch.tensor([problem.vocabulary], device=problem.token_ids.device)
    widths = [torch.zeros_like(width) for _ in range(dist.get_world_size(group))]
    dist.all_gather(widths, width, group=group)
    sizes = [int(w) for w in widths]
    return Shard(ShardedColumns(sum(sizes[: dist.get_rank(group)]), group), sum(sizes), max(sizes))


def same_everywhere(problem: Problem, group: dist.ProcessGroup) -> Problem:
    """Randomness is the first rank's: of the controls, and of a verdict that was shuffled."""
    verdict = problem.verdict.clone()
    uniform = None if problem.uniform is None else problem.uniform.contiguous()
    for tensor in (verdict, uniform):
        if tensor is not None:
            dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
    return replace(problem, verdict=verdict, uniform=uniform)


def run(
    problem: Problem,
    backend: TorchBackend,
    row_scale: Tensor,
    need: Need,
    group: dist.ProcessGroup | None = None,
) -> Result:
    """Runs the cheapest plan within `problem.spec.budget`.

    `row_scale` [N] multiplies each token's gradient (not `stats`).

    With `group` the plan is exact: each rank holds a slice of every head and the same hidden states; statistics and
    `hidden` are equal on all ranks, `weight` and `bias` are the slice's.
    """
    shard = None
    if group is not None:
        problem, shard = same_everywhere(problem, group), shard_of(problem, group)
    spec, total = problem.spec, shard.total if shard else problem.vocabulary
    valid = None
    if backend.capturing(problem.token_ids.device):
        # How many tokens are valid is not known while a graph is captured: all take part, the ignored with weight 0.
        rows = torch.arange(problem.token_ids.numel(), device=problem.token_ids.device)
        valid = problem.token_ids != spec.ignore_index
        check_values(problem, rows, total)
        problem = replace(problem, token_ids=problem.token_ids.where(valid, 0))
    else:
        rows = problem.valid_rows()
        check_values(problem, rows, total)
    weights = cell_weights(
        problem.verdict[rows],
        problem.reliability_of(rows),
        spec.agree,
        spec.conflict,
        spec.neutral,
        spec.keep,
    )
    if valid is not None:
        weights *= valid
    if problem.uniform is None:
        return _pass(problem, backend, rows, weights, None, row_scale, need, shard, valid)
    # The `random` control draws agreement at the measured rate: measure it first.
    measured = _pass(problem, backend, rows, weights, None, row_scale, Need(), shard, valid).stats[rows]
    d = measured[:, TEACHER_LOGPROB] - measured[:, STUDENT_LOGPROB]
    forced = draw_agreement(d, problem.verdict[rows].double(), spec.tolerance, problem.uniform[rows])
    return _pass(problem, backend, rows, weights, forced, row_scale, need, shard, valid)


def complete_teacher(problem: Problem, rows: Tensor, z_student: Tensor, out: Tensor) -> Tensor:
    """Teacher logits [n, V] of top-k log-probabilities: the tail's mass is shared out as the student shares its own.

    With q_v = p_v * q_tail / p_tail beyond the top k, the reverse KL over all columns *is* the one over k + 1 buckets,
    sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail) >= 0, and its logit gradient is that one's too.
    """
    assert problem.topk_ids is not None and problem.topk_logprob is not None
    spec, head = problem.spec, problem.student
    ids, log_q = problem.topk_ids[rows], problem.topk_logprob[rows].double()
    # The student's logits, as the row pass will make them; it divides `out` by the temperature as well.
    z = out.copy_(z_student)
    if head.bias is not None:
        z += head.bias[: z.shape[1]].float()
    z *= head.logit_scale
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    z /= spec.temperature
    log_p_tail = torch.logsumexp(z.scatter(-1, ids, -torch.inf), -1).double()  # not 1 - sum: that cancels
    log_q_tail = tail_logprob(log_q)
    z += (log_q_tail - log_p_tail).unsqueeze(-1).float()
    z.scatter_(-1, ids, log_q.float())
    return z.mul_(spec.temperature)


def tail_logprob(log_q: Tensor) -> Tensor:
    """log(1 - sum q) of top-k log-probabilities [..., k], float64; -inf where nothing is left."""
    return torch.log1p(-log_q.exp().sum(-1).clamp(max=1.0))


def _forward(
    problem: Problem,
    backend: TorchBackend,
    at: Tensor,
    z_s: Tensor,
    z_t: Tensor | None,
    z_r: Tensor | None,
    weights: Tensor,
    forced: Tensor | None,
    scale: Tensor,
    gradient: bool,
    columns: ShardedColumns | None,
    screen: Screen | None,
) -> tuple[Tensor, Tensor | None]:
    """A chunk's statistics, and the report of its screen if there is one; leaves the gradient in z_s."""
    v = problem.vocabulary
    report = None
    if screen is not None:
        assert z_t is not None
        screen.project(problem, at, z_s, z_t)
        report = screen.refine(problem, at, z_s, z_t)
    else:
        backend.project(problem.student_hidden[at], problem.student.weight[:v], z_s)
        if problem.teacher is not None:
            assert z_t is not None and problem.teacher_hidden is not None
            backend.project(problem.teacher_hidden[at], problem.teacher.weight[:v], z_t)
        if problem.reference is not None:
            assert z_r is not None and problem.reference_hidden is not None
            backend.project(problem.reference_hidden[at], problem.reference.weight[:v], z_r)
        if problem.topk_ids is not None:
            assert z_t is not None
            complete_teacher(problem, at, z_s, z_t)
    extra = () if columns is None else (columns,)
    return backend.rows(problem, at, z_s, z_t, z_r, weights, forced, scale, gradient, *extra), report


def compact(backend: TorchBackend, g: Tensor, active: Tensor) -> Tensor:
    """Moves the active rows [n] of g to its front; their row numbers, in the order in which they now stand.

    Rows from the end fill the gaps: the fewest moves, and no row is written that is still to be read.
    """
    order = torch.arange(int(active.sum()), device=g.device)
    gaps = torch.nonzero(~active[: order.numel()]).squeeze(-1)
    last = torch.nonzero(active[order.numel() :]).squeeze(-1) + order.numel()
    backend.move_rows(g, gaps, last)
    order[gaps] = last
    return order


def _pass(
    problem: Problem,
    backend: TorchBackend,
    rows: Tensor,
    weights: Tensor,
    forced: Tensor | None,
    row_scale: Tensor,
    need: Need,
    shard: Shard | None = None,
    valid: Tensor | None = None,
) -> Result:
    """`valid` [N]: which rows are tokens at all, where `rows` is all of them; None: all of `rows` are."""
    hidden, head, v = problem.student_hidden, problem.student, problem.vocabulary
    device, total = hidden.device, rows.numel()
    sparse = None if shard is not None or problem.spec.budget == 0 else backend.sparse(problem)
    if sparse is not None and not sparse.worthwhile(rows):
        sparse = None
    if sparse is not None:
        sparse.probe(rows)
    # Ranks must agree on the chunks: their collectives pair up.
    beside = (0, 0) if sparse is None else sparse.held_bytes()
    wide = replace(problem, spec=replace(problem.spec, budget=0.0))  # a sparse plan spends the budget itself
    size = chunk_rows(problem if sparse is None else wide, backend, total, shard.widest if shard else v, beside)

    stats = torch.zeros(hidden.shape[0], COLUMNS, dtype=torch.float64, device=device)
    d_hidden = torch.zeros_like(hidden, dtype=gradient_dtype(hidden)) if need.hidden else None
    d_weight = backend.zeros(head.weight.shape[0], head.weight.shape[1], device) if need.weight else None
    d_bias = torch.zeros(head.weight.shape[0], dtype=torch.float32, device=device) if need.bias else None

    def chunks() -> None:
        space_s = backend.logits(size, v, device)
        space_t = None if problem.teacher is None and problem.topk_ids is None else backend.logits(size, v, device)
        space_r = None if problem.reference is None else backend.logits(size, v, device)

        for first in range(0, total, size):
            chunk = slice(first, min(first + size, total))
            at = rows[chunk]
            n = at.numel()
            z_s, h = space_s[:n], hidden[at]
            if valid is not None:
                h = h.masked_fill(~valid[chunk].unsqueeze(-1), 0.0)  # 0 * NaN of an ignored token is no gradient
            z_t = None if space_t is None else space_t[:n]
            z_r = None if space_r is None else space_r[:n]
            scale = row_scale[at]

            part = None if forced is None else forced[chunk]
            columns = shard.columns if shard else None
            given = wide if sparse is not None and sparse.pays else problem
            forward = partial(
                _forward, given, backend, at, z_s, z_t, z_r, weights[:, chunk], part, scale, bool(need), columns
            )
            values, taken = (
                (forward(None)[0], None) if sparse is None else sparse.chunk(forward, z_s, scale, bool(need))
            )
            stats[at] = values if valid is None else values.masked_fill(~valid[chunk].unsqueeze(-1), 0.0)
            if not need:
                continue
            if sparse is not None and taken is not None:
                sparse.gradients(taken, z_s, h, at, d_hidden, d_weight, d_bias)
                continue

            g = backend.gradient_of(given, z_s)
            if valid is None and backend.waits(problem):
                # Rows without weight leave the backward.
                if problem.reference is None:
                    active = (values[:, GATE] != 0) & (scale != 0)
                else:
                    active = (weights[:, chunk] != 0).any(0) & (scale != 0)
                order = compact(backend, g, active)
                if order.numel() == 0:
                    continue
                if order.numel() < n:
                    g, h, at = g[: order.numel()], h[order], at[order]
            if d_hidden is not None:
                g_h = torch.zeros(at.numel(), hidden.shape[1], dtype=torch.float32, device=device)
                backend.add_hidden_gradient(g, head.weight[:v], g_h)
                if shard is not None:
                    dist.all_reduce(g_h, group=shard.columns.group)
                d_hidden[at] = g_h.to(d_hidden.dtype)
            if d_weight is not None:
                backend.add_weight_gradient(g, h, d_weight[:v])
            if d_bias is not None:
                d_bias[:v] += g.sum(0, dtype=torch.float32)

    chunks()  # a function of its own: its logits are given back before the gradients are rounded
    return Result(
        stats,
        d_hidden,
        None if d_weight is None else d_weight.to(gradient_dtype(head.weight)),
        None if d_bias is None or head.bias is None else d_bias.to(gradient_dtype(head.bias)),
        (Report(error=backend.gradient_error(problem) if need else 0.0) if sparse is None else sparse.report).tensor(),
    )
