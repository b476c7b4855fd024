// The fused row pass in CUDA: one thread block a token, the contract of ../rows.h, the numerics of
// ../cpu/rows.cpp. Raw pointers and a stream: no torch linkage, one build for every torch.
//
// Each thread walks the row with stride kThreads and keeps online statistics of its own; the block combines them
// once. Projections become logits on load (bias, scale, softcap, temperature), so nothing is written but the
// gradient. The running offset c of the centred moments is z - t at the sampled token, which carries mass.

#include <cuda_runtime.h>
#include <math_constants.h>

#include <cmath>
#include <stdexcept>
#include <string>

#include "../rows.h"

namespace sgopd {
namespace {

constexpr int kThreads = 256;  // 512 would leave 128 registers a thread: sm_90 spills then
constexpr int kWarps = kThreads / 32;
constexpr double kPrecise = 0.05;  // nats: below, KL is summed from second-order terms

__device__ inline float neg_inf() { return -INFINITY; }

// Sums `count` doubles over the block; every thread gets the totals. `shared` holds kWarps * count doubles.
template <int kCount>
__device__ void block_sum(double (&values)[kCount], double* shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) values[i] += __shfl_xor_sync(0xffffffffu, values[i], offset);
  }
  __syncthreads();  // the previous use of `shared` is over
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) shared[warp * kCount + i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = 0;
    for (int w = 0; w < kWarps; ++w) values[i] += shared[w * kCount + i];
  }
}

__device__ float block_max(float value, double* shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  __syncthreads();
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = neg_inf();
  for (int w = 0; w < kWarps; ++w) value = fmaxf(value, static_cast<float>(shared[w]));
  return value;
}

struct Row {
  const RowsArgs& a;
  const float *z, *t, *r;  // projections
  float gate = 1.f;        // of the mixture
  enum Target { kTeacher, kMixture, kReference } target = kTeacher;

  __device__ float logit(const float* x, const HeadArgs& head, int64_t v) const {
    float value = (x[v] + (head.bias != nullptr ? head.bias[v] : 0.f)) * head.logit_scale;
    if (head.softcap != 0.f && value != neg_inf()) value = head.softcap * tanhf(value / head.softcap);
    return value * a.inverse_temperature;
  }
  // (student, target) logits of a column; the student's is -inf where a target's is.
  __device__ float2 load(int64_t v) const {
    float s = logit(z, a.student_head, v), q = 0.f;
    if (t != nullptr) {
      q = logit(t, a.teacher_head, v);
      bool outside = q == neg_inf();
      if (r != nullptr) {
        const float reference = logit(r, a.reference_head, v);
        outside = outside || reference == neg_inf();
        if (target == kMixture) q = outside ? neg_inf() : gate * q + (1.f - gate) * reference;
        if (target == kReference) q = reference;
      }
      if (outside) s = neg_inf();
    }
    return make_float2(s, q);
  }
};

struct Summary {
  float max_p, max_q, offset;
  double sum_p, sum_q, moment_p, moment_q, p_delta, q_delta, q_outside;

  __device__ double lse_p() const { return max_p + log(sum_p); }
  __device__ double lse_q() const { return max_q + log(sum_q); }
  __device__ double lse_difference() const { return (static_cast<double>(max_p) - max_q) + (log(sum_p) - log(sum_q)); }
  __device__ double mean_delta() const { return offset + p_delta / sum_p; }
  __device__ double reverse_kl() const { return mean_delta() - lse_difference(); }
  __device__ double forward_kl() const {
    return q_outside > 0 ? static_cast<double>(INFINITY) : lse_difference() - (offset + q_delta / sum_q);
  }
};

