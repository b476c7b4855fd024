// Products on tiles by AVX512-BF16: vdpbf16ps adds two products of bf16 numbers to each of 16 fp32 lanes, which are a
// tile's columns. 8 rows by 32 columns of sums stay in registers, a word of a row is broadcast. tiles.h has the
// algorithms. The instruction takes a denormal operand as 0, and so a denormal sum.

#include "tile_kernels.h"
#include "tile_packing.h"
#include "tiles.h"

namespace sgopd {
namespace avx512bf16 {
namespace {

inline void dot(__m512& sum, __m512i w, __m512i x) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x)); }

// The rows whose sums are in registers: variables by name, because GCC 12 spills an array of them in every step, as it
// does the intrinsic's own.
constexpr int64_t kRows = 8;
#define SGOPD_ROWS(M) M(a, 0) M(b, 1) M(c, 2) M(d, 3) M(e, 4) M(f, 5) M(g, 6) M(h, 7)

struct Machine : Packing {
  alignas(64) float sums[4][kWords];  // C [32, 32], as tiles

  template <int t>
  void zero() {
    std::memset(sums[t], 0, sizeof sums[t]);
  }
  template <int t>
  void load_sum(const float* from) {
    std::memcpy(sums[t], from, sizeof sums[t]);
  }
  template <int t>
  void store_tile(float* to, int64_t stride) {
    for (int64_t i = 0; i < kTile; ++i) std::memcpy(to + i * stride, sums[t] + i * kTile, 4 * kTile);
  }

  template <bool kLowA, bool kLowB>
  void accumulate(const Limbs& a, const Limbs& b, int64_t steps, const uint8_t* fine, int64_t fine_stride) {
    // 16 KiB of A and B: in L1 while all rows pass; and sums of sums round less than one long one.
    constexpr int64_t kSteps = 4;
    for (int64_t first = 0; first < steps; first += kSteps) {
      for (int64_t row = 0; row < 2 * kTile; row += kRows)
        add<kLowA, kLowB>(row, a, b, first, smaller(first + kSteps, steps), fine, fine_stride);
    }
  }

  // 8 rows of C from `row`.
  template <bool kLowA, bool kLowB>
  void add(int64_t row, const Limbs& a, const Limbs& b, int64_t first, int64_t last, const uint8_t* fine,
           int64_t fine_stride) {
    float* left = sums[row / kTile * 2] + row % kTile * kTile;
    float* right = left + kWords;
    const int64_t from = row / kTile * a.strip + row % kTile * kTile;
#define SGOPD_CLEAR(r, i) __m512 r##0 = _mm512_setzero_ps(), r##1 = r##0;
    SGOPD_ROWS(SGOPD_CLEAR)
#undef SGOPD_CLEAR
    for (int64_t k = first; k < last; ++k) {
      const int64_t at = k * kWords;
      const bool both = (kLowA || kLowB) && (fine == nullptr || fine[k * fine_stride] != 0);
      const auto step = [&](const uint32_t* x, const uint32_t* w) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int64_t word = 0; word < kTile; ++word) {
          const __m512i w0 = _mm512_load_si512(w + word * kTile), w1 = _mm512_load_si512(w + b.strip + word * kTile);
#define SGOPD_STEP(r, i)                                                                                            \
  {                                                                                                                 \
    /* from memory: a broadcast from a general register would take a port of the products */                        \
    const __m512i term = _mm512_castps_si512(_mm512_set1_ps(*reinterpret_cast<const Word*>(x + i * kTile + word))); \
    dot(r##0, w0, term), dot(r##1, w1, term);                                                                       \
  }
          SGOPD_ROWS(SGOPD_STEP)
#undef SGOPD_STEP
        }
      };
      step(a.high + from + at, b.high + at);
      if constexpr (kLowA) {
        if (both) step(a.low + from + at, b.high + at);
      }
      if constexpr (kLowB) {
        if (both) step(a.high + from + at, b.low + at);
      }
    }
    const auto store = [](float* to, __m512 sum) { _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), sum)); };
#define SGOPD_STORE(r, i) store(left + i * kTile, r##0), store(right + i * kTile, r##1);
    SGOPD_ROWS(SGOPD_STORE)
#undef SGOPD_STORE
  }
};

}  // namespace

const TileKernels& tiles() {
  static const TileKernels kernels = kernels_on<Machine>(1 << 24, false);
  return kernels;
}

}  // namespace avx512bf16
}  // namespace sgopd
