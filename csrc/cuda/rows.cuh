// The fused row pass on a device: the contract of ../rows.h, the numerics of ../cpu/rows.cpp.
//
// A team of threads works on one token's row: a block that walks it two or three times, or (kStaged) the blocks of a
// cluster, each with a slice of the columns, which it reads from memory once and keeps as logits in shared memory. A
// thread takes four columns at a time, 16 bytes, and keeps online statistics of its own; the team adds them up once.
// Projections become logits on load (bias, scale, softcap, temperature), so nothing is written but the gradient. The
// offset c of the centred moments is z - t at the sampled token, which carries mass.
//
// Compiled for the host too, with threads for threads: tests/cuda_host.
#pragma once

#include <cmath>

#include "../rows.h"

namespace sgopd {
namespace cuda {

constexpr double kPrecise = 0.05;  // nats: below, KL is summed from second-order terms
constexpr int kSums = 7;

#ifdef __CUDACC__
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}
// What block `rank` of the cluster has where this one has `own`, in shared memory.
__device__ inline double cluster_read(double* own, int rank) {
#if __CUDA_ARCH__ >= 900
  return *cooperative_groups::this_cluster().map_shared_rank(own, rank);
#else
  return *own;
#endif
}
// What the lane has whose number differs by `offset`.
template <int kCount>
__device__ inline void exchange(const double (&own)[kCount], double (&other)[kCount], int offset) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) other[i] = __shfl_xor_sync(0xffffffffu, own[i], offset);
}
__device__ inline void copy_async(float4* to, const float* from) { __pipeline_memcpy_async(to, from, 16); }
__device__ inline void copied() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}
#endif

__device__ inline float neg_inf() { return -INFINITY; }

constexpr int kMostBlocks = 16;  // of a cluster

template <int kThreads>
struct Shared {
  double warps[kThreads / 32 * kSums];
  double block[2][kSums];  // in turn: the other blocks may still read the sums before
  double blocks[kMostBlocks * kSums];
};

// The threads that work on one row.
template <int kThreads>
struct Team {
  Shared<kThreads>& shared;
  int rank = 0, blocks = 1;  // of a cluster
  int turn = 0;

  __device__ int thread() const { return static_cast<int>(threadIdx.x); }

  // Every thread gets the totals. Within a warp, a block, the cluster.
  template <int kCount, typename Combine>
  __device__ void reduce(double (&values)[kCount], Combine combine) {
    const int lane = thread() & 31, warp = thread() >> 5;
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
      double others[kCount];
      exchange(values, others, offset);
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = combine(values[i], others[i]);
    }
    __syncthreads();  // the previous use of `shared` is over
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) shared.warps[warp * kCount + i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = shared.warps[i];
      for (int w = 1; w < kThreads / 32; ++w) values[i] = combine(values[i], shared.warps[w * kCount + i]);
    }
    if (blocks == 1) return;
    double* own = shared.block[turn];
    turn ^= 1;
    if (thread() == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) own[i] = values[i];
    }
    cluster_sync();
    for (int i = thread(); i < blocks * kCount; i += kThreads)
      shared.blocks[i] = cluster_read(own + i % kCount, i / kCount);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = shared.blocks[i];
      for (int b = 1; b < blocks; ++b) values[i] = combine(values[i], shared.blocks[b * kCount + i]);
    }
  }

  template <int kCount>
  __device__ void sum(double (&values)[kCount]) {
    reduce(values, [](double a, double b) { return a + b; });
  }
  __device__ void max(float& a, float& b) {
    double values[2] = {a, b};
    reduce(values, [](double x, double y) { return x > y ? x : y; });
    a = static_cast<float>(values[0]);
    b = static_cast<float>(values[1]);
  }
};

// Fours of columns that a thread has of a row, at the most.
SGOPD_BOTH int stage_quads(int64_t columns, int threads, int blocks) {
  const int64_t at_once = 4ll * threads * blocks;
  return static_cast<int>((columns + at_once - 1) / at_once);
}

struct Four {
  float x[4];
};