// One pass over the row: both softmaxes and the centred moments of z - t.
__device__ Summary summarise(const Row& row, int64_t y, double* shared) {
  const bool pair = row.t != nullptr;
  const float2 at_y = row.load(y);
  const float c = pair && at_y.x != neg_inf() ? at_y.x - at_y.y : 0.f;
  float mp = neg_inf(), mq = neg_inf();
  float sp = 0, sq = 0, ep = 0, eq = 0, dp = 0, dq = 0, out = 0;
  for (int64_t v = threadIdx.x; v < row.a.vocabulary; v += kThreads) {
    const float2 x = row.load(v);
    if (x.x > mp) {
      const float shift = mp - x.x, f = sp > 0 ? expf(shift) : 0.f;
      ep = sp > 0 ? f * (ep + sp * shift) : 0.f;
      sp *= f;
      dp *= f;
      mp = x.x;
    }
    if (pair && x.y > mq) {
      const float shift = mq - x.y, f = sq > 0 ? expf(shift) : 0.f;
      eq = sq > 0 ? f * (eq + sq * shift) : 0.f;
      sq *= f;
      dq *= f;
      out *= f;
      mq = x.y;
    }
    const bool p_in = x.x != neg_inf(), q_in = pair && x.y != neg_inf();
    const float a = p_in ? x.x - mp : 0.f, b = q_in ? x.y - mq : 0.f;
    const float ea = p_in ? expf(a) : 0.f, eb = q_in ? expf(b) : 0.f;
    const float delta = pair && p_in ? (x.x - x.y) - c : 0.f;
    sp += ea;
    sq += eb;
    ep += ea * a;
    eq += eb * b;
    dp += ea * delta;
    dq += eb * delta;
    if (!p_in) out += eb;
  }
  Summary s;
  s.offset = c;
  s.max_p = block_max(mp, shared);
  s.max_q = block_max(mq, shared);
  const double shift_p = mp == neg_inf() ? 0.0 : static_cast<double>(mp) - s.max_p;
  const double shift_q = mq == neg_inf() ? 0.0 : static_cast<double>(mq) - s.max_q;
  const double fp = exp(shift_p), fq = exp(shift_q);
  double sums[7] = {sp * fp, sq * fq, (ep + sp * shift_p) * fp, (eq + sq * shift_q) * fq, dp * fp, dq * fq, out * fq};
  block_sum(sums, shared);
  s.sum_p = sums[0];
  s.sum_q = sums[1];
  s.moment_p = sums[2];
  s.moment_q = sums[3];
  s.p_delta = sums[4];
  s.q_delta = sums[5];
  s.q_outside = sums[6];
  return s;
}

// The divergence; below kPrecise from terms of second order in u = log q - log p. `mean_score`: E_p[s] of those that
// are no KL.
__device__ double divergence(const Row& row, const Summary& s, double* mean_score, double* shared) {
  const RowsArgs& a = row.a;
  const double first_order = a.divergence == kForwardKL ? s.forward_kl() : s.reverse_kl();
  if (is_kl(a.divergence) && !(first_order < kPrecise)) return first_order;
  const double dlse = s.lse_difference(), lse_p = s.lse_p(), lse_q = s.lse_q();
  const float ip = static_cast<float>(1.0 / s.sum_p), iq = static_cast<float>(1.0 / s.sum_q);
  double sums[3] = {0, 0, 0};  // divergence, score, mass
  for (int64_t v = threadIdx.x; v < a.vocabulary; v += kThreads) {
    const float2 x = row.load(v);
    const bool p_in = x.x != neg_inf(), q_in = x.y != neg_inf();
    if (!is_kl(a.divergence)) {
      const double p = p_in ? exp(x.x - lse_p) : 0.0, q = q_in ? exp(x.y - lse_q) : 0.0;
      if (p != 0) {
        const ColumnTerms c = column(a.divergence, a.parameter, p, q, dlse - (static_cast<double>(x.x) - x.y));
        sums[0] += c.value;
        sums[1] += c.score;
        sums[2] += p;
      } else if (q != 0) {
        sums[0] += column_outside(a.divergence, a.parameter, q);
      }
      continue;
    }
    const float p = p_in ? expf(x.x - s.max_p) * ip : 0.f, q = q_in ? expf(x.y - s.max_q) * iq : 0.f;
    const float u = p_in ? static_cast<float>(dlse - (static_cast<double>(x.x) - x.y)) : 0.f;
    sums[0] += a.divergence == kReverseKL ? kl_value<true>(p, q, u) : kl_value<false>(p, q, u);
  }
  block_sum(sums, shared);
  *mean_score = sums[2] > 0 ? sums[1] / sums[2] : sums[1];
  // A student that can produce nothing is no distribution.
  return !is_kl(a.divergence) && !(sums[2] > 0) ? static_cast<double>(CUDART_NAN) : sums[0];
}

