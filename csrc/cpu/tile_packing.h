// Packs operands into tiles (tiles.h) by AVX-512 and AVX512-BF16, whose rounding to bf16 takes a denormal number as 0.
#pragma once

#include "avx512.h"

namespace sgopd {
namespace {

__mmask16 mask16(int64_t count) { return count <= 0 ? 0 : left(count); }
__mmask32 mask32(int64_t count) { return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1; }

struct Packing {
  using Words = __m512i;

  // fp32 as words (even, odd) of two rows, or one row's 32 in order.
  struct Pair {
    __m512 even, odd;
    static Words words(__m512 even, __m512 odd) {
      alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
      return _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
    }
    Words high() const { return words(even, odd); }
    Words low(Words high) const {
      const __m512i upper = _mm512_and_si512(high, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
      return words(_mm512_sub_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(high, 16))),
                   _mm512_sub_ps(odd, _mm512_castsi512_ps(upper)));
    }
  };
  struct Line {
    __m512 first, second;
    static __m512 wide(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }
    Words high() const { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }
    Words low(Words high) const {
      return (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(second, wide(_mm512_extracti64x4_epi64(high, 1))),
                                          _mm512_sub_ps(first, wide(_mm512_castsi512_si256(high))));
    }
  };
  // bf16 is its own high limb.
  struct Whole {
    Words words;
    Words high() const { return words; }
    Words low(Words) const { return _mm512_setzero_si512(); }
  };

  static Pair pair(const float* a, int64_t count_a, const float* b, int64_t count_b) {
    return {_mm512_maskz_loadu_ps(mask16(count_a), a), _mm512_maskz_loadu_ps(mask16(count_b), b)};
  }
  static Whole pair(const uint16_t* a, int64_t count_a, const uint16_t* b, int64_t count_b) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask16(count_a), a));
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask16(count_b), b));
    return {_mm512_or_si512(even, _mm512_slli_epi32(odd, 16))};
  }
  static Line line(const float* x, int64_t count) {
    return {_mm512_maskz_loadu_ps(mask16(count), x), _mm512_maskz_loadu_ps(mask16(count - 16), x + 16)};
  }
  static Whole line(const uint16_t* x, int64_t count) { return {_mm512_maskz_loadu_epi16(mask32(count), x)}; }
  static void transpose(Words (&words)[16]) { sgopd::transpose(words); }
  static void store(uint32_t* to, Words words) { _mm512_store_si512(to, words); }

  // Rows of 32 floats past the caches: whole lines that nobody reads soon.
  static bool streams(const void* out, int64_t stride) {
    return reinterpret_cast<uintptr_t>(out) % 64 == 0 && stride % 16 == 0;
  }
  static void stream(float* to, const float* from) {
    _mm512_stream_ps(to, _mm512_load_ps(from));
    _mm512_stream_ps(to + 16, _mm512_load_ps(from + 16));
  }
  static void fence() { _mm_sfence(); }
};

}  // namespace
}  // namespace sgopd
