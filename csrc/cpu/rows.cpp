// The fused row pass on the CPU. Compiled once an instruction set (SGOPD_ISA names the namespace).
//
// A row is one token: student logits z [V], teacher logits t [V], optionally reference logits. One visit
// computes both log-sum-exps, the divergence, entropies, the sign gate and, in place of z, the gradient
//
//     reverse KL   G_v = w p_v ((z_v - t_v) - E_p[z - t])
//     forward KL   G_v = w (p_v - q_v)
//     others       G_v = w p_v (s_v - E_p[s]), with the score s of ../divergence.h
//     sampled      G_v = w d (p_v - 1[v = y])
//
// Numerics. Distillation converges where student and teacher nearly agree, so nothing may cancel there:
// - E_p[z - t] is accumulated around a running offset c, so that sums hold differences of the size of the spread
//   of z - t and not of z - t itself; the reverse-KL gradient then needs no log-sum-exp at all.
// - KL from first moments, E_p[z - t] - (lse_z - lse_t), has an absolute error of about 5e-8 from the rounding of
//   exp, which is 0.5 % at KL 1e-5. Below kPrecise it is summed instead as p (e^u - 1 - u), u = log q - log p: every
//   term is >= 0 and of second order in u, and an error in either log-sum-exp enters at second order.
// - block sums are float in SIMD lanes, row sums double.
// Legal -inf: a student column at -inf has p = 0; a column where a target is -inf leaves the student's
// distribution. NaN goes through to the statistics and the gradient.

#include "../rows.h"

#include "exp.h"

namespace sgopd {
namespace SGOPD_ISA {
namespace {

constexpr double kPrecise = 0.05;  // nats
constexpr float kTiny = std::numeric_limits<float>::min();

// tanh, <= 2 ulp: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would lose all relative accuracy.
inline float tanh_f32(float x) {
  const float a = std::fabs(x), s = x * x;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const float small = p * s * x + x;
  const float large = 1.f - 2.f / (exp_f32(a < 44.f ? 2.f * a : 88.f) + 1.f);
  const float big = x < 0.f ? -large : large;
  return a < 0.625f ? small : (x != x ? x : big);
}

// Projections -> logits: bias, scale, softcap, temperature.
void transform(float* __restrict z, const HeadArgs& head, float inverse_temperature, int64_t first, int64_t count) {
  z += first;
  if (head.bias != nullptr) {
    const float* __restrict bias = head.bias + first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) z[i] += bias[i];
  }
  if (head.softcap != 0.f) {
    const float in = head.logit_scale / head.softcap, out = head.softcap * inverse_temperature;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) z[i] = z[i] == kNegInf ? kNegInf : out * tanh_f32(z[i] * in);
  } else {
    const float scale = head.logit_scale * inverse_temperature;
    if (scale != 1.f) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) z[i] *= scale;
    }
  }
}

// A column that `target` cannot produce leaves the student's distribution.
void restrict_support(float* __restrict z, const float* __restrict target, int64_t count) {
  int outside = 0;
#pragma omp simd reduction(| : outside)
  for (int64_t i = 0; i < count; ++i) outside |= target[i] == kNegInf;
  if (!outside) return;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) z[i] = target[i] == kNegInf ? kNegInf : z[i];
}

// Logit -> log-probability. Not x - lse: a large offset common to all logits would take the digits of log_sum.
struct LogSoftmax {
  double max, log_sum;
  double operator()(double x) const { return (x - max) - log_sum; }
};

// One side's running softmax: maximum, sum of exponentials, sum of e * (z - max) for the entropy.
struct Side {
  float max = kNegInf;
  double sum = 0, moment = 0;

  // Moves the maximum; returns the factor on everything summed so far.
  double raise(float block) {
    if (!(block > max)) return 1.0;
    const double shift = sum > 0 ? static_cast<double>(max) - block : 0.0;
    const double factor = sum > 0 ? std::exp(shift) : 0.0;
    moment = sum > 0 ? factor * (moment + sum * shift) : 0.0;
    sum *= factor;
    max = block;
    return factor;
  }
  float origin() const { return max == kNegInf ? 0.f : max; }  // -inf - -inf would be NaN
  double log_sum() const { return std::log(sum); }
  LogSoftmax log_softmax() const { return {max, log_sum()}; }
  double entropy() const { return log_sum() - moment / sum; }
};

