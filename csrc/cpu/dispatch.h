// The kernels of each instruction set: one table, from which every call chooses by name.
#pragma once

#include <string>
#include <vector>

#include "../rows.h"
#include "int16.h"
#include "pair_kernels.h"
#include "tile_kernels.h"

namespace sgopd {

// Logits in fp32 from bf16 operands (project_bf16.cpp).
struct BFloat16Kernels {
  int64_t (*panels)(int64_t v);
  int64_t (*pack_words)(int64_t h);
  void (*project)(const uint16_t* hidden, int64_t n, int64_t hidden_stride, const uint16_t* weight, int64_t v,
                  int64_t weight_stride, int64_t h, float* out, int64_t out_stride, int64_t first, int64_t last,
                  uint32_t* pack);
};

// Null: this instruction set, on this processor, has none.
struct Kernels {
  std::string name;
  void (*rows)(const RowsArgs&, int64_t first, int64_t last);
  const PairKernels* pairs;
  const Int16Kernels* int16;
  const BFloat16Kernels* bf16;
  const TileKernels* tiles;
};

// Of the build and this processor, best first.
const std::vector<Kernels>& all_kernels();

// The best ones for "", else those of that name; throws std::invalid_argument for one this processor lacks.
const Kernels& kernels(const std::string& isa);

}  // namespace sgopd