__global__ void __launch_bounds__(kThreads) rows_kernel(const RowsArgs a) {
  __shared__ double shared[kWarps * 7];
  const int64_t n = blockIdx.x, y = a.token_ids[n];
  float* out_z = a.student + n * a.student_stride;
  Row row{a, out_z, a.teacher == nullptr ? nullptr : a.teacher + n * a.teacher_stride,
          a.reference == nullptr ? nullptr : a.reference + n * a.reference_stride};

  Summary s = summarise(row, y, shared);
  const float2 at_y = row.load(y);
  const bool pair = row.t != nullptr;
  const double lp = at_y.x - s.lse_p();
  const double lq = pair ? at_y.y - s.lse_q() : static_cast<double>(a.teacher_logprob[n]);
  const double d = pair ? (static_cast<double>(at_y.y) - at_y.x) + s.lse_difference() : lq - lp;

  const double signed_d = d * a.verdict[n];
  bool agrees = signed_d > a.tolerance, conflicts = signed_d < -a.tolerance;
  if (a.forced != nullptr && a.forced[n] >= 0) {
    agrees = a.forced[n] == 1;
    conflicts = !agrees;
  }
  const double w_agree = a.weights[n], w_conflict = a.weights[a.rows + n], w_neutral = a.weights[2 * a.rows + n];
  const double w = agrees ? w_agree : (conflicts ? w_conflict : w_neutral);

  double mean_score = 0;
  const double none = CUDART_NAN;
  double kl = pair ? divergence(row, s, &mean_score, shared) : none;
  const double measured_kl = kl;
  const double entropy_p = log(s.sum_p) - s.moment_p / s.sum_p;
  const double entropy_q = pair ? log(s.sum_q) - s.moment_q / s.sum_q : none;

  double weight = w, advantage = d;
  if (row.r != nullptr) {
    weight = w_agree != 0 || w_conflict != 0 || w_neutral != 0 ? 1.0 : 0.0;
    if (a.sampled) {
      // log pi_R(y): pi_R's own softmax, over the columns that only the teacher lacks too.
      row.target = Row::kReference;
      const Summary reference = summarise(row, y, shared);
      const float r_y = row.load(y).y;
      const bool outside = at_y.y == neg_inf() || r_y == neg_inf();
      advantage = (outside ? static_cast<double>(neg_inf()) : w * lq + (1 - w) * (r_y - reference.lse_q())) - lp;
      row.target = Row::kTeacher;
    } else {
      row.target = Row::kMixture;
      row.gate = static_cast<float>(w);
      s = summarise(row, y, shared);
      kl = divergence(row, s, &mean_score, shared);
    }
  } else if (a.behaviour_logprob != nullptr) {
    const double ratio = exp(lp - a.behaviour_logprob[n]);
    advantage *= ratio > a.ratio_clip ? a.ratio_clip : ratio;  // NaN stays NaN
  }
  if (threadIdx.x == 0) {
    double* out = a.stats + n * kColumns;
    out[kLoss] = weight == 0 ? 0.0 : (a.sampled ? -weight * advantage * lp : weight * kl);
    out[kKL] = measured_kl;
    out[kStudentLogprob] = lp;
    out[kTeacherLogprob] = lq;
    out[kStudentEntropy] = entropy_p;
    out[kTeacherEntropy] = entropy_q;
    out[kGate] = w;
    out[kAgree] = agrees ? 1.0 : 0.0;
  }
  if (!a.gradient) return;

  const float full = static_cast<float>(weight * a.row_scale[n]);
  const float sampled = static_cast<float>(weight * advantage * a.row_scale[n]);
  const float ip = static_cast<float>(1.0 / s.sum_p), iq = static_cast<float>(1.0 / s.sum_q);
  const double dlse = s.lse_difference(), mean = s.mean_delta(), lse_p = s.lse_p(), lse_q = s.lse_q();
  const float mean_hi = static_cast<float>(mean), mean_lo = static_cast<float>(mean - mean_hi);
  const float chain = a.student_head.logit_scale * a.inverse_temperature;
  const float to_tanh = a.student_head.softcap == 0.f ? 0.f : 1.f / (a.student_head.softcap * a.inverse_temperature);
  // From here a thread writes the columns it reads; the sampled token's column was read by all of them.
  __syncthreads();
  for (int64_t v = threadIdx.x; v < a.vocabulary; v += kThreads) {
    const float2 x = row.load(v);
    float g = 0.f;
    if (weight != 0 && x.x != neg_inf()) {
      const float p = expf(x.x - s.max_p) * ip;
      if (a.sampled) {
        g = sampled * (p - (v == y ? 1.f : 0.f));
      } else if (a.divergence == kReverseKL) {
        g = reverse_kl_gradient(full * p, x.x - x.y, mean_hi, mean_lo);
      } else {
        const double u = dlse - (static_cast<double>(x.x) - x.y);
        if (a.divergence == kForwardKL) {
          g = full * forward_kl_gradient(p, expf(x.y - s.max_q) * iq, static_cast<float>(u));
        } else {
          const double wide = exp(x.x - lse_p);
          const double score = column(a.divergence, a.parameter, wide, exp(x.y - lse_q), u).score;
          g = static_cast<float>(full * (score - wide * mean_score));
        }
      }
      const float th = x.x * to_tanh;
      g *= chain * (1.f - th * th);
    }
    out_z[v] = g;
  }
}

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA row pass: ") + cudaGetErrorString(status));
  }
}

}  // namespace

// Device pointers throughout; asynchronous on `stream`.
void cuda_rows(const RowsArgs& args, void* stream) {
  int devices = 0;
  check(cudaGetDeviceCount(&devices));
  if (devices == 0) throw std::runtime_error("CUDA row pass: no CUDA device is available");
  rows_kernel<<<static_cast<unsigned>(args.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  check(cudaGetLastError());
}

}  // namespace sgopd
