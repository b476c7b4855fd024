"""The exact plan, the oracle of the others: both models' logits of a chunk in fp32; one fused row pass that leaves the
gradient in the student's logits; two dense gradient products. Nothing is recomputed: 6 Hs + 2 Ht FLOP for each of the
N V logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends.torch import TorchBackend
from ..options import Head
from ..oracle import STATS
from ..problem import Chunk, Problem
from .base import Gradients, NeedsGrad


class Exact:
    pays = True
    form = torch.float32  # of G

    def __init__(self, problem: Problem, backend: TorchBackend, needs_grad: NeedsGrad) -> None:
        self.problem, self.backend, self.needs_grad = problem, backend, needs_grad
        self.v = problem.vocabulary
        self.head = problem.student.weight[: self.v]
        self.ran, self.kept = "exact", 0

    def held_bytes(self) -> tuple[int, int]:
        return self.backend.held_bytes(self.problem)

    def forward(self, chunk: Chunk) -> float:
        self.project(chunk)
        form = self.form if self.needs_grad else None
        chunk.stats = self.backend.rows(self.problem, chunk, form)
        self.kept = chunk.z_student.numel()
        return 0.0

    def balance(self, head: Head) -> Tensor | None:
        """How fp32 operands of a projection are split into parts; None: they are not."""
        return None

    def project(self, chunk: Chunk) -> None:
        """All models' logits."""
        p, at = self.problem, chunk.positions
        models = (p.student, chunk.z_student), (p.teacher, chunk.z_teacher), (p.reference, chunk.z_reference)
        for head, z in models:
            if head is not None:
                assert z is not None
                self.backend.project(head.hidden[at], head.weight[: self.v], z, self.balance(head))
        if p.topk_ids is not None:
            assert chunk.z_teacher is not None
            complete_teacher(p, at, chunk.z_student, chunk.z_teacher)

    def gradients(self, chunk: Chunk, out: Gradients) -> None:
        g, order = self.gradient(chunk)
        if order.numel() == 0:
            return
        h, at = chunk.hidden, chunk.positions
        if order.numel() < at.numel():
            h, at = h[order], at[order]
        if out.hidden is not None:
            g_h = torch.empty(at.numel(), h.shape[1], dtype=torch.float32, device=h.device)
            self.backend.add_hidden_gradient(g, self.head, g_h, add=False)
            self.backend.vocabulary.add_up(g_h)
            out.hidden[at] = g_h.to(out.hidden.dtype)
        if out.weight is not None:
            self.backend.add_weight_gradient(g, h, out.weight[: self.v], add=not out.empty, rest=out.rest)
            out.empty = False
        if out.bias is not None:
            out.bias[: self.v] += g.sum(0, dtype=torch.float32)

    def gradient(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """The chunk's gradient without rows that weigh nothing (where looking costs no wait); its rows' numbers."""
        g = self.left_by_rows(chunk)
        if chunk.valid is not None or (self.backend.waits and not self.problem.may_weigh_0):
            return g, torch.arange(g.shape[0], device=g.device)
        order = compact(self.backend, g, self.active(chunk))
        return g[: order.numel()], order

    def left_by_rows(self, chunk: Chunk) -> Tensor:
        """The gradient [n, V], where the row pass left it."""
        return chunk.z_student

    def active(self, chunk: Chunk) -> Tensor:
        """[n] bool: rows with a weight; the others leave the backward."""
        weighs = chunk.stats[:, STATS["gate"]] if self.problem.reference is None else (chunk.weights != 0).any(0)
        return (weighs != 0) & (chunk.scale != 0)


def compact(backend: TorchBackend, g: Tensor, active: Tensor) -> Tensor:
    """Moves the active rows [n] of g to its front; their row numbers, in the order in which they now stand.

    Rows from the end fill the gaps: the fewest moves, and no row is written that is still to be read.
    """
    order = torch.arange(active.numel(), device=g.device)
    count = active.sum()
    gap, late = ~active & (order < count), active & (order >= count)
    stay, moved = torch.stack([count, late.sum()]).tolist()  # where the host waits, it waits here alone
    gaps, last = (where.to(torch.int8).argsort(descending=True, stable=True)[:moved] for where in (gap, late))
    backend.move_rows(g, gaps, last)
    order = order[:stay]
    order[gaps] = last
    return order


def complete_teacher(problem: Problem, rows: Tensor, z_student: Tensor, out: Tensor) -> None:
    """Teacher logits of top-k log-probabilities, to `out` [n, V]: the tail's mass is shared out as the student shares
    its own.

    With q_v = p_v * q_tail / p_tail beyond the top k, the reverse KL over all columns *is* the one over k + 1 buckets,
    sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail) >= 0, and its logit gradient is that one's too.
    """
    assert problem.topk_ids is not None and problem.topk_logprob is not None
    temperature, head = problem.options.temperature, problem.student
    ids, log_q = problem.topk_ids[rows], problem.topk_logprob[rows].double()
    # The student's logits, as the row pass will make them; it divides `out` by the temperature as well.
    z = out.copy_(z_student)
    if head.bias is not None:
        z += head.bias[: z.shape[1]].float()
    z *= head.logit_scale
    if head.softcap is not None:
        masked = z == -torch.inf
        z.div_(head.softcap).tanh_().mul_(head.softcap).masked_fill_(masked, -torch.inf)  # masked stays masked
        del masked
    z /= temperature
    log_p_tail = torch.logsumexp(z.scatter(-1, ids, -torch.inf), -1).double()  # not 1 - sum: that cancels
    log_q_tail = tail_logprob(log_q)
    # Where the student masks all of the tail, the teacher's mass lies there none the less: columns share it equally.
    alone = log_p_tail == -torch.inf
    z.masked_fill_(alone.unsqueeze(-1), 0.0)
    log_p_tail = log_p_tail.masked_fill(alone, math.log(max(1, z.shape[1] - ids.shape[1])))
    z += (log_q_tail - log_p_tail).unsqueeze(-1).float()
    z.scatter_(-1, ids, log_q.float())
    z.mul_(temperature)


def tail_logprob(log_q: Tensor) -> Tensor:
    """log(1 - sum q) of top-k log-probabilities [..., k], float64; -inf where nothing is left."""
    return torch.log1p(-log_q.exp().sum(-1).clamp(max=1.0))
