// The CPU extension: picks the instruction set and splits the rows over threads.

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "pairs.h"

namespace sgopd {
py::class_<Pairs> define_pairs(py::module_&);          // pairs.cpp
void define_products(py::module_&);                    // products.cpp
void define_refine(py::module_&, py::class_<Pairs>&);  // refine.cpp
}  // namespace sgopd

namespace {

namespace py = pybind11;

void run_rows(const sgopd::RowsArgs& a, int threads, const std::string& isa, std::uintptr_t) {
  const auto run = sgopd::kernels(isa).rows;
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
  using namespace py::literals;
  py::class_<sgopd::Kernels>(m, "Kernels", "What an instruction set has, on this processor.")
      .def_property_readonly("int16", [](const sgopd::Kernels& k) { return k.int16 != nullptr; })
      .def_property_readonly("tiles", [](const sgopd::Kernels& k) { return k.tiles != nullptr; })
      .def_property_readonly("wide_tiles", [](const sgopd::Kernels& k) { return k.tiles != nullptr && k.tiles->wide; });
  m.def("kernels", &sgopd::kernels, "isa"_a = "", py::return_value_policy::reference,
        "Of an instruction set by name, or the best one.");
  m.def(
      "available",
      [] {
        std::vector<std::string> names;
        for (const sgopd::Kernels& k : sgopd::all_kernels()) names.push_back(k.name);
        return names;
      },
      "Instruction sets this build and this processor share, best first.");
  sgopd::define_rows(m, run_rows);
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));
  auto pairs = sgopd::define_pairs(m);
  sgopd::define_refine(m, pairs);
  sgopd::define_products(m);
}
#undef PyInit__cpu
SGOPD_PYINIT(PyInit__cpu, sgopd_pybind_init)
