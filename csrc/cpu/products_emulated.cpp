// The products of tiles.h in plain C++, rounded as AMX rounds: packing, edges and blocks are the same code, so that
// they are tested on any processor. Slow, and taken by name alone.

#include "tiles.h"

namespace sgopd {
namespace emulated {
namespace {

// A denormal operand, or sum, is 0 of its sign.
float flushed(float x) { return (bits(x) & 0x7f800000u) == 0 ? number(bits(x) & 0x80000000u) : x; }

uint32_t rounded(float x) {  // to bf16, to nearest even
  const uint32_t u = bits(flushed(x));
  return x != x ? (u >> 16 | 0x40) : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

struct Machine : TileRegisters<Machine> {
  struct Words {
    uint32_t word[kTile];
  };
  struct Wide {
    float even[kTile], odd[kTile];
    Words high() const {
      Words w;
      for (int64_t i = 0; i < kTile; ++i) w.word[i] = rounded(even[i]) | rounded(odd[i]) << 16;
      return w;
    }
    Words low(const Words& high) const {
      Words w;
      for (int64_t i = 0; i < kTile; ++i)
        w.word[i] = rounded(even[i] - number(high.word[i] << 16)) | rounded(odd[i] - number(high.word[i] & 0xffff0000u))
                                                                        << 16;
      return w;
    }
  };
  struct Whole {
    Words words;
    Words high() const { return words; }
    Words low(const Words&) const { return {}; }
  };

  static Wide pair(const float* a, int64_t count_a, const float* b, int64_t count_b) {
    Wide w{};
    for (int64_t i = 0; i < smaller(kTile, count_a); ++i) w.even[i] = a[i];
    for (int64_t i = 0; i < smaller(kTile, count_b); ++i) w.odd[i] = b[i];
    return w;
  }
  static Whole pair(const uint16_t* a, int64_t count_a, const uint16_t* b, int64_t count_b) {
    Whole w{};
    for (int64_t i = 0; i < smaller(kTile, count_a); ++i) w.words.word[i] = a[i];
    for (int64_t i = 0; i < smaller(kTile, count_b); ++i) w.words.word[i] |= static_cast<uint32_t>(b[i]) << 16;
    return w;
  }
  static Wide line(const float* x, int64_t count) {
    Wide w{};
    for (int64_t i = 0; i < smaller(2 * kTile, count); ++i) {
      // GCC 12's check of bounds reads a wrong index where this is one expression.
      float* half = i % 2 ? w.odd : w.even;
      half[i / 2] = x[i];
    }
    return w;
  }
  static Whole line(const uint16_t* x, int64_t count) {
    Whole w{};
    for (int64_t i = 0; i < smaller(2 * kTile, count); ++i)
      w.words.word[i / 2] |= static_cast<uint32_t>(x[i]) << (i % 2 ? 16 : 0);
    return w;
  }
  static void transpose(Words (&words)[kTile]) {
    for (int64_t i = 0; i < kTile; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        const uint32_t word = words[i].word[j];
        words[i].word[j] = words[j].word[i];
        words[j].word[i] = word;
      }
    }
  }
  static void store(uint32_t* to, const Words& words) { std::memcpy(to, words.word, sizeof words); }
  static bool streams(const void*, int64_t) { return true; }
  static void stream(float* to, const float* from) { std::memcpy(to, from, 32 * sizeof(float)); }
  static void fence() {}

  union {
    uint32_t word[8][kTile][kTile];
    float sum[8][kTile][kTile];
  } tile;

  template <int t>
  void zero() {
    std::memset(tile.word[t], 0, sizeof tile.word[t]);
  }
  template <int t>
  void load(const void* from) {
    std::memcpy(tile.word[t], from, sizeof tile.word[t]);
  }
  template <int t>
  void load_sum(const float* from) {
    load<t>(from);
  }
  template <int t>
  void store_tile(float* to, int64_t stride) {
    for (int64_t i = 0; i < kTile; ++i) std::memcpy(to + i * stride, tile.sum[t][i], sizeof tile.sum[t][i]);
  }
  // Even terms and odd ones apart, then their sum. A product of two bf16 numbers and its sum with an fp32 one are exact
  // in double unless they differ by 2^29, so that one rounding is left, as in a fused multiply-add.
  template <int c, int a, int b>
  void dot() {
    for (int64_t i = 0; i < kTile; ++i) {
      float even[kTile] = {}, odd[kTile] = {};
      for (int64_t k = 0; k < kTile; ++k) {
        const uint32_t x = tile.word[a][i][k];
        const double x_even = flushed(number(x << 16)), x_odd = flushed(number(x & 0xffff0000u));
        for (int64_t j = 0; j < kTile; ++j) {
          const uint32_t y = tile.word[b][k][j];
          even[j] = flushed(static_cast<float>(x_even * flushed(number(y << 16)) + even[j]));
          odd[j] = flushed(static_cast<float>(x_odd * flushed(number(y & 0xffff0000u)) + odd[j]));
        }
      }
      for (int64_t j = 0; j < kTile; ++j) tile.sum[c][i][j] = flushed(tile.sum[c][i][j] + flushed(even[j] + odd[j]));
    }
  }
};

}  // namespace

const TileKernels& tiles() {
  static const TileKernels kernels = kernels_on<Machine>(1 << 18, true);
  return kernels;
}

}  // namespace emulated
}  // namespace sgopd
