// project_int16.cpp for AVX2: vpmaddwd makes 8 sums of two 16-bit products, vpaddd adds them to 8 int32 lanes. Where a
// core issues two of each a cycle (Zen 3 and later, Intel since Haswell one and a half) that is up to twice the
// products of its fp32 FMAs. Same scales, same bound on the accumulators, same segments; a panel is 16 vocabulary rows,
// so that 6 tokens by 2 vectors of accumulators fit the 16 registers. Hidden states are packed as the steps read them,
// six tokens' words side by side: one stream that the processor prefetches from L2, where six rows are not.

#include <immintrin.h>

#include "exp.h"
#include "feedback.h"
#include "int16.h"

namespace sgopd {
namespace avx2 {
namespace {

constexpr int64_t kPanel = 16;
using Word __attribute__((may_alias)) = int32_t;  // two 16-bit elements

template <typename T>
Steps scale_of(const T* row, int64_t h, int64_t depth, float moved) {
  float largest = 0, peak = 0;
  for (int64_t first = 0; first < h; first += 2 * depth) {
    const int64_t last = min64(first + 2 * depth, h);
    float norm = 0, top = 0;
#pragma omp simd reduction(+ : norm) reduction(max : top)
    for (int64_t k = first; k < last; ++k) {
      const float x = widened(row[k]), size = x < 0 ? -x : x;
      norm += x * x;
      top = size > top ? size : top;
    }
    largest = norm > largest || norm != norm ? norm : largest;
    peak = top > peak ? top : peak;
  }
  return steps_of(largest, peak, depth, moved);
}

// Rounds a row to int16 into `out` [h]; returns the value of one step (NaN: not finite).
template <typename T>
float quantise(const T* row, int64_t h, int64_t depth, int16_t* out) {
  const Steps steps = scale_of(row, h, depth, kNearest);
  int64_t k = 0;
  const __m256 factor = _mm256_set1_ps(steps.factor);
  for (; k + 16 <= h; k += 16) {
    __m256 x[2];
    for (int half = 0; half < 2; ++half) {
      const T* at = row + k + 8 * half;
      if constexpr (sizeof(T) == 4)
        x[half] = _mm256_loadu_ps(at);
      else
        x[half] = _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))), 16));
    }
    const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(x[0], factor)),
                                              _mm256_cvtps_epi32(_mm256_mul_ps(x[1], factor)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k), _mm256_permute4x64_epi64(packed, 0xd8));
  }
  for (; k < h; ++k) out[k] = static_cast<int16_t>(_mm_cvtss_si32(_mm_set_ss(widened(row[k]) * steps.factor)));
  return steps.step;
}

// pack[k][j] = elements (2k, 2k + 1) of row j as one word: rows [16, width] of int16, `width` a multiple of 16.
void pack_panel(const int16_t* rows, int64_t width, uint32_t* pack) {
  for (int64_t k = 0; k < width / 2; k += 8) {
    for (int64_t j = 0; j < kPanel; j += 8) {
      __m256i r[8], t[8];
      for (int i = 0; i < 8; ++i)
        r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + (j + i) * width + 2 * k));
      for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
      }
      for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
      }
      for (int i = 0; i < 4; ++i) {
        auto* to = reinterpret_cast<__m256i*>(pack + (k + i) * kPanel + j);
        _mm256_storeu_si256(to, _mm256_permute2x128_si256(r[i], r[i + 4], 0x20));
        _mm256_storeu_si256(to + 4 * kPanel / 8, _mm256_permute2x128_si256(r[i], r[i + 4], 0x31));
      }
    }
  }
}

// asm: with the intrinsics GCC 12 loads and spills accumulators in every step.
inline void dot(__m256i& sum, __m256i w, __m256i x) {
  __m256i product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(w), "x"(x));
}

