// Python's door to the row pass of any native device: addresses and strides as integers, checked before they are
// followed. Every extension module defines `rows` through `define_rows`, so that one contract serves them all.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
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

// Fills one field of the struct from its Python argument.
using Field = std::function<void(RowsArgs&, const std::string& name, py::handle)>;

template <typename T>
Field field(T RowsArgs::* member) {
  return [member](RowsArgs& a, const std::string&, py::handle value) { a.*member = value.cast<T>(); };
}

template <typename T>
Field field(T* RowsArgs::* member) {
  return [member](RowsArgs& a, const std::string& name, py::handle value) {
    a.*member = pointer<T>(name.c_str(), value.cast<Address>(), false);
  };
}

inline Field field(HeadArgs RowsArgs::* member) {
  return [member](RowsArgs& a, const std::string& name, py::handle value) {
    a.*member = head(name.c_str(), value.cast<HeadTuple>());
  };
}

#define SGOPD_FIELD(name) {#name, field(&RowsArgs::name)}
#define SGOPD_NUMBER_FIELD(name) SGOPD_FIELD(name),

inline void check(const RowsArgs& a) {
  extent("student", a.rows, a.vocabulary, a.student_stride);
  if (a.teacher != nullptr) extent("teacher", a.rows, a.vocabulary, a.teacher_stride);
  if (a.reference != nullptr) extent("reference", a.rows, a.vocabulary, a.reference_stride);
  const auto need = [&](const char* name, const void* address, bool needed) {
    if (needed && a.rows > 0 && address == nullptr) throw std::invalid_argument(std::string(name) + ": null address");
  };
  need("student", a.student, true);
  need("token_ids", a.token_ids, true);
  need("verdict", a.verdict, true);
  need("weights", a.weights, true);
  need("stats", a.stats, true);
  need("row_scale", a.row_scale, a.gradient);
  if (a.divergence < 0 || a.divergence >= kDivergences) throw std::invalid_argument("rows: unknown divergence");
  if (a.teacher == nullptr && !a.sampled)
    throw std::invalid_argument("rows: without teacher logits only the sampled estimator is defined");
  need("teacher_logprob", a.teacher_logprob, a.teacher == nullptr);
  if (a.reference != nullptr && a.teacher == nullptr)
    throw std::invalid_argument("rows: a reference needs teacher logits");
  if (!(a.inverse_temperature > 0) || !std::isfinite(a.inverse_temperature))
    throw std::invalid_argument("rows: temperature must be > 0, with an inverse that float32 holds");
  if (!is_kl(a.divergence) && !(a.parameter > 0 && a.parameter < 1))
    throw std::invalid_argument("rows: the divergence's parameter must lie between 0 and 1");
  if (!(a.tolerance >= 0)) throw std::invalid_argument("rows: tolerance must be >= 0");
  if (std::isnan(a.ratio_clip)) throw std::invalid_argument("rows: ratio_clip is NaN");
}

// Arguments by name: the fields of RowsArgs, and threads, isa and stream of `Run`.
inline void define_rows(py::module_& m, Run run) {
  m.attr("COLUMNS") = static_cast<int>(kColumns);
  static const std::map<std::string, Field> fields{SGOPD_FIELD(rows),
                                                   SGOPD_FIELD(vocabulary),
                                                   SGOPD_FIELD(student),
                                                   SGOPD_FIELD(student_stride),
                                                   SGOPD_FIELD(teacher),
                                                   SGOPD_FIELD(teacher_stride),
                                                   SGOPD_FIELD(reference),
                                                   SGOPD_FIELD(reference_stride),
                                                   SGOPD_FIELD(student_head),
                                                   SGOPD_FIELD(teacher_head),
                                                   SGOPD_FIELD(reference_head),
                                                   SGOPD_FIELD(token_ids),
                                                   SGOPD_FIELD(verdict),
                                                   SGOPD_FIELD(weights),
                                                   SGOPD_FIELD(forced),
                                                   SGOPD_FIELD(row_scale),
                                                   SGOPD_FIELD(teacher_logprob),
                                                   SGOPD_FIELD(behaviour_logprob),
                                                   SGOPD_FIELD(stats),
                                                   SGOPD_FIELD(sampled),
                                                   SGOPD_FIELD(divergence),
                                                   SGOPD_ROW_NUMBERS(SGOPD_NUMBER_FIELD) SGOPD_FIELD(gradient),
                                                   SGOPD_FIELD(energy)};
  m.def("rows", [run](const py::kwargs& given) {
    RowsArgs a{};
    int threads = 1;
    std::string isa;
    Address stream = 0;
    std::size_t filled = 0;
    for (const auto& [key, value] : given) {
      const auto name = key.cast<std::string>();
      try {
        if (const auto found = fields.find(name); found != fields.end()) {
          found->second(a, name, value);
          ++filled;
        } else if (name == "temperature") {
          a.inverse_temperature = static_cast<float>(1.0 / value.cast<double>());
        } else if (name == "threads") {
          threads = value.cast<int>();
        } else if (name == "isa") {
          isa = value.cast<std::string>();
        } else if (name == "stream") {
          stream = value.cast<Address>();
        } else {
          throw py::type_error("rows: unknown argument " + name);
        }
      } catch (const py::cast_error&) {
        throw py::type_error("rows: " + name + " has the wrong type");
      }
    }
    if (filled != fields.size()) throw py::type_error("rows: an argument is missing");
    require_threads(threads);
    check(a);
    if (a.rows > 0) run(a, threads, isa, stream);
  });
}

}  // namespace sgopd
