// What the filtered and quantized plans do inside a row, and with a pair (token, column). Compiled once an instruction
// set.
//
// The pairs are few, 1-4 % of a chunk, and differ from token to token: the union of their columns over 256 tokens is
// half of the vocabulary, so that work on pairs is an order of magnitude less than work on columns.

#include "pair_kernels.h"

#include "exp.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sgopd {
namespace SGOPD_ISA {
namespace {

#if defined(__AVX2__) && !defined(__AVX512F__)
// AVX-512's compressing store for 8 lanes, without a branch: a table of the lanes of each mask. It writes all 8.
struct Lanes {
  alignas(64) uint64_t of[256] = {};
  constexpr Lanes() {
    for (int mask = 0; mask < 256; ++mask)
      for (int lane = 0, to = 0; lane < 8; ++lane)
        if (mask >> lane & 1) of[mask] |= static_cast<uint64_t>(lane) << 8 * to++;
  }
};
constexpr Lanes kLanes;

inline __m256i lanes(int mask) {
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kLanes.of[mask])));
}
#endif

double log_sum_exp(const float* z, float scale, int64_t v) {
  float highest = kNegInf;
  double sum = 0;
  for (int64_t first = 0; first < v; first += kBlock) {
    const int64_t count = min64(kBlock, v - first);
    const float* __restrict block = z + first;
    const float top = block_max(block, count) * scale;
    if (top > highest) {
      sum *= std::exp(static_cast<double>(highest) - top);  // a NaN stays one
      highest = top;
    }
    const float origin = highest == kNegInf ? 0.f : highest;
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < count; ++i) part += exp_f32(block[i] * scale - origin);
    sum += part;
  }
  return static_cast<double>(highest) + std::log(sum);
}

int64_t select_mass(const float* z, float z_scale, const float* t, float t_scale, int64_t v, float log_threshold,
                    int64_t y, int32_t* columns, double* lse) {
  lse[0] = log_sum_exp(z, z_scale, v);
  lse[1] = log_sum_exp(t, t_scale, v);
  const float cut_z = static_cast<float>((lse[0] + log_threshold) / z_scale);
  const float cut_t = static_cast<float>((lse[1] + log_threshold) / t_scale);
  int64_t count = 0;
  int64_t i = 0;
#ifdef __AVX512F__
  const __m512 limit_z = _mm512_set1_ps(cut_z), limit_t = _mm512_set1_ps(cut_t);
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= v; i += 16) {
    __mmask16 in = _mm512_cmp_ps_mask(_mm512_loadu_ps(z + i), limit_z, _CMP_GE_OQ) |
                   _mm512_cmp_ps_mask(_mm512_loadu_ps(t + i), limit_t, _CMP_GE_OQ);
    if (static_cast<uint64_t>(y - i) < 16) in |= static_cast<__mmask16>(1u << (y - i));
    if (in) {
      _mm512_mask_compressstoreu_epi32(columns + count, in, index);
      count += __builtin_popcount(in);
    }
    index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
  }
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256 limit_z = _mm256_set1_ps(cut_z), limit_t = _mm256_set1_ps(cut_t);
  for (; i + 8 <= v; i += 8) {
    const __m256 in = _mm256_or_ps(_mm256_cmp_ps(_mm256_loadu_ps(z + i), limit_z, _CMP_GE_OQ),
                                   _mm256_cmp_ps(_mm256_loadu_ps(t + i), limit_t, _CMP_GE_OQ));
    int mask = _mm256_movemask_ps(in);
    if (static_cast<uint64_t>(y - i) < 8) mask |= 1 << (y - i);
    if (mask == 0) continue;
    const __m256i at = _mm256_add_epi32(lanes(mask), _mm256_set1_epi32(static_cast<int>(i)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(columns + count), at);
    count += __builtin_popcount(mask);
  }
#endif
  for (; i < v; ++i) {
    if (z[i] >= cut_z || t[i] >= cut_t || i == y) columns[count++] = static_cast<int32_t>(i);
  }
  return count;
}

