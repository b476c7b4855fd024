"""The oracle: plain, slow, obviously right; any float dtype; [N, V] logits and torch's own autograd.

Every fast path is compared with this in float64. It is written from the formulas of docs/method.md, section 2,
and shares nothing with the fast paths but the gate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .gate import choose, draw_agreement
from .options import Head
from .problem import Problem


class TokenValues(NamedTuple):
    """Per valid token, [M]: the loss before reduction and what `stats` reports."""

    loss: Tensor
    kl: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    gate: Tensor
    agree: Tensor


STATS = {name: column for column, name in enumerate(TokenValues._fields)}  # columns of a table of them


def logits(head: Head, rows: Tensor, vocabulary: int, temperature: float, dtype: torch.dtype) -> Tensor:
    """[M, V] logits of one head: projection, bias, logit scale, softcap, temperature, in this order."""
    z = head.hidden[rows].to(dtype) @ head.weight[:vocabulary].to(dtype).T
    if head.bias is not None:
        z = z + head.bias[:vocabulary].to(dtype)
    z = z * head.logit_scale
    if head.softcap is not None:
        z = torch.where(z == -torch.inf, z, head.softcap * torch.tanh(z / head.softcap))  # masked stays masked
    return z / temperature


def _xlogx_sum(p: Tensor, log_ratio: Tensor) -> Tensor:
    """sum_v p * log_ratio with 0 * anything = 0: a masked column (p = 0) takes no part. NaN stays NaN."""
    return (p * torch.where(p == 0, 0.0, log_ratio)).sum(-1)


def _divergence(name: str, parameter: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Per-token divergence [N] of student p and teacher q: options.Options has the formulas."""
    p, q = log_p.exp(), log_q.exp()
    # In a column that both mask there is no gradient; no sum below reads it there.
    both = (log_p == -torch.inf) & (log_q == -torch.inf)
    log_p_, log_q_ = log_p.masked_fill(both, 0.0), log_q.masked_fill(both, 0.0)

    def mixture(weight_q: float) -> Tensor:
        return torch.logaddexp(log_q_ + math.log(weight_q), log_p_ + math.log1p(-weight_q))

    if name == "reverse-kl":
        return _xlogx_sum(p, log_p - log_q)
    if name == "forward-kl":
        return _xlogx_sum(q, log_q - log_p)
    if name == "jsd":
        log_m = mixture(parameter)
        return parameter * _xlogx_sum(q, log_q - log_m) + (1 - parameter) * _xlogx_sum(p, log_p - log_m)
    if name == "skew-reverse-kl":
        return _xlogx_sum(p, log_p - mixture(1 - parameter))
    if name == "skew-forward-kl":
        return _xlogx_sum(q, log_q - mixture(parameter))
    # 1 - sum p^a q^(1-a), as a sum of terms that are 0 where the models are equal
    none = (log_p == -torch.inf) | (log_q == -torch.inf)
    power = (parameter * log_p.masked_fill(none, 0.0) + (1 - parameter) * log_q.masked_fill(none, 0.0)).exp()
    power = power.masked_fill(none, 0.0)
    return (parameter * p + (1 - parameter) * q - power).sum(-1) / (parameter * (1 - parameter))


