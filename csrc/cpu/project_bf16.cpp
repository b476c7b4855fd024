// Logits in fp32 from bf16 operands: out [n, v] = hidden [n, h] * weight [v, h]^T, accumulated in fp32 and never
// rounded to bf16 (libraries round their bf16 products' output, which ruins distillation gradients near convergence).
//
// AVX512-BF16: vdpbf16ps adds two products to each of 16 fp32 lanes. Lanes run over 64 vocabulary rows at a time (a
// panel, packed so that the pair of columns (2k, 2k + 1) of 64 rows is contiguous: h * 128 bytes, in L2), 6 tokens by
// 4 vectors of accumulators stay in registers, and a pair of a token's hidden state is broadcast. Packing reads the
// head once per token chunk. Threads take panels: no reduction crosses them, so their number changes no bit.

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace sgopd {
namespace avx512bf16 {
namespace {

constexpr int64_t kPanel = 64;
constexpr int kTokens = 6;
// Pairs summed in one accumulator: 24 KiB of a panel, in L1; and sums of sums round less than one long one.
constexpr int64_t kDepth = 96;

// 16 x 16 words: out[k] holds word k of each of the 16 rows.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // r[4 g + i], lane l: word 4 l + i of rows 4 g .. 4 g + 3
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// pack[k][j] = columns (2k, 2k + 1) of vocabulary row j as one 32-bit word; missing rows and columns are 0.
void pack_panel(const uint16_t* weight, int64_t stride, int64_t rows, int64_t h, uint32_t* pack) {
  const int64_t pairs = (h + 1) / 2;
  for (int64_t j = 0; j < kPanel; j += 16) {
    for (int64_t k = 0; k < pairs; k += 16) {
      const int64_t left = h - 2 * k;  // bf16 columns
      const __mmask32 mask = left >= 32 ? 0xffffffffu : (1u << left) - 1;
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i)
        r[i] =
            j + i < rows ? _mm512_maskz_loadu_epi16(mask, weight + (j + i) * stride + 2 * k) : _mm512_setzero_si512();
      transpose(r);
      for (int64_t i = 0; i < 16 && k + i < pairs; ++i) _mm512_storeu_si512(pack + (k + i) * kPanel + j, r[i]);
    }
  }
}

// Adds the product over pairs [first, last) to out (sets it where first is 0).
template <int kRows>
void block(const uint16_t* hidden, int64_t stride, const uint32_t* pack, int64_t h, int64_t first, int64_t last,
           float* out, int64_t out_stride, int64_t columns) {
  __m512 sum[kRows][4];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_setzero_ps();
  const auto step = [&](int64_t k, int bytes) __attribute__((always_inline)) {
    __m512bh w[4];
    for (int c = 0; c < 4; ++c) w[c] = (__m512bh)_mm512_loadu_si512(pack + k * kPanel + 16 * c);
    for (int r = 0; r < kRows; ++r) {
      uint32_t pair = 0;
      std::memcpy(&pair, hidden + r * stride + 2 * k, bytes);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
      for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], w[c], x);
    }
  };
  const int64_t whole = last < h / 2 ? last : h / 2;
  for (int64_t k = first; k < whole; ++k) step(k, 4);
  if (whole < last) step(whole, 2);  // an odd last column
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < 4; ++c) {
      const int64_t left = columns - 16 * c;
      if (left <= 0) break;
      const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
      float* to = out + r * out_stride + 16 * c;
      if (first > 0) sum[r][c] = _mm512_add_ps(sum[r][c], _mm512_maskz_loadu_ps(mask, to));
      _mm512_mask_storeu_ps(to, mask, sum[r][c]);
    }
  }
}

}  // namespace

int64_t panels(int64_t v) { return (v + kPanel - 1) / kPanel; }
int64_t pack_words(int64_t h) { return (h + 1) / 2 * kPanel; }

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

}  // namespace avx512bf16
}  // namespace sgopd

#endif
