"""Triton kernels: the fused row pass, one program a token. Contract: csrc/rows.h; numerics: csrc/cpu/rows.cpp.

A program walks its row in blocks of BLOCK columns. Projections become logits on load (bias, scale, softcap,
temperature), so that nothing is written but the gradient. Every lane of a block keeps sums of its own, in fp32, about
the row's running maximum; they are added up once, in fp64. E_p[z - t] is summed around c = z - t at
the sampled token, which carries mass, and where the models nearly agree once more around what came out: the sums then
hold numbers of the size of the spread of z - t, and the reverse-KL gradient p ((z - t) - E_p[z - t]) needs no
log-sum-exp.

Plain `triton.language` throughout, for any device Triton compiles for: no inline assembly, no vendor's libdevice.
Interpreted (TRITON_INTERPRET=1), bf16 is only ever loaded or stored, never computed with.
"""

from __future__ import annotations

import triton
import triton.language as tl

COLUMNS = tl.constexpr(8)  # of the statistics: oracle.TokenValues
PRECISE = tl.constexpr(0.05)  # nats: below, KL is summed from second-order terms

# Whose logits stand in the target's place.
TEACHER, MIXTURE, REFERENCE = (tl.constexpr(i) for i in range(3))
# As options.DIVERGENCES numbers them.
REVERSE_KL, FORWARD_KL, JSD, SKEW_REVERSE_KL, SKEW_FORWARD_KL, ALPHA = (tl.constexpr(i) for i in range(6))


@triton.jit
def _tanh(x):
    """Near 0 an odd polynomial: 1 - 2 / (e^2x + 1) would lose all relative accuracy there."""
    size = tl.abs(x)
    s = x * x
    p = -5.70498872745e-3 * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)  # e^2x at infinity: 1
    return tl.where(size < 0.625, p * s * x + x, tl.where(x < 0, -large, large))


@triton.jit
def _logits(row, bias, columns, inside, scale, softcap, inverse_temperature):
    """Logits of a block; -inf outside the row. `softcap` None: no cap."""
    z = tl.load(row + columns, mask=inside, other=0.0)
    if bias is not None:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    if softcap is not None:
        z = tl.where(z == float("-inf"), z, softcap * _tanh(z / softcap))  # masked stays masked
    return tl.where(inside, z * inverse_temperature, float("-inf"))


@triton.jit
def _pair(models, columns, inside, gate, TARGET: tl.constexpr):
    """(student, target) logits; the student's is -inf where a target's is. Without a teacher the target is 0.

    `models`: of student, teacher and reference their rows of projections, biases, scales and caps, with None for what
    there is not (flat: Triton 3.6 has no None in a tuple within a tuple); 1 / temperature.
    """
    z_row, t_row, r_row, z_bias, t_bias, r_bias, z_scale, t_scale, r_scale, z_cap, t_cap, r_cap, inverse_t = models
    z = _logits(z_row, z_bias, columns, inside, z_scale, z_cap, inverse_t)
    t = tl.zeros_like(z)
    if t_row is not None:
        t = _logits(t_row, t_bias, columns, inside, t_scale, t_cap, inverse_t)
        outside = t == float("-inf")
        if r_row is not None:
            r = _logits(r_row, r_bias, columns, inside, r_scale, r_cap, inverse_t)
            outside = outside | (r == float("-inf"))
            if TARGET == MIXTURE:
                t = tl.where(outside, float("-inf"), gate * t + (1.0 - gate) * r)
            if TARGET == REFERENCE:
                t = r
        z = tl.where(outside, float("-inf"), z)
    return z, t


