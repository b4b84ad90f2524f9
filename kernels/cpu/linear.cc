// linear: y = W x + b, and its gradients dx = dy W, dW = dy^T x, db = sum dy over the rows.
#include "linear.h"

#include "gradients.h"
#include "ops.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

constexpr int64_t kForwardChunk = 128;

bool is_dtype(int32_t dtype) { return dtype == FASTFAR_FLOAT32 || dtype == FASTFAR_BFLOAT16; }

// Writes c (+ bias) to rows of `to`.
struct Store {
  Numbers to;
  int64_t n, row0, count;
  const float* bias;
  void row(int64_t block, int64_t panel, int64_t row, const float* c) {
    const int64_t local = block * kBlock + row, column = panel * kBlock;
    if (local >= count) return;
    for (int64_t i = 0; i < kBlock && column + i < n; i += kLanes) {
      const int64_t numbers = n - column - i;
      V y = load(c + i);
      if (bias != nullptr) y = y + load_part(bias + column + i, numbers);
      to.put((row0 + local) * n + column + i, y, numbers);
    }
  }
};

template <class M>
struct Forward {
  const fastfar_linear_args& args;
  int64_t depth, chunk;

  explicit Forward(const fastfar_linear_args& a) : args(a), depth(depth_of(a.k)) {
    chunk = smaller(kForwardChunk, padded_rows(ceil_div(a.rows, 2 * a.threads)));
  }
  int64_t operand() const { return operand_size(chunk, args.k); }
  int64_t bytes() const {
    return args.threads * operand() * static_cast<int64_t>(sizeof(typename M::A));
  }

  void run() const {
    const Numbers x = {const_cast<void*>(args.x_MK), args.x_dtype};
    const auto* weight = static_cast<const typename M::W*>(args.weight);
    parallel_for(args.threads, ceil_div(args.rows, chunk), [&](int64_t task, int32_t worker) {
      const TileScope tiles;
      auto* a = static_cast<typename M::A*>(args.scratch) + worker * operand();
      const int64_t row0 = task * chunk, count = smaller(chunk, args.rows - row0);
      const int64_t blocks = ceil_div(count, kBlock);
      to_operand(x, args.x_stride, row0, row0 + count, blocks, args.k, a);
      const Segment<M> segment = {a, weight, depth, depth * kTileSize, depth * kPanelStep};
      Store epilogue{{args.out_MN, args.out_dtype}, args.n, row0, count, args.bias};
      multiply(&segment, 1, blocks, 0, depth_of(args.n), epilogue);
    });
  }
};

template <class M>
struct Backward {
  using A = typename M::A;
  using W = typename M::W;
  struct Buffers {
    A *x, *dy, *transposed;
    W* panels;
  };

  const fastfar_linear_backward_args& args;
  RowPlan plan;
  Arena arena;
  int64_t n_depth, k_depth, matrix, stride, buffer_size;
  float* sums;
  char* buffers;

  explicit Backward(const fastfar_linear_backward_args& a, void* scratch)
      : args(a), plan(a.rows), arena{static_cast<char*>(scratch)} {
    n_depth = depth_of(a.n);
    k_depth = depth_of(a.k);
    matrix = gradient_size(a.n, a.k);
    stride = matrix + n_depth * kDepth;
    sums = arena.take<float>(plan.groups * stride);
    Arena one{nullptr};
    take(one);
    buffer_size = one.used;
    buffers = arena.take<char>(a.threads * buffer_size);
  }

  Buffers take(Arena& one) const {
    Buffers b;
    b.x = one.take<A>(operand_size(plan.chunk, args.k));
    b.dy = one.take<A>(operand_size(plan.chunk, args.n));
    b.transposed = one.take<A>(operand_size(plan.chunk, args.n));
    b.panels = one.take<W>(operand_size(plan.chunk, args.k));
    return b;
  }

