// The CUDA extension. Imports without a GPU; a launch without one raises.

#include "../arguments.h"

namespace sgopd {
void cuda_rows(const RowsArgs& args, void* stream, bool staged);
}

#define PyInit__cuda sgopd_pybind_init
PYBIND11_MODULE(_cuda, m) {
  sgopd::require_main_interpreter();
  m.doc() = "Fused row pass of the gated distillation loss in CUDA (internal: use sgopd_kernels.gated_kl_loss).";
  sgopd::define_rows(m, [](const sgopd::RowsArgs& args, int, const std::string& isa, std::uintptr_t stream) {
    if (!isa.empty() && isa != "block" && isa != "cluster")
      throw std::invalid_argument("isa: expected 'block' or 'cluster', got '" + isa + "'");
    sgopd::cuda_rows(args, reinterpret_cast<void*>(stream), isa == "cluster");
  });
}
#undef PyInit__cuda
SGOPD_PYINIT(PyInit__cuda, sgopd_pybind_init)
