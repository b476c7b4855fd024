// Products on the tile registers of AMX-BF16: eight registers of 16 rows of 64 bytes; an instruction multiplies two of
// them, 16,384 terms in 16 cycles. tiles.h has the algorithms.

#include "tile_kernels.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tile_packing.h"
#include "tiles.h"

namespace sgopd {
namespace amx {
namespace {

struct Machine : Packing, TileRegisters<Machine> {
  // A thread's registers take their shape when it begins and lose it when it ends.
  Machine() {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shape{};
    static_assert(sizeof shape == 64, "as the instruction reads it");
    shape.palette = 1;
    for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = 16;
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~Machine() { asm volatile("tilerelease" ::: "memory"); }
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  template <int t>
  void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(t));
  }
  template <int t>
  void load(const void* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(int64_t{64}), "i"(t) : "memory");
  }
  template <int t>
  void load_sum(const float* from) {
    load<t>(from);
  }
  template <int t>
  void store_tile(float* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(4 * stride), "i"(t) : "memory");
  }
  template <int c, int a, int b>
  void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
};

}  // namespace

// The processor has them, its system saves them, and lets this process use them: asked once, for all its threads.
bool available() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (1u << 22)) == 0 || (d & (1u << 24)) == 0) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (1u << 27)) == 0) return false;  // OSXSAVE: xgetbv may be asked
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr uint32_t kTileState = 3u << 17;
  if ((low & kTileState) != kTileState) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

const TileKernels& tiles() {
  static const TileKernels kernels = kernels_on<Machine>(1 << 24, true);
  return kernels;
}

}  // namespace amx
}  // namespace sgopd

#else

namespace sgopd {
namespace amx {
bool available() { return false; }
const TileKernels& tiles() { return emulated::tiles(); }
}  // namespace amx
}  // namespace sgopd

#endif
