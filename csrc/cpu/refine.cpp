// Quantized logits: the product in 16-bit integers, the pairs that carry probability, their logits again in fp32.

#include <cmath>

#include "pairs.h"

namespace sgopd {
namespace {

// out [n, v] fp32 = hidden [n, h] * weight [v, h]^T, through int16, `segment` products summed in int32. `along`,
// `absorb` [h, 16] fp32: Feedback's, or null.
void project_int16(const MatrixTuple& hidden, int64_t n, const MatrixTuple& weight, int64_t v, int64_t h, Address out,
                   int64_t out_stride, int64_t segment, Address along, Address absorb, int threads,
                   const std::string& isa) {
  const Int16Kernels* k = kernels(isa).int16;
  if (k == nullptr) throw std::invalid_argument("project_int16: needs AVX2 or AVX512-VNNI, and an isa that has it");
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
  const int64_t all = k->panels(v), tasks = std::min<int64_t>(all, threads);
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
  const PairKernels& k = *kernels(isa).pairs;
  auto pairs = std::make_unique<Pairs>(n, v);
  py::gil_scoped_release release;
  const auto cut = static_cast<float>(std::log(threshold));
  collect(*pairs, n, v, false, threads, [&](int64_t i, int32_t* columns, float*) {
    return k.select_mass(z.data + i * z.stride, student_scale, t.data + i * t.stride, teacher_scale, v, cut, y[i],
                         columns, out + 6 * i);
  });
  return pairs;
}

// Puts fp32 products in place of the quantized logits of the pairs, and measures the quantization by them. report [n,
// 6]: columns 2, 3 probability outside the pairs; 4, 5 variance of (fp32 - quantized) over a token's pairs, in logits,
// for student and teacher. Its mean is subtracted from the pairs: a shift of all of a token's logits changes nothing,
// while a shift between pairs and the rest would.
void refine(const Pairs& pairs, Address student, int64_t student_stride, float student_scale, Address teacher,
            int64_t teacher_stride, float teacher_scale, const MatrixTuple& student_hidden,
            const MatrixTuple& student_weight, int64_t student_width, const MatrixTuple& teacher_hidden,
            const MatrixTuple& teacher_weight, int64_t teacher_width, Address report, int threads,
            const std::string& isa) {
  const int64_t n = pairs.rows, v = pairs.vocabulary, parts = parts_of(v);
  require_threads(threads);
  auto* out = pointer<double>("report", report, n > 0);
  const PairKernels& k = *kernels(isa).pairs;
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

}  // namespace

void define_refine(py::module_& m, py::class_<Pairs>& pairs) {
  using namespace py::literals;
  pairs.def("refine", &refine, py::kw_only(), "student"_a, "student_stride"_a, "student_scale"_a, "teacher"_a,
            "teacher_stride"_a, "teacher_scale"_a, "student_hidden"_a, "student_weight"_a, "student_width"_a,
            "teacher_hidden"_a, "teacher_weight"_a, "teacher_width"_a, "report"_a, "threads"_a = 1, "isa"_a = "");
  m.attr("DIRECTIONS") = kDirections;
  m.def("project_int16", &project_int16, py::kw_only(), "hidden"_a, "n"_a, "weight"_a, "v"_a, "h"_a, "out"_a,
        "out_stride"_a, "segment"_a, "along"_a = 0, "absorb"_a = 0, "threads"_a = 1, "isa"_a = "");
  m.def("select_mass", &select_mass, py::kw_only(), "student"_a, "student_stride"_a, "student_scale"_a, "teacher"_a,
        "teacher_stride"_a, "teacher_scale"_a, "n"_a, "v"_a, "token_ids"_a, "threshold"_a, "report"_a, "threads"_a = 1,
        "isa"_a = "");
}

}  // namespace sgopd
