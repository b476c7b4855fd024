// Python's door to the row pass of any native device: addresses and strides as integers, checked before they are
// followed. Every extension module defines `rows` through `define_rows`, so that one contract serves them all.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>

#include "rows.h"

namespace sgopd {

namespace py = pybind11;
using Address = std::uintptr_t;
using HeadTuple = std::tuple<Address, float, float>;  // bias, logit scale, softcap (0: none)

// How a device runs the pass: its arguments, then the CPU's thread count and instruction set, the GPU's stream.
using Run = std::function<void(const RowsArgs&, int threads, const std::string& isa, Address stream)>;

template <typename T>
inline T* pointer(const char* name, std::uintptr_t address, bool required) {
  if (address == 0 && required) throw std::invalid_argument(std::string(name) + ": null address");
  if (address % alignof(T) != 0) {
    throw std::invalid_argument(std::string(name) + ": address is not aligned to its element");
  }
  return reinterpret_cast<T*>(address);
}

// Rows and columns of a matrix, and the elements from one row to the next. Row and column numbers are 32-bit where
// pairs of them are kept, and no byte offset may leave the 64-bit range.
inline void extent(const char* name, int64_t rows, int64_t columns, int64_t stride) {
  constexpr int64_t kIndex = std::numeric_limits<int32_t>::max(), kBytes = std::numeric_limits<int64_t>::max() / 8;
  if (rows < 0 || columns < 1 || rows > kIndex || columns > kIndex)
    throw std::invalid_argument(std::string(name) + ": expected 0 to 2^31 - 1 rows and 1 to 2^31 - 1 columns, got " +
                                std::to_string(rows) + " and " + std::to_string(columns));
  if (stride < columns)
    throw std::invalid_argument(std::string(name) + ": a row stride of " + std::to_string(stride) +
                                " is smaller than the width of " + std::to_string(columns));
  if (stride > kBytes / (rows > 0 ? rows : 1))
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(rows) + " rows at a stride of " +
                                std::to_string(stride) + " leave the address space");
}

inline void require_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
}

// Modules serve the main interpreter alone, as torch does. pybind11's PyInit takes the GIL with PyGILState_Ensure,
// which before Python 3.12 waits for ever in a subinterpreter: it would wait for the thread that it runs on. So
// SGOPD_PYINIT defines a PyInit that asks first and stands before pybind11's; and since Python 3.13 runs every PyInit
// in the main interpreter, whatever interpreter imports, a module's body begins with the same question.
inline const char* refusal() {
  return PyInterpreterState_Get() == PyInterpreterState_Main()
             ? nullptr
             : "sgopd_kernels: its native extensions, like torch, serve the main interpreter alone; import it there, "
               "and use threads or processes for parallel work";
}

inline void require_main_interpreter() {
  if (const char* why = refusal()) throw py::import_error(why);
}

#define SGOPD_PYINIT(exported, pybind)              \
  extern "C" PYBIND11_EXPORT PyObject* exported() { \
    if (const char* why = ::sgopd::refusal()) {     \
      PyErr_SetString(PyExc_ImportError, why);      \
      return nullptr;                               \
    }                                               \
    return pybind();                                \
  }

inline HeadArgs head(const char* name, const HeadTuple& h) {
  const HeadArgs a{pointer<const float>(name, std::get<0>(h), false), std::get<1>(h), std::get<2>(h)};
  if (!std::isfinite(a.logit_scale) || !std::isfinite(a.softcap) || a.softcap < 0)
    throw std::invalid_argument(std::string(name) + ": its head needs a finite logit scale and a softcap >= 0");
  return a;
}