// Statistics of a pair of distributions: p over z, q over t, and moments of z - t around `offset`.
struct Moments {
  Side p, q;
  float offset = 0.f;
  double p_delta = 0, q_delta = 0;  // sums of e * (z - t - offset) under p and q
  double q_outside = 0;             // q's sum over columns where p is 0 by -inf

  double lse_difference() const { return (static_cast<double>(p.max) - q.max) + (p.log_sum() - q.log_sum()); }
  double mean_delta() const { return offset + p_delta / p.sum; }
  double reverse_kl() const { return mean_delta() - lse_difference(); }
  double forward_kl() const {
    return q_outside > 0 ? std::numeric_limits<double>::infinity() : lse_difference() - (offset + q_delta / q.sum);
  }

  void recentre(float to) {
    p_delta += p.sum * (static_cast<double>(offset) - to);
    q_delta += q.sum * (static_cast<double>(offset) - to);
    offset = to;
  }

  // Where a row has nearly all of its probability in one column, its gradient is that of the others: 1 - p, and what
  // they add to the mean of z - t. So that column is counted apart (`kTop`), and z - t taken around it.
  void add_block(const float* __restrict z, const float* __restrict t, int64_t count) {
    const float before_p = p.max, before_q = q.max;
    p_delta *= p.raise(block_max(z, count));
    const double factor = q.raise(block_max(t, count));
    q_delta *= factor;
    q_outside *= factor;
    if (p.max > before_p) {
      for (int64_t i = 0; i < count; ++i) {
        if (z[i] == p.max) {
          recentre(z[i] - t[i]);
          break;
        }
      }
    }
    if (p.max > before_p || q.max > before_q) {
      add<true>(z, t, count);
    } else {
      add<false>(z, t, count);
    }
    if (p.sum > 0) recentre(static_cast<float>(offset + p_delta / p.sum));
  }

  // Of columns that are in no block before; `kTop`: the largest yet may be among them.
  template <bool kTop>
  void add(const float* __restrict z, const float* __restrict t, int64_t count) {
    const float mp = p.origin(), mq = q.origin(), c = offset;
    float sp = 0, sq = 0, ep = 0, eq = 0, dp = 0, dq = 0, out = 0, top_p = 0, top_q = 0;
#pragma omp simd reduction(+ : sp, sq, ep, eq, dp, dq, out, top_p, top_q)
    for (int64_t i = 0; i < count; ++i) {
      const float a = z[i] - mp, b = t[i] - mq;
      const float ea = exp_f32(a), eb = exp_f32(b);
      const bool p_in = z[i] != kNegInf, q_in = t[i] != kNegInf;
      const float delta = p_in ? (z[i] - t[i]) - c : 0.f;  // t is finite wherever z is
      if constexpr (kTop) {
        top_p += a == 0.f ? 1.f : 0.f;
        top_q += b == 0.f ? 1.f : 0.f;
        sp += a == 0.f ? 0.f : ea;
        sq += b == 0.f ? 0.f : eb;
      } else {
        sp += ea;
        sq += eb;
      }
      ep += p_in ? ea * a : 0.f;
      eq += q_in ? eb * b : 0.f;
      dp += ea * delta;
      dq += eb * delta;
      // below fp32's smallest number a probability is still one: as far down as float64 has it
      out += p_in ? 0.f : (b > -745.f ? (eb > kTiny ? eb : kTiny) : 0.f);
    }
    p.sum += static_cast<double>(top_p) + sp;
    q.sum += static_cast<double>(top_q) + sq;
    p.moment += ep;
    q.moment += eq;
    p_delta += dp;
    q_delta += dq;
    q_outside += out;
  }
};

// A double as two floats: x - value is then exact to double's rounding where it matters.
struct Split {
  float hi, lo;
  explicit Split(double value) : hi(static_cast<float>(value)), lo(static_cast<float>(value - hi)) {}
};