@triton.jit
def _summarise(models, V, y, gate, PAIR: tl.constexpr, TARGET: tl.constexpr, BLOCK: tl.constexpr):
    """One walk over the row: (z_y, t_y) and `sums`, of both softmaxes and the moments of z - t around c."""
    lanes = tl.arange(0, BLOCK)
    z_y, t_y = _pair(models, y, y >= 0, gate, TARGET)
    c = tl.where(z_y == float("-inf"), 0.0, z_y - t_y)
    max_p = tl.full((), float("-inf"), tl.float32)
    max_q = tl.full((), float("-inf"), tl.float32)
    sum_p = tl.zeros((BLOCK,), tl.float32)
    moment_p = tl.zeros((BLOCK,), tl.float32)
    sum_q = tl.zeros((BLOCK,), tl.float32)
    moment_q = tl.zeros((BLOCK,), tl.float32)
    p_delta = tl.zeros((BLOCK,), tl.float32)
    q_delta = tl.zeros((BLOCK,), tl.float32)
    outside = tl.zeros((BLOCK,), tl.float32)  # q's mass where p is 0 by -inf
    for first in range(0, V, BLOCK):
        columns = first + lanes
        z, t = _pair(models, columns, columns < V, gate, TARGET)
        p_in = z != float("-inf")
        highest = tl.maximum(max_p, tl.max(z, 0))
        shift = tl.where(max_p == float("-inf"), 0.0, max_p - highest)
        factor = tl.exp(shift)
        moment_p = factor * (moment_p + sum_p * shift)
        sum_p *= factor
        max_p = highest
        a = tl.where(p_in, z - max_p, float("-inf"))
        e = tl.exp(a)
        sum_p += e
        moment_p += tl.where(p_in, e * a, 0.0)
        if PAIR:
            delta = tl.where(p_in, (z - t) - c, 0.0)
            p_delta = p_delta * factor + e * delta
            q_in = t != float("-inf")
            highest = tl.maximum(max_q, tl.max(t, 0))
            shift = tl.where(max_q == float("-inf"), 0.0, max_q - highest)
            factor = tl.exp(shift)
            moment_q = factor * (moment_q + sum_q * shift)
            sum_q *= factor
            max_q = highest
            a = tl.where(q_in, t - max_q, float("-inf"))
            e = tl.exp(a)
            sum_q += e
            moment_q += tl.where(q_in, e * a, 0.0)
            q_delta = q_delta * factor + e * delta
            outside = outside * factor + tl.where(p_in, 0.0, e)
    p = tl.sum(sum_p.to(tl.float64), 0)
    q = tl.sum(sum_q.to(tl.float64), 0)
    moments = tl.sum(moment_p.to(tl.float64), 0), tl.sum(moment_q.to(tl.float64), 0)
    mean_p = c + tl.sum(p_delta.to(tl.float64), 0) / p  # E_p[z - t]
    mean_q = c + tl.sum(q_delta.to(tl.float64), 0) / q
    return z_y, t_y, moments, (max_p, max_q, p, q, mean_p, mean_q, tl.sum(outside.to(tl.float64), 0))


@triton.jit
def _expm1(u):
    """e^u - 1"""
    series = u * (1 / 120 + u * (1 / 720 + u * (1 / 5040)))
    series = u * (1.0 + u * (1 / 2 + u * (1 / 6 + u * (1 / 24 + series))))
    return tl.where(tl.abs(u) < 0.4, series, tl.exp(u) - 1.0)


@triton.jit
def _log1p(x):
    """log(1 + x), as 2 atanh(x / (2 + x)) near 0: a device's log has an absolute error near 1."""
    s = x / (2.0 + x)
    s2 = s * s
    series = 2.0 * s * (1.0 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9)))))
    return tl.where(tl.abs(x) < 0.4, series, tl.log(1.0 + x))


@triton.jit
def _phi(x):
    """(1 + x) log(1 + x) - x for |x| <= 0.25"""
    series = x * (1 / 30 + x * (-1 / 42 + x * (1 / 56)))
    series = 0.5 + x * (-1 / 6 + x * (1 / 12 + x * (-1 / 20 + series)))
    return x * x * series


@triton.jit
def _exponential(u):
    """(e^u - 1 - u) / u^2 near 0"""
    return 0.5 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120 + u * (1 / 720))))


