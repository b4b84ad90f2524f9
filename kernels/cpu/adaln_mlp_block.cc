// adaln_mlp_block: y = x + gate * (W_2 silu(W_1 m + b_1) + b_2), m = LN(x) * (1 + scale) + shift.
//
// Forward: each thread takes chunks of rows through both products; only m and silu(h) of a chunk
// are kept, both as A operands. Backward: mlp_gradient.h.
#include "mlp_gradient.h"
#include "ops.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

constexpr int64_t kForwardChunk = 128;

template <class M>
struct Forward {
  using A = typename M::A;
  const fastfar_adaln_mlp_block_args& args;
  Numbers x, shift, scale, gate, h, u, out;
  int64_t depth, chunk;

  struct Buffers {
    A *m, *hidden;
    float* row;
  };

  explicit Forward(const fastfar_adaln_mlp_block_args& a)
      : args(a),
        x{const_cast<void*>(a.x_NW), a.x_dtype},
        shift{const_cast<void*>(a.shift_NW), a.modulation_dtype},
        scale{const_cast<void*>(a.scale_NW), a.modulation_dtype},
        gate{const_cast<void*>(a.gate_NW), a.modulation_dtype},
        h{a.h_NW, a.dtype},
        u{a.u_NW, a.dtype},
        out{a.out_NW, a.x_dtype},
        depth(depth_of(a.width)) {
    // Enough chunks for all threads, each of 32 rows at least.
    const int64_t share = ceil_div(a.rows, 2 * a.threads);
    chunk = smaller(kForwardChunk, padded_rows(share));
  }

  Buffers take(Arena& arena) const {
    Buffers b;
    b.m = arena.take<A>(operand_size(chunk, args.width));
    b.hidden = arena.take<A>(operand_size(chunk, args.width));
    b.row = arena.take<float>(padded_columns(args.width));
    return b;
  }

  int64_t bytes_per_thread() const {
    Arena counted{nullptr};
    take(counted);
    return counted.used;
  }

  void enter_row(const Buffers& b, int64_t row, int64_t local) const {
    const int64_t width = args.width, place = row * width, change = row * args.modulation_stride;
    for (int64_t i = 0; i < width; i += kLanes) store(b.row + i, x.get(place + i, width - i));
    float mean, rstd;
    row_statistics(b.row, width, args.eps, mean, rstd);
    for (int64_t i = 0; i < depth * kDepth; i += kLanes) {
      const int64_t count = width - i;
      V m = set(0.0F);
      if (count > 0) {
        const V n = (load_part(b.row + i, count) - set(mean)) * set(rstd);
        m = fma(n, load_part(args.norm_weight + i, count), load_part(args.norm_bias + i, count));
        m = fma(m, scale.get(change + i, count), m) + shift.get(change + i, count);
      }
      store(at(b.m, depth, local, i), m);
    }
  }

  struct Inner {
    const Forward& of;
    const Buffers& b;
    int64_t row0, count;
    void row(int64_t block, int64_t panel, int64_t row, const float* c) {
      const int64_t local = block * kBlock + row, column = panel * kBlock;
      const int64_t place = (row0 + local) * of.args.width + column;
      A* hidden = at(b.hidden, of.depth, local, column);
      for (int64_t i = 0; i < kBlock; i += kLanes) {
        const int64_t numbers = larger(0, of.args.width - column - i);
        const V h = load(c + i) + load_part(of.args.fc1_bias + column + i, numbers);
        if (of.h.p != nullptr && local < count) of.h.put(place + i, h, numbers);
        store(hidden + i, silu(h));
      }
    }
  };

  struct Outer {
    const Forward& of;
    int64_t row0, count;
    void row(int64_t block, int64_t panel, int64_t row, const float* c) {
      const int64_t local = block * kBlock + row, column = panel * kBlock;
      if (local >= count) return;
      const int64_t place = (row0 + local) * of.args.width + column;
      const int64_t change = (row0 + local) * of.args.modulation_stride + column;
      for (int64_t i = 0; i < kBlock && column + i < of.args.width; i += kLanes) {
        const int64_t numbers = of.args.width - column - i;
        const V u = load(c + i) + load_part(of.args.fc2_bias + column + i, numbers);
        if (of.u.p != nullptr) of.u.put(place + i, u, numbers);
        const V y = fma(of.gate.get(change + i, numbers), u, of.x.get(place + i, numbers));
        of.out.put(place + i, y, numbers);
      }
    }
  };

  void run() const {
    const auto* fc1 = static_cast<const typename M::W*>(args.fc1);
    const auto* fc2 = static_cast<const typename M::W*>(args.fc2);
    const int64_t bytes = bytes_per_thread();
    parallel_for(args.threads, ceil_div(args.rows, chunk), [&](int64_t task, int32_t worker) {
      const TileScope tiles;
      Arena arena{static_cast<char*>(args.scratch) + worker * bytes};
      const Buffers b = take(arena);
      const int64_t row0 = task * chunk, count = smaller(chunk, args.rows - row0);
      const int64_t blocks = ceil_div(count, kBlock);
      for (int64_t local = 0; local < count; ++local) enter_row(b, row0 + local, local);
      const Segment<M> first = {b.m, fc1, depth, depth * kTileSize, depth * kPanelStep};
      Inner inner{*this, b, row0, count};
      multiply(&first, 1, blocks, 0, depth, inner);
      const Segment<M> second = {b.hidden, fc2, depth, depth * kTileSize, depth * kPanelStep};
      Outer outer{*this, row0, count};
      multiply(&second, 1, blocks, 0, depth, outer);
    });
  }
};

