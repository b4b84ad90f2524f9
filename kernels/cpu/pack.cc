// pack: a matrix of weights in the order in which the products of gemm.h read it. As fast as memory
// where one of the strides is 1: blocks of 32 x 32 numbers are read in the order of the source,
// turned in L1, and written one after the other.
#include "gemm.h"
#include "ops.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

constexpr int64_t kPanelsPerTask = 4;  // so that a task reads 128 neighbours of a transposed matrix
constexpr int64_t kSmall = 1 << 16;    // numbers that are not worth a second thread

// 32 x 32 weights, [output][input] or, from a transpose, [input][output].
template <class W>
struct alignas(64) Square {
  W x[kBlock][kDepth];
};

inline void convert(float from, float* to) { *to = from; }
inline void convert(float from, bf16* to) { *to = to_bf16(from); }
inline void convert(bf16 from, float* to) { *to = from_bf16(from); }
inline void convert(bf16 from, bf16* to) { *to = from; }

// `lines` x `count` numbers, `stride` and `step` apart; zeros beyond.
template <class T, class W>
inline void read(const T* from, int64_t stride, int64_t step, int64_t lines, int64_t count,
                 Square<W>& to) {
  for (int64_t line = 0; line < kBlock; ++line, from += line < lines ? stride : 0) {
    W* out = to.x[line];
    if (line < lines && count == kDepth && step == 1) {
      for (int64_t i = 0; i < kDepth; ++i) convert(from[i], out + i);
    } else {
      const int64_t inside = line < lines ? count : 0;
      for (int64_t i = 0; i < inside; ++i) convert(from[i * step], out + i);
      for (int64_t i = inside; i < kDepth; ++i) out[i] = W{0};
    }
  }
}

// float32: [input][32 outputs].
inline void write(const Square<float>& from, bool transposed, float* out) {
  if (transposed) {
    std::memcpy(out, from.x, sizeof(from.x));
    return;
  }
  for (int64_t k = 0; k < kDepth; k += kTile) {
    for (int64_t n = 0; n < kBlock; n += kTile) {
      transpose_words(&from.x[n][k], kDepth, kTile, kTile, out + k * kBlock + n, kBlock);
    }
  }
}

// bfloat16: two tiles [input pair][16 outputs][2].
inline void write(const Square<bf16>& from, bool transposed, bf16* out) {
  for (int64_t n = 0; n < kBlock; n += kTile, out += kTileSize) {
    if (transposed) {
      for (int64_t k = 0; k < kDepth; k += 2) {
        interleave(&from.x[k][n], &from.x[k + 1][n], kTile, out + k * kTile);
      }
    } else {
      transpose_words(from.x[n], kDepth / 2, kTile, kTile, out, kTile);
    }
  }
}

template <class T, class W>
void pack_panels(const fastfar_pack_args& args, int64_t panel0, int64_t panel1) {
  const T* w = static_cast<const T*>(args.w);
  const bool transposed = args.stride_k != 1 && args.stride_n == 1;
  const int64_t depth = depth_of(args.k);
  const int64_t panels = panel1 - panel0;
  Square<W> square;
  for (int64_t i = 0; i < depth * panels; ++i) {
    // Along the rows of the source, whichever way they run.
    const int64_t block = transposed ? i / panels : i % depth;
    const int64_t panel = panel0 + (transposed ? i % panels : i / depth);
    const int64_t n = panel * kBlock, k = block * kDepth;
    const int64_t outputs = smaller(kBlock, args.n - n), inputs = smaller(kDepth, args.k - k);
    const T* from = w + n * args.stride_n + k * args.stride_k;
    if (transposed) {
      read(from, args.stride_k, 1, inputs, outputs, square);
    } else {
      read(from, args.stride_n, args.stride_k, outputs, inputs, square);
    }
    write(square, transposed, static_cast<W*>(args.packed) + (panel * depth + block) * kPanelStep);
  }
}

template <class T, class W>
void pack_as(const fastfar_pack_args& args) {
  const int64_t panels = ceil_div(args.n, kBlock);
  const int32_t threads = args.n * args.k < kSmall ? 1 : args.threads;
  parallel_for(threads, ceil_div(panels, kPanelsPerTask), [&](int64_t task, int32_t) {
    const int64_t first = task * kPanelsPerTask;
    pack_panels<T, W>(args, first, smaller(first + kPanelsPerTask, panels));
  });
}

}  // namespace

int32_t pack(const fastfar_pack_args& args) {
  if (args.n < 0 || args.k < 0 || args.w == nullptr || args.packed == nullptr) {
    return FASTFAR_ERROR_ARGUMENT;
  }
  const bool from_float = args.source_dtype == FASTFAR_FLOAT32;
  const bool to_float = args.dtype == FASTFAR_FLOAT32;
  if (!from_float && args.source_dtype != FASTFAR_BFLOAT16) return FASTFAR_ERROR_ARGUMENT;
  if (!to_float && args.dtype != FASTFAR_BFLOAT16) return FASTFAR_ERROR_ARGUMENT;
  if (from_float && to_float) pack_as<float, float>(args);
  if (from_float && !to_float) pack_as<float, bf16>(args);
  if (!from_float && to_float) pack_as<bf16, float>(args);
  if (!from_float && !to_float) pack_as<bf16, bf16>(args);
  return 0;
}

}  // namespace FASTFAR_TARGET
}  // namespace fastfar
