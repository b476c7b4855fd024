// Scales of 16-bit integer products, for every instruction set that quantizes (project_int16.cpp,
// project_int16_avx2.cpp).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace sgopd {

// How hidden states are rounded so that what rounding leaves, x - q, is small along a few directions b of the head's
// rows: there it would move all logits of its token together. In the order of the elements, each one takes over what it
// can better than the elements behind it: error feedback, as quantisers of weights use it (GPTQ, arXiv 2210.17323).
constexpr int64_t kDirections = 16;

struct Feedback {
  const float* along = nullptr;   // [h, kDirections]: the directions, by element
  const float* absorb = nullptr;  // [h, kDirections]: how much of what is left an element takes over
};

// Products of rows of T: fp32, or bf16 as uint16_t.
template <typename T>
struct Int16Products {
  // hidden -> int16 rows of `stride` elements (a multiple of 32, zeroed beyond h), and the value of a step a row. `out`
  // has room for n + kRoom rows; how they lie there is the instruction set's affair. `depth`: pairs of elements that
  // one int32 accumulator sums, a segment of a row. Shorter ones leave more bits to an element, longer ones are faster.
  void (*quantise_rows)(const T* hidden, int64_t n, int64_t hidden_stride, int64_t h, int64_t depth,
                        const Feedback& feedback, int16_t* out, int64_t stride, float* step);
  // Panels [first, last) of the product; `scratch` is this thread's, scratch_words(n, h) words, zeroed.
  void (*project)(const int16_t* hidden, const float* step_x, int64_t n, int64_t stride, const T* weight, int64_t v,
                  int64_t weight_stride, int64_t h, int64_t depth, float* out, int64_t out_stride, int64_t first,
                  int64_t last, uint32_t* scratch);
};

struct Int16Kernels {
  int64_t (*panels)(int64_t v);
  int64_t (*scratch_words)(int64_t n, int64_t h);
  Int16Products<float> fp32;
  Int16Products<uint16_t> bf16;
};

namespace avx2 {
const Int16Kernels& int16();
}
namespace avx512vnni {
const Int16Kernels& int16();
}

namespace {

// The tokens whose accumulators a kernel holds, and M(name, index) for each. They are variables by name, a0 to f3,
// because GCC 12 spills an array of them in every step, as it does the dot-product intrinsics' own: see dot() beside
// each kernel.
#define SGOPD_TOKENS(M) M(a, 0) M(b, 1) M(c, 2) M(d, 3) M(e, 4) M(f, 5)

constexpr int kTokens = 6;
constexpr int64_t kRoom = 11;       // rows: a block of 6 that is not full, and one more
constexpr float kNorm = 46340.95f;  // sqrt(2^31)

struct Steps {
  float factor;  // multiplies an element; 0 where the row is not finite, or 0
  float step;    // value of one integer step; NaN where the row is not finite
};

constexpr float kNearest = 0.5f;      // steps that rounding may move an element
constexpr float kMostFeedback = 1.f;  // ... and that it may take over
constexpr float kFed = kNearest + kMostFeedback;

// `largest`: the squared norm of the row's largest segment, `peak`: its largest |element|, `moved`: steps that rounding
// may move an element, which add to the norm.
inline Steps steps_of(float largest, float peak, int64_t depth, float moved) {
  const float room = kNorm - moved * std::sqrt(2.f * static_cast<float>(depth)) - 16.f;
  if (largest == 0.f) return {0.f, 1.f};
  const float scale = room / std::sqrt(largest);
  if (!(largest < 1e30f && scale < 1e30f)) return {0.f, std::numeric_limits<float>::quiet_NaN()};
  // An element is at most the norm, 46,341 steps, yet has to fit 16 bits; saturation would be an error of quantizing.
  const float shrink = peak * scale > 32700.f ? 32700.f / (peak * scale) : 1.f;
  return {scale * shrink, 1.f / (scale * shrink)};
}

}  // namespace
}  // namespace sgopd