// One segment, pairs [first, last), of kTokens packed tokens by a panel; the first `rows` of them are stored. Otherwise
// as in project_int16.cpp.
void block(const Word* hidden, int rows, const uint32_t* pack, int64_t first, int64_t last, bool final,
           const float* step_x, const float* step_w, float* partial, float* out, int64_t out_stride, int64_t columns) {
  const __m256i zero = _mm256_setzero_si256();
#define SGOPD_DECLARE(r, index) __m256i r##0 = zero, r##1 = zero;
  SGOPD_TOKENS(SGOPD_DECLARE)
#undef SGOPD_DECLARE
  for (int64_t k = first; k < last; ++k) {
    const auto* w = reinterpret_cast<const __m256i*>(pack + k * kPanel);
    const __m256i w0 = _mm256_load_si256(w), w1 = _mm256_load_si256(w + 1);
#define SGOPD_STEP(r, index)                                          \
  {                                                                   \
    const __m256i x = _mm256_set1_epi32(hidden[k * kTokens + index]); \
    dot(r##0, w0, x), dot(r##1, w1, x);                               \
  }
    SGOPD_TOKENS(SGOPD_STEP)
#undef SGOPD_STEP
  }
  const auto finish = [&](int r, int c, __m256i sum) __attribute__((always_inline)) {
    float* part = partial + r * kPanel + 8 * c;
    __m256 z = _mm256_mul_ps(_mm256_cvtepi32_ps(sum),
                             _mm256_mul_ps(_mm256_set1_ps(step_x[r]), _mm256_loadu_ps(step_w + 8 * c)));
    if (first > 0) z = _mm256_add_ps(z, _mm256_loadu_ps(part));
    float* to = out + r * out_stride + 8 * c;
    if (final && columns >= 8 * (c + 1)) return _mm256_storeu_ps(to, z);
    _mm256_storeu_ps(part, z);
    if (final)
      for (int64_t j = 0; j < columns - 8 * c; ++j) to[j] = part[j];
  };
#define SGOPD_FINISH(r, index) \
  if (rows > index) finish(index, 0, r##0), finish(index, 1, r##1);
  SGOPD_TOKENS(SGOPD_FINISH)
#undef SGOPD_FINISH
}

int64_t padded(int64_t h) { return (h + 15) / 16 * 16; }

int64_t panels(int64_t v) { return (v + kPanel - 1) / kPanel; }
// A packed panel (from a 64-byte boundary), its rows, and the partial sums of n tokens.
int64_t scratch_words(int64_t n, int64_t h) { return 16 + 2 * kPanel * padded(h) / 2 + n * kPanel; }

// Word (i / kTokens * stride / 2 + k) * kTokens + i % kTokens: elements (2k, 2k + 1) of token i, 0 beyond the last one.
// A block's rows are first rounded into the room behind the last block.
template <typename T>
void quantise_rows(const T* hidden, int64_t n, int64_t hidden_stride, int64_t h, int64_t depth,
                   const Feedback& feedback, int16_t* out, int64_t stride, float* step) {
  const int64_t end = (n + kTokens - 1) / kTokens * kTokens;
  int16_t* rows = out + end * stride;
  for (int64_t first = 0; first < end; first += kTokens) {
    for (int64_t k = 0; k < kTokens * stride; ++k) rows[k] = 0;
    for (int64_t i = first; i < min64(first + kTokens, n); ++i) {
      const T* row = hidden + i * hidden_stride;
      int16_t* to = rows + (i - first) * stride;
      step[i] = feedback.absorb == nullptr ? quantise(row, h, depth, to)
                                           : round_with_feedback(row, h, scale_of(row, h, depth, kFed), feedback, to);
    }
    auto* words = reinterpret_cast<Word*>(out + first * stride);
    for (int64_t k = 0; k < stride / 2; ++k)
      for (int64_t r = 0; r < kTokens; ++r)
        words[k * kTokens + r] = *reinterpret_cast<const Word*>(rows + r * stride + 2 * k);
  }
}

template <typename T>
void project(const int16_t* hidden, const float* step_x, int64_t n, int64_t stride, const T* weight, int64_t v,
             int64_t weight_stride, int64_t h, int64_t depth, float* out, int64_t out_stride, int64_t first,
             int64_t last, uint32_t* scratch) {
  const int64_t width = padded(h), pairs = (h + 1) / 2;
  auto* pack = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
  auto* rows = reinterpret_cast<int16_t*>(pack + kPanel * width / 2);  // zero beyond h, and beyond the vocabulary
  auto* partial = reinterpret_cast<float*>(pack + kPanel * width);
  float step_w[kPanel];
  for (int64_t p = first; p < last; ++p) {
    const int64_t column = p * kPanel, columns = min64(v - column, kPanel);
    for (int64_t j = 0; j < kPanel; ++j) {
      step_w[j] = j < columns ? quantise(weight + (column + j) * weight_stride, h, depth, rows + j * width) : 0.f;
      for (int64_t k = 0; j >= columns && k < width; ++k) rows[j * width + k] = 0;
    }
    pack_panel(rows, width, pack);
    for (int64_t k = 0; k < pairs; k += depth) {
      const int64_t end = min64(k + depth, pairs);
      for (int64_t i = 0; i < n; i += kTokens)
        block(reinterpret_cast<const Word*>(hidden + i * stride), static_cast<int>(min64(n - i, kTokens)), pack, k, end,
              end == pairs, step_x + i, step_w, partial + i * kPanel, out + i * out_stride + column, out_stride,
              columns);
    }
  }
}

}  // namespace

const Int16Kernels& int16() {
  static const Int16Kernels kernels{
      panels, scratch_words, {quantise_rows<float>, project<float>}, {quantise_rows<uint16_t>, project<uint16_t>}};
  return kernels;
}

}  // namespace avx2
}  // namespace sgopd
