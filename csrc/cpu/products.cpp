// Python's door to the products on tiles: checks, threads, and who does which part.

#include <memory>
#include <new>

#include "pairs.h"

namespace sgopd {
namespace {

// Words of 4 bytes on a cache line, not zeroed.
struct Words {
  explicit Words(int64_t count)
      : data(static_cast<uint32_t*>(::operator new(sizeof(uint32_t) * (count + 16), std::align_val_t{64}))) {}
  ~Words() { ::operator delete(data, std::align_val_t{64}); }
  Words(const Words&) = delete;
  Words& operator=(const Words&) = delete;
  uint32_t* data;
};

const TileKernels& tiles_of(const char* what, const std::string& isa) {
  const TileKernels* k = kernels(isa).tiles;
  if (k == nullptr)
    throw std::invalid_argument(std::string(what) +
                                ": needs AMX-BF16, or isa='avx512-bf16' or 'amx-emulated'; see kernels(isa).tiles");
  return *k;
}

// Threads that a product of n v h terms is worth.
int64_t workers(const TileKernels& k, int threads, int64_t n, int64_t v, int64_t h) {
  const double terms = static_cast<double>(n) * static_cast<double>(v) * static_cast<double>(h);
  const double worth = terms / static_cast<double>(k.worthwhile);
  return worth >= threads ? threads : std::max<int64_t>(1, static_cast<int64_t>(worth));
}

// Hidden states as an operand: packed once, read by all threads.
struct Hidden {
  Hidden(const TileKernels& k, const Matrix& x, int64_t n, int64_t h, bool paired, bool both)
      : size(hidden_words(n, h)), high(size), low(both ? size : 0) {
    uint32_t* second = both ? low.data : nullptr;
    (paired ? k.pack_hidden_paired : k.pack_hidden)(x, n, h, high.data, second);
    limbs = {high.data, second, count_of(paired ? n : h, 32) * kWords};
  }
  int64_t size;
  Words high, low;
  Limbs limbs;
};

TiledGradient tiled(Address gradient, int64_t stride, int64_t n, int64_t v, Address fine, int64_t fine_stride) {
  const Logits g = logits("gradient", gradient, n, v, stride);
  const int64_t blocks = count_of(n, 32), columns = count_of(v, 32);
  if (fine != 0) extent("fine", blocks, columns, fine_stride);
  return {g.data, stride, n, v, pointer<const uint8_t>("fine", fine, false), fine_stride};
}

// out [n, v] fp32 = hidden [n, h] * weight [v, h]^T; fp32 operands in two limbs.
void project_tiles(const MatrixTuple& hidden, int64_t n, const MatrixTuple& weight, int64_t v, int64_t h, Address out,
                   int64_t out_stride, int threads, const std::string& isa) {
  const TileKernels& k = tiles_of("project_tiles", isa);
  const Matrix x = matrix("hidden", hidden, n, h), w = matrix("weight", weight, v, h);
  const Logits z = logits("out", out, n, v, out_stride);
  require_threads(threads);
  if (n == 0) return;
  py::gil_scoped_release release;
  const Hidden packed(k, x, n, h, false, x.element == Element::kFloat32);
  const int64_t panels = count_of(v, kColumns64), parts = std::min(kColumnParts, panels);
  parallel(parts, workers(k, threads, n, v, h), [&](int64_t part) {
    const Words scratch(project_scratch(h));
    k.project(packed.limbs, n, h, w, v, z.data, z.stride, bound(panels, part, parts), bound(panels, part + 1, parts),
              scratch.data);
  });
}

// out [n, h] fp32 += gradient [n, v] * weight [v, h].
void add_hidden_gradient_tiles(Address gradient, int64_t stride, int64_t n, Address fine, int64_t fine_stride,
                               const MatrixTuple& weight, int64_t v, int64_t h, Address out, int64_t out_stride,
                               int threads, const std::string& isa) {
  const TileKernels& k = tiles_of("add_hidden_gradient_tiles", isa);
  const TiledGradient g = tiled(gradient, stride, n, v, fine, fine_stride);
  const Matrix w = matrix("weight", weight, v, h);
  const Logits to = logits("out", out, n, h, out_stride);
  require_threads(threads);
  if (n == 0) return;
  py::gil_scoped_release release;
  // A part is some tokens by some of the width. It packs the head for its width and the gradient for its tokens: of the
  // ways to cut, the one whose largest part is least, in tiles multiplied and (at about four of these) packed.
  const int64_t blocks = count_of(n, 32), strips = count_of(h, 32), most = workers(k, threads, n, v, h);
  int64_t rows = 1, columns = 1, least = std::numeric_limits<int64_t>::max();
  for (int64_t r = 1; r <= std::min(most, blocks); ++r) {
    const int64_t c = std::min(most / r, strips), b = count_of(blocks, r), s = count_of(strips, c);
    const int64_t cost = b * s + 4 * (b + s);
    if (cost < least) least = cost, rows = r, columns = c;
  }
  parallel(rows * columns, most, [&](int64_t part) {
    const int64_t r = part / columns, c = part % columns;
    const int64_t first_block = bound(blocks, r, rows), last_block = bound(blocks, r + 1, rows);
    const int64_t first_strip = bound(strips, c, columns), last_strip = bound(strips, c + 1, columns);
    const Words scratch(hidden_gradient_scratch(last_block - first_block, last_strip - first_strip));
    k.hidden_gradient(g, w, h, to.data, to.stride, first_block, last_block, first_strip, last_strip, scratch.data);
  });
}

// out [v, h] += gradient [n, v]^T * hidden [n, h]; out fp32, or bf16 as WeightSum has it.
void add_weight_gradient_tiles(Address gradient, int64_t stride, int64_t n, int64_t v, Address fine,
                               int64_t fine_stride, const MatrixTuple& hidden, int64_t h, const MatrixTuple& out,
                               Address rest, int64_t rest_stride, bool first, int threads, const std::string& isa) {
  const TileKernels& k = tiles_of("add_weight_gradient_tiles", isa);
  const TiledGradient g = tiled(gradient, stride, n, v, fine, fine_stride);
  const Matrix x = matrix("hidden", hidden, n, h), to = matrix("out", out, v, h);
  if (rest != 0) extent("rest", v, h, rest_stride);
  if (to.element == Element::kBFloat16 && rest == 0 && !first)
    throw std::invalid_argument("add_weight_gradient_tiles: a sum in bf16 needs rest, or first");
  require_threads(threads);
  if (n == 0) return;
  const WeightSum sum{const_cast<void*>(to.data),           to.stride,   to.element,
                      pointer<int8_t>("rest", rest, false), rest_stride, first};
  py::gil_scoped_release release;
  const Hidden packed(k, x, n, h, true, x.element == Element::kFloat32);
  const int64_t panels = count_of(v, kColumns64), parts = std::min(kColumnParts, panels);
  parallel(parts, workers(k, threads, n, v, h), [&](int64_t part) {
    const Words scratch(weight_gradient_scratch(n));
    k.weight_gradient(g, packed.limbs, h, sum, bound(panels, part, parts), bound(panels, part + 1, parts),
                      scratch.data);
  });
}

}  // namespace

void define_products(py::module_& m) {
  using namespace py::literals;
  m.def("project_tiles", &project_tiles, py::kw_only(), "hidden"_a, "n"_a, "weight"_a, "v"_a, "h"_a, "out"_a,
        "out_stride"_a, "threads"_a = 1, "isa"_a = "");
  m.def("add_hidden_gradient_tiles", &add_hidden_gradient_tiles, py::kw_only(), "gradient"_a, "stride"_a, "n"_a,
        "fine"_a, "fine_stride"_a, "weight"_a, "v"_a, "h"_a, "out"_a, "out_stride"_a, "threads"_a = 1, "isa"_a = "");
  m.def("add_weight_gradient_tiles", &add_weight_gradient_tiles, py::kw_only(), "gradient"_a, "stride"_a, "n"_a, "v"_a,
        "fine"_a, "fine_stride"_a, "hidden"_a, "h"_a, "out"_a, "rest"_a = 0, "rest_stride"_a = 0, "first"_a = false,
        "threads"_a = 1, "isa"_a = "");
}

}  // namespace sgopd
