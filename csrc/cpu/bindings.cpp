// The CPU extension: picks the instruction set and splits the rows over threads.

#include <algorithm>
#include <thread>
#include <vector>

#include "../arguments.h"

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

namespace py = pybind11;
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

void run_rows(const sgopd::RowsArgs& a, int threads, const std::string& isa, std::uintptr_t) {
  const RowsFunction run = pick(isa);
  py::gil_scoped_release release;
  for (int64_t i = 0; i < a.rows; ++i) {
    if (a.token_ids[i] < 0 || a.token_ids[i] >= a.vocabulary) {
      py::gil_scoped_acquire acquire;
      throw std::out_of_range("token_ids: " + std::to_string(a.token_ids[i]) + " is outside the shared vocabulary of " +
                              std::to_string(a.vocabulary));
    }
  }
  // Threads are made for the call: no pool to survive a fork, no runtime to spin beside torch's. Rows are
  // independent, so the result does not depend on how many there are. Below ~0.2 ms of work they don't pay.
  const int64_t worthwhile = a.rows * a.vocabulary / (1 << 18);
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>({threads, a.rows, worthwhile}));
  std::vector<std::thread> pool;
  const auto bound = [&](int64_t i) { return a.rows * i / count; };
  for (int64_t i = 1; i < count; ++i) pool.emplace_back(run, std::cref(a), bound(i), bound(i + 1));
  run(a, 0, bound(1));
  for (auto& thread : pool) thread.join();
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Fused row pass of the gated distillation loss on the CPU (internal: use sgopd_kernels.gated_kl_loss).";
  m.def("available", &available, "Instruction sets this build and this processor share, best first.");
  sgopd::define_rows(m, run_rows);
}
