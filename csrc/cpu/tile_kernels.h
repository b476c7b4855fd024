// Products on tiles (tiles.h), as each machine that has them offers them: AMX, its emulation, and AVX512-BF16.
#pragma once

#include <cstdint>

#include "pair_kernels.h"

namespace sgopd {

// An operand in tiles, one array a limb; `low` is null where there is one limb. `strip`: words from one strip of 16
// rows (or columns) to the next.
struct Limbs {
  const uint32_t *high, *low;
  int64_t strip;
};

// A gradient [n, v], and in which blocks of 32 tokens by 32 columns it is taken with both limbs: `fine` [ceil(n / 32),
// ceil(v / 32)]; null: in all.
struct TiledGradient {
  const float* data;
  int64_t stride, n, v;
  const uint8_t* fine;
  int64_t fine_stride;
};

// Where the weight gradient [v, h] goes: fp32; or bf16, the result itself, with a byte beside each element (`rest`)
// that keeps a sum over chunks to 24 bits. `first`: nothing has been added yet, what is there is not read.
struct WeightSum {
  void* data;
  int64_t stride;
  Element element;
  int8_t* rest;  // [v, h] at `rest_stride`, or null: bf16 that is written once
  int64_t rest_stride;
  bool first;
};

namespace {

constexpr int64_t kTile = 16;  // rows of a tile, and words of 4 bytes in each
constexpr int64_t kWords = kTile * kTile;
constexpr int64_t kColumns64 = 64;  // vocabulary rows that a pass over the tokens has in L2
constexpr int64_t kDepth = 256;     // columns of G whose products are summed before their sum goes back to memory

inline int64_t count_of(int64_t total, int64_t unit) { return (total + unit - 1) / unit; }

// Words, 64-byte aligned, of a limb of packed hidden states [n, h], and of the scratch that each product below is
// given.
inline int64_t hidden_words(int64_t n, int64_t h) { return 2 * count_of(n, 32) * count_of(h, 32) * kWords; }
inline int64_t project_scratch(int64_t h) { return 2 * 4 * count_of(h, 32) * kWords; }
inline int64_t hidden_gradient_scratch(int64_t blocks, int64_t strips) {
  constexpr int64_t kSteps = kDepth / 32;
  return blocks * strips * 4 * kWords + 2 * (2 * strips * kSteps + 2 * kSteps) * kWords;
}
inline int64_t weight_gradient_scratch(int64_t n) { return 2 * 4 * count_of(n, 32) * kWords; }

}  // namespace

// Ranges are parts of the work that may run in any order.
struct TileKernels {
  int64_t worthwhile;  // terms of a product that a thread is worth
  bool wide;           // whether two limbs of an fp32 operand are faster than fp32 products

  // Packs x [n, h], as the left operand of `project` and as the right one of `weight_gradient` (low null: one limb).
  void (*pack_hidden)(const Matrix& x, int64_t n, int64_t h, uint32_t* high, uint32_t* low);
  void (*pack_hidden_paired)(const Matrix& x, int64_t n, int64_t h, uint32_t* high, uint32_t* low);

  // out [n, v] fp32 = x [n, h] * weight [v, h]^T: panels [first, last) of 64 columns.
  void (*project)(const Limbs& x, int64_t n, int64_t h, const Matrix& weight, int64_t v, float* out, int64_t out_stride,
                  int64_t first, int64_t last, uint32_t* scratch);

  // out [n, h] fp32 += g * weight [v, h]: token blocks [first_block, last_block) of 32 by strips [first_strip,
  // last_strip) of 32 columns of h.
  void (*hidden_gradient)(const TiledGradient& g, const Matrix& weight, int64_t h, float* out, int64_t out_stride,
                          int64_t first_block, int64_t last_block, int64_t first_strip, int64_t last_strip,
                          uint32_t* scratch);

  // out [v, h] += g^T * x [n, h]: panels [first, last) of 64 columns of g.
  void (*weight_gradient)(const TiledGradient& g, const Limbs& x, int64_t h, const WeightSum& out, int64_t first,
                          int64_t last, uint32_t* scratch);
};

namespace emulated {
const TileKernels& tiles();
}
namespace avx512bf16 {
const TileKernels& tiles();
}
namespace amx {
bool available();  // on this processor, and granted by its system
const TileKernels& tiles();
}  // namespace amx

}  // namespace sgopd
