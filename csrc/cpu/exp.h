// exp for the passes that are compiled once an instruction set (SGOPD_ISA names the namespace).
//
// No std:: algorithm is instantiated in these passes: its weak symbol, compiled for one instruction set, could be
// linked into another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace sgopd {
namespace SGOPD_ISA {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 1024;  // floats: three operands of a block stay in a 32 KiB L1

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

inline float as_float(int32_t i) {
  float f;
  std::memcpy(&f, &i, sizeof f);
  return f;
}
inline int32_t as_int(float f) {
  int32_t i;
  std::memcpy(&i, &f, sizeof i);
  return i;
}

// exp for x <= 88, <= 1.3 ulp: Cody-Waite reduction and a degree-6 polynomial (minimax, relative error 2e-8).
// Exactly 0 below the smallest normal result, for -inf too; NaN stays NaN.
inline float exp_f32(float x) {
  constexpr float kLog2E = 1.44269504088896341f, kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const float shifted = x * kLog2E + kMagic;
  const float n = shifted - kMagic;
  const float f = (x - n * kLn2Hi) - n * kLn2Lo;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = (p * f) * f + f + 1.f;
  const float scale = as_float(static_cast<int32_t>((static_cast<uint32_t>(as_int(shifted)) << 23) + 0x3f800000u));
  return x < -87.3365f ? 0.f : p * scale;
}

inline float block_max(const float* __restrict z, int64_t count) {
  float m = kNegInf;
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < count; ++i) m = z[i] > m ? z[i] : m;
  return m;
}

}  // namespace
}  // namespace SGOPD_ISA
}  // namespace sgopd