  void run() const {
    const Numbers x = {const_cast<void*>(args.x_MK), args.x_dtype};
    const Numbers dy = {const_cast<void*>(args.dout_MN), args.out_dtype};
    const auto* weight = static_cast<const W*>(args.weight_transposed);
    parallel_for(args.threads, plan.groups, [&](int64_t group, int32_t worker) {
      const TileScope tiles;
      Arena one{buffers + worker * buffer_size};
      const Buffers b = take(one);
      float* dweight = sums + group * stride;
      float* dbias = dweight + matrix;
      clear(dbias, n_depth * kDepth);
      const int64_t begin = group * plan.per_group;
      const int64_t end = smaller(args.rows, begin + plan.per_group);
      for (int64_t row0 = begin; row0 < end; row0 += plan.chunk) {
        const int64_t count = smaller(plan.chunk, end - row0), blocks = ceil_div(count, kBlock);
        to_operand(x, args.x_stride, row0, row0 + count, blocks, args.k, b.x);
        to_operand(dy, args.n, row0, row0 + count, blocks, args.n, b.dy, dbias);
        to_panels(b.x, blocks, k_depth, b.panels);
        to_transposed(b.dy, blocks, n_depth, b.transposed);
        add_weight_gradient<M>(b.transposed, n_depth, b.panels, k_depth, blocks, dweight,
                               row0 == begin);
        if (args.dx_MK == nullptr) continue;
        const Segment<M> segment = {b.dy, weight, n_depth, n_depth * kTileSize,
                                    n_depth * kPanelStep};
        Store epilogue{{args.dx_MK, args.x_dtype}, args.k, row0, count, nullptr};
        multiply(&segment, 1, blocks, 0, k_depth, epilogue);
      }
    });
    reduce_weight_gradient(args.threads, sums, plan.groups, stride, args.n, args.k, args.dweight);
    reduce_vector(sums + matrix, plan.groups, stride, args.n, args.dbias);
  }
};

template <class Args>
bool valid(const Args& a) {
  return a.threads > 0 && a.rows > 0 && a.n > 0 && a.k > 0 && is_dtype(a.dtype) &&
         is_dtype(a.x_dtype) && is_dtype(a.out_dtype);
}

}  // namespace

int64_t linear_scratch(const fastfar_linear_args& args) {
  if (!valid(args)) return FASTFAR_ERROR_ARGUMENT;
  return args.dtype == FASTFAR_BFLOAT16 ? Forward<Bfloat16>(args).bytes()
                                        : Forward<Float32>(args).bytes();
}

int32_t linear(const fastfar_linear_args& args) {
  if (!valid(args) || args.x_MK == nullptr || args.weight == nullptr || args.out_MN == nullptr ||
      args.scratch == nullptr) {
    return FASTFAR_ERROR_ARGUMENT;
  }
  if (args.dtype == FASTFAR_BFLOAT16) {
    Forward<Bfloat16>(args).run();
  } else {
    Forward<Float32>(args).run();
  }
  return 0;
}

int64_t linear_backward_scratch(const fastfar_linear_backward_args& args) {
  if (!valid(args)) return FASTFAR_ERROR_ARGUMENT;
  return args.dtype == FASTFAR_BFLOAT16 ? Backward<Bfloat16>(args, nullptr).arena.used
                                        : Backward<Float32>(args, nullptr).arena.used;
}

int32_t linear_backward(const fastfar_linear_backward_args& args) {
  if (!valid(args) || args.x_MK == nullptr || args.dout_MN == nullptr || args.dweight == nullptr ||
      args.dbias == nullptr || args.scratch == nullptr ||
      (args.dx_MK != nullptr && args.weight_transposed == nullptr)) {
    return FASTFAR_ERROR_ARGUMENT;
  }
  if (args.dtype == FASTFAR_BFLOAT16) {
    Backward<Bfloat16>(args, args.scratch).run();
  } else {
    Backward<Float32>(args, args.scratch).run();
  }
  return 0;
}

}  // namespace FASTFAR_TARGET
}  // namespace fastfar
