// Dense products whose fp32 operands are sums of bf16 numbers: logits, and both gradients.
//
// A number is rounded to bf16 (its high limb), and what that leaves is rounded to bf16 again (its low limb): 2^-9 and
// 2^-17 of it are lost, at the most. Products of limbs are exact in fp32 and are summed in fp32:
//
//     high(A) * high(B)              both operands rounded once
//   + low(A) * high(B)               A to 17 bits
//   + high(A) * low(B)               both; low * low is 2^-18 and left out
//
// A bf16 operand is its own high limb, and has no other. A gradient G [n, v] needs its low limb only where its energy
// lies: `fine` says in which blocks of 32 tokens by 32 columns it takes part, and there alone the other operand's does.
//
// The inner product is one of 16 x 16 tiles over 32 terms, on a Machine: AMX's registers (products_amx.cpp), dot
// products of AVX512-BF16 (products_bf16.cpp), or plain C++ that rounds as AMX does (products_emulated.cpp). All take a
// denormal operand as 0 and give a denormal sum as 0. Operands are packed into tiles as they come, edges filled with
// zeros, so that neither sizes nor strides matter to it. An element's terms are summed in one order, whatever the
// number of threads: it changes no bit.
//
// No std:: template is instantiated here: its weak symbol, compiled for one instruction set, could be linked into
// another.
#pragma once

#include <cstring>

#include "tile_kernels.h"

namespace sgopd {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
constexpr bool kIsWide = sizeof(T) == 4;

// One tile, zero beyond `rows` and `columns`, and what rounding it leaves (`low`, unless null). Of fp32 or bf16 x:
//   kPaired   32 rows by 16 columns; a word is a column's entries of rows (2 i, 2 i + 1)
//   else      16 rows by 32 columns; a word is a row's entries of columns (2 k, 2 k + 1)
// kTransposed: word k of row i at row k.
template <class Machine, bool kPaired, bool kTransposed, typename T>
inline void pack(const T* x, int64_t stride, int64_t rows, int64_t columns, uint32_t* high, uint32_t* low) {
  typename Machine::Words h[kTile], l[kTile];
  for (int64_t i = 0; i < kTile; ++i) {
    if constexpr (kPaired) {
      const T* row = x + 2 * i * stride;
      const auto pair = Machine::pair(row, 2 * i < rows ? columns : 0, row + stride, 2 * i + 1 < rows ? columns : 0);
      h[i] = pair.high();
      if (low != nullptr) l[i] = pair.low(h[i]);
    } else {
      const auto line = Machine::line(x + i * stride, i < rows ? columns : 0);
      h[i] = line.high();
      if (low != nullptr) l[i] = line.low(h[i]);
    }
  }
  if constexpr (kTransposed) Machine::transpose(h);
  for (int64_t i = 0; i < kTile; ++i) Machine::store(high + i * kTile, h[i]);
  if (low == nullptr) return;
  if constexpr (kTransposed) Machine::transpose(l);
  for (int64_t i = 0; i < kTile; ++i) Machine::store(low + i * kTile, l[i]);
}

// C += A B on registers that hold a tile each: 0 to 3 are C [32, 32], 4 and 5 A's two strips, 6 and 7 B's.
template <class Machine>
struct TileRegisters {
  // Over `steps` tiles; low limbs where fine[k * fine_stride], or everywhere where it is null.
  template <bool kLowA, bool kLowB>
  void accumulate(const Limbs& a, const Limbs& b, int64_t steps, const uint8_t* fine, int64_t fine_stride) {
    Machine& m = static_cast<Machine&>(*this);
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t at = k * kWords;
      const bool both = (kLowA || kLowB) && (fine == nullptr || fine[k * fine_stride] != 0);
      m.template load<6>(b.high + at);
      m.template load<7>(b.high + b.strip + at);
      if constexpr (kLowA) {
        if (both) {
          m.template load<4>(a.low + at);
          m.template dot<0, 4, 6>();
          m.template dot<1, 4, 7>();
          m.template load<5>(a.low + a.strip + at);
          m.template dot<2, 5, 6>();
          m.template dot<3, 5, 7>();
        }
      }
      m.template load<4>(a.high + at);
      m.template dot<0, 4, 6>();
      m.template dot<1, 4, 7>();
      m.template load<5>(a.high + a.strip + at);
      m.template dot<2, 5, 6>();
      m.template dot<3, 5, 7>();
      if constexpr (kLowB) {
        if (both) {
          m.template load<6>(b.low + at);
          m.template dot<0, 4, 6>();
          m.template dot<2, 5, 6>();
          m.template load<7>(b.low + b.strip + at);
          m.template dot<1, 4, 7>();
          m.template dot<3, 5, 7>();
        }
      }
    }
  }
};

