// Python's door to the CPU row pass: addresses and strides as integers, checked here; the instruction set and
// the threads chosen here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../rows.h"

namespace py = pybind11;

namespace sgopd {
namespace base {
void rows(const RowsArgs&, int64_t, int64_t);
}
#ifdef SGOPD_X86
namespace avx2 {
void rows(const RowsArgs&, int64_t, int64_t);
}
namespace avx512 {
void rows(const RowsArgs&, int64_t, int64_t);
}
#endif
}  // namespace sgopd

namespace {

using RowsFunction = void (*)(const sgopd::RowsArgs&, int64_t, int64_t);

std::vector<std::string> available() {
  std::vector<std::string> names;
#ifdef SGOPD_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    names.emplace_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.emplace_back("avx2");
#endif
  names.emplace_back("base");
  return names;  // best first
}

RowsFunction pick(const std::string& isa) {
  const auto names = available();
  const std::string wanted = isa.empty() ? names.front() : isa;
  if (std::find(names.begin(), names.end(), wanted) == names.end()) {
    std::string list;
    for (const auto& name : names) list += (list.empty() ? "" : ", ") + name;
    throw std::invalid_argument("isa: this processor has no '" + isa + "'; available: " + list);
  }
#ifdef SGOPD_X86
  if (wanted == "avx512") return sgopd::avx512::rows;
  if (wanted == "avx2") return sgopd::avx2::rows;
#endif
  return sgopd::base::rows;
}

template <typename T>
T* pointer(const char* name, std::uintptr_t address, bool required) {
  if (address == 0 && required) throw std::invalid_argument(std::string(name) + ": null address");
  if (address % alignof(T) != 0) {
    throw std::invalid_argument(std::string(name) + ": address is not aligned to its element");
  }
  return reinterpret_cast<T*>(address);
}

using Address = std::uintptr_t;
using HeadTuple = std::tuple<Address, float, float>;  // bias, logit scale, softcap (0: none)

sgopd::HeadArgs head(const char* name, const HeadTuple& h) {
  return {pointer<const float>(name, std::get<0>(h), false), std::get<1>(h), std::get<2>(h)};
}

void rows(int64_t n, int64_t vocabulary, Address student, int64_t student_stride, Address teacher,
          int64_t teacher_stride, Address reference, int64_t reference_stride, const HeadTuple& student_head,
          const HeadTuple& teacher_head, const HeadTuple& reference_head, Address token_ids, Address verdict,
          Address weights, Address forced, Address row_scale, Address teacher_logprob, Address behaviour_logprob,
          Address stats, int estimator, int divergence, double beta, double tolerance, double ratio_clip,
          double temperature, bool gradient, int threads, const std::string& isa) {
  if (n < 0 || vocabulary < 1) throw std::invalid_argument("rows: n must be >= 0 and vocabulary >= 1");
  if (n == 0) return;
  if (student_stride < vocabulary || (teacher != 0 && teacher_stride < vocabulary) ||
      (reference != 0 && reference_stride < vocabulary))
    throw std::invalid_argument("rows: a row stride is smaller than the vocabulary");
  if (estimator < 0 || estimator > 1 || divergence < 0 || divergence > 2)
    throw std::invalid_argument("rows: unknown estimator or divergence");
  if (teacher == 0 && estimator != sgopd::kSampled)
    throw std::invalid_argument("rows: without teacher logits only the sampled estimator is defined");
  if (reference != 0 && teacher == 0) throw std::invalid_argument("rows: a reference needs teacher logits");
  if (!(temperature > 0)) throw std::invalid_argument("rows: temperature must be > 0");

  sgopd::RowsArgs a{};
  a.rows = n;
  a.vocabulary = vocabulary;
  a.student = pointer<float>("student", student, true);
  a.student_stride = student_stride;
  a.teacher = pointer<float>("teacher", teacher, false);
  a.teacher_stride = teacher_stride;
  a.reference = pointer<float>("reference", reference, false);
  a.reference_stride = reference_stride;
  a.student_head = head("student bias", student_head);
  a.teacher_head = head("teacher bias", teacher_head);
  a.reference_head = head("reference bias", reference_head);
  a.token_ids = pointer<const int64_t>("token_ids", token_ids, true);
  a.verdict = pointer<const float>("verdict", verdict, true);
  a.weights = pointer<const double>("weights", weights, true);
  a.forced = pointer<const int8_t>("forced", forced, false);
  a.row_scale = pointer<const float>("row_scale", row_scale, gradient);
  a.teacher_logprob = pointer<const float>("teacher_logprob", teacher_logprob, teacher == 0);
  a.behaviour_logprob = pointer<const float>("behaviour_logprob", behaviour_logprob, false);
  a.stats = pointer<double>("stats", stats, true);
  a.estimator = estimator;
  a.divergence = divergence;
  a.beta = beta;
  a.tolerance = tolerance;
  a.ratio_clip = ratio_clip;
  a.inverse_temperature = static_cast<float>(1.0 / temperature);
  a.gradient = gradient;
  const RowsFunction run = pick(isa);

  py::gil_scoped_release release;
  for (int64_t i = 0; i < n; ++i) {
    if (a.token_ids[i] < 0 || a.token_ids[i] >= vocabulary) {
      py::gil_scoped_acquire acquire;
      throw std::out_of_range("token_ids: " + std::to_string(a.token_ids[i]) + " is outside the shared vocabulary of " +
                              std::to_string(vocabulary));
    }
  }
  // Threads are made for the call: no pool to survive a fork, no runtime to spin beside torch's. Rows are
  // independent, so the result does not depend on how many there are. Below ~0.2 ms of work they don't pay.
  const int64_t worthwhile = n * vocabulary / (1 << 18);
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>({threads, n, worthwhile}));
  std::vector<std::thread> pool;
  const auto bound = [&](int64_t i) { return n * i / count; };
  for (int64_t i = 1; i < count; ++i) pool.emplace_back(run, std::cref(a), bound(i), bound(i + 1));
  run(a, 0, bound(1));
  for (auto& thread : pool) thread.join();
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Fused row pass of the gated distillation loss on the CPU (internal: use sgopd_kernels.gated_kl_loss).";
  m.def("available", &available, "Instruction sets this build and this processor share, best first.");
  m.attr("COLUMNS") = static_cast<int>(sgopd::kColumns);
  using namespace py::literals;
  m.def("rows", &rows, py::kw_only(), "n"_a, "vocabulary"_a, "student"_a, "student_stride"_a, "teacher"_a,
        "teacher_stride"_a, "reference"_a, "reference_stride"_a, "student_head"_a, "teacher_head"_a, "reference_head"_a,
        "token_ids"_a, "verdict"_a, "weights"_a, "forced"_a, "row_scale"_a, "teacher_logprob"_a, "behaviour_logprob"_a,
        "stats"_a, "estimator"_a, "divergence"_a, "beta"_a, "tolerance"_a, "ratio_clip"_a, "temperature"_a,
        "gradient"_a, "threads"_a, "isa"_a = "");
}
