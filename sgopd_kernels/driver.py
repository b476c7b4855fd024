"""A call from its operands to statistics and gradients: chunks of tokens, each by the cheapest plan within the budget.

The memory is bounded by `workspace`, not by the number of tokens: chunks share their logits' space.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from .backends.cpu import CpuBackend
from .backends.tensor_cores import TensorCoreBackend
from .backends.torch import TorchBackend, VocabularySlice, device_guard, without_autocast
from .gate import draw_agreement
from .oracle import STATS
from .plans import calibration, narrow
from .plans.base import Gradients, NeedsGrad, Plan, Report
from .plans.blocks import blocks
from .plans.directions import Residual
from .plans.exact import Exact
from .plans.pairs import Pairs
from .plans.quantized import quantized
from .problem import Chunk, Problem
from .values import check_values


@dataclass
class Result:
    stats: Tensor  # [N, 8] float64, columns as STATS; rows of ignored tokens are 0
    # Accumulated in fp32 and rounded once, to `gradient_dtype`.
    hidden: Tensor | None  # [N, Hs]
    weight: Tensor | None  # [V_S, Hs]
    bias: Tensor | None  # [V_S]
    report: Tensor  # [3] float64, Report.tensor


def gradient_dtype(leaf: Tensor) -> torch.dtype:
    """A leaf's dtype; fp32 for fp16, whose range a mean's gradient underflows before a loss scale has multiplied it."""
    return torch.float32 if leaf.dtype == torch.float16 else leaf.dtype


def rounded(total: Tensor, unit: Tensor | None, dtype: torch.dtype) -> Tensor:
    """total * unit, in one pass."""
    if unit is None:
        return total.to(dtype)
    return torch.mul(total, unit, out=total if dtype == total.dtype else torch.empty_like(total, dtype=dtype))


def run(
    problem: Problem,
    backend: TorchBackend,
    row_scale: Tensor,
    needs_grad: NeedsGrad,
    group: dist.ProcessGroup | None = None,
) -> Result:
    """Runs the cheapest plans within `problem.budget`.

    `row_scale` [N] multiplies each token's gradient (not `stats`).

    With `group` the plan is exact: each rank holds a slice of every head and the same hidden states; statistics and
    `hidden` are equal on all ranks, `weight` and `bias` are the slice's.
    """
    device = problem.token_ids.device
    with device_guard(device), without_autocast(device):
        shard, valid = None, None
        if group is not None:
            problem, shard = same_everywhere(problem, group), VocabularySlice.of(problem.vocabulary, device, group)
            backend = TorchBackend(shard)
        if backend.capturing(device):
            # How many tokens are valid is not known while a graph is captured: all take part, ignored ones by weight 0.
            rows = torch.arange(problem.token_ids.numel(), device=device)
            valid = problem.token_ids != problem.options.ignore_index
        else:
            rows = problem.valid_rows()
        check_values(problem, rows, shard.total if shard else problem.vocabulary)
        weights = problem.cell_weights(rows)
        if valid is not None:
            problem = replace(problem, token_ids=problem.token_ids.where(valid, 0))
            weights = weights.masked_fill(~valid, 0.0)  # 0 * NaN of an ignored token is no weight
        call = Call(problem, backend, rows, valid, weights, row_scale, shard)
        if problem.uniform is None:
            return call.compute(None, needs_grad)
        # The `random` control draws agreement at the measured rate: measure it first.
        measured = call.compute(None, NeedsGrad()).stats[rows]
        d = measured[:, STATS["teacher_logprob"]] - measured[:, STATS["student_logprob"]]
        forced = draw_agreement(d, problem.verdict[rows].double(), problem.gate.tolerance, problem.uniform[rows])
        return call.compute(forced, needs_grad)


@dataclass
class Call:
    """A call whose tokens and weights are known. `valid`: which of `rows` are tokens at all; None: all of them."""

    problem: Problem
    backend: TorchBackend
    positions: Tensor  # [M] in the problem's tokens
    valid: Tensor | None  # [M]
    weights: Tensor  # [3, M]
    row_scale: Tensor  # [N]
    shard: VocabularySlice | None

    def compute(self, forced: Tensor | None, needs_grad: NeedsGrad) -> Result:
        """`forced` [M]: agreement, where the `random` control draws it."""
        head = self.problem.student
        hidden = head.hidden
        device, (v_all, h) = hidden.device, head.weight.shape
        stats = torch.zeros(hidden.shape[0], len(STATS), dtype=torch.float64, device=device)
        ladder = self.ladder(needs_grad)
        size = self.chunk_rows(ladder[0])
        out = Gradients(
            hidden.new_zeros(hidden.shape, dtype=gradient_dtype(hidden)) if needs_grad.hidden else None,
            None,
            torch.zeros(v_all, dtype=torch.float32, device=device) if needs_grad.bias else None,
        )
        if needs_grad.weight:
            rounds = self.backend.rounds_sums(self.problem)
            out.weight = self.backend.accumulator(v_all, h, device, torch.bfloat16 if rounds else torch.float32)
            if rounds and size < self.positions.numel():
                out.rest = self.backend.accumulator(v_all, h, device, torch.int8)
        report = self.walk(ladder, size, forced, needs_grad, stats, out)
        if out.weight is not None:  # what no chunk has written
            out.weight[0 if out.empty else self.problem.vocabulary :].zero_()
        return Result(
            stats,
            out.hidden,
            None if out.weight is None else rounded(out.weight, out.unit, gradient_dtype(head.weight)),
            None if out.bias is None or head.bias is None else out.bias.to(gradient_dtype(head.bias)),
            report.tensor(),
        )

    def ladder(self, needs_grad: NeedsGrad) -> list[Plan]:
        """Plans from the cheapest that the call may take to one that always keeps within the budget."""
        problem, backend, numbers = self.problem, self.backend, calibration.FITTED
        budget, v, width = problem.budget, problem.vocabulary, problem.student.hidden.shape[1]
        exact = Exact(problem, backend, needs_grad)
        if isinstance(backend, TensorCoreBackend) and backend.narrows() and narrow.fits(problem):
            scale = self.row_scale[self.positions]
            return [narrow.Narrow(problem, backend, needs_grad, self.positions, self.valid, self.weights, scale)]
        if budget == 0:
            return [exact]
        work = self.positions.numel() * v * width
        if isinstance(backend, CpuBackend) and backend.has_tiles(*problem.operands()):
            return [*blocks(problem, backend, needs_grad, self.positions), exact]
        if isinstance(backend, CpuBackend) and backend.has_pairs(problem.student.weight):
            if work < numbers.pairs.worthwhile:
                return [exact]
            fastest = partial(backend.project_quantized, segment=numbers.quantized.settings[0].segment(width))
            residual = Residual(problem.student.weight[:v], fastest)
            return [
                *quantized(problem, backend, needs_grad, residual, self.positions),
                Pairs(problem, backend, needs_grad, residual),
            ]
        return [exact]

    def chunk_rows(self, plan: Plan) -> int:
        """Tokens a chunk: as many as the workspace holds fp32 logits for, in chunks of equal size.

        Ranks must agree on it: their collectives pair up.
        """
        problem, valid = self.problem, self.positions.numel()
        v = self.shard.widest if self.shard else problem.vocabulary
        # The logits, those of a top k's teacher and what completing it takes; gathered hidden states, a gradient row.
        blocks = len(problem.heads) + (0 if problem.topk_ids is None else 3)
        widest = max(h.weight.shape[1] for h in problem.heads)
        fixed, row_bytes = plan.held_bytes()
        row_bytes += 4 * (v * blocks + 3 * widest)
        room = self.backend.workspace(problem) - fixed
        rows = max(1, room // row_bytes)
        if rows >= valid:
            return max(1, valid)
        if self.backend.rounds_sums(problem):  # a byte an element beside the sum over several chunks
            rows = max(1, (room - min(problem.student.weight.numel(), room // 2)) // row_bytes)
        unit = self.backend.row_multiple
        rows = rows // unit * unit if rows > unit else rows
        size = -(-valid // -(-valid // rows))
        return min(rows, -(-size // unit) * unit) if self.backend.whole_multiples else size

    def walk(
        self, ladder: list[Plan], size: int, forced: Tensor | None, needs_grad: NeedsGrad, stats: Tensor, out: Gradients
    ) -> Report:
        """Every chunk, by the first plan of the ladder whose error is within the budget. Its logits go with it."""
        problem, backend, report = self.problem, self.backend, Report()
        v, device, total = problem.vocabulary, problem.token_ids.device, self.positions.numel()
        z_student = backend.logits(size, v, device)
        has_teacher = problem.teacher is not None or problem.topk_ids is not None
        z_teacher = backend.logits(size, v, device) if has_teacher else None
        z_reference = backend.logits(size, v, device) if problem.reference is not None else None
        for first in range(0, total, size):
            part = slice(first, min(first + size, total))
            rows = self.positions[part]
            n, valid = rows.numel(), None if self.valid is None else self.valid[part]
            hidden = problem.student.hidden[rows]
            chunk = Chunk(
                positions=rows,
                # 0 * NaN of an ignored token is no gradient
                hidden=hidden if valid is None else hidden.masked_fill(~valid.unsqueeze(-1), 0.0),
                z_student=z_student[:n],
                z_teacher=None if z_teacher is None else z_teacher[:n],
                z_reference=None if z_reference is None else z_reference[:n],
                weights=self.weights[:, part],
                forced=None if forced is None else forced[part],
                scale=self.row_scale[rows],
                valid=valid,
            )
            plan = ladder[0]
            error = plan.forward(chunk)
            if not plan.pays:
                ladder.pop(0)
            if not error <= problem.budget and plan is not ladder[-1]:  # what cannot be estimated is NaN
                plan = ladder[-1]
                error = plan.forward(chunk)
            stats[rows] = chunk.stats if valid is None else chunk.stats.masked_fill(~valid.unsqueeze(-1), 0.0)
            report.add(plan, n * v, error)
            if needs_grad:
                plan.gradients(chunk, out)
        return report


def same_everywhere(problem: Problem, group: dist.ProcessGroup) -> Problem:
    """Randomness is the first rank's: of the controls, and of a verdict that was shuffled."""
    verdict = problem.verdict.clone()
    uniform = None if problem.uniform is None else problem.uniform.contiguous()
    for tensor in (verdict, uniform):
        if tensor is not None:
            dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
    return replace(problem, verdict=verdict, uniform=uniform)