__device__ inline float logit(float x, const HeadArgs& head, int64_t v, float inverse_temperature) {
  float value = (x + (head.bias != nullptr ? head.bias[v] : 0.f)) * head.logit_scale;
  if (head.softcap != 0.f && value != neg_inf()) value = head.softcap * tanhf(value / head.softcap);
  return value * inverse_temperature;
}

// Columns first .. first + 3 of a row; -inf beyond it.
__device__ inline Four read(const float* row, int64_t first, int64_t columns) {
  Four r;
  if (first + 4 <= columns && reinterpret_cast<uintptr_t>(row) % 16 == 0) {
    const float4 four = *reinterpret_cast<const float4*>(row + first);
    r = {{four.x, four.y, four.z, four.w}};
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) r.x[j] = first + j < columns ? row[first + j] : neg_inf();
  }
  return r;
}

__device__ inline Four logits(Four r, const HeadArgs& head, int64_t first, const RowsArgs& a) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (first + j < a.vocabulary) r.x[j] = logit(r.x[j], head, first + j, a.inverse_temperature);
  }
  return r;
}

template <int kThreads, bool kStaged>
struct Row {
  const RowsArgs& a;
  const float *z, *t, *r;  // projections
  const float4* stage;     // kStaged: this thread's logits, model after model
  int quads;               // fours of columns of a thread and model, at the most
  int rank, blocks;
  float z_y, t_y, r_y;  // logits of the sampled token
  float gate = 1.f;     // of the mixture
  enum Target { kTeacher, kMixture, kReference } target = kTeacher;

  // (student, target); the student's is -inf where a target's is.
  __device__ float2 combine(float s, float q, float reference) const {
    if (t == nullptr) return make_float2(s, 0.f);
    bool outside = q == neg_inf();
    if (r != nullptr) {
      outside = outside || reference == neg_inf();
      if (target == kMixture) q = outside ? neg_inf() : gate * q + (1.f - gate) * reference;
      if (target == kReference) q = reference;
    }
    return make_float2(outside ? neg_inf() : s, q);
  }

  __device__ Four model(int m, int i, int64_t first) const {
    if (kStaged) {
      const float4 four = stage[(m * quads + i) * kThreads];
      return {{four.x, four.y, four.z, four.w}};
    }
    const float* row = m == 0 ? z : m == 1 ? t : r;
    const HeadArgs& head = m == 0 ? a.student_head : m == 1 ? a.teacher_head : a.reference_head;
    return logits(read(row, first, a.vocabulary), head, first, a);
  }

  // This thread's i-th four columns.
  __device__ int64_t first(int i) const {
    return 4 * ((static_cast<int64_t>(i) * blocks + rank) * kThreads + threadIdx.x);
  }
  __device__ void load(int i, float2 (&pairs)[4]) const {
    const int64_t at = first(i);
    const Four s = model(0, i, at), q = t == nullptr ? Four{} : model(1, i, at),
               x = r == nullptr ? Four{} : model(2, i, at);
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = combine(s.x[j], q.x[j], x.x[j]);
  }
  // visit(column, student's logit, target's logit)
  template <typename Visit>
  __device__ void each(Visit visit) const {
    for (int i = 0; first(i) < a.vocabulary; ++i) {
      float2 pairs[4];
      load(i, pairs);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (first(i) + j < a.vocabulary) visit(pairs[j].x, pairs[j].y);
      }
    }
  }
};

struct Summary {
  float max_p, max_q, offset;
  double sum_p, sum_q, moment_p, moment_q, p_delta, q_delta, q_outside;
  double drift = 0;  // what is left of E_p[z - t] around mean_delta, where the models nearly agree

  // Of a logit x. Not x - lse: a large offset common to all logits would take the digits of log(sum).
  __device__ double log_p(double x) const { return (x - max_p) - log(sum_p); }
  __device__ double log_q(double x) const { return (x - max_q) - log(sum_q); }
  __device__ double lse_difference() const { return (static_cast<double>(max_p) - max_q) + (log(sum_p) - log(sum_q)); }
  __device__ double mean_delta() const { return offset + p_delta / sum_p + drift; }
  __device__ double reverse_kl() const { return mean_delta() - lse_difference(); }
  __device__ double forward_kl() const {
    return q_outside > 0 ? static_cast<double>(INFINITY) : lse_difference() - (offset + q_delta / sum_q);
  }
};