def _bucketed(log_p: Tensor, ids: Tensor, log_q: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(reverse KL over the top k and a bucket for the rest, log q(y)); beyond the top k, q_y = p_y q_tail / p_tail."""
    top = log_p.gather(-1, ids)
    log_q_tail = _tail(log_q)
    rest = log_p.scatter(-1, ids, -torch.inf)
    # No tail, of the teacher or of the student: nothing of it is read, and -inf - -inf has no gradient.
    none, alone = log_q_tail == -torch.inf, (rest == -torch.inf).all(-1)
    log_p_tail = torch.logsumexp(rest.masked_fill((none | alone).unsqueeze(-1), 0.0), -1)
    total = torch.logaddexp(torch.logsumexp(log_q, -1), log_q_tail)  # 0, but where rounding took the sum above 1
    log_q, log_q_tail = log_q - total.unsqueeze(-1), log_q_tail - total
    tail = _xlogx_sum(log_p_tail.exp().unsqueeze(-1), (log_p_tail - log_q_tail.masked_fill(none, 0.0)).unsqueeze(-1))
    tail = torch.where(none | alone, 0.0, tail)
    kl = _xlogx_sum(top.exp(), top - log_q) + tail
    inside = ids == y
    q_inside = torch.where(inside, log_q, 0.0).sum(-1)
    q_outside = log_p.detach().gather(-1, y).squeeze(-1) + log_q_tail - log_p_tail.detach()
    beyond = max(1, log_p.shape[-1] - ids.shape[-1])  # columns, which share it equally where the student has none there
    q_outside = torch.where(alone, log_q_tail - math.log(beyond), q_outside)
    q_outside = q_outside.masked_fill(none, -torch.inf)
    return kl, torch.where(inside.any(-1), q_inside, q_outside)


def _tail(log_q: Tensor) -> Tensor:
    return torch.log1p(-log_q.exp().sum(-1).clamp(max=1.0))


def _topk_support(z_student: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    """As `_support`, for a top k: its columns at -inf, and all beyond it where it leaves no mass."""
    outside = (_tail(log_q) == -torch.inf).unsqueeze(-1).expand_as(z_student)
    return z_student.masked_fill(outside.scatter(-1, ids, log_q == -torch.inf), -torch.inf)


def _support(z_student: Tensor, *others: Tensor) -> Tensor:
    """Columns a target cannot produce (-inf) leave the student's distribution, as rows beyond V_T do."""
    for other in others:
        z_student = z_student.masked_fill(other == -torch.inf, -torch.inf)
    return z_student


def token_values(problem: Problem, dtype: torch.dtype) -> TokenValues:
    """The loss of every valid token, differentiable in the student's hidden states, weight and bias."""
    options, settings, rows = problem.options, problem.gate, problem.valid_rows()
    v, t = problem.vocabulary, options.temperature
    y = problem.token_ids[rows].unsqueeze(-1)
    verdict = problem.verdict[rows].to(dtype)
    z_s = logits(problem.student, rows, v, t, dtype)

    if problem.topk_ids is not None:
        assert problem.topk_logprob is not None
        top_ids, top = problem.topk_ids[rows], problem.topk_logprob[rows].to(dtype)
        log_p, log_q, log_r = torch.log_softmax(_topk_support(z_s, top_ids, top), -1), None, None
        kl, log_q_y = _bucketed(log_p, top_ids, top, y)
        entropy_q = torch.full_like(log_q_y, torch.nan)
    elif problem.teacher is None:
        assert problem.teacher_logprob is not None
        log_p = torch.log_softmax(z_s, -1)
        log_q_y = problem.teacher_logprob[rows].to(dtype)
        nan = torch.full_like(log_q_y, torch.nan)
        kl, entropy_q = nan, nan
        log_q = log_r = None
    else:
        z_t = logits(problem.teacher, rows, v, t, dtype)
        z_s = _support(z_s, z_t)
        log_p, log_q, log_r = torch.log_softmax(z_s, -1), torch.log_softmax(z_t, -1), None
        log_q_y = log_q.gather(-1, y).squeeze(-1)
        entropy_q = -_xlogx_sum(log_q.exp(), log_q)
        if problem.reference is not None:
            z_r = logits(problem.reference, rows, v, t, dtype)
            log_p = torch.log_softmax(_support(z_s, z_r), -1)
            log_r = torch.log_softmax(z_r, -1)
        kl = _divergence(*problem.divergence, log_p, log_q)

    log_p_y = log_p.gather(-1, y).squeeze(-1)
    d = (log_q_y - log_p_y).detach()
    weights = problem.cell_weights(rows).to(dtype)
    forced = None
    if problem.uniform is not None:
        forced = draw_agreement(d, verdict, settings.tolerance, problem.uniform[rows])
    gate, agree = choose(d, verdict, weights, settings.tolerance, forced)

    if log_r is not None:
        assert log_q is not None
        # log pi* = w log pi_T + (1 - w) log pi_R (G-OPD, arXiv 2602.12125); -inf where either is.
        g = gate.unsqueeze(-1)
        outside = (log_q == -torch.inf) | (log_r == -torch.inf)
        target = g * log_q.masked_fill(outside, 0.0) + (1 - g) * log_r.masked_fill(outside, 0.0)
        target = target.masked_fill(outside, -torch.inf)
        kept = (weights != 0).any(0).to(dtype)
        if options.estimator == "full":
            loss = kept * _divergence(*problem.divergence, log_p, torch.log_softmax(target, -1))
        else:
            advantage = target.gather(-1, y).squeeze(-1) - log_p_y.detach()
            loss = -kept * advantage * log_p_y
        if problem.loss_factor is not None:
            factor = problem.loss_factor[rows].to(dtype)
            loss = torch.where(factor == 0, 0.0, factor * loss)
    elif options.estimator == "full":
        loss = torch.where(gate != 0, gate * kl, 0.0)
    else:
        advantage = torch.where(gate != 0, gate * d, 0.0)
        if problem.behaviour_logprob is not None:
            ratio = (log_p_y.detach() - problem.behaviour_logprob[rows].to(dtype)).exp()
            advantage = advantage * ratio.clamp(max=options.ratio_clip)
        loss = torch.where(gate != 0, -advantage * log_p_y, 0.0)
    entropy_p = -_xlogx_sum(log_p.exp(), log_p)
    return TokenValues(loss, kl, log_p_y, log_q_y, entropy_p, entropy_q, gate, agree)