// One block's reverse (or forward) KL, from terms of second order in u. Selections by mask and no && or branch, and u's
// by its bits: where GCC knows a value to be 0 it branches around what follows, and leaves the loop scalar (2.5 times
// the whole row pass; tests/kernels/test_native.py looks at the time).
template <bool kReverse>
float precise_block(const float* __restrict z, const float* __restrict t, int64_t count, float mp, float mq, float ip,
                    float iq, Split dlse) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    const float p = exp_f32(z[i] - mp) * ip, q = exp_f32(t[i] - mq) * iq;
    const float difference = (dlse.hi - (z[i] - t[i])) + dlse.lo;
    const float u = as_float(as_int(difference) & (z[i] == kNegInf ? 0 : -1));
    sum += kl_value<kReverse>(p, q, u);
  }
  return sum;
}

// Divergences of nearly equal distributions, every term of second order in u = log q - log p.
// Also those that are no KL, at any distance: in double, by the C library. `mean_score`: E_p[s] of these.
double precise_divergence(const float* __restrict z, const float* __restrict t, int64_t v, const Moments& s,
                          int divergence, double parameter, double* mean_score) {
  const float mp = s.p.origin(), mq = s.q.origin();
  const float ip = static_cast<float>(1.0 / s.p.sum), iq = static_cast<float>(1.0 / s.q.sum);
  const Split dlse(s.lse_difference());
  double total = 0, score = 0, mass = 0;
  for (int64_t first = 0; first < v; first += kBlock) {
    const int64_t last = min64(v, first + kBlock);
    if (!is_kl(divergence)) {
      const LogSoftmax log_p = s.p.log_softmax(), log_q = s.q.log_softmax();
      for (int64_t i = first; i < last; ++i) {
        const double p = z[i] == kNegInf ? 0.0 : std::exp(log_p(z[i]));
        const double q = t[i] == kNegInf ? 0.0 : std::exp(log_q(t[i]));
        if (p != 0) {  // NaN too: a comparison with 0 would drop it from the value and leave it in the gradient
          const ColumnTerms c = column(divergence, parameter, p, q, log_q(t[i]) - log_p(z[i]));
          total += c.value;
          score += c.score;
          mass += p;
        } else if (q != 0) {
          total += column_outside(divergence, parameter, q);
        }
      }
      continue;
    }
    const int64_t count = last - first;
    const float block = divergence == kReverseKL
                            ? precise_block<true>(z + first, t + first, count, mp, mq, ip, iq, dlse)
                            : precise_block<false>(z + first, t + first, count, mp, mq, ip, iq, dlse);
    total += block;
  }
  // The gradient sums to 0 only if the mean is taken under weights that sum to 1.
  *mean_score = mass > 0 ? score / mass : score;
  // A student that can produce nothing is no distribution.
  return !is_kl(divergence) && !(mass > 0) ? std::numeric_limits<double>::quiet_NaN() : total;
}

// d(loss)/d(projection) from d(loss)/d(logit): through temperature, softcap and scale, in place.
void chain(float* __restrict g, const float* __restrict logits, const RowsArgs& a, int64_t first, int64_t count) {
  const HeadArgs& head = a.student_head;
  const float scale = head.logit_scale * a.inverse_temperature;
  if (head.softcap != 0.f) {
    const float to_tanh = 1.f / (head.softcap * a.inverse_temperature);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float th = logits[i] * to_tanh;
      g[first + i] *= logits[i] == kNegInf ? 0.f : scale * (1.f - th * th);
    }
  } else if (scale != 1.f) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) g[first + i] *= scale;
  }
}

struct Coefficients {
  float full = 0;      // of the divergence's gradient
  double sampled = 0;  // of p - 1[v = y]
  double logprob = 0;  // of the sampled token
  double mean_score = 0;
};