@triton.jit
def _columns(p_in, p, q, u, a, DIVERGENCE: tl.constexpr):
    """(p f(u), p s(u)) of a block for the divergences that are no KL: column32 of csrc/divergence.h, term for term.

    `p_in`: where the student has a probability; elsewhere u must be 0.
    """
    x = _expm1(tl.minimum(u, 0.25))
    near = tl.abs(u) < 0.2
    if DIVERGENCE == ALPHA:
        c = 1.0 - a
        v = c * u
        power = tl.where(u > 0, q * tl.exp(-a * tl.maximum(u, 0.0)), p * tl.exp(tl.minimum(v, 0.0)))  # p^a q^(1-a)
        score = -tl.where(u < 1, p * _expm1(tl.minimum(v, c)), power - p) / c
        small = p * u * u * (_exponential(u) - c * _exponential(v)) / a
        value = tl.where(near, small, (a * p + c * q - power) / (a * c))
        beyond = q / a
    else:
        b = a
        if DIVERGENCE == SKEW_REVERSE_KL:
            b = 1.0 - a
        rest = 1.0 - b
        large = u > 0.2
        inverse = tl.exp(tl.where(large, -u, 0.0))
        mixture = tl.where(large, b + rest * inverse, 1.0 + b * x)  # m / q, or m / p
        log_q = tl.log(tl.where(large, mixture, 1.0))
        r = tl.where(large, u + log_q, _log1p(b * x))  # log(m / p)
        excess = rest * tl.where(large, 1.0 - inverse, x) / mixture  # q / m - 1
        from_q = tl.where(large, -q * log_q, q * (u - r))  # q log(q / m)
        if DIVERGENCE == JSD:
            value = tl.where(near, p * (b * _phi(x) - _phi(b * x)), b * from_q - rest * p * r)
            score = -rest * p * r
            beyond = -b * tl.log(b) * q
        elif DIVERGENCE == SKEW_REVERSE_KL:
            y = b * x
            # (y - log(1 + y)) / y^2
            series = y * (1 / 8 + y * (-1 / 9 + y * (1 / 10 + y * (-1 / 11))))
            series = y * (1 / 4 + y * (-1 / 5 + y * (1 / 6 + y * (-1 / 7 + series))))
            value = tl.where(near, p * y * y * (0.5 + y * (-1 / 3) + y * series), b * (q - p) - p * r)
            score = p * (b * excess - r)
            beyond = b * q
        else:
            value = tl.where(near, p * (_phi(x) - _phi(b * x) - rest * x * r), from_q - rest * (q - p))
            score = -rest * p * excess
            beyond = -(tl.log(b) + rest) * q
    return tl.where(p_in, value, beyond), tl.where(p_in, score, 0.0)


@triton.jit
def _divergence(models, V, gate, sums, parameter, TARGET: tl.constexpr, DIVERGENCE: tl.constexpr, BLOCK: tl.constexpr):
    """(divergence, E_p[s] and the largest p |s| if it is no KL, E_p[z - t] once more around itself where the models
    nearly agree)."""
    max_p, max_q, sum_p, sum_q, mean_p, mean_q, q_outside = sums
    lanes = tl.arange(0, BLOCK)
    log_p = tl.log(sum_p)
    log_q = tl.log(sum_q)
    dlse = (max_p.to(tl.float64) - max_q) + (log_p - log_q)
    if DIVERGENCE == FORWARD_KL:
        value = tl.where(q_outside > 0, float("inf"), dlse - mean_q)
    else:
        value = mean_p - dlse
    mean_score = value * 0.0
    most_score = mean_score.to(tl.float32)
    mean = mean_p
    if (value < PRECISE) | (DIVERGENCE >= JSD):
        dlse_hi = dlse.to(tl.float32)
        dlse_lo = (dlse - dlse_hi).to(tl.float32)
        mean_hi = mean_p.to(tl.float32)
        mean_lo = (mean_p - mean_hi).to(tl.float32)
        ip = (1.0 / sum_p).to(tl.float32)
        iq = (1.0 / sum_q).to(tl.float32)
        terms = tl.zeros((BLOCK,), tl.float32)
        means = tl.zeros((BLOCK,), tl.float32)  # of a KL: what is left of z - t around its mean; else of the scores
        mass = tl.zeros((BLOCK,), tl.float32)
        most = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, V, BLOCK):
            columns = first + lanes
            z, t = _pair(models, columns, columns < V, gate, TARGET)
            p_in = z != float("-inf")
            p = tl.where(p_in, tl.exp(z - max_p), 0.0) * ip
            q = tl.where(t != float("-inf"), tl.exp(t - max_q), 0.0) * iq
            delta = tl.where(p_in, z - t, 0.0)
            u = tl.where(p_in, (dlse_hi - delta) + dlse_lo, 0.0)
            if DIVERGENCE >= JSD:
                part, score = _columns(p_in, p, q, u, parameter, DIVERGENCE)
                terms += part
                means += score
                mass += tl.where(p_in, p, 0.0)
                most = tl.maximum(most, tl.abs(score))
            else:
                # e^u - 1 - u and e^u (u - 1) + 1, over u^2
                if DIVERGENCE == FORWARD_KL:
                    s = u * (1 / 144 + u * (1 / 840))
                    near = 0.5 + u * (1 / 3 + u * (1 / 8 + u * (1 / 30 + s)))
                    far = (q * u - q) + p
                else:
                    s = u * (1 / 720 + u * (1 / 5040))
                    near = 0.5 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120 + s)))
                    far = (q - p) - p * u
                terms += tl.where((tl.abs(u) < 0.25) & p_in, p * u * u * near, far)
                means += tl.where(p_in, p * ((delta - mean_hi) - mean_lo), 0.0)
        value = tl.sum(terms.to(tl.float64), 0)
        if DIVERGENCE >= JSD:
            # The gradient sums to 0 only if the mean is taken under weights that sum to 1.
            total = tl.sum(mass.to(tl.float64), 0)
            mean_score = tl.sum(means.to(tl.float64), 0) / total
            value = tl.where(total > 0, value, mean_score)  # a student that can produce nothing: 0 / 0
            most_score = tl.max(most, 0)
        else:
            mean = mean_p + tl.sum(means.to(tl.float64), 0)
    return value, mean_score, most_score, mean


