// Rounding to int16 with error feedback, for the instruction sets that quantize (int16.h has the idea).
#pragma once

#include <cstring>

#include "int16.h"

namespace sgopd {
namespace {

inline float widened(float x) { return x; }
inline float widened(uint16_t x) {  // bf16
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// Rounds row * steps.factor into `out` [h], each element within kFed of its place; returns the value of one step.
template <typename T>
float round_with_feedback(const T* row, int64_t h, const Steps& steps, const Feedback& feedback, int16_t* out) {
  if (steps.factor == 0.f) {  // a row of zeros, or not finite: its step says so
    for (int64_t k = 0; k < h; ++k) out[k] = 0;
    return steps.step;
  }
  float residual[kDirections] = {};
  for (int64_t k = 0; k < h; ++k) {
    const float* along = feedback.along + k * kDirections;
    const float* absorb = feedback.absorb + k * kDirections;
    const float x = widened(row[k]) * steps.factor;
    float taken = 0;
#pragma omp simd reduction(+ : taken)
    for (int64_t i = 0; i < kDirections; ++i) taken += absorb[i] * residual[i];
    // Whatever the directions are: no accumulator may overflow, a NaN is nothing, and a row of zeros stays one.
    if (!(taken <= kMostFeedback)) taken = taken > kMostFeedback ? kMostFeedback : 0.f;
    if (taken < -kMostFeedback) taken = -kMostFeedback;
    const auto q = static_cast<int32_t>(__builtin_lrintf(x - taken));
    out[k] = static_cast<int16_t>(q);
    const float moved = static_cast<float>(q) - x;
#pragma omp simd
    for (int64_t i = 0; i < kDirections; ++i) residual[i] += moved * along[i];
  }
  return steps.step;
}

}  // namespace
}  // namespace sgopd
