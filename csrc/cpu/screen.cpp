// The sparse plans' steps over a chunk of tokens, for Python: screened logits, refinement, gradients over pairs.
// A result never depends on the number of threads: work is cut the same way for any.

#include <cmath>
#include <cstring>
#include <memory>

#include "../arguments.h"
#include "int16.h"
#include "isa.h"
#include "sparse.h"

namespace sgopd {

namespace {

const SparseKernels& kernels(const std::string& isa) {
  const std::string name = pick_isa(isa);
#ifdef SGOPD_X86
  if (name == "avx512") return avx512::sparse();
  if (name == "avx2") return avx2::sparse();
#endif
  return base::sparse();
}

// The fastest 16-bit products of this processor, or null.
const Int16Kernels* int16_kernels() {
#ifdef SGOPD_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) return &avx512vnni::int16();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::int16();
#endif
  return nullptr;
}

bool has_int16() { return int16_kernels() != nullptr; }

// Python's (address, stride, is bf16) of a matrix with unit stride along its width.
using MatrixTuple = std::tuple<Address, int64_t, bool>;

Matrix matrix(const char* name, const MatrixTuple& m, int64_t rows, int64_t width) {
  extent(name, rows, width, std::get<1>(m));
  const auto [address, stride, is_bf16] = m;
  if (is_bf16) return {pointer<const uint16_t>(name, address, rows > 0), stride, Element::kBFloat16};
  return {pointer<const float>(name, address, rows > 0), stride, Element::kFloat32};
}

// Row i in fp32: itself, or widened into `scratch`.
inline const float* row(const Matrix& m, int64_t i, int64_t h, const SparseKernels& k, float* scratch) {
  if (m.element == Element::kFloat32) return static_cast<const float*>(m.data) + i * m.stride;
  k.widen(static_cast<const uint16_t*>(m.data) + i * m.stride, h, scratch);
  return scratch;
}

// fp32 rows, unit stride along them: logits, a gradient.
struct Logits {
  float* data;
  int64_t stride;
};

Logits logits(const char* name, Address address, int64_t n, int64_t v, int64_t stride) {
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
      throw std::invalid_argument(std::string(what) + ": these pairs hold no gradient; take_large makes such");
  }
  int64_t count() const {
    int64_t total = 0;
    for (int64_t i = 0; i < rows; ++i) total += last[i] - first[i];
    return total;
  }
};

constexpr int64_t kRowParts = 32, kColumnParts = 64;

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

int64_t parts_of(int64_t v) { return std::min(kColumnParts, std::max<int64_t>(1, v / 64)); }

// out [n, v] fp32 = hidden [n, h] * weight [v, h]^T, through int16, `segment` products summed in int32. `along`,
// `absorb` [h, 16] fp32: Feedback's, or null.
void project_int16(const MatrixTuple& hidden, int64_t n, const MatrixTuple& weight, int64_t v, int64_t h, Address out,
                   int64_t out_stride, int64_t segment, Address along, Address absorb, int threads) {
  const Int16Kernels* k = int16_kernels();
  if (k == nullptr) throw std::invalid_argument("project_int16: this processor has neither AVX2 nor AVX512-VNNI");
  const Matrix x = matrix("hidden", hidden, n, h), w = matrix("weight", weight, v, h);
  const Logits z = logits("out", out, n, v, out_stride);
  require_threads(threads);
  if (segment < 2 || segment % 2 != 0 || segment > (1 << 16))
    throw std::invalid_argument("project_int16: segment must be even and lie in [2, 65536], got " +
                                std::to_string(segment));
  const int64_t depth = segment / 2;
  const Feedback feedback{pointer<const float>("along", along, absorb != 0),
                          pointer<const float>("absorb", absorb, along != 0)};
  if (n == 0) return;
  py::gil_scoped_release release;
  const int64_t stride = (h + 31) / 32 * 32;
  std::vector<int16_t> quantised((n + kRoom) * stride);
  std::vector<float> step(n);
  const auto quantise = [&](const auto& products, auto* data) {
    products.quantise_rows(data, n, x.stride, h, depth, feedback, quantised.data(), stride, step.data());
  };
  if (x.element == Element::kFloat32)
    quantise(k->fp32, static_cast<const float*>(x.data));
  else
    quantise(k->bf16, static_cast<const uint16_t*>(x.data));
  const int64_t all = k->panels(v), tasks = std::min<int64_t>(all, std::max<int64_t>(threads, 1));
  parallel(tasks, threads, [&](int64_t task) {
    std::vector<uint32_t> scratch(k->scratch_words(n, h));
    const int64_t first = bound(all, task, tasks), last = bound(all, task + 1, tasks);
    const auto run = [&](const auto& products, auto* data) {
      products.project(quantised.data(), step.data(), n, stride, data, v, w.stride, h, depth, z.data, z.stride, first,
                       last, scratch.data());
    };
    if (w.element == Element::kFloat32)
      run(k->fp32, static_cast<const float*>(w.data));
    else
      run(k->bf16, static_cast<const uint16_t*>(w.data));
  });
}

// Columns that carry at least `threshold` of either model's probability, and the sampled one. report [n, 6] float64:
// columns 0, 1 both log-sum-exps; the rest is refine's.
std::unique_ptr<Pairs> select_mass(Address student, int64_t student_stride, float student_scale, Address teacher,
                                   int64_t teacher_stride, float teacher_scale, int64_t n, int64_t v, Address token_ids,
                                   double threshold, Address report, int threads, const std::string& isa) {
  const Logits z = logits("student", student, n, v, student_stride),
               t = logits("teacher", teacher, n, v, teacher_stride);
  const auto* y = pointer<const int64_t>("token_ids", token_ids, n > 0);
  auto* out = pointer<double>("report", report, n > 0);
  require_threads(threads);
  if (!(threshold > 0 && threshold <= 1)) throw std::invalid_argument("select_mass: threshold must lie in (0, 1]");
  for (const float scale : {student_scale, teacher_scale})
    if (!(scale > 0) || !std::isfinite(scale))
      throw std::invalid_argument("select_mass: scales must be finite and > 0");
  for (int64_t i = 0; i < n; ++i)
    if (y[i] < 0 || y[i] >= v) throw std::out_of_range("select_mass: a token id is outside the vocabulary");
  const SparseKernels& k = kernels(isa);
  auto pairs = std::make_unique<Pairs>(n, v);
  py::gil_scoped_release release;
  const auto cut = static_cast<float>(std::log(threshold));
  collect(*pairs, n, v, false, threads, [&](int64_t i, int32_t* columns, float*) {
    return k.select_mass(z.data + i * z.stride, student_scale, t.data + i * t.stride, teacher_scale, v, cut, y[i],
                         columns, out + 6 * i);
  });
  return pairs;
}

// Puts fp32 products in place of the screened logits of the pairs, and measures the screen by them. report [n, 6]:
// columns 2, 3 probability outside the pairs; 4, 5 variance of (fp32 - screened) over a token's pairs, in logits, for
// student and teacher. Its mean is subtracted from the pairs: a shift of all of a token's logits changes nothing, while
// a shift between pairs and the rest would.
void refine(const Pairs& pairs, Address student, int64_t student_stride, float student_scale, Address teacher,
            int64_t teacher_stride, float teacher_scale, const MatrixTuple& student_hidden,
            const MatrixTuple& student_weight, int64_t student_width, const MatrixTuple& teacher_hidden,
            const MatrixTuple& teacher_weight, int64_t teacher_width, Address report, int threads,
            const std::string& isa) {
  const int64_t n = pairs.rows, v = pairs.vocabulary, parts = parts_of(v);
  require_threads(threads);
  auto* out = pointer<double>("report", report, n > 0);
  const SparseKernels& k = kernels(isa);
  struct Side {
    Logits z;
    double scale;
    Matrix hidden, weight;
    int64_t width;
  };
  const Side sides[2] = {{logits("student", student, n, v, student_stride), student_scale,
                          matrix("student_hidden", student_hidden, n, student_width),
                          matrix("student_weight", student_weight, v, student_width), student_width},
                         {logits("teacher", teacher, n, v, teacher_stride), teacher_scale,
                          matrix("teacher_hidden", teacher_hidden, n, teacher_width),
                          matrix("teacher_weight", teacher_weight, v, teacher_width), teacher_width}};
  for (const Side& side : sides)
    if (side.hidden.element != Element::kFloat32) throw std::invalid_argument("refine: hidden states must be float32");
  py::gil_scoped_release release;
  std::vector<double> sums(parts * n * 6, 0.0);  // a part and token: mass, error, squared error a side
  parallel(parts, threads, [&](int64_t part) {
    const int64_t begin = bound(v, part, parts), end = bound(v, part + 1, parts);
    const ByColumn order(pairs, begin, end);
    std::vector<float> scratch(std::max(student_width, teacher_width));
    for (int s = 0; s < 2; ++s) {
      const Side& side = sides[s];
      double* sum = sums.data() + part * n * 6 + s;
      for (int64_t j = begin; j < end; ++j) {
        const int64_t first = order.first[j - begin], last = order.first[j - begin + 1];
        if (first == last) continue;
        const float* w = row(side.weight, j, side.width, k, scratch.data());
        for (int64_t p = first; p < last; p += 4) {
          const int count = static_cast<int>(std::min<int64_t>(4, last - p));
          const float* rows[4];
          float exact[4];
          for (int q = 0; q < count; ++q)
            rows[q] = static_cast<const float*>(side.hidden.data) + order.rows[p + q] * side.hidden.stride;
          k.dot(rows, w, side.width, count, exact);
          for (int q = 0; q < count; ++q) {
            const int64_t i = order.rows[p + q];
            float& z = side.z.data[i * side.z.stride + j];
            const double error = static_cast<double>(exact[q]) - z;
            sum[i * 6] += std::exp(exact[q] * side.scale - out[6 * i + s]);
            sum[i * 6 + 2] += error;
            sum[i * 6 + 4] += error * error;
            z = exact[q];
          }
        }
      }
    }
  });
  const int64_t row_parts = std::min(n, kRowParts);
  parallel(row_parts, threads, [&](int64_t row_part) {
    for (int64_t i = bound(n, row_part, row_parts); i < bound(n, row_part + 1, row_parts); ++i) {
      double total[6] = {0, 0, 0, 0, 0, 0};
      for (int64_t part = 0; part < parts; ++part)
        for (int c = 0; c < 6; ++c) total[c] += sums[(part * n + i) * 6 + c];
      const double count = static_cast<double>(pairs.last[i] - pairs.first[i]);
      for (int s = 0; s < 2; ++s) {
        const double mean = total[2 + s] / count;
        out[6 * i + 2 + s] = total[s] < 1 ? 1.0 - total[s] : 0.0;
        out[6 * i + 4 + s] = total[4 + s] / count - mean * mean;
        float* z = sides[s].z.data + i * sides[s].z.stride;
        for (int64_t k = pairs.first[i]; k < pairs.last[i]; ++k) z[pairs.columns[k]] -= static_cast<float>(mean);
      }
    }
  });
}

// The largest entries of a gradient g [n, v], taken out of it (zeroed): as many as leave at most `budget` of its
// Frobenius norm behind, by a histogram of a sample of tokens. `dense` and nothing taken where they would be more than
// `most` of all entries.
std::unique_ptr<Pairs> take_large(Address gradient, int64_t stride, int64_t n, int64_t v, double budget, double most,
                                  int threads, const std::string& isa) {
  const Logits g = logits("gradient", gradient, n, v, stride);
  require_threads(threads);
  if (!(budget > 0) || !(most > 0)) throw std::invalid_argument("take_large: budget and most must be > 0");
  const SparseKernels& k = kernels(isa);
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
    return k.take_large(g.data + i * g.stride, v, threshold, columns, values, energy.data() + 2 * i);
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
  const SparseKernels& k = kernels(isa);
  py::gil_scoped_release release;
  const int64_t n = pairs.rows, v = pairs.vocabulary;
  const int64_t width = std::max<int64_t>(16, (512 << 10) / (4 * h));
  const int64_t parts = std::min<int64_t>(std::max(threads, 1), std::max<int64_t>(n, 1));
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
  const SparseKernels& k = kernels(isa);
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

void define_screen(py::module_& m) {
  using namespace py::literals;
  py::class_<Pairs>(m, "Pairs", "(token, column) pairs of a chunk, with a gradient's values or without.")
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
      .def("add_bias_gradient", &add_bias_gradient, "out"_a)
      .def("refine", &refine, py::kw_only(), "student"_a, "student_stride"_a, "student_scale"_a, "teacher"_a,
           "teacher_stride"_a, "teacher_scale"_a, "student_hidden"_a, "student_weight"_a, "student_width"_a,
           "teacher_hidden"_a, "teacher_weight"_a, "teacher_width"_a, "report"_a, "threads"_a = 1, "isa"_a = "");
  m.def("has_int16", &has_int16, "Whether project_int16 runs on this processor (AVX512-VNNI or AVX2).");
  m.def("project_int16", &project_int16, py::kw_only(), "hidden"_a, "n"_a, "weight"_a, "v"_a, "h"_a, "out"_a,
        "out_stride"_a, "segment"_a, "along"_a = 0, "absorb"_a = 0, "threads"_a = 1);
  m.def("select_mass", &select_mass, py::kw_only(), "student"_a, "student_stride"_a, "student_scale"_a, "teacher"_a,
        "teacher_stride"_a, "teacher_scale"_a, "n"_a, "v"_a, "token_ids"_a, "threshold"_a, "report"_a, "threads"_a = 1,
        "isa"_a = "");
  m.def("take_large", &take_large, py::kw_only(), "gradient"_a, "stride"_a, "n"_a, "v"_a, "budget"_a, "most"_a,
        "threads"_a = 1, "isa"_a = "");
}

}  // namespace sgopd