@triton.jit
def _bound(value, sum_p, sum_q, most_score, mean_score, DIVERGENCE: tl.constexpr):
    """No |gradient| of the row is larger, over its coefficient: docs/kernels.md. fp32."""
    p = (1.0 / sum_p).to(tl.float32)  # the largest probability
    value = tl.maximum(value, 0.0).to(tl.float32)
    if DIVERGENCE == REVERSE_KL:
        bound = tl.sqrt(2.0 * p * value) + value
    elif DIVERGENCE == FORWARD_KL:
        bound = tl.minimum(tl.maximum(p, (1.0 / sum_q).to(tl.float32)), tl.sqrt(0.5 * value))
    else:
        bound = most_score + p * tl.abs(mean_score).to(tl.float32)
    return bound


@triton.jit
def _unit(ratio):
    """(2^(e - m), 2^(m - e)) for ratio < 2^e and the exponent m of plans/narrow.py."""
    e = ((ratio.to(tl.int32, bitcast=True) >> 23) & 255) - 126
    e = tl.minimum(tl.maximum(e, -24), 15)
    shift = e - 15 + tl.maximum(12 - e, 0) // 3
    return ((127 + shift) << 23).to(tl.float32, bitcast=True), ((127 - shift) << 23).to(tl.float32, bitcast=True)


