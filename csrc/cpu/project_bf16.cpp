// Logits in fp32 from bf16 operands: out [n, v] = hidden [n, h] * weight [v, h]^T, accumulated in fp32 and never
// rounded to bf16 (libraries round their bf16 products' output, which ruins distillation gradients near convergence).
//
// AVX512-BF16: vdpbf16ps adds two products to each of 16 fp32 lanes. Lanes run over 64 vocabulary rows at a time (a
// panel, packed so that the pair of columns (2k, 2k + 1) of 64 rows is contiguous: h * 128 bytes, in L2), 6 tokens by
// 4 vectors of accumulators stay in registers, and a pair of a token's hidden state is broadcast. Packing reads the
// head once per token chunk. Threads take panels: no reduction crosses them, so their number changes no bit. The
// instruction takes a denormal operand as 0.

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__)

#include "dispatch.h"
#include "panel.h"

namespace sgopd {
namespace avx512bf16 {
namespace {

constexpr int kTokens = 6;
// Pairs summed in one accumulator: 24 KiB of a panel, in L1; and sums of sums round less than one long one.
constexpr int64_t kDepth = 96;

inline void dot(__m512& sum, __m512i w, __m512i x) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x)); }

// Adds the product over pairs [first, last) to out (sets it where first is 0).
template <int kRows>
void block(const uint16_t* hidden, int64_t stride, const uint32_t* pack, int64_t h, int64_t first, int64_t last,
           float* out, int64_t out_stride, int64_t columns) {
  const __m512 zero = _mm512_setzero_ps();
#define SGOPD_DECLARE(r, index) __m512 r##0 = zero, r##1 = zero, r##2 = zero, r##3 = zero;
  SGOPD_TOKENS(SGOPD_DECLARE)
#undef SGOPD_DECLARE
  const auto step = [&](int64_t k, const auto& token) __attribute__((always_inline)) {
    const uint32_t* w = pack + k * kPanel;
    const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 16), w2 = _mm512_loadu_si512(w + 32),
                  w3 = _mm512_loadu_si512(w + 48);
#define SGOPD_STEP(r, index)                                                \
  if constexpr (kRows > index) {                                            \
    const __m512i x = token(hidden + index * stride + 2 * k);               \
    dot(r##0, w0, x), dot(r##1, w1, x), dot(r##2, w2, x), dot(r##3, w3, x); \
  }
    SGOPD_TOKENS(SGOPD_STEP)
#undef SGOPD_STEP
  };
  const auto pair = [](const uint16_t* at) __attribute__((always_inline)) {
    // from memory: a broadcast from a general register would take a port of the products
    return _mm512_castps_si512(_mm512_set1_ps(*reinterpret_cast<const Word*>(at)));
  };
  const auto single = [](const uint16_t* at) __attribute__((always_inline)) { return _mm512_set1_epi32(*at); };
  const int64_t whole = last < h / 2 ? last : h / 2;
  for (int64_t k = first; k < whole; ++k) step(k, pair);
  if (whole < last) step(whole, single);  // an odd last column
  const auto finish = [&](int r, int c, __m512 sum) __attribute__((always_inline)) {
    if (columns <= 16 * c) return;
    const __mmask16 mask = left(columns - 16 * c);
    float* to = out + r * out_stride + 16 * c;
    if (first > 0) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, to));
    _mm512_mask_storeu_ps(to, mask, sum);
  };
#define SGOPD_FINISH(r, index)                      \
  if constexpr (kRows > index) {                    \
    finish(index, 0, r##0), finish(index, 1, r##1); \
    finish(index, 2, r##2), finish(index, 3, r##3); \
  }
  SGOPD_TOKENS(SGOPD_FINISH)
#undef SGOPD_FINISH
}

int64_t panels(int64_t v) { return panel_count(v); }
int64_t pack_words(int64_t h) { return panel_words(h); }

// Panels [first, last) of the product; `pack` is this thread's scratch of pack_words(h) words.
void project(const uint16_t* hidden, int64_t n, int64_t hidden_stride, const uint16_t* weight, int64_t v,
             int64_t weight_stride, int64_t h, float* out, int64_t out_stride, int64_t first, int64_t last,
             uint32_t* pack) {
  for (int64_t p = first; p < last; ++p) {
    const int64_t column = p * kPanel, columns = v - column < kPanel ? v - column : kPanel;
    pack_panel(weight + column * weight_stride, weight_stride, columns, h, pack);
    const int64_t pairs = (h + 1) / 2;
    for (int64_t k = 0; k < pairs; k += kDepth) {
      const int64_t end = k + kDepth < pairs ? k + kDepth : pairs;
      int64_t i = 0;
      for (; i + kTokens <= n; i += kTokens)
        block<kTokens>(hidden + i * hidden_stride, hidden_stride, pack, h, k, end, out + i * out_stride + column,
                       out_stride, columns);
      for (; i < n; ++i)
        block<1>(hidden + i * hidden_stride, hidden_stride, pack, h, k, end, out + i * out_stride + column, out_stride,
                 columns);
    }
  }
}

}  // namespace

const BFloat16Kernels& bf16() {
  static const BFloat16Kernels kernels{panels, pack_words, project};
  return kernels;
}

}  // namespace avx512bf16
}  // namespace sgopd

#endif
