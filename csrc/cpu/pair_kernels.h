// The pairs (token, column) that matter, and what is done with them alone. Compiled once an instruction set.
#pragma once

#include <cstdint>

namespace sgopd {

enum class Element : int { kFloat32 = 0, kBFloat16 = 1 };

// A matrix [rows, width] of either element, unit stride along its width.
struct Matrix {
  const void* data;
  int64_t stride;
  Element element;
};

struct PairKernels {
  // Columns of a row where either model has probability >= exp(log_threshold) by the quantized logits, and column y.
  // `lse` receives both log-sum-exps. Returns how many columns were written to `columns` [v], ascending.
  int64_t (*select_mass)(const float* z, float z_scale, const float* t, float t_scale, int64_t v, float log_threshold,
                         int64_t y, int32_t* columns, double* lse);
  // Columns of a row with |g| >= threshold, ascending: moved to `columns` and `values`, zeroed in g. Adds the squares
  // of what was taken and of what was left to energy[0], energy[1].
  int64_t (*extract_top)(float* g, int64_t v, float threshold, int32_t* columns, float* values, double* energy);
  // out[i] = <rows[i], w>, i < count <= 4
  void (*dot)(const float* const* rows, const float* w, int64_t h, int count, float* out);
  // out += sum_i coefficient[i] * rows[i], i < count <= 4
  void (*add)(const float* const* rows, const float* coefficient, int64_t h, int count, float* out);
  // fp32 copy of a row
  void (*widen)(const uint16_t* row, int64_t h, float* out);
};

namespace base {
const PairKernels& pairs();
}
namespace avx2 {
const PairKernels& pairs();
}
namespace avx512 {
const PairKernels& pairs();
}

}  // namespace sgopd