int64_t extract_top(float* g, int64_t v, float threshold, int32_t* columns, float* values, double* energy) {
  int64_t count = 0;
  double left = 0, taken = 0;
  // Squares of fp32 leave its range beyond 1e19 and below 1e-19: what is left is summed in units of the threshold.
  const float unit = threshold > 1e-37f ? 1.f / threshold : 1e37f;
  for (int64_t first = 0; first < v; first += kBlock) {
    const int64_t last = min64(first + kBlock, v), before = count;
    int64_t i = first;
#ifdef __AVX512F__
    const __m512 limit = _mm512_set1_ps(threshold);
    __m512i index = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)),
                                     _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (; i + 16 <= last; i += 16) {
      const __m512 x = _mm512_loadu_ps(g + i);
      // not "less than": a NaN is taken, and shows in both gradients
      const __mmask16 in = _mm512_cmp_ps_mask(_mm512_abs_ps(x), limit, _CMP_NLT_UQ);
      if (in) {
        _mm512_mask_compressstoreu_epi32(columns + count, in, index);
        _mm512_mask_compressstoreu_ps(values + count, in, x);
        _mm512_mask_storeu_ps(g + i, in, _mm512_setzero_ps());
        count += __builtin_popcount(in);
      }
      index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
    }
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256 limit = _mm256_set1_ps(threshold), sign = _mm256_set1_ps(-0.f);
    for (; i + 8 <= last; i += 8) {
      const __m256 x = _mm256_loadu_ps(g + i);
      const int mask = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_andnot_ps(sign, x), limit, _CMP_NLT_UQ));
      const __m256i from = lanes(mask);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(columns + count),
                          _mm256_add_epi32(from, _mm256_set1_epi32(static_cast<int>(i))));
      _mm256_storeu_ps(values + count, _mm256_permutevar8x32_ps(x, from));
      count += __builtin_popcount(mask);
    }
    for (int64_t k = before; k < count; ++k) g[columns[k]] = 0;
#endif
    for (; i < last; ++i) {
      if (std::fabs(g[i]) < threshold) continue;  // a NaN is taken
      columns[count] = static_cast<int32_t>(i);
      values[count++] = g[i];
      g[i] = 0;
    }
    float rest = 0;  // what was taken is 0 by now
#pragma omp simd reduction(+ : rest)
    for (int64_t j = first; j < last; ++j) rest += (g[j] * unit) * (g[j] * unit);
    left += rest / (static_cast<double>(unit) * unit);
    for (int64_t k = before; k < count; ++k) taken += static_cast<double>(values[k]) * values[k];
  }
  energy[0] += taken;
  energy[1] += left;
  return count;
}

template <int kCount>
void dot_many(const float* const* rows, const float* __restrict w, int64_t h, float* out) {
  const float* __restrict a = rows[0], * __restrict b = rows[kCount > 1 ? 1 : 0], * __restrict c = rows[kCount > 2 ? 2 : 0], * __restrict d = rows[kCount > 3 ? 3 : 0];
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t k = 0; k < h; ++k) {
    s0 += a[k] * w[k];
    if (kCount > 1) s1 += b[k] * w[k];
    if (kCount > 2) s2 += c[k] * w[k];
    if (kCount > 3) s3 += d[k] * w[k];
  }
  const float sums[4] = {s0, s1, s2, s3};
  for (int i = 0; i < kCount; ++i) out[i] = sums[i];
}

void dot(const float* const* rows, const float* w, int64_t h, int count, float* out) {
  if (count == 4) return dot_many<4>(rows, w, h, out);
  if (count == 3) return dot_many<3>(rows, w, h, out);
  if (count == 2) return dot_many<2>(rows, w, h, out);
  dot_many<1>(rows, w, h, out);
}

template <int kCount>
void add_many(const float* const* rows, const float* coefficient, int64_t h, float* __restrict out) {
  const float* __restrict a = rows[0], * __restrict b = rows[kCount > 1 ? 1 : 0], * __restrict c = rows[kCount > 2 ? 2 : 0], * __restrict d = rows[kCount > 3 ? 3 : 0];
  const float ca = coefficient[0], cb = coefficient[kCount > 1 ? 1 : 0], cc = coefficient[kCount > 2 ? 2 : 0],
              cd = coefficient[kCount > 3 ? 3 : 0];
#pragma omp simd
  for (int64_t k = 0; k < h; ++k) {
    float sum = out[k] + ca * a[k];
    if (kCount > 1) sum += cb * b[k];
    if (kCount > 2) sum += cc * c[k];
    if (kCount > 3) sum += cd * d[k];
    out[k] = sum;
  }
}

void add(const float* const* rows, const float* coefficient, int64_t h, int count, float* out) {
  if (count == 4) return add_many<4>(rows, coefficient, h, out);
  if (count == 3) return add_many<3>(rows, coefficient, h, out);
  if (count == 2) return add_many<2>(rows, coefficient, h, out);
  add_many<1>(rows, coefficient, h, out);
}

void widen(const uint16_t* __restrict row, int64_t h, float* __restrict out) {
#pragma omp simd
  for (int64_t k = 0; k < h; ++k) out[k] = as_float(static_cast<int32_t>(static_cast<uint32_t>(row[k]) << 16));
}

}  // namespace

const PairKernels& pairs() {
  static const PairKernels kernels{select_mass, extract_top, dot, add, widen};
  return kernels;
}

}  // namespace SGOPD_ISA
}  // namespace sgopd
