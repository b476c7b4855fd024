// Quantized logits: out [n, v] = hidden [n, h] * weight [v, h]^T in 16-bit integers, fp32 out.
//
// AVX512-VNNI: vpdpwssd adds two 16-bit products to each of 16 int32 lanes, at twice the products of an fp32 FMA.
// Every row of either operand has its own scale. It is bound by the accumulator: |sum over a segment of h| <=
// ||x|| ||w|| over that segment (Cauchy-Schwarz), so each side is scaled to a norm of sqrt(2^31) in its largest segment
// and no int32 can overflow, whatever the data. A logit's error is then, with S segments of even norm,
//
//     sqrt(2 / (12 S)) ||x|| ||w|| / 46,000        7e-4 for SmolLM2-135M's hidden states (|x| 46, |w| 3.2, S 3)
//
// a tenth of what rounding the operands to bf16 costs. The columns that carry probability are computed again in fp32
// (refine.cpp), which also measures this error.
//
// A head's panel is quantised and packed once per token chunk, from L2; nothing of it is kept. Threads take panels.

#include "avx512.h"
#include "feedback.h"
#include "int16.h"

namespace sgopd {
namespace avx512vnni {
namespace {

// 64 vocabulary rows, packed so that the 16-bit columns (2k, 2k + 1) of all of them are contiguous words: h * 128
// bytes, which stay in L2.
constexpr int64_t kPanel = 64;

inline __m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline __m512 load(const uint16_t* from, __mmask16 mask) {  // bf16
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

inline void dot(__m512i& sum, __m512i w, __m512i x) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x)); }

template <typename T>
Steps scale_of(const T* row, int64_t h, int64_t depth, float moved) {
  float largest = 0;
  __m512 top = _mm512_setzero_ps();
  for (int64_t first = 0; first < h; first += 2 * depth) {
    const int64_t last = first + 2 * depth < h ? first + 2 * depth : h;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = first; k < last; k += 16) {
      const __m512 x = load(row + k, left(last - k));
      sum = _mm512_fmadd_ps(x, x, sum);
      top = _mm512_max_ps(top, _mm512_abs_ps(x));
    }
    const float norm = _mm512_reduce_add_ps(sum);
    largest = norm > largest || norm != norm ? norm : largest;
  }
  return steps_of(largest, _mm512_reduce_max_ps(top), depth, moved);
}

// Rounds a row to int16 into `out` [h padded to 16 k words]; returns the value of one step (NaN: not finite).
template <typename T>
float quantise(const T* row, int64_t h, int64_t depth, int16_t* out) {
  const Steps steps = scale_of(row, h, depth, kNearest);
  const __m512 factor = _mm512_set1_ps(steps.factor);
  for (int64_t k = 0; k < h; k += 16) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load(row + k, left(h - k)), factor));
    _mm256_mask_storeu_epi16(out + k, left(h - k), _mm512_cvtsepi32_epi16(q));
  }
  return steps.step;
}

// pack[k][j] = columns (2k, 2k + 1) of vocabulary row j as one 32-bit word; missing rows and columns are 0.
inline void pack_panel(const uint16_t* weight, int64_t stride, int64_t rows, int64_t h, uint32_t* pack) {
  const int64_t pairs = (h + 1) / 2;
  for (int64_t j = 0; j < kPanel; j += 16) {
    for (int64_t k = 0; k < pairs; k += 16) {
      const int64_t columns = h - 2 * k;  // int16
      const __mmask32 mask = columns >= 32 ? 0xffffffffu : (1u << columns) - 1;
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i)
        r[i] =
            j + i < rows ? _mm512_maskz_loadu_epi16(mask, weight + (j + i) * stride + 2 * k) : _mm512_setzero_si512();
      transpose(r);
      for (int64_t i = 0; i < 16 && k + i < pairs; ++i) _mm512_storeu_si512(pack + (k + i) * kPanel + j, r[i]);
    }
  }
}