// Student logits -> gradient, in place.
void gradient(float* __restrict z, const float* __restrict t, const RowsArgs& a, const Moments& s, int64_t y,
              const Coefficients& k) {
  const int64_t v = a.vocabulary;
  const float mp = s.p.origin(), mq = s.q.origin();
  const float ip = static_cast<float>(1.0 / s.p.sum), iq = static_cast<float>(1.0 / s.q.sum);
  const Split mean(s.mean_delta()), dlse(s.lse_difference());
  float logits[kBlock];
  for (int64_t first = 0; first < v; first += kBlock) {
    const int64_t count = min64(kBlock, v - first);
    float* __restrict zb = z + first;
    const float* __restrict tb = t == nullptr ? nullptr : t + first;
    if (a.student_head.softcap != 0.f) std::memcpy(logits, zb, sizeof(float) * count);
    if (a.sampled) {
      const float c = static_cast<float>(k.sampled) * ip;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) zb[i] = c * exp_f32(zb[i] - mp);
      if (y >= first && y < first + count) zb[y - first] = static_cast<float>(k.sampled * std::expm1(k.logprob));
    } else if (a.divergence == kReverseKL) {
      const float c = k.full * ip;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const float e = c * exp_f32(zb[i] - mp);
        const float g = reverse_kl_gradient(e, zb[i] - tb[i], mean.hi, mean.lo);
        zb[i] = zb[i] == kNegInf ? 0.f : g;
      }
    } else if (a.divergence == kForwardKL) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const float p = exp_f32(zb[i] - mp) * ip, q = exp_f32(tb[i] - mq) * iq;
        const float u = p > 0.f ? (dlse.hi - (zb[i] - tb[i])) + dlse.lo : 1.f;
        zb[i] = k.full * (zb[i] == kNegInf ? 0.f : forward_kl_gradient(p, q, u));
      }
    } else {
      const LogSoftmax log_p = s.p.log_softmax(), log_q = s.q.log_softmax();
      for (int64_t i = 0; i < count; ++i) {
        const double lp = log_p(zb[i]), lq = log_q(tb[i]), p = std::exp(lp);
        const double score = column(a.divergence, a.parameter, p, std::exp(lq), lq - lp).score;
        zb[i] = zb[i] == kNegInf ? 0.f : static_cast<float>(k.full * (score - p * k.mean_score));
      }
    }
    chain(z, logits, a, first, count);
  }
}

Moments statistics(const float* z, const float* t, int64_t v) {
  Moments s;
  for (int64_t first = 0; first < v; first += kBlock) s.add_block(z + first, t + first, min64(kBlock, v - first));
  return s;
}

// The student's side alone, when the teacher gives only the sampled token's log-probability.
Moments student_statistics(const float* z, int64_t v) {
  Moments s;
  for (int64_t first = 0; first < v; first += kBlock) {
    const int64_t count = min64(kBlock, v - first);
    const float* __restrict zb = z + first;
    s.p.raise(block_max(zb, count));
    const float mp = s.p.origin();
    float sum = 0, moment = 0, top = 0;
#pragma omp simd reduction(+ : sum, moment, top)
    for (int64_t i = 0; i < count; ++i) {
      const float a = zb[i] - mp, e = exp_f32(a);
      top += a == 0.f ? 1.f : 0.f;  // apart, as in Moments
      sum += a == 0.f ? 0.f : e;
      moment += zb[i] == kNegInf ? 0.f : e * a;
    }
    s.p.sum += static_cast<double>(top) + sum;
    s.p.moment += moment;
  }
  return s;
}

double divergence_of(const float* z, const float* t, int64_t v, const Moments& s, const RowsArgs& a,
                     double* mean_score) {
  double value = a.divergence == kForwardKL ? s.forward_kl() : s.reverse_kl();
  if (!is_kl(a.divergence) || value < kPrecise) {
    value = precise_divergence(z, t, v, s, a.divergence, a.parameter, mean_score);
  }
  return value;
}

// log pi* = w log pi_T + (1 - w) log pi_R up to a constant, in place of the teacher's logits.
void extrapolate(float* __restrict t, const float* __restrict r, int64_t v, float w) {
#pragma omp simd
  for (int64_t i = 0; i < v; ++i) {
    const bool outside = t[i] == kNegInf || r[i] == kNegInf;
    t[i] = outside ? kNegInf : w * t[i] + (1.f - w) * r[i];
  }
}