# A stride that is the call's count of tokens: no kernel of its own for counts that 16 divides. Per-token numbers are
# read one by one: none for addresses that 16 divides.
@triton.jit(
    do_not_specialize=["weights_stride"],
    do_not_specialize_on_alignment=["rows", "weights", "forced", "row_scale", "stats", "top", "units"],
)
def rows_kernel(
    student,
    student_stride,
    gradient,  # the gradient's place: over the student's row, in fp32 or narrower; None: statistics only
    gradient_stride,
    top,  # of a gradient in fp16: plans/narrow.py
    units,  # [n]
    teacher,  # None: teacher_logprob holds the teacher's word
    teacher_stride,
    reference,
    reference_stride,
    student_bias,
    teacher_bias,
    reference_bias,
    student_scale,
    teacher_scale,
    reference_scale,
    student_softcap,
    teacher_softcap,
    reference_softcap,
    inverse_temperature,
    rows,  # [n] positions in the per-token tensors
    token_ids,
    verdict,
    teacher_logprob,
    behaviour_logprob,
    weights,  # [3, n]
    weights_stride,
    forced,
    row_scale,
    stats,
    V,
    parameter,
    tolerance,
    ratio_clip,
    SAMPLED: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    at = tl.load(rows + n)
    # An id out of range has been reported (values.check_values); it must not become an address.
    y = tl.minimum(tl.maximum(tl.load(token_ids + at), 0), V - 1).to(tl.int32)
    row = n.to(tl.int64)
    PAIR: tl.constexpr = teacher is not None
    models = (
        student + row * student_stride,
        teacher + row * teacher_stride if teacher is not None else None,
        reference + row * reference_stride if reference is not None else None,
        student_bias,
        teacher_bias,
        reference_bias,
        student_scale,
        teacher_scale,
        reference_scale,
        student_softcap,
        teacher_softcap,
        reference_softcap,
        inverse_temperature,
    )
    z_y, t_y, moments, sums = _summarise(models, V, y, 1.0, PAIR, TEACHER, BLOCK)
    max_p, max_q, sum_p, sum_q, mean, _, _ = sums
    log_sum_p = tl.log(sum_p)
    lp = (z_y.to(tl.float64) - max_p) - log_sum_p
    entropy_p = log_sum_p - moments[0] / sum_p
    dlse = lp * 0.0
    if teacher is not None:
        log_sum_q = tl.log(sum_q)
        dlse = (max_p.to(tl.float64) - max_q) + (log_sum_p - log_sum_q)
        lq = (t_y.to(tl.float64) - max_q) - log_sum_q
        d = (t_y.to(tl.float64) - z_y) + dlse
        entropy_q = log_sum_q - moments[1] / sum_q
    else:
        lq = tl.load(teacher_logprob + at).to(tl.float64)
        d = lq - lp
        entropy_q = tl.full((), float("nan"), tl.float64)

    # The gate: gate.choose.
    signed = d * tl.load(verdict + at)
    agrees = signed > tolerance
    conflicts = signed < -tolerance
    if forced is not None:
        force = tl.load(forced + n)
        agrees = tl.where(force < 0, agrees, force == 1)
        conflicts = tl.where(force < 0, conflicts, force == 0)
    w_agree = tl.load(weights + n)
    w_conflict = tl.load(weights + weights_stride + n)
    w_neutral = tl.load(weights + 2 * weights_stride + n)
    w = tl.where(agrees, w_agree, tl.where(conflicts, w_conflict, w_neutral))

    kl = tl.full((), float("nan"), tl.float64)
    mean_score = kl
    most_score = kl.to(tl.float32)
    if teacher is not None:
        kl, mean_score, most_score, mean = _divergence(models, V, 1.0, sums, parameter, TEACHER, DIVERGENCE, BLOCK)
    value = kl
    weight = w
    advantage = d
    gate = w.to(tl.float32)
    if reference is not None:
        # The gate moves the target; the row itself weighs 1, or 0 if its rollout is not kept.
        weight = tl.where((w_agree != 0) | (w_conflict != 0) | (w_neutral != 0), 1.0, 0.0).to(tl.float64)
        if SAMPLED:
            # log pi_R(y): pi_R's own softmax, over all of its columns
            _, r_y, _, r_sums = _summarise(models, V, y, gate, PAIR, REFERENCE, BLOCK)
            lr = (r_y.to(tl.float64) - r_sums[1]) - tl.log(r_sums[3])
            target = tl.where((t_y == float("-inf")) | (r_y == float("-inf")), float("-inf"), w * lq + (1.0 - w) * lr)
            advantage = target - lp
        else:
            _, _, _, sums = _summarise(models, V, y, gate, PAIR, MIXTURE, BLOCK)
            max_p, max_q, sum_p, sum_q, _, _, _ = sums
            dlse = (max_p.to(tl.float64) - max_q) + (tl.log(sum_p) - tl.log(sum_q))
            value, mean_score, most_score, mean = _divergence(
                models, V, gate, sums, parameter, MIXTURE, DIVERGENCE, BLOCK
            )
    elif behaviour_logprob is not None:
        ratio = tl.exp(lp - tl.load(behaviour_logprob + at).to(tl.float64))
        advantage *= tl.where(ratio > ratio_clip, ratio_clip, ratio)  # a minimum would drop a NaN

    out = stats + row * COLUMNS
    if SAMPLED:
        loss = -weight * advantage * lp
    else:
        loss = weight * value
    tl.store(out, tl.where(weight == 0, 0.0, loss))
    tl.store(out + 1, kl)
    tl.store(out + 2, lp)
    tl.store(out + 3, lq)
    tl.store(out + 4, entropy_p)
    tl.store(out + 5, entropy_q)
    tl.store(out + 6, w)
    tl.store(out + 7, agrees.to(tl.float64))

    if gradient is not None:
        scaled = weight * tl.load(row_scale + n).to(tl.float64)
        if SAMPLED:
            scaled *= advantage
        # Through temperature and scale, back to the projection.
        coefficient = (scaled * student_scale * inverse_temperature).to(tl.float32)
        if units is not None:
            inverse_top = 1.0 / tl.load(top)
            bound = tl.abs(coefficient)
            if not SAMPLED:
                bound *= _bound(value, sum_p, sum_q, most_score, mean_score, DIVERGENCE)
            unit, inverse_unit = _unit(bound * inverse_top)
            tl.store(units + n, unit)
            coefficient = coefficient * inverse_top * inverse_unit
        on = weight != 0
        ip = (1.0 / sum_p).to(tl.float32)
        iq = (1.0 / sum_q).to(tl.float32)
        mean_hi = mean.to(tl.float32)
        mean_lo = (mean - mean_hi).to(tl.float32)
        dlse_hi = dlse.to(tl.float32)
        dlse_lo = (dlse - dlse_hi).to(tl.float32)
        g_row = gradient + row * gradient_stride
        for first in range(0, V, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            inside = columns < V
            if SAMPLED:
                z, t = _pair(models, columns, inside, gate, TEACHER)
            else:
                z, t = _pair(models, columns, inside, gate, MIXTURE)
            p_in = z != float("-inf")
            p = tl.exp(tl.where(p_in, z - max_p, float("-inf"))) * ip
            if SAMPLED:
                # Not under p_in: where y is outside, so is its loss, and the advantage shows it.
                g = p - tl.where(columns == y, 1.0, 0.0)
            else:
                delta = tl.where(p_in, z - t, 0.0)
                if DIVERGENCE == REVERSE_KL:
                    g = p * ((delta - mean_hi) - mean_lo)
                elif DIVERGENCE == FORWARD_KL:
                    u = (dlse_hi - delta) + dlse_lo
                    # p - q = -p (e^u - 1)
                    s = u * (1 / 120 + u * (1 / 720))
                    near = -p * (u * (1.0 + u * (0.5 + u * (1 / 6 + u * (1 / 24 + s)))))
                    q = tl.where(t != float("-inf"), tl.exp(t - max_q), 0.0) * iq
                    g = tl.where(tl.abs(u) < 0.25, near, p - q)
                else:
                    u = tl.where(p_in, (dlse_hi - delta) + dlse_lo, 0.0)
                    q = tl.where(t != float("-inf"), tl.exp(t - max_q), 0.0) * iq
                    _part, score = _columns(p_in, p, q, u, parameter, DIVERGENCE)
                    g = score - p * mean_score.to(tl.float32)
                g = tl.where(p_in, g, 0.0)
            if student_softcap is not None:
                x = z / (student_softcap * inverse_temperature)
                g *= tl.where(p_in, 1.0 - x * x, 0.0)
            g = tl.where(on, coefficient * g, 0.0)
            if gradient.dtype.element_ty != tl.float32:
                # A narrow row lies over the first half of the wide one: all lanes read before any writes.
                tl.debug_barrier()
            tl.store(g_row + columns, g.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def move_rows_kernel(z, stride, to, origin, V, BLOCK: tl.constexpr):
    """z[to] = z[origin], for disjoint row numbers."""
    pair = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(z + tl.load(origin + pair).to(tl.int64) * stride + columns, mask=columns < V)
    tl.store(z + tl.load(to + pair).to(tl.int64) * stride + columns, row, mask=columns < V)


@triton.jit
def parts_kernel(x, stride, unit, out, H, COUNT: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr):
    """TensorCoreBackend.parts. LOW: bit i is set where the i-th is a low one."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < H
    scaled = tl.load(x + row * stride + columns, mask=inside).to(tl.float32) * tl.load(unit)
    high = scaled.to(tl.float16)
    low = (scaled - high.to(tl.float32)).to(tl.float16)
    for i in tl.static_range(COUNT):
        part = low if (LOW >> i) & 1 else high
        tl.store(out + (row * COUNT + i) * H + columns, part, mask=inside)
