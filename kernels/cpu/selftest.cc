// selftest: c_MN = a_MK b_NK^T through `multiply` of gemm.h, with all that it can do: the two
// arithmetics, sums over two segments, K in pieces, several threads.
//
// Not an operation of the model: the smallest one that uses what each instruction set is there for.
#include "gemm.h"
#include "ops.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

#if defined(FASTFAR_HAS_TILES)
constexpr int32_t kIsa = FASTFAR_ISA_AMX;
#elif defined(__AVX512BF16__)
constexpr int32_t kIsa = FASTFAR_ISA_AVX512_BF16;
#elif defined(__AVX512F__)
constexpr int32_t kIsa = FASTFAR_ISA_AVX512;
#elif defined(__AVX2__)
constexpr int32_t kIsa = FASTFAR_ISA_AVX2;
#else
constexpr int32_t kIsa = FASTFAR_ISA_SCALAR;
#endif

constexpr int64_t kPanelsPerTask = 3;

struct Writer {
  const fastfar_selftest_args& args;

  void row(int64_t block, int64_t panel, int64_t row, const float* c) const {
    const int64_t m = block * kBlock + row, n = panel * kBlock;
    if (m >= args.m) return;
    const int64_t count = smaller(kBlock, args.n - n);
    std::memcpy(args.c_MN + m * args.n + n, c, static_cast<size_t>(count) * sizeof(float));
  }
};

// Numbers of partial sums that a worker keeps.
int64_t partial_size(const fastfar_selftest_args& args) {
  return args.pieces > 1 ? kPanelsPerTask * padded_rows(args.m) * kBlock : 0;
}

// Where piece or segment `i` of `count` begins.
int64_t begin_of(int64_t i, int64_t count, int64_t depth) { return i * depth / count; }

template <class M>
void run(const fastfar_selftest_args& args) {
  using A = typename M::A;
  const int64_t depth = depth_of(args.k), blocks = ceil_div(args.m, kBlock);
  A* a = static_cast<A*>(args.scratch);
  float* sums = reinterpret_cast<float*>(a + operand_size(args.m, args.k));
  parallel_for(args.threads, blocks, [&](int64_t block, int32_t) {
    for (int64_t row = block * kBlock; row < (block + 1) * kBlock; ++row) {
      for (int64_t k = 0; k < padded_columns(args.k); ++k) {
        const bool inside = row < args.m && k < args.k;
        const float value = inside ? args.a_MK[row * args.k + k] : 0.0F;
        const bool rounded = args.dtype == FASTFAR_BFLOAT16;
        store_one(at(a, depth, row, k), rounded ? from_bf16(to_bf16(value)) : value);
      }
    }
  });
  const int64_t panels = ceil_div(args.n, kBlock), pieces = smaller(args.pieces, depth);
  parallel_for(args.threads, ceil_div(panels, kPanelsPerTask), [&](int64_t task, int32_t worker) {
    const TileScope tiles;
    Writer writer{args};
    float* partial = pieces > 1 ? sums + worker * partial_size(args) : nullptr;
    const int64_t panel0 = task * kPanelsPerTask;
    const int64_t panel1 = smaller(panel0 + kPanelsPerTask, panels);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t first = begin_of(piece, pieces, depth);
      const int64_t length = begin_of(piece + 1, pieces, depth) - first;
      Segment<M> segments[2];
      const int64_t count = smaller(args.segments, length);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t tile = first + begin_of(i, count, length);
        const int64_t end = first + begin_of(i + 1, count, length);
        const auto* b = static_cast<const typename M::W*>(args.b_NK);
        segments[i] = {a + tile * kTileSize, b + tile * kPanelStep, end - tile, depth * kTileSize,
                       depth * kPanelStep};
      }
      multiply(segments, static_cast<int>(count), blocks, panel0, panel1, writer, partial,
               piece > 0, piece + 1 < pieces);
    }
  });
}

}  // namespace

int64_t selftest_scratch(const fastfar_selftest_args& args) {
  const int64_t workers = larger(args.threads, 1);
  const int64_t size = operand_size(args.m, args.k) + workers * partial_size(args);
  return size * static_cast<int64_t>(sizeof(float));
}

int32_t selftest(const fastfar_selftest_args& args) {
  if (args.m < 0 || args.n < 0 || args.k < 0) return FASTFAR_ERROR_ARGUMENT;
  if (args.segments < 1 || args.segments > 2 || args.pieces < 1) return FASTFAR_ERROR_ARGUMENT;
  if (args.dtype != FASTFAR_FLOAT32 && args.dtype != FASTFAR_BFLOAT16)
    return FASTFAR_ERROR_ARGUMENT;
  if (args.m == 0 || args.n == 0) return kIsa;
  if (args.c_MN == nullptr) return FASTFAR_ERROR_ARGUMENT;
  if (args.k == 0) {
    std::memset(args.c_MN, 0, static_cast<size_t>(args.m * args.n) * sizeof(float));
    return kIsa;
  }
  if (args.a_MK == nullptr || args.b_NK == nullptr || args.scratch == nullptr) {
    return FASTFAR_ERROR_ARGUMENT;
  }
  if (args.dtype == FASTFAR_BFLOAT16) {
    run<Bfloat16>(args);
  } else {
    run<Float32>(args);
  }
  return kIsa;
}

}  // namespace FASTFAR_TARGET
}  // namespace fastfar
