#include "dispatch.h"

#include <stdexcept>

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

const std::vector<Kernels>& all_kernels() {
  static const std::vector<Kernels> all = [] {
    std::vector<Kernels> found;
#ifdef SGOPD_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const Int16Kernels* int16 = avx2 ? &avx2::int16() : nullptr;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      const Kernels avx512{"avx512", avx512::rows, &avx512::pairs(),
                           __builtin_cpu_supports("avx512vnni") ? &avx512vnni::int16() : int16, nullptr};
      const auto with = [&](const char* name, const TileKernels& tiles) {
        found.push_back(avx512);
        found.back().name = name;
        found.back().tiles = &tiles;
      };
      // AMD's processors multiply bf16 numbers at twice the rate of fp32 ones; Intel's without tiles at the same.
      const bool bf16 = __builtin_cpu_supports("avx512bf16"), fast = __builtin_cpu_is("amd");
      if (bf16 && amx::available()) with("amx", amx::tiles());
      if (bf16 && fast) with("avx512-bf16", avx512bf16::tiles());
      found.push_back(avx512);
      if (bf16 && !fast) with("avx512-bf16", avx512bf16::tiles());
    }
    if (avx2) found.push_back({"avx2", avx2::rows, &avx2::pairs(), int16, nullptr});
#endif
    found.push_back({"base", base::rows, &base::pairs(), nullptr, nullptr});
    found.push_back({"amx-emulated", base::rows, &base::pairs(), nullptr, &emulated::tiles()});
    return found;
  }();
  return all;
}

const Kernels& kernels(const std::string& isa) {
  const std::vector<Kernels>& all = all_kernels();
  if (isa.empty()) return all.front();
  std::string names;
  for (const Kernels& k : all) {
    if (k.name == isa) return k;
    names += (names.empty() ? "" : ", ") + k.name;
  }
  throw std::invalid_argument("isa: this processor has no '" + isa + "'; available: " + names);
}

}  // namespace sgopd