// One pass over the row: both softmaxes and the centred moments of z - t.
template <int kThreads, bool kStaged>
__device__ Summary summarise(const Row<kThreads, kStaged>& row, Team<kThreads>& team) {
  const bool pair = row.t != nullptr;
  const float2 at_y = row.combine(row.z_y, row.t_y, row.r_y);
  const float c = pair && at_y.x != neg_inf() ? at_y.x - at_y.y : 0.f;
  float mp = neg_inf(), mq = neg_inf();
  float sp = 0, sq = 0, ep = 0, eq = 0, dp = 0, dq = 0, out = 0;
  row.each([&](float s, float q) {
    if (s > mp) {
      const float shift = mp - s, f = sp > 0 ? expf(shift) : 0.f;
      ep = sp > 0 ? f * (ep + sp * shift) : 0.f;
      sp *= f;
      dp *= f;
      mp = s;
    }
    if (pair && q > mq) {
      const float shift = mq - q, f = sq > 0 ? expf(shift) : 0.f;
      eq = sq > 0 ? f * (eq + sq * shift) : 0.f;
      sq *= f;
      dq *= f;
      out *= f;
      mq = q;
    }
    const bool p_in = s != neg_inf(), q_in = pair && q != neg_inf();
    const float a = p_in ? s - mp : 0.f, b = q_in ? q - mq : 0.f;
    const float ea = p_in ? expf(a) : 0.f, eb = q_in ? expf(b) : 0.f;
    const float delta = pair && p_in ? (s - q) - c : 0.f;
    sp += ea;
    sq += eb;
    ep += ea * a;
    eq += eb * b;
    dp += ea * delta;
    dq += eb * delta;
    if (!p_in) out += eb;
  });
  Summary s;
  s.offset = c;
  s.max_p = mp;
  s.max_q = mq;
  team.max(s.max_p, s.max_q);
  const double shift_p = mp == neg_inf() ? 0.0 : static_cast<double>(mp) - s.max_p;
  const double shift_q = mq == neg_inf() ? 0.0 : static_cast<double>(mq) - s.max_q;
  const double fp = exp(shift_p), fq = exp(shift_q);
  double sums[kSums] = {sp * fp, sq * fq, (ep + sp * shift_p) * fp, (eq + sq * shift_q) * fq, dp * fp,
                        dq * fq, out * fq};
  team.sum(sums);
  s.sum_p = sums[0];
  s.sum_q = sums[1];
  s.moment_p = sums[2];
  s.moment_q = sums[3];
  s.p_delta = sums[4];
  s.q_delta = sums[5];
  s.q_outside = sums[6];
  return s;
}

// A number as the sum of two floats.
struct Twofold {
  float high, low;
  __device__ explicit Twofold(double x) : high(static_cast<float>(x)), low(static_cast<float>(x - high)) {}
};

// The divergence; below kPrecise from terms of second order in u = log q - log p. `mean_score`: E_p[s] of those that
// are no KL.
template <int kThreads, bool kStaged>
__device__ double divergence(const Row<kThreads, kStaged>& row, Summary& s, double* mean_score, Team<kThreads>& team) {
  const RowsArgs& a = row.a;
  const double first_order = a.divergence == kForwardKL ? s.forward_kl() : s.reverse_kl();
  if (is_kl(a.divergence) && !(first_order < kPrecise)) return first_order;
  const Twofold dlse(s.lse_difference()), mean(s.mean_delta());
  const float ip = static_cast<float>(1.0 / s.sum_p), iq = static_cast<float>(1.0 / s.sum_q);
  const float parameter = static_cast<float>(a.parameter);
  float value = 0, score = 0, mass = 0;  // of a KL, score: what the mean of z - t is off by
  row.each([&](float z, float t) {
    const bool p_in = z != neg_inf();
    const float p = p_in ? expf(z - s.max_p) * ip : 0.f, q = t != neg_inf() ? expf(t - s.max_q) * iq : 0.f;
    const float u = p_in ? (dlse.high - (z - t)) + dlse.low : 0.f;
    if (is_kl(a.divergence)) {
      value += a.divergence == kReverseKL ? kl_value<true>(p, q, u) : kl_value<false>(p, q, u);
      if (p_in) score += reverse_kl_gradient(p, z - t, mean.high, mean.low);
    } else if (p_in) {
      const ColumnTerms32 c = column32(a.divergence, parameter, p, q, u);
      value += c.value;
      score += c.score;
      mass += p;
    } else {
      value += static_cast<float>(column_outside(a.divergence, a.parameter, q));
    }
  });
  double sums[3] = {value, score, mass};
  team.sum(sums);
  if (is_kl(a.divergence)) {
    s.drift += sums[1];
    return sums[0];
  }
  *mean_score = sums[1] / sums[2];
  return sums[2] > 0 ? sums[0] : *mean_score;  // a student that can produce nothing is no distribution: 0 / 0
}