void one_row(const RowsArgs& a, int64_t n) {
  const int64_t v = a.vocabulary, y = a.token_ids[n];
  float* z = a.student + n * a.student_stride;
  float* t = a.teacher == nullptr ? nullptr : a.teacher + n * a.teacher_stride;
  float* r = a.reference == nullptr ? nullptr : a.reference + n * a.reference_stride;
  double* out = a.stats + n * kColumns;

  for (int64_t first = 0; first < v; first += kBlock) {
    const int64_t count = min64(kBlock, v - first);
    transform(z, a.student_head, a.inverse_temperature, first, count);
    const auto target = [&](float* logits, const HeadArgs& head) {
      transform(logits, head, a.inverse_temperature, first, count);
      restrict_support(z + first, logits + first, count);
    };
    if (t != nullptr) target(t, a.teacher_head);
    if (r != nullptr) target(r, a.reference_head);
  }

  Moments s = t == nullptr ? student_statistics(z, v) : statistics(z, t, v);
  const double lp = s.p.log_softmax()(z[y]);
  const double lq = t == nullptr ? static_cast<double>(a.teacher_logprob[n]) : s.q.log_softmax()(t[y]);
  const double d = t == nullptr ? lq - lp : (static_cast<double>(t[y]) - z[y]) + s.lse_difference();

  const Gated gate = gated(a, n, d);
  const double w = gate.weight;
  Coefficients k;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  double kl = t == nullptr ? nan : divergence_of(z, t, v, s, a, &k.mean_score);
  out[kKL] = kl;
  out[kStudentLogprob] = lp;
  out[kTeacherLogprob] = lq;
  out[kStudentEntropy] = s.p.entropy();
  out[kTeacherEntropy] = t == nullptr ? nan : s.q.entropy();
  out[kGate] = w;
  out[kAgree] = gate.agrees ? 1.0 : 0.0;

  double weight = w;  // of the row's loss
  double advantage = d;
  if (r != nullptr) {
    // The gate moves the target; the row itself weighs 1, or 0 if its rollout is not kept.
    weight = gate.counts ? 1.0 : 0.0;
    if (a.sampled) {
      const bool outside = t[y] == kNegInf || r[y] == kNegInf;
      const double lr = student_statistics(r, v).p.log_softmax()(r[y]);
      advantage = (outside ? static_cast<double>(kNegInf) : w * lq + (1 - w) * lr) - lp;
    } else {
      extrapolate(t, r, v, static_cast<float>(w));
      s = statistics(z, t, v);
      kl = divergence_of(z, t, v, s, a, &k.mean_score);
    }
  } else if (a.behaviour_logprob != nullptr) {
    const double ratio = std::exp(lp - a.behaviour_logprob[n]);
    advantage *= ratio > a.ratio_clip ? a.ratio_clip : ratio;  // NaN stays NaN
  }
  if (weight == 0) {
    out[kLoss] = 0;
    if (a.gradient) std::memset(z, 0, sizeof(float) * v);
    return;
  }
  out[kLoss] = a.sampled ? -weight * advantage * lp : weight * kl;
  if (!a.gradient) return;
  k.full = static_cast<float>(weight * a.row_scale[n]);
  k.sampled = weight * advantage * a.row_scale[n];
  k.logprob = lp;
  gradient(z, t, a, s, y, k);
}

// Where the gradient's energy lies, while the row is in a cache.
void energies(const float* __restrict g, int64_t v, float* __restrict out) {
  const int64_t whole = v / 32;
  for (int64_t block = 0; block < whole; ++block) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < 32; ++i) sum += g[32 * block + i] * g[32 * block + i];
    out[block] = sum;
  }
  if (32 * whole == v) return;
  out[whole] = 0;
  for (int64_t i = 32 * whole; i < v; ++i) out[whole] += g[i] * g[i];
}

}  // namespace

void rows(const RowsArgs& a, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) {
    one_row(a, n);
    if (a.energy != nullptr && a.gradient)
      energies(a.student + n * a.student_stride, a.vocabulary, a.energy + n * ((a.vocabulary + 31) / 32));
  }
}

}  // namespace SGOPD_ISA
}  // namespace sgopd
