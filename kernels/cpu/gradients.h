// What gradients of linear layers need beside the products of gemm.h: A operands in the two other
// orders that products over rows read, sums over rows, and gradients of weights.
//
// dW_NK = sum over rows of dy[row, n] x[row, k] is a product whose K is the rows: dy transposed is
// its A operand and x, as it lies, are its panels. Rows are cut into groups, each of which has its
// own float32 sums; the cut depends on the number of rows only, so that results do not depend on
// the number of threads. Included by kernel sources only.
#ifndef FASTFAR_KERNELS_CPU_GRADIENTS_H_
#define FASTFAR_KERNELS_CPU_GRADIENTS_H_

#include "linear.h"
#include "rows.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

constexpr int64_t kGroups = 8;          // of rows, at most
constexpr int64_t kRowsPerGroup = 512;  // at least, where there are several groups
constexpr int64_t kChunk = 256;         // rows whose operands are in cache together

// The cut of all rows: groups of `per_group`, a multiple of 32, in chunks of `chunk`.
struct RowPlan {
  int64_t rows, groups, per_group, chunk;

  explicit RowPlan(int64_t row_count) : rows(row_count) {
    const int64_t wanted = larger(1, smaller(kGroups, rows / kRowsPerGroup));
    per_group = larger(kBlock, padded_rows(ceil_div(rows, wanted)));
    groups = larger(1, ceil_div(rows, per_group));
    chunk = smaller(per_group, kChunk);
  }
};

// 32 rows x 32 columns of an A operand (its upper and lower tile) as one block of a panel.
inline void panel_block(const float* upper, const float* lower, float* out) {
  std::memcpy(out, upper, kTileSize * sizeof(float));
  std::memcpy(out + kTileSize, lower, kTileSize * sizeof(float));
}
inline void panel_block(const bf16* upper, const bf16* lower, bf16* out) {
  for (int64_t pair = 0; pair < kDepth / 2; ++pair) {
    const bf16* a = (pair < 8 ? upper : lower - kTileSize) + 2 * pair * kDepth;
    interleave(a, a + kDepth, 16, out + pair * kDepth);
    interleave(a + kTile, a + kDepth + kTile, 16, out + kTileSize + pair * kDepth);
  }
}
inline void panel_block(const float* upper, const float* lower, bf16* out) {
  alignas(64) bf16 rounded[2 * kTileSize];
  for (int64_t i = 0; i < kTileSize; i += kLanes) {
    store(rounded + i, load(upper + i));
    store(rounded + kTileSize + i, load(lower + i));
  }
  panel_block(rounded, rounded + kTileSize, out);
}

// The same block transposed: two tiles of 16 columns x 32 rows, `stride` numbers apart.
inline void transposed_block(const float* upper, const float* lower, float* out, int64_t stride) {
  for (int64_t half = 0; half < 2; ++half) {
    transpose_words(upper + half * kTile, kDepth, 16, 16, out + half * stride, kDepth);
    transpose_words(lower + half * kTile, kDepth, 16, 16, out + half * stride + kTile, kDepth);
  }
}
inline void transposed_block(const bf16* upper, const bf16* lower, bf16* out, int64_t stride) {
  alignas(64) bf16 pairs[2 * kTileSize];
  panel_block(upper, lower, pairs);
  transpose_words(pairs, 16, 16, 16, out, 16);
  transpose_words(pairs + kTileSize, 16, 16, 16, out + stride, 16);
}

// `blocks` x 32 rows of an A operand of `depth` k tiles, as panels over the rows.
template <class A, class W>
inline void to_panels(const A* a, int64_t blocks, int64_t depth, W* out) {
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t k = 0; k < depth; ++k) {
      const A* upper = a + (2 * block * depth + k) * kTileSize;
      panel_block(upper, upper + depth * kTileSize, out + (k * blocks + block) * kPanelStep);
    }
  }
}