template <class Machine>
inline void clear(Machine& m) {
  m.template zero<0>(), m.template zero<1>(), m.template zero<2>(), m.template zero<3>();
}

// C to rows of 32 floats: [32, 32].
template <class Machine>
inline void put(Machine& m, float* to) {
  m.template store_tile<0>(to, 32), m.template store_tile<1>(to + 16, 32);
  m.template store_tile<2>(to + 512, 32), m.template store_tile<3>(to + 528, 32);
}

template <class Machine, bool kPaired, typename T>
void pack_operand(const T* x, int64_t stride, int64_t n, int64_t h, uint32_t* high, uint32_t* low) {
  // Strips of 16 tokens, or of 16 columns, an even number of them; each over the other side in steps of 32.
  const int64_t strips = 2 * count_of(kPaired ? h : n, 32), steps = count_of(kPaired ? n : h, 32);
  for (int64_t s = 0; s < strips; ++s) {
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t row = kPaired ? 32 * k : 16 * s, column = kPaired ? 16 * s : 32 * k, to = (s * steps + k) * kWords;
      pack<Machine, kPaired, false>(x + row * stride + column, stride, n - row, h - column, high + to,
                                    low == nullptr ? nullptr : low + to);
    }
  }
}

template <class Machine, bool kPaired>
void pack_hidden(const Matrix& x, int64_t n, int64_t h, uint32_t* high, uint32_t* low) {
  if (x.element == Element::kFloat32)
    pack_operand<Machine, kPaired>(static_cast<const float*>(x.data), x.stride, n, h, high, low);
  else
    pack_operand<Machine, kPaired>(static_cast<const uint16_t*>(x.data), x.stride, n, h, high, low);
}

// ---- logits

template <class Machine, bool kLowA, typename T>
void project_panels(const Limbs& x, int64_t n, int64_t h, const T* weight, int64_t stride, int64_t v, float* out,
                    int64_t out_stride, int64_t first, int64_t last, uint32_t* scratch) {
  const int64_t steps = count_of(h, 32), strip = steps * kWords;
  uint32_t *high = scratch, *low = kIsWide<T> ? scratch + 4 * strip : nullptr;
  alignas(64) float sums[32 * 32];
  const bool streams = Machine::streams(out, out_stride);
  Machine m;
  for (int64_t p = first; p < last; ++p) {
    const int64_t column = p * kColumns64, columns = smaller(kColumns64, v - column),
                  strips = 2 * count_of(columns, 32);
    for (int64_t s = 0; s < strips; ++s) {
      for (int64_t k = 0; k < steps; ++k) {
        const int64_t to = s * strip + k * kWords;
        pack<Machine, false, true>(weight + (column + 16 * s) * stride + 32 * k, stride, columns - 16 * s, h - 32 * k,
                                   high + to, kIsWide<T> ? low + to : nullptr);
      }
    }
    for (int64_t s = 0; s < strips; s += 2) {
      const Limbs b{high + s * strip, kIsWide<T> ? low + s * strip : nullptr, strip};
      for (int64_t i = 0; i < n; i += 32) {
        const int64_t a = i / 16 * x.strip;
        clear(m);
        m.template accumulate<kLowA, kIsWide<T>>({x.high + a, kLowA ? x.low + a : nullptr, x.strip}, b, steps, nullptr,
                                                 0);
        put(m, sums);
        const int64_t rows = smaller(32, n - i), width = smaller(32, columns - 16 * s);
        float* to = out + i * out_stride + column + 16 * s;
        for (int64_t r = 0; r < rows; ++r) {
          if (streams && width == 32)
            Machine::stream(to + r * out_stride, sums + 32 * r);
          else
            std::memcpy(to + r * out_stride, sums + 32 * r, sizeof(float) * width);
        }
      }
    }
  }
  Machine::fence();
}

template <class Machine>
void project(const Limbs& x, int64_t n, int64_t h, const Matrix& weight, int64_t v, float* out, int64_t out_stride,
             int64_t first, int64_t last, uint32_t* scratch) {
  const auto run = [&](const auto* data) {
    if (x.low != nullptr)
      project_panels<Machine, true>(x, n, h, data, weight.stride, v, out, out_stride, first, last, scratch);
    else
      project_panels<Machine, false>(x, n, h, data, weight.stride, v, out, out_stride, first, last, scratch);
  };
  if (weight.element == Element::kFloat32)
    run(static_cast<const float*>(weight.data));
  else
    run(static_cast<const uint16_t*>(weight.data));
}

// ---- the hidden gradient