// One token's row, by all threads of its team. `stage`: kStaged, room for this thread's logits.
template <int kThreads, bool kStaged>
__device__ void run_row(const RowsArgs& a, int64_t n, Team<kThreads> team, float4* stage) {
  const int64_t y = a.token_ids[n];
  float* out_z = a.student + n * a.student_stride;
  const float none = NAN;
  Row<kThreads, kStaged> row{a,
                             out_z,
                             a.teacher == nullptr ? nullptr : a.teacher + n * a.teacher_stride,
                             a.reference == nullptr ? nullptr : a.reference + n * a.reference_stride,
                             stage,
                             stage_quads(a.vocabulary, kThreads, team.blocks),
                             team.rank,
                             team.blocks,
                             none,
                             0.f,
                             0.f};
  row.z_y = logit(row.z[y], a.student_head, y, a.inverse_temperature);
  if (row.t != nullptr) row.t_y = logit(row.t[y], a.teacher_head, y, a.inverse_temperature);
  if (row.r != nullptr) row.r_y = logit(row.r[y], a.reference_head, y, a.inverse_temperature);
  if (kStaged) {
    const int models = row.r != nullptr ? 3 : row.t != nullptr ? 2 : 1;
    for (int m = 0; m < models; ++m) {
      const float* from = m == 0 ? row.z : m == 1 ? row.t : row.r;
      const bool whole = reinterpret_cast<uintptr_t>(from) % 16 == 0;
      for (int i = 0; row.first(i) < a.vocabulary; ++i) {
        float4* to = stage + (m * row.quads + i) * kThreads;
        if (whole && row.first(i) + 4 <= a.vocabulary) {
          copy_async(to, from + row.first(i));
        } else {
          const Four four = read(from, row.first(i), a.vocabulary);
          *to = make_float4(four.x[0], four.x[1], four.x[2], four.x[3]);
        }
      }
    }
    copied();
    // Every thread reads back what it copied itself: nobody else's writes have to be waited for.
    for (int m = 0; m < models; ++m) {
      const HeadArgs& head = m == 0 ? a.student_head : m == 1 ? a.teacher_head : a.reference_head;
      for (int i = 0; row.first(i) < a.vocabulary; ++i) {
        float4& four = stage[(m * row.quads + i) * kThreads];
        const Four x = logits({{four.x, four.y, four.z, four.w}}, head, row.first(i), a);
        four = make_float4(x.x[0], x.x[1], x.x[2], x.x[3]);
      }
    }
  }

  Summary s = summarise(row, team);
  const float2 at_y = row.combine(row.z_y, row.t_y, row.r_y);
  const bool pair = row.t != nullptr;
  const double lp = s.log_p(at_y.x);
  const double lq = pair ? s.log_q(at_y.y) : static_cast<double>(a.teacher_logprob[n]);
  const double d = pair ? (static_cast<double>(at_y.y) - at_y.x) + s.lse_difference() : lq - lp;

  const Gated gate = gated(a, n, d);
  const double w = gate.weight;
  double mean_score = 0;
  double kl = pair ? divergence(row, s, &mean_score, team) : static_cast<double>(none);
  const double measured_kl = kl;
  const double entropy_p = log(s.sum_p) - s.moment_p / s.sum_p;
  const double entropy_q = pair ? log(s.sum_q) - s.moment_q / s.sum_q : static_cast<double>(none);

  double weight = w, advantage = d;
  if (row.r != nullptr) {
    weight = gate.counts ? 1.0 : 0.0;
    if (a.sampled) {
      // log pi_R(y): pi_R's own softmax, over the columns that only the teacher lacks too.
      row.target = row.kReference;
      const Summary reference = summarise(row, team);
      const float r_y = row.combine(row.z_y, row.t_y, row.r_y).y;
      const bool outside = at_y.y == neg_inf() || r_y == neg_inf();
      advantage = (outside ? static_cast<double>(neg_inf()) : w * lq + (1 - w) * reference.log_q(r_y)) - lp;
      row.target = row.kTeacher;
    } else {
      row.target = row.kMixture;
      row.gate = static_cast<float>(w);
      s = summarise(row, team);
      kl = divergence(row, s, &mean_score, team);
    }
  } else if (a.behaviour_logprob != nullptr) {
    const double ratio = exp(lp - a.behaviour_logprob[n]);
    advantage *= ratio > a.ratio_clip ? a.ratio_clip : ratio;  // NaN stays NaN
  }
  if (team.thread() == 0 && team.rank == 0) {
    double* out = a.stats + n * kColumns;
    out[kLoss] = weight == 0 ? 0.0 : (a.sampled ? -weight * advantage * lp : weight * kl);
    out[kKL] = measured_kl;
    out[kStudentLogprob] = lp;
    out[kTeacherLogprob] = lq;
    out[kStudentEntropy] = entropy_p;
    out[kTeacherEntropy] = entropy_q;
    out[kGate] = w;
    out[kAgree] = gate.agrees ? 1.0 : 0.0;
  }
  // From here a thread writes the columns it reads; the sampled token's column was read by all of them, and a block's
  // sums by the others of its cluster.
  if (team.blocks > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  if (!a.gradient) return;

  const float chain = a.student_head.logit_scale * a.inverse_temperature;
  const float full = static_cast<float>(weight * (a.sampled ? advantage : 1.0) * a.row_scale[n]) * chain;
  const float ip = static_cast<float>(1.0 / s.sum_p), iq = static_cast<float>(1.0 / s.sum_q);
  const Twofold dlse(s.lse_difference()), mean(s.mean_delta());
  const float score = static_cast<float>(mean_score), parameter = static_cast<float>(a.parameter);
  const float to_tanh = a.student_head.softcap == 0.f ? 0.f : 1.f / (a.student_head.softcap * a.inverse_temperature);
  for (int i = 0; row.first(i) < a.vocabulary; ++i) {
    float2 pairs[4];
    row.load(i, pairs);
    const int64_t at = row.first(i);
    Four g;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float z = pairs[j].x, t = pairs[j].y;
      g.x[j] = 0.f;
      if (weight == 0 || z == neg_inf()) continue;
      const float p = expf(z - s.max_p) * ip;
      if (a.sampled) {
        g.x[j] = full * (p - (at + j == y ? 1.f : 0.f));
      } else if (a.divergence == kReverseKL) {
        g.x[j] = reverse_kl_gradient(full * p, z - t, mean.high, mean.low);
      } else {
        const float q = expf(t - s.max_q) * iq, u = (dlse.high - (z - t)) + dlse.low;
        g.x[j] = full * (a.divergence == kForwardKL ? forward_kl_gradient(p, q, u)
                                                    : column32(a.divergence, parameter, p, q, u).score - p * score);
      }
      const float th = z * to_tanh;
      g.x[j] *= 1.f - th * th;
    }
    if (at + 4 <= a.vocabulary && reinterpret_cast<uintptr_t>(out_z) % 16 == 0) {
      *reinterpret_cast<float4*>(out_z + at) = make_float4(g.x[0], g.x[1], g.x[2], g.x[3]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (at + j < a.vocabulary) out_z[at + j] = g.x[j];
      }
    }
  }
}

}  // namespace cuda
}  // namespace sgopd
