// The CPU extension: picks the instruction set and splits the rows over threads.

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../arguments.h"
#include "isa.h"

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
namespace avx512bf16 {
int64_t panels(int64_t v);
int64_t pack_words(int64_t h);
void project(const uint16_t*, int64_t, int64_t, const uint16_t*, int64_t, int64_t, int64_t, float*, int64_t, int64_t,
             int64_t, uint32_t*);
}  // namespace avx512bf16
#endif

void define_screen(py::module_&);  // screen.cpp

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
#ifdef SGOPD_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    names.emplace_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.emplace_back("avx2");
#endif
  names.emplace_back("base");
  return names;
}

std::string pick_isa(const std::string& isa) {
  const auto names = available_isas();
  if (isa.empty()) return names.front();
  if (std::find(names.begin(), names.end(), isa) == names.end()) {
    std::string list;
    for (const auto& name : names) list += (list.empty() ? "" : ", ") + name;
    throw std::invalid_argument("isa: this processor has no '" + isa + "'; available: " + list);
  }
  return isa;
}

}  // namespace sgopd

namespace {

namespace py = pybind11;
using RowsFunction = void (*)(const sgopd::RowsArgs&, int64_t, int64_t);

RowsFunction pick(const std::string& isa) {
  const std::string name = sgopd::pick_isa(isa);
#ifdef SGOPD_X86
  if (name == "avx512") return sgopd::avx512::rows;
  if (name == "avx2") return sgopd::avx2::rows;
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
  // Rows are independent, so the result does not depend on how many threads there are. Below ~0.2 ms of work they
  // don't pay.
  const int64_t worthwhile = a.rows * a.vocabulary / (1 << 18);
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>({threads, a.rows, worthwhile}));
  sgopd::parallel(count, count, [&](int64_t i) { run(a, a.rows * i / count, a.rows * (i + 1) / count); });
}

bool has_bf16() {
#ifdef SGOPD_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
#else
  return false;
#endif
}

// out [n, v] fp32 = hidden [n, h] bf16 * weight [v, h]^T bf16; unit stride along h and v.
void project_bf16(std::uintptr_t hidden, int64_t n, int64_t hidden_stride, std::uintptr_t weight, int64_t v,
                  int64_t weight_stride, int64_t h, std::uintptr_t out, int64_t out_stride, int threads) {
  if (!has_bf16()) throw std::invalid_argument("project_bf16: this processor has no AVX512-BF16");
  sgopd::extent("hidden", n, h, hidden_stride);
  sgopd::extent("weight", v, h, weight_stride);
  sgopd::extent("out", n, v, out_stride);
  sgopd::require_threads(threads);
  const auto* x = sgopd::pointer<const uint16_t>("hidden", hidden, n > 0);
  const auto* w = sgopd::pointer<const uint16_t>("weight", weight, true);
  auto* z = sgopd::pointer<float>("out", out, n > 0);
  if (n == 0) return;
#ifdef SGOPD_X86
  py::gil_scoped_release release;
  const int64_t panels = sgopd::avx512bf16::panels(v);
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>({threads, panels, n * v / 4096 * h / 4096}));
  sgopd::parallel(count, count, [&](int64_t i) {
    std::vector<uint32_t> pack(sgopd::avx512bf16::pack_words(h));
    sgopd::avx512bf16::project(x, n, hidden_stride, w, v, weight_stride, h, z, out_stride, panels * i / count,
                               panels * (i + 1) / count, pack.data());
  });
#else
  (void)x, (void)w, (void)z, (void)threads;
#endif
}

// Asks for 2 MiB pages: fewer page faults on first touch, and rows a large stride apart share TLB entries.
void advise_huge_pages(sgopd::Address address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096, begin = (static_cast<uintptr_t>(address) + page - 1) / page * page;
  const uintptr_t end = (static_cast<uintptr_t>(address) + static_cast<uintptr_t>(bytes)) / page * page;
  // Advice: a kernel built without them refuses, and ordinary pages do.
  if (address != 0 && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace

#define PyInit__cpu sgopd_pybind_init
PYBIND11_MODULE(_cpu, m) {
  sgopd::require_main_interpreter();
  m.doc() = "Fused row pass of the gated distillation loss on the CPU (internal: use sgopd_kernels.gated_kl_loss).";
  m.def("available", &sgopd::available_isas, "Instruction sets this build and this processor share, best first.");
  sgopd::define_rows(m, run_rows);
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));
  m.def("has_bf16", &has_bf16, "Whether project_bf16 runs on this processor (AVX512-BF16).");
  using namespace py::literals;
  m.def("project_bf16", &project_bf16, py::kw_only(), "hidden"_a, "n"_a, "hidden_stride"_a, "weight"_a, "v"_a,
        "weight_stride"_a, "h"_a, "out"_a, "out_stride"_a, "threads"_a);
  sgopd::define_screen(m);
}
#undef PyInit__cpu
SGOPD_PYINIT(PyInit__cpu, sgopd_pybind_init)