template <class Machine, typename T>
void hidden_gradient_part(const TiledGradient& g, const T* weight, int64_t stride, int64_t h, float* out,
                          int64_t out_stride, int64_t first_block, int64_t last_block, int64_t first_strip,
                          int64_t last_strip, uint32_t* scratch) {
  constexpr int64_t kSteps = kDepth / 32, kStrip = kSteps * kWords;
  const int64_t strips = last_strip - first_strip, blocks = last_block - first_block;
  auto* sums = reinterpret_cast<float*>(scratch);  // [blocks, strips, 4 tiles]
  uint32_t *high = scratch + blocks * strips * 4 * kWords, *low = high + 2 * strips * kStrip;  // of the head
  uint32_t *g_high = low + 2 * strips * kStrip, *g_low = g_high + 2 * kStrip;
  const auto fine = [&](int64_t block, int64_t k) {
    return g.fine == nullptr || g.fine[block * g.fine_stride + k] != 0;
  };
  Machine m;
  for (int64_t column = 0; column < g.v; column += kDepth) {
    const int64_t steps = count_of(smaller(kDepth, g.v - column), 32), fine_at = column / 32;
    for (int64_t k = 0; k < steps; ++k) {
      bool both = false;
      for (int64_t b = first_block; kIsWide<T> && b < last_block && !both; ++b) both = fine(b, fine_at + k);
      for (int64_t s = 0; s < 2 * strips; ++s) {
        const int64_t row = column + 32 * k, at = 32 * first_strip + 16 * s, to = s * kStrip + k * kWords;
        pack<Machine, true, false>(weight + row * stride + at, stride, g.v - row, h - at, high + to,
                                   both ? low + to : nullptr);
      }
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t block = first_block + b, token = 32 * block;
      for (int64_t k = 0; k < steps; ++k) {
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t row = token + 16 * half, at = column + 32 * k, to = half * kStrip + k * kWords;
          pack<Machine, false, false>(g.data + row * g.stride + at, g.stride, g.n - row, g.v - at, g_high + to,
                                      fine(block, fine_at + k) ? g_low + to : nullptr);
        }
      }
      const uint8_t* limbs = g.fine == nullptr ? nullptr : g.fine + block * g.fine_stride + fine_at;
      for (int64_t s = 0; s < strips; ++s) {
        float* sum = sums + (b * strips + s) * 4 * kWords;
        if (column == 0) {
          clear(m);
        } else {
          m.template load_sum<0>(sum), m.template load_sum<1>(sum + kWords);
          m.template load_sum<2>(sum + 2 * kWords), m.template load_sum<3>(sum + 3 * kWords);
        }
        m.template accumulate<true, kIsWide<T>>({g_high, g_low, kStrip},
                                                {high + 2 * s * kStrip, low + 2 * s * kStrip, kStrip}, steps, limbs, 1);
        m.template store_tile<0>(sum, 16), m.template store_tile<1>(sum + kWords, 16);
        m.template store_tile<2>(sum + 2 * kWords, 16), m.template store_tile<3>(sum + 3 * kWords, 16);
      }
    }
  }
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t s = 0; s < strips; ++s) {
      const float* sum = sums + (b * strips + s) * 4 * kWords;
      const int64_t token = 32 * (first_block + b), at = 32 * (first_strip + s);
      for (int64_t r = 0; r < smaller(32, g.n - token); ++r) {
        for (int64_t c = 0; c < smaller(32, h - at); ++c)
          out[(token + r) * out_stride + at + c] += sum[(r / 16 * 2 + c / 16) * kWords + r % 16 * 16 + c % 16];
      }
    }
  }
}

template <class Machine>
void hidden_gradient(const TiledGradient& g, const Matrix& weight, int64_t h, float* out, int64_t out_stride,
                     int64_t first_block, int64_t last_block, int64_t first_strip, int64_t last_strip,
                     uint32_t* scratch) {
  if (weight.element == Element::kFloat32)
    hidden_gradient_part<Machine>(g, static_cast<const float*>(weight.data), weight.stride, h, out, out_stride,
                                  first_block, last_block, first_strip, last_strip, scratch);
  else
    hidden_gradient_part<Machine>(g, static_cast<const uint16_t*>(weight.data), weight.stride, h, out, out_stride,
                                  first_block, last_block, first_strip, last_strip, scratch);
}

// ---- the weight gradient