// The same, transposed, as an A operand of `blocks` k tiles.
template <class A>
inline void to_transposed(const A* a, int64_t blocks, int64_t depth, A* out) {
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t k = 0; k < depth; ++k) {
      const A* upper = a + (2 * block * depth + k) * kTileSize;
      A* place = out + (2 * k * blocks + block) * kTileSize;
      transposed_block(upper, upper + depth * kTileSize, place, blocks * kTileSize);
    }
  }
}

// Numbers of the sums of one group for an (n, k) matrix.
inline int64_t gradient_size(int64_t n, int64_t k) { return padded_columns(n) * padded_columns(k); }

// sums (+)= dy^T x over `blocks` x 32 rows; dy of n_depth k tiles, transposed, x of k_depth panels.
template <class M>
inline void add_weight_gradient(const typename M::A* dy, int64_t n_depth, const typename M::W* x,
                                int64_t k_depth, int64_t blocks, float* sums, bool first) {
  const Segment<M> segment = {dy, x, blocks, blocks * kTileSize, blocks * kPanelStep};
  NoEpilogue nothing;
  multiply(&segment, 1, n_depth, 0, k_depth, nothing, sums, !first, true);
}

// dw_NK = the sum over groups of their sums, which lie `stride` numbers apart.
inline void reduce_weight_gradient(int32_t threads, const float* sums, int64_t groups,
                                   int64_t stride, int64_t n, int64_t k, float* dw_NK) {
  const int64_t n_depth = depth_of(n);
  parallel_for(threads, n_depth, [&](int64_t block, int32_t) {
    for (int64_t panel = 0; panel < depth_of(k); ++panel) {
      for (int64_t i = 0; i < smaller(kBlock, n - block * kBlock); ++i) {
        const float* from = sums + ((panel * n_depth + block) * kBlock + i) * kBlock;
        float* to = dw_NK + (block * kBlock + i) * k + panel * kBlock;
        for (int64_t j = 0; j < kBlock && panel * kBlock + j < k; j += kLanes) {
          V total = load(from + j);
          for (int64_t g = 1; g < groups; ++g) total = total + load(from + g * stride + j);
          store_part(to + j, total, k - panel * kBlock - j);
        }
      }
    }
  });
}

// out_N = the sum over groups of their sums.
inline void reduce_vector(const float* sums, int64_t groups, int64_t stride, int64_t n,
                          float* out_N) {
  for (int64_t i = 0; i < n; i += kLanes) {
    V total = load(sums + i);
    for (int64_t g = 1; g < groups; ++g) total = total + load(sums + g * stride + i);
    store_part(out_N + i, total, n - i);
  }
}

inline void clear(float* p, int64_t count) {
  std::memset(p, 0, static_cast<size_t>(count) * sizeof(float));
}

// Adds up to 32 numbers to a sum over rows.
inline void accumulate(float* sums, V x) { store(sums, load(sums) + x); }

// Rows row0 .. row0 + 32 blocks - 1 of a matrix with rows `stride` apart as an A operand; rows from
// `end` on and columns from `columns` on are zero. `sums`, where given, gets the sum of the rows.
template <class A>
inline void to_operand(const Numbers& x, int64_t stride, int64_t row0, int64_t end, int64_t blocks,
                       int64_t columns, A* out, float* sums = nullptr) {
  const int64_t depth = depth_of(columns);
  for (int64_t row = 0; row < blocks * kBlock; ++row) {
    const bool inside = row0 + row < end;
    for (int64_t column = 0; column < depth * kDepth; column += kLanes) {
      const int64_t count = columns - column;
      V value = set(0.0F);
      if (inside && count > 0) value = x.get((row0 + row) * stride + column, count);
      store(at(out, depth, row, column), value);
      if (sums != nullptr) accumulate(sums + column, value);
    }
  }
}

}  // namespace
}  // namespace FASTFAR_TARGET
}  // namespace fastfar

#endif  // FASTFAR_KERNELS_CPU_GRADIENTS_H_
