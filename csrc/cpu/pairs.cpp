// The gradient's largest entries as pairs (token, column), and products over them.

#include "pairs.h"

#include <cstring>

namespace sgopd {
namespace {

// The largest entries of a gradient g [n, v], taken out of it (zeroed): as many as leave at most `budget` of its
// Frobenius norm behind, by a histogram of a sample of tokens. `dense` and nothing taken where they would be more than
// `most` of all entries.
std::unique_ptr<Pairs> extract_top(Address gradient, int64_t stride, int64_t n, int64_t v, double budget, double most,
                                   int threads, const std::string& isa) {
  const Logits g = logits("gradient", gradient, n, v, stride);
  require_threads(threads);
  if (!(budget > 0) || !(most > 0)) throw std::invalid_argument("extract_top: budget and most must be > 0");
  const PairKernels& k = *kernels(isa).pairs;
  auto pairs = std::make_unique<Pairs>(n, v);
  if (n == 0) return pairs;
  py::gil_scoped_release release;

  constexpr int kBins = 1024;  // a quarter of an octave each
  struct Histogram {
    std::vector<double> energy = std::vector<double>(kBins, 0.0);
    std::vector<int64_t> count = std::vector<int64_t>(kBins, 0);
  };
  const auto measure = [&](int64_t sample) {
    const int64_t parts = std::min<int64_t>(sample, kRowParts);
    std::vector<Histogram> each(parts);
    parallel(parts, threads, [&](int64_t part) {
      for (int64_t s = bound(sample, part, parts); s < bound(sample, part + 1, parts); ++s) {
        const float* row = g.data + bound(n, s, sample) * g.stride;
        for (int64_t j = 0; j < v; ++j) {
          uint32_t bits;
          std::memcpy(&bits, row + j, 4);
          const uint32_t bin = (bits & 0x7fffffffu) >> 21;
          each[part].energy[bin] += static_cast<double>(row[j]) * row[j];
          ++each[part].count[bin];
        }
      }
    });
    Histogram all;
    for (const Histogram& h : each) {
      for (int b = 0; b < kBins; ++b) {
        all.energy[b] += h.energy[b];
        all.count[b] += h.count[b];
      }
    }
    return all;
  };
  int64_t sample = std::min<int64_t>(n, std::max<int64_t>(16, n / 16));
  Histogram histogram = measure(sample);
  const auto total = [&] {
    double sum = 0;
    for (const double e : histogram.energy) sum += e;
    return sum;
  };
  if (sample < n && total() == 0) histogram = measure(sample = n);  // the sample's tokens have weight 0
  const double allowed = budget * budget * total();
  double left = 0;
  int bin = 0;
  // A zero is never taken: bin 0 holds zeros and denormals.
  while (bin + 1 < kBins && (bin == 0 || left + histogram.energy[bin] <= allowed)) left += histogram.energy[bin++];
  int64_t kept = 0;
  for (int b = bin; b < kBins; ++b) kept += histogram.count[b];
  if (static_cast<double>(kept) > most * static_cast<double>(sample) * static_cast<double>(v)) {
    pairs->dense = true;
    return pairs;
  }
  const uint32_t edge = static_cast<uint32_t>(bin) << 21;
  float threshold;
  std::memcpy(&threshold, &edge, 4);
  std::vector<double> energy(2 * n, 0.0);
  collect(*pairs, n, v, true, threads, [&](int64_t i, int32_t* columns, float* values) {
    return k.extract_top(g.data + i * g.stride, v, threshold, columns, values, energy.data() + 2 * i);
  });
  pairs->threshold = threshold;
  for (int64_t i = 0; i < n; ++i) {
    pairs->taken += energy[2 * i];
    pairs->left += energy[2 * i + 1];
  }
  return pairs;
}

// Puts the pairs back into the gradient they were taken from.
void restore(const Pairs& pairs, Address gradient, int64_t stride) {
  const Logits g = logits("gradient", gradient, pairs.rows, pairs.vocabulary, stride);
  pairs.require_values("restore");
  for (int64_t i = 0; i < pairs.rows; ++i)
    for (int64_t k = pairs.first[i]; k < pairs.last[i]; ++k) g.data[i * g.stride + pairs.columns[k]] = pairs.values[k];
}

// out [n, h] fp32 += pairs * weight. Tokens in parallel, columns in blocks of the head that stay in L2.
void add_hidden_gradient(const Pairs& pairs, const MatrixTuple& weight, int64_t h, Address out, int64_t out_stride,
                         int threads, const std::string& isa) {
  const Matrix w = matrix("weight", weight, pairs.vocabulary, h);
  float* to = logits("out", out, pairs.rows, h, out_stride).data;
  require_threads(threads);
  pairs.require_values("add_hidden_gradient");
  const PairKernels& k = *kernels(isa).pairs;
  py::gil_scoped_release release;
  const int64_t n = pairs.rows, v = pairs.vocabulary;
  const int64_t width = std::max<int64_t>(16, (512 << 10) / (4 * h));
  const int64_t parts = std::min<int64_t>(threads, std::max<int64_t>(n, 1));
  parallel(parts, threads, [&](int64_t part) {
    const int64_t low = bound(n, part, parts), high = bound(n, part + 1, parts);
    std::vector<int64_t> cursor(pairs.first.begin() + low, pairs.first.begin() + high);
    std::vector<float> wide(w.element == Element::kFloat32 ? 0 : width * h);
    for (int64_t begin = 0; begin < v; begin += width) {
      const int64_t end = std::min(begin + width, v);
      const float* block = static_cast<const float*>(w.data) + begin * w.stride;
      int64_t stride = w.stride;
      if (w.element != Element::kFloat32) {
        for (int64_t j = begin; j < end; ++j) row(w, j, h, k, wide.data() + (j - begin) * h);
        block = wide.data();
        stride = h;
      }
      for (int64_t i = low; i < high; ++i) {
        int64_t& p = cursor[i - low];
        while (p < pairs.last[i] && pairs.columns[p] < end) {
          const float* rows[4];
          const float* values = pairs.values.get() + p;
          int count = 0;
          for (; count < 4 && p < pairs.last[i] && pairs.columns[p] < end; ++p)
            rows[count++] = block + (pairs.columns[p] - begin) * stride;
          k.add(rows, values, h, count, to + i * out_stride);
        }
      }
    }
  });
}

// out [v, h] fp32 += pairs^T * hidden [n, h] fp32. Columns in parallel.
void add_weight_gradient(const Pairs& pairs, const MatrixTuple& hidden, int64_t h, Address out, int64_t out_stride,
                         int threads, const std::string& isa) {
  const Matrix x = matrix("hidden", hidden, pairs.rows, h);
  if (x.element != Element::kFloat32) throw std::invalid_argument("add_weight_gradient: hidden must be float32");
  float* to = logits("out", out, pairs.vocabulary, h, out_stride).data;
  require_threads(threads);
  pairs.require_values("add_weight_gradient");
  const PairKernels& k = *kernels(isa).pairs;
  py::gil_scoped_release release;
  const int64_t v = pairs.vocabulary, parts = parts_of(v);
  parallel(parts, threads, [&](int64_t part) {
    const int64_t begin = bound(v, part, parts), end = bound(v, part + 1, parts);
    const ByColumn order(pairs, begin, end);
    for (int64_t j = begin; j < end; ++j) {
      const int64_t last = order.first[j - begin + 1];
      for (int64_t p = order.first[j - begin]; p < last; p += 4) {
        const int count = static_cast<int>(std::min<int64_t>(4, last - p));
        const float* rows[4];
        float values[4];
        for (int q = 0; q < count; ++q) {
          rows[q] = static_cast<const float*>(x.data) + order.rows[p + q] * x.stride;
          values[q] = pairs.values[order.at[p + q]];
        }
        k.add(rows, values, h, count, to + j * out_stride);
      }
    }
  });
}

// out [v] fp32 += column sums.
void add_bias_gradient(const Pairs& pairs, Address out) {
  pairs.require_values("add_bias_gradient");
  auto* to = pointer<float>("out", out, true);
  for (int64_t i = 0; i < pairs.rows; ++i)
    for (int64_t k = pairs.first[i]; k < pairs.last[i]; ++k) to[pairs.columns[k]] += pairs.values[k];
}

}  // namespace

py::class_<Pairs> define_pairs(py::module_& m) {
  using namespace py::literals;
  m.def("extract_top", &extract_top, py::kw_only(), "gradient"_a, "stride"_a, "n"_a, "v"_a, "budget"_a, "most"_a,
        "threads"_a = 1, "isa"_a = "");
  return py::class_<Pairs>(m, "Pairs", "(token, column) pairs of a chunk, with a gradient's values or without.")
      .def_property_readonly("count", &Pairs::count)
      .def_readonly("threshold", &Pairs::threshold)
      .def_readonly("taken", &Pairs::taken)
      .def_readonly("left", &Pairs::left)
      .def_readonly("dense", &Pairs::dense)
      .def("restore", &restore, "gradient"_a, "stride"_a)
      .def("add_hidden_gradient", &add_hidden_gradient, py::kw_only(), "weight"_a, "h"_a, "out"_a, "out_stride"_a,
           "threads"_a = 1, "isa"_a = "")
      .def("add_weight_gradient", &add_weight_gradient, py::kw_only(), "hidden"_a, "h"_a, "out"_a, "out_stride"_a,
           "threads"_a = 1, "isa"_a = "")
      .def("add_bias_gradient", &add_bias_gradient, "out"_a);
}

}  // namespace sgopd
