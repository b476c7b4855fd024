// (token, column) pairs of a chunk, and the operands that Python hands over beside them.
// A result never depends on the number of threads: work is cut the same way for any.
#pragma once

#include <memory>

#include "../arguments.h"
#include "dispatch.h"
#include "parallel.h"

namespace sgopd {

// Python's (address, stride, is bf16) of a matrix with unit stride along its width.
using MatrixTuple = std::tuple<Address, int64_t, bool>;

inline Matrix matrix(const char* name, const MatrixTuple& m, int64_t rows, int64_t width) {
  extent(name, rows, width, std::get<1>(m));
  const auto [address, stride, is_bf16] = m;
  if (is_bf16) return {pointer<const uint16_t>(name, address, rows > 0), stride, Element::kBFloat16};
  return {pointer<const float>(name, address, rows > 0), stride, Element::kFloat32};
}

// Row i in fp32: itself, or widened into `scratch`.
inline const float* row(const Matrix& m, int64_t i, int64_t h, const PairKernels& k, float* scratch) {
  if (m.element == Element::kFloat32) return static_cast<const float*>(m.data) + i * m.stride;
  k.widen(static_cast<const uint16_t*>(m.data) + i * m.stride, h, scratch);
  return scratch;
}

// fp32 rows, unit stride along them: logits, a gradient.
struct Logits {
  float* data;
  int64_t stride;
};

inline Logits logits(const char* name, Address address, int64_t n, int64_t v, int64_t stride) {
  extent(name, n, v, stride);
  return {pointer<float>(name, address, n > 0), stride};
}

// (token, column) pairs of a chunk, by token, columns ascending. Those of token i are [first[i], last[i]) of buffers as
// large as the chunk, of which only what holds pairs is ever touched: nothing is copied together, and nothing grows.
struct Pairs {
  Pairs(int64_t n, int64_t v) : rows(n), vocabulary(v), first(n, 0), last(n, 0) {}

  int64_t rows, vocabulary;
  std::vector<int64_t> first, last;  // [rows]
  std::unique_ptr<int32_t[]> columns;
  std::unique_ptr<float[]> values;  // of a gradient, or null
  double threshold = 0, taken = 0, left = 0;
  bool dense = false;  // too many to be worth it: nothing was taken

  void require_values(const char* what) const {
    if (values == nullptr && count() > 0)
      throw std::invalid_argument(std::string(what) + ": these pairs hold no gradient; extract_top makes such");
  }
  int64_t count() const {
    int64_t total = 0;
    for (int64_t i = 0; i < rows; ++i) total += last[i] - first[i];
    return total;
  }
};

inline constexpr int64_t kRowParts = 32, kColumnParts = 64;

inline int64_t bound(int64_t total, int64_t i, int64_t parts) { return total * i / parts; }

// Fills `pairs` from `one_row(row, columns, values)` -> count, rows in parallel.
template <typename OneRow>
void collect(Pairs& pairs, int64_t n, int64_t v, bool with_values, int threads, const OneRow& one_row) {
  pairs.columns.reset(new int32_t[n * v]);  // not make_unique: that would touch every page
  if (with_values) pairs.values.reset(new float[n * v]);
  const int64_t parts = std::min<int64_t>(kRowParts, std::max<int64_t>(n, 1));
  parallel(parts, threads, [&](int64_t part) {
    int64_t at = bound(n, part, parts) * v;
    for (int64_t i = bound(n, part, parts); i < bound(n, part + 1, parts); ++i) {
      pairs.first[i] = at;
      at += one_row(i, pairs.columns.get() + at, with_values ? pairs.values.get() + at : nullptr);
      pairs.last[i] = at;
    }
  });
}

// The pairs of columns [begin, end), by column, tokens ascending.
struct ByColumn {
  std::vector<int64_t> first;  // [end - begin + 1]
  std::vector<int32_t> rows;
  std::vector<int64_t> at;  // position in Pairs

  ByColumn(const Pairs& pairs, int64_t begin, int64_t end) : first(end - begin + 1, 0) {
    std::vector<int64_t> low(pairs.rows), high(pairs.rows);
    const int32_t* c = pairs.columns.get();
    for (int64_t i = 0; i < pairs.rows; ++i) {
      low[i] = std::lower_bound(c + pairs.first[i], c + pairs.last[i], static_cast<int32_t>(begin)) - c;
      high[i] = std::lower_bound(c + low[i], c + pairs.last[i], static_cast<int32_t>(end)) - c;
      for (int64_t k = low[i]; k < high[i]; ++k) ++first[c[k] - begin + 1];
    }
    for (size_t j = 1; j < first.size(); ++j) first[j] += first[j - 1];
    rows.resize(first.back());
    at.resize(first.back());
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t i = 0; i < pairs.rows; ++i) {
      for (int64_t k = low[i]; k < high[i]; ++k) {
        const int64_t to = next[c[k] - begin]++;
        rows[to] = static_cast<int32_t>(i);
        at[to] = k;
      }
    }
  }
};

inline int64_t parts_of(int64_t v) { return std::min(kColumnParts, std::max<int64_t>(1, v / 64)); }

}  // namespace sgopd