// One segment, pairs [first, last), of kRows tokens by a panel. Segments but the last add to `partial` [kRows, 64]; the
// last one goes to out. (Straight to out, every segment would meet the cache sets that rows of 2^k elements share.)
template <int kRows>
void block(const int16_t* hidden, int64_t stride, const uint32_t* pack, int64_t first, int64_t last, bool final,
           const float* step_x, const float* step_w, float* partial, float* out, int64_t out_stride, int64_t columns) {
  __m512i zero = _mm512_setzero_si512();
#define SGOPD_DECLARE(r, index) __m512i r##0 = zero, r##1 = zero, r##2 = zero, r##3 = zero;
  SGOPD_TOKENS(SGOPD_DECLARE)
#undef SGOPD_DECLARE
  for (int64_t k = first; k < last; ++k) {
    const uint32_t* w = pack + k * kPanel;
    const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 16), w2 = _mm512_loadu_si512(w + 32),
                  w3 = _mm512_loadu_si512(w + 48);
    // from memory: a broadcast from a general register would take a port of the products
#define SGOPD_STEP(r, index)                                                         \
  if constexpr (kRows > index) {                                                     \
    const auto* at = reinterpret_cast<const Word*>(hidden + index * stride + 2 * k); \
    const __m512i x = _mm512_castps_si512(_mm512_set1_ps(*at));                      \
    dot(r##0, w0, x), dot(r##1, w1, x), dot(r##2, w2, x), dot(r##3, w3, x);          \
  }
    SGOPD_TOKENS(SGOPD_STEP)
#undef SGOPD_STEP
  }
  const auto finish = [&](int r, int c, __m512i sum) __attribute__((always_inline)) {
    if (columns <= 16 * c) return;
    float* part = partial + r * kPanel + 16 * c;
    const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(step_x[r]), _mm512_loadu_ps(step_w + 16 * c));
    __m512 z = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
    if (first > 0) z = _mm512_add_ps(z, _mm512_loadu_ps(part));
    if (final)
      _mm512_mask_storeu_ps(out + r * out_stride + 16 * c, left(columns - 16 * c), z);
    else
      _mm512_storeu_ps(part, z);
  };
#define SGOPD_FINISH(r, index) \
  if constexpr (kRows > index) \
    finish(index, 0, r##0), finish(index, 1, r##1), finish(index, 2, r##2), finish(index, 3, r##3);
  SGOPD_TOKENS(SGOPD_FINISH)
#undef SGOPD_FINISH
}

int64_t panels(int64_t v) { return (v + kPanel - 1) / kPanel; }
int64_t panel_words(int64_t h) { return (h + 1) / 2 * kPanel; }
// A packed panel, its rows, and the partial sums of n tokens.
int64_t scratch_words(int64_t n, int64_t h) { return panel_words(h) + kPanel * ((h + 31) / 32 * 16) + n * kPanel; }

template <typename T>
void quantise_rows(const T* hidden, int64_t n, int64_t hidden_stride, int64_t h, int64_t depth,
                   const Feedback& feedback, int16_t* out, int64_t stride, float* step) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = h; k < stride; ++k) out[i * stride + k] = 0;
    const T* row = hidden + i * hidden_stride;
    int16_t* to = out + i * stride;
    step[i] = feedback.absorb == nullptr ? quantise(row, h, depth, to)
                                         : round_with_feedback(row, h, scale_of(row, h, depth, kFed), feedback, to);
  }
}

template <typename T>
void project(const int16_t* hidden, const float* step_x, int64_t n, int64_t stride, const T* weight, int64_t v,
             int64_t weight_stride, int64_t h, int64_t depth, float* out, int64_t out_stride, int64_t first,
             int64_t last, uint32_t* scratch) {
  const int64_t width = (h + 31) / 32 * 32, pairs = (h + 1) / 2;
  uint32_t* pack = scratch;
  auto* rows = reinterpret_cast<int16_t*>(scratch + panel_words(h));
  auto* partial = reinterpret_cast<float*>(scratch + panel_words(h) + kPanel * width / 2);
  float step_w[kPanel];
  for (int64_t p = first; p < last; ++p) {
    const int64_t column = p * kPanel, columns = v - column < kPanel ? v - column : kPanel;
    for (int64_t j = 0; j < kPanel; ++j)
      step_w[j] = j < columns ? quantise(weight + (column + j) * weight_stride, h, depth, rows + j * width) : 0.f;
    pack_panel(reinterpret_cast<uint16_t*>(rows), width, columns, h, pack);
    for (int64_t k = 0; k < pairs; k += depth) {
      const int64_t end = k + depth < pairs ? k + depth : pairs;
      const bool final = end == pairs;
      int64_t i = 0;
      for (; i + kTokens <= n; i += kTokens)
        block<kTokens>(hidden + i * stride, stride, pack, k, end, final, step_x + i, step_w, partial + i * kPanel,
                       out + i * out_stride + column, out_stride, columns);
      for (; i < n; ++i)
        block<1>(hidden + i * stride, stride, pack, k, end, final, step_x + i, step_w, partial + i * kPanel,
                 out + i * out_stride + column, out_stride, columns);
    }
  }
}

}  // namespace

const Int16Kernels& int16() {
  static const Int16Kernels kernels{
      panels, scratch_words, {quantise_rows<float>, project<float>}, {quantise_rows<uint16_t>, project<uint16_t>}};
  return kernels;
}

}  // namespace avx512vnni
}  // namespace sgopd