MlpGradient described(const fastfar_adaln_mlp_block_backward_args& a) {
  const auto in = [](const void* p, int32_t dtype) { return Numbers{const_cast<void*>(p), dtype}; };
  MlpGradient g;
  g.rows = a.rows;
  g.width = g.hidden = a.width;
  g.eps = a.eps;
  g.x = in(a.x_NW, a.x_dtype);
  g.dout = in(a.dout_NW, a.x_dtype);
  g.dx = in(a.dx_NW, a.x_dtype);
  g.shift = in(a.shift_NW, a.modulation_dtype);
  g.scale = in(a.scale_NW, a.modulation_dtype);
  g.gate = in(a.gate_NW, a.modulation_dtype);
  g.dshift = in(a.dshift_NW, a.modulation_dtype);
  g.dscale = in(a.dscale_NW, a.modulation_dtype);
  g.dgate = in(a.dgate_NW, a.modulation_dtype);
  g.modulation_stride = a.modulation_stride;
  g.norm_weight = a.norm_weight;
  g.norm_bias = a.norm_bias;
  g.fc1_bias = nullptr;
  g.h = in(a.h_NW, a.dtype);
  g.u = in(a.u_NW, a.dtype);
  g.fc1 = nullptr;
  g.fc1_transposed = a.fc1_transposed;
  g.fc2_transposed = a.fc2_transposed;
  g.dnorm_weight = a.dnorm_weight;
  g.dnorm_bias = a.dnorm_bias;
  g.dfc1_weight = a.dfc1_weight;
  g.dfc1_bias = a.dfc1_bias;
  g.dfc2_weight = a.dfc2_weight;
  g.dfc2_bias = a.dfc2_bias;
  return g;
}

bool is_dtype(int32_t dtype) { return dtype == FASTFAR_FLOAT32 || dtype == FASTFAR_BFLOAT16; }

template <class Args>
bool valid(const Args& a) {
  return a.threads > 0 && a.rows > 0 && a.width > 0 && is_dtype(a.dtype) && is_dtype(a.x_dtype) &&
         is_dtype(a.modulation_dtype);
}

}  // namespace

int64_t adaln_mlp_block_scratch(const fastfar_adaln_mlp_block_args& args) {
  if (!valid(args)) return FASTFAR_ERROR_ARGUMENT;
  const int64_t bytes = args.dtype == FASTFAR_BFLOAT16 ? Forward<Bfloat16>(args).bytes_per_thread()
                                                       : Forward<Float32>(args).bytes_per_thread();
  return args.threads * bytes;
}

int32_t adaln_mlp_block(const fastfar_adaln_mlp_block_args& args) {
  if (!valid(args) || args.x_NW == nullptr || args.shift_NW == nullptr ||
      args.scale_NW == nullptr || args.gate_NW == nullptr || args.norm_weight == nullptr ||
      args.norm_bias == nullptr || args.fc1 == nullptr || args.fc1_bias == nullptr ||
      args.fc2 == nullptr || args.fc2_bias == nullptr || args.out_NW == nullptr ||
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

int64_t adaln_mlp_block_backward_scratch(const fastfar_adaln_mlp_block_backward_args& args) {
  if (!valid(args)) return FASTFAR_ERROR_ARGUMENT;
  const MlpGradient g = described(args);
  return args.dtype == FASTFAR_BFLOAT16
             ? MlpBackward<Bfloat16, Silu>(g, args.threads, nullptr).arena.used
             : MlpBackward<Float32, Silu>(g, args.threads, nullptr).arena.used;
}

int32_t adaln_mlp_block_backward(const fastfar_adaln_mlp_block_backward_args& args) {
  if (!valid(args) || args.x_NW == nullptr || args.shift_NW == nullptr ||
      args.scale_NW == nullptr || args.gate_NW == nullptr || args.norm_weight == nullptr ||
      args.norm_bias == nullptr || args.fc1_transposed == nullptr ||
      args.fc2_transposed == nullptr || args.h_NW == nullptr || args.u_NW == nullptr ||
      args.dout_NW == nullptr || args.dx_NW == nullptr || args.dshift_NW == nullptr ||
      args.dscale_NW == nullptr || args.dgate_NW == nullptr || args.dnorm_weight == nullptr ||
      args.dnorm_bias == nullptr || args.dfc1_weight == nullptr || args.dfc1_bias == nullptr ||
      args.dfc2_weight == nullptr || args.dfc2_bias == nullptr || args.scratch == nullptr) {
    return FASTFAR_ERROR_ARGUMENT;
  }
  const MlpGradient g = described(args);
  if (args.dtype == FASTFAR_BFLOAT16) {
    MlpBackward<Bfloat16, Silu>(g, args.threads, args.scratch).run(args.threads);
  } else {
    MlpBackward<Float32, Silu>(g, args.threads, args.scratch).run(args.threads);
  }
  return 0;
}

}  // namespace FASTFAR_TARGET
}  // namespace fastfar