inline void define_rows(py::module_& m, Run run) {
  using namespace py::literals;
  m.attr("COLUMNS") = static_cast<int>(kColumns);
  const auto rows = [run](int64_t n, int64_t vocabulary, Address student, int64_t student_stride, Address teacher,
                          int64_t teacher_stride, Address reference, int64_t reference_stride,
                          const HeadTuple& student_head, const HeadTuple& teacher_head, const HeadTuple& reference_head,
                          Address token_ids, Address verdict, Address weights, Address forced, Address row_scale,
                          Address teacher_logprob, Address behaviour_logprob, Address stats, Address energy,
                          int estimator, int divergence, double beta, double tolerance, double ratio_clip,
                          double temperature, bool gradient, int threads, const std::string& isa, Address stream) {
    extent("student", n, vocabulary, student_stride);
    if (teacher != 0) extent("teacher", n, vocabulary, teacher_stride);
    if (reference != 0) extent("reference", n, vocabulary, reference_stride);
    require_threads(threads);
    if (estimator < 0 || estimator > 1 || divergence < 0 || divergence > 2)
      throw std::invalid_argument("rows: unknown estimator or divergence");
    if (teacher == 0 && estimator != kSampled)
      throw std::invalid_argument("rows: without teacher logits only the sampled estimator is defined");
    if (reference != 0 && teacher == 0) throw std::invalid_argument("rows: a reference needs teacher logits");
    const auto inverse_temperature = static_cast<float>(1.0 / temperature);
    if (!(inverse_temperature > 0) || !std::isfinite(inverse_temperature))
      throw std::invalid_argument("rows: temperature must be > 0, with an inverse that float32 holds");
    if (divergence == kJSD && !(beta > 0 && beta < 1))
      throw std::invalid_argument("rows: beta of the JSD must lie between 0 and 1");
    if (!(tolerance >= 0)) throw std::invalid_argument("rows: tolerance must be >= 0");
    if (std::isnan(ratio_clip)) throw std::invalid_argument("rows: ratio_clip is NaN");

    RowsArgs a{};
    a.rows = n;
    a.vocabulary = vocabulary;
    a.student = pointer<float>("student", student, n > 0);
    a.student_stride = student_stride;
    a.teacher = pointer<float>("teacher", teacher, false);
    a.teacher_stride = teacher_stride;
    a.reference = pointer<float>("reference", reference, false);
    a.reference_stride = reference_stride;
    a.student_head = head("student bias", student_head);
    a.teacher_head = head("teacher bias", teacher_head);
    a.reference_head = head("reference bias", reference_head);
    a.token_ids = pointer<const int64_t>("token_ids", token_ids, n > 0);
    a.verdict = pointer<const float>("verdict", verdict, n > 0);
    a.weights = pointer<const double>("weights", weights, n > 0);
    a.forced = pointer<const int8_t>("forced", forced, false);
    a.row_scale = pointer<const float>("row_scale", row_scale, gradient && n > 0);
    a.teacher_logprob = pointer<const float>("teacher_logprob", teacher_logprob, teacher == 0 && n > 0);
    a.behaviour_logprob = pointer<const float>("behaviour_logprob", behaviour_logprob, false);
    a.stats = pointer<double>("stats", stats, n > 0);
    a.energy = pointer<float>("energy", energy, false);
    a.estimator = estimator;
    a.divergence = divergence;
    a.beta = beta;
    a.tolerance = tolerance;
    a.ratio_clip = ratio_clip;
    a.inverse_temperature = inverse_temperature;
    a.gradient = gradient;
    if (n == 0) return;
    run(a, threads, isa, stream);
  };
  m.def("rows", rows, py::kw_only(), "n"_a, "vocabulary"_a, "student"_a, "student_stride"_a, "teacher"_a,
        "teacher_stride"_a, "reference"_a, "reference_stride"_a, "student_head"_a, "teacher_head"_a, "reference_head"_a,
        "token_ids"_a, "verdict"_a, "weights"_a, "forced"_a, "row_scale"_a, "teacher_logprob"_a, "behaviour_logprob"_a,
        "stats"_a, "energy"_a = 0, "estimator"_a, "divergence"_a, "beta"_a, "tolerance"_a, "ratio_clip"_a,
        "temperature"_a, "gradient"_a, "threads"_a = 1, "isa"_a = "", "stream"_a = 0);
}

}  // namespace sgopd
