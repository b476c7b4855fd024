// The kernels of each instruction set: one table, from which every call chooses by name.
#pragma once

#include <string>
#include <vector>

#include "../rows.h"
#include "int16.h"
#include "pair_kernels.h"
#include "tile_kernels.h"

namespace sgopd {

// Null: this instruction set, on this processor, has none.
struct Kernels {
  std::string name;
  void (*rows)(const RowsArgs&, int64_t first, int64_t last);
  const PairKernels* pairs;
  const Int16Kernels* int16;
  const TileKernels* tiles;
};

// Of the build and this processor, best first.
const std::vector<Kernels>& all_kernels();

// The best ones for "", else those of that name; throws std::invalid_argument for one this processor lacks.
const Kernels& kernels(const std::string& isa);

}  // namespace sgopd
