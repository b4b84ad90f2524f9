// A linear layer over all rows, shared out to threads: chunks of rows that stay in cache, groups of
// panels of weights, and K in pieces. Each weight is read from memory once per chunk of rows.
// Included by kernel sources only.
#ifndef FASTFAR_KERNELS_CPU_LINEAR_H_
#define FASTFAR_KERNELS_CPU_LINEAR_H_

#include "gemm.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

constexpr int64_t kPieceBytes = 80 << 10;   // of a panel: longer ones fall out of L1 too early
constexpr int64_t kChunkBytes = 448 << 10;  // of an A operand; a neighbour may use half of L2
constexpr int64_t kPartialBlocks = 400;     // of C between the pieces of K: 1.6 MB
constexpr int64_t kTasksPerThread = 4;      // so that threads of different speed end together
constexpr int64_t kPiecedTasks = 2;         // where K is in pieces: each task reads all of A anew

// How a product of `rows` x k by k x n is cut.
struct LinearPlan {
  int64_t rows, panels, depth;
  int64_t pieces, piece;  // of K; k tiles of one
  int64_t chunks, chunk;  // of rows; blocks of one
  int64_t groups, group;  // of panels; panels of one

  LinearPlan(int32_t threads, int64_t row_count, int64_t n, int64_t k, int64_t size_of_a) {
    rows = row_count;
    panels = ceil_div(n, kBlock);
    depth = depth_of(k);
    const int64_t longest = kPieceBytes / (kPanelStep * size_of_a);
    piece = larger(1, ceil_div(depth, ceil_div(depth, longest)));
    pieces = ceil_div(depth, piece);
    const int64_t blocks = ceil_div(rows, kBlock);
    const int64_t most = larger(1, kChunkBytes / (2 * piece * kTileSize * size_of_a));
    chunk = ceil_div(blocks, ceil_div(blocks, most));
    chunks = ceil_div(blocks, chunk);
    group = panels;
    const int64_t tasks = threads * (pieces > 1 ? kPiecedTasks : kTasksPerThread);
    if (threads > 1) group = ceil_div(panels, ceil_div(tasks, chunks));
    if (pieces > 1) group = smaller(group, larger(1, kPartialBlocks / chunk));
    groups = ceil_div(panels, group);
  }
  // Numbers per thread that keep C between the pieces.
  int64_t partial_size() const { return pieces > 1 ? group * chunk * kBlock * kBlock : 0; }
};

// Calls write(row, column, c) for the rows that exist; c: 32 sums, from `column` on.
template <class Write>
struct EachRow {
  const Write& write;
  int64_t row0, rows;

  void row(int64_t block, int64_t panel, int64_t row, const float* c) {
    const int64_t place = row0 + block * kBlock + row;
    if (place < rows) write(place, panel * kBlock, c);
  }
};

// write(row, column, c) for all rows and panels of a w. `partials`: partial_size() per thread.
template <class M, class Write>
inline void linear(int32_t threads, const LinearPlan& plan, const typename M::A* a, const void* w,
                   float* partials, const Write& write) {
  const auto* weights = static_cast<const typename M::W*>(w);
  const int64_t a_stride = plan.depth * kTileSize, b_stride = plan.depth * kPanelStep;
  const int64_t blocks = ceil_div(plan.rows, kBlock);
  parallel_for(threads, plan.chunks * plan.groups, [&](int64_t task, int32_t worker) {
    const TileScope tiles;
    const int64_t block0 = task / plan.groups * plan.chunk;
    const int64_t count = smaller(plan.chunk, blocks - block0);
    const int64_t panel0 = task % plan.groups * plan.group;
    const int64_t panel1 = smaller(plan.panels, panel0 + plan.group);
    float* partial = partials + worker * plan.partial_size();
    EachRow<Write> epilogue{write, block0 * kBlock, plan.rows};
    for (int64_t i = 0; i < plan.pieces; ++i) {
      const int64_t k0 = i * plan.piece;
      const Segment<M> segment = {a + 2 * block0 * a_stride + k0 * kTileSize,
                                  weights + k0 * kPanelStep, smaller(plan.piece, plan.depth - k0),
                                  a_stride, b_stride};
      multiply(&segment, 1, count, panel0, panel1, epilogue, partial, i > 0, i + 1 < plan.pieces);
    }
  });
}

}  // namespace
}  // namespace FASTFAR_TARGET
}  // namespace fastfar

#endif  // FASTFAR_KERNELS_CPU_LINEAR_H_
