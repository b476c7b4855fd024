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
namespace avx512bf16 {
int64_t panels(int64_t v);
int64_t pack_words(int64_t h);
void project(const uint16_t*, int64_t, int64_t, const uint16_t*, int64_t, int64_t, int64_t, float*, int64_t, int64_t,
             int64_t, uint32_t*);
}  // namespace avx512bf16
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
  if (n < 0 || v < 1 || h < 1 || hidden_stride < h || weight_stride < h || out_stride < v)
    throw std::invalid_argument("project_bf16: sizes and strides do not fit");
  if (n == 0) return;
  const auto* x = sgopd::pointer<const uint16_t>("hidden", hidden, true);
  const auto* w = sgopd::pointer<const uint16_t>("weight", weight, true);
  auto* z = sgopd::pointer<float>("out", out, true);
#ifdef SGOPD_X86
  py::gil_scoped_release release;
  const int64_t panels = sgopd::avx512bf16::panels(v);
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>({threads, panels, n * v / 4096 * h / 4096}));
  const auto part = [&](int64_t i) {
    std::vector<uint32_t> pack(sgopd::avx512bf16::pack_words(h));
    sgopd::avx512bf16::project(x, n, hidden_stride, w, v, weight_stride, h, z, out_stride, panels * i / count,
                               panels * (i + 1) / count, pack.data());
  };
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < count; ++i) pool.emplace_back(part, i);
  part(0);
  for (auto& thread : pool) thread.join();
#else
  (void)x, (void)w, (void)z, (void)threads;
#endif
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Fused row pass of the gated distillation loss on the CPU (internal: use sgopd_kernels.gated_kl_loss).";
  m.def("available", &available, "Instruction sets this build and this processor share, best first.");
  sgopd::define_rows(m, run_rows);
  m.def("has_bf16", &has_bf16, "Whether project_bf16 runs on this processor (AVX512-BF16).");
  using namespace py::literals;
  m.def("project_bf16", &project_bf16, py::kw_only(), "hidden"_a, "n"_a, "hidden_stride"_a, "weight"_a, "v"_a,
        "weight_stride"_a, "h"_a, "out"_a, "out_stride"_a, "threads"_a);
}