inline uint32_t bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
inline float number(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

// bf16, to nearest even.
inline void round_row(const float* __restrict sums, uint16_t* __restrict to, int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    const uint32_t u = bits(sums[c]);
    to[c] = static_cast<uint16_t>(sums[c] != sums[c] ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
}

// A number is its 24 leading bits: bf16 is these to the nearest, and so the result at any time; `rest` is what is left
// of them, signed.
template <bool kFirst>
void keep_row(const float* __restrict sums, uint16_t* __restrict to, int8_t* __restrict rest, int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    float sum = sums[c];
    if constexpr (!kFirst) {
      const auto signed_rest = static_cast<uint32_t>(static_cast<int32_t>(rest[c]));
      sum += number((static_cast<uint32_t>(to[c]) << 16) + (signed_rest << 8));
    }
    const uint32_t u = sum != sum ? 0x7fc00000u : bits(sum), kept = (u + 0x7f + (u >> 8 & 1)) >> 8;
    const uint32_t rounded = (kept + 0x80) >> 8;
    to[c] = static_cast<uint16_t>(rounded);
    rest[c] = static_cast<int8_t>(kept - (rounded << 8));
  }
}

// A row's sums into the weight gradient.
inline void add_row(const float* sums, const WeightSum& out, int64_t row, int64_t column, int64_t count) {
  const int64_t at = row * out.stride + column;
  if (out.element == Element::kBFloat16) {
    uint16_t* to = static_cast<uint16_t*>(out.data) + at;
    int8_t* rest = out.rest + (out.rest == nullptr ? 0 : row * out.rest_stride + column);
    if (out.rest == nullptr)
      round_row(sums, to, count);
    else if (out.first)
      keep_row<true>(sums, to, rest, count);
    else
      keep_row<false>(sums, to, rest, count);
    return;
  }
  float* to = static_cast<float*>(out.data) + at;
  if (out.first)
    std::memcpy(to, sums, sizeof(float) * count);
  else
    for (int64_t c = 0; c < count; ++c) to[c] += sums[c];
}

template <class Machine, bool kLowB>
void weight_gradient_panels(const TiledGradient& g, const Limbs& x, int64_t h, const WeightSum& out, int64_t first,
                            int64_t last, uint32_t* scratch) {
  const int64_t steps = count_of(g.n, 32), strip = steps * kWords;
  uint32_t *high = scratch, *low = scratch + 4 * strip;
  alignas(64) float sums[32 * 32];
  const bool streams = out.first && out.element == Element::kFloat32 && Machine::streams(out.data, out.stride);
  Machine m;
  for (int64_t p = first; p < last; ++p) {
    const int64_t columns = smaller(kColumns64, g.v - p * kColumns64), strips = 2 * count_of(columns, 32);
    for (int64_t k = 0; k < steps; ++k) {
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t at = p * kColumns64 + 16 * s, to = s * strip + k * kWords;
        const bool fine = g.fine == nullptr || g.fine[k * g.fine_stride + at / 32] != 0;
        pack<Machine, true, true>(g.data + 32 * k * g.stride + at, g.stride, g.n - 32 * k, g.v - at, high + to,
                                  fine ? low + to : nullptr);
      }
    }
    for (int64_t s = 0; s < strips; s += 2) {
      const int64_t row = p * kColumns64 + 16 * s, rows = smaller(32, g.v - row);
      const uint8_t* limbs = g.fine == nullptr ? nullptr : g.fine + row / 32;
      for (int64_t column = 0; column < h; column += 32) {
        const int64_t b = column / 16 * x.strip, width = smaller(32, h - column);
        clear(m);
        m.template accumulate<true, kLowB>({high + s * strip, low + s * strip, strip},
                                           {x.high + b, kLowB ? x.low + b : nullptr, x.strip}, steps, limbs,
                                           g.fine_stride);
        put(m, sums);
        for (int64_t r = 0; r < rows; ++r) {
          if (streams && width == 32)
            Machine::stream(static_cast<float*>(out.data) + (row + r) * out.stride + column, sums + 32 * r);
          else
            add_row(sums + 32 * r, out, row + r, column, width);
        }
      }
    }
  }
  Machine::fence();
}

template <class Machine>
void weight_gradient(const TiledGradient& g, const Limbs& x, int64_t h, const WeightSum& out, int64_t first,
                     int64_t last, uint32_t* scratch) {
  if (x.low != nullptr)
    weight_gradient_panels<Machine, true>(g, x, h, out, first, last, scratch);
  else
    weight_gradient_panels<Machine, false>(g, x, h, out, first, last, scratch);
}

template <class Machine>
constexpr TileKernels kernels_on(int64_t worthwhile, bool wide) {
  return {worthwhile,
          wide,
          pack_hidden<Machine, false>,
          pack_hidden<Machine, true>,
          project<Machine>,
          hidden_gradient<Machine>,
          weight_gradient<Machine>};
}

}  // namespace
}  // namespace sgopd
