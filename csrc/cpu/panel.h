// Panels of a head for the dot-product instruction of AVX512-VNNI: 64 vocabulary rows at a time, packed so
// that the 16-bit columns (2k, 2k + 1) of 64 rows are contiguous words. A panel is h * 128 bytes and stays in L2.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sgopd {
namespace {

constexpr int64_t kPanel = 64;

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

using Word __attribute__((may_alias, aligned(2))) = float;  // two 16-bit elements, aligned as one

inline __mmask16 left(int64_t count) { return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1); }

// M(name, index) for each of the tokens whose accumulators a kernel holds. They are variables by name, a0 to f3,
// because GCC 12 spills an array of them in every step, as it does the dot-product intrinsics' own: see dot() beside
// each kernel.
#define SGOPD_TOKENS(M) M(a, 0) M(b, 1) M(c, 2) M(d, 3) M(e, 4) M(f, 5)

inline int64_t panel_count(int64_t v) { return (v + kPanel - 1) / kPanel; }
inline int64_t panel_words(int64_t h) { return (h + 1) / 2 * kPanel; }

}  // namespace
}  // namespace sgopd
