// Backward of out = x + gate * (W_2 f(W_1 m + b_1) + b_2), m = LN(x) * (1 + scale) + shift, with or
// without the modulations. One thread takes a group of rows through all of it, a chunk at a time:
//
//   du = dout * gate          dgate = dout * u        db_2 = sum du      dW_2 = du^T f(h)
//   dh = (du W_2) * f'(h)                             db_1 = sum dh      dW_1 = dh^T m
//   dm = dh W_1               dshift = dm             dscale = dm * l    l = n * weight + bias
//   dl = dm * (1 + scale)     dweight = sum dl * n    dbias = sum dl     n = (x - mean) * rstd
//   dn = dl * weight          dx = dout + rstd * (dn - mean(dn) - n * mean(dn * n))
// Included by kernel sources only.
#ifndef FASTFAR_KERNELS_CPU_MLP_GRADIENT_H_
#define FASTFAR_KERNELS_CPU_MLP_GRADIENT_H_

#include "gradients.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

// f(x) and f'(x).
struct Silu {
  static void apply(V x, V& value, V& slope) {
    const V s = set(1.0F) / (set(1.0F) + exponential(set(0.0F) - x));
    value = x * s;
    slope = fma(value, set(1.0F) - s, s);
  }
};

struct Gelu {
  static void apply(V x, V& value, V& slope) {  // x Phi(x) and Phi(x) + x phi(x)
    const V tail = set(0.5F) * complementary_error(absolute(x));
    const V below = select_less(x, set(0.0F), tail, set(1.0F) - tail);
    value = x * below;
    slope = fma(x * set(0.398942280F), exponential(set(-0.5F) * x * x), below);
  }
};

// Everything that one backward reads and writes; packed weights, vectors float32.
struct MlpGradient {
  int64_t rows, width, hidden;
  float eps;
  Numbers x, dout, dx;               // rows `width` apart
  Numbers shift, scale, gate;        // rows `modulation_stride` apart; all or none (null)
  Numbers u, dshift, dscale, dgate;  // rows `width` apart; with modulations only
  int64_t modulation_stride;
  const float *norm_weight, *norm_bias, *fc1_bias;
  Numbers h;  // (rows, hidden); null: recomputed, which needs fc1
  const void *fc1, *fc1_transposed, *fc2_transposed;
  float *dnorm_weight, *dnorm_bias, *dfc1_weight, *dfc1_bias, *dfc2_weight, *dfc2_bias;
};

template <class M, class F>
struct MlpBackward {
  using A = typename M::A;
  using W = typename M::W;

  // Sums of one group, and buffers of one thread.
  struct Sums {
    float *dfc1_weight, *dfc2_weight, *dnorm_weight, *dnorm_bias, *dfc1_bias, *dfc2_bias;
  };
  struct Buffers {
    A *m, *du, *hidden, *slope, *transposed;
    W* panels;
    float *dm, *mean, *rstd, *row;
  };

  const MlpGradient& g;
  RowPlan plan;
  Arena arena;
  int64_t depth, hidden_depth;
  Sums sums;
  int64_t stride;  // between the sums of groups
  char* buffers;
  int64_t buffer_size;

  MlpBackward(const MlpGradient& gradient, int32_t threads, void* scratch)
      : g(gradient), plan(gradient.rows), arena{static_cast<char*>(scratch)} {
    depth = depth_of(g.width);
    hidden_depth = depth_of(g.hidden);
    const int64_t matrix = gradient_size(g.width, g.hidden);
    stride = 2 * matrix + (3 * depth + hidden_depth) * kDepth;
    float* all = arena.take<float>(plan.groups * stride);
    sums.dfc1_weight = all;
    sums.dfc2_weight = all + matrix;
    sums.dnorm_weight = all + 2 * matrix;
    sums.dnorm_bias = sums.dnorm_weight + depth * kDepth;
    sums.dfc2_bias = sums.dnorm_bias + depth * kDepth;
    sums.dfc1_bias = sums.dfc2_bias + depth * kDepth;
    buffers = nullptr;
    Arena one{nullptr};
    take(one);
    buffer_size = one.used;
    buffers = arena.take<char>(threads * buffer_size);
  }

  Buffers take(Arena& one) const {
    const int64_t most = larger(g.width, g.hidden);
    Buffers b;
    b.m = one.take<A>(operand_size(plan.chunk, g.width));
    b.du = one.take<A>(operand_size(plan.chunk, g.width));
    b.hidden = one.take<A>(operand_size(plan.chunk, g.hidden));
    b.slope = one.take<A>(operand_size(plan.chunk, g.hidden));
    b.transposed = one.take<A>(operand_size(plan.chunk, most));
    b.panels = one.take<W>(operand_size(plan.chunk, most));
    b.dm = one.take<float>(operand_size(plan.chunk, g.width));
    b.mean = one.take<float>(plan.chunk);
    b.rstd = one.take<float>(plan.chunk);
    b.row = one.take<float>(depth * kDepth);
    return b;
  }

  bool modulated() const { return g.scale.p != nullptr; }

  // m and du of one row, which exists.
  void enter_row(const Buffers& b, const Sums& s, int64_t row, int64_t local) const {
    const int64_t place = row * g.width, change = row * g.modulation_stride;
    for (int64_t i = 0; i < g.width; i += kLanes) store(b.row + i, g.x.get(place + i, g.width - i));
    row_statistics(b.row, g.width, g.eps, b.mean[local], b.rstd[local]);
    const V mean = set(b.mean[local]), rstd = set(b.rstd[local]);
    for (int64_t i = 0; i < depth * kDepth; i += kLanes) {
      const int64_t count = g.width - i;
      V m = set(0.0F), du = m;
      if (count > 0) {
        const V weight = load_part(g.norm_weight + i, count);
        const V bias = load_part(g.norm_bias + i, count);
        m = fma((load_part(b.row + i, count) - mean) * rstd, weight, bias);
        du = g.dout.get(place + i, count);
        if (modulated()) {
          m = fma(m, g.scale.get(change + i, count), m) + g.shift.get(change + i, count);
          g.dgate.put(place + i, du * g.u.get(place + i, count), count);
          du = du * g.gate.get(change + i, count);
        }
        accumulate(s.dfc2_bias + i, du);
      }
      store(at(b.m, depth, local, i), m);
      store(at(b.du, depth, local, i), du);
    }
  }

  template <class T>
  static void clear_row(T* operand, int64_t depth, int64_t row) {
    for (int64_t k = 0; k < depth; ++k) {
      std::memset(at(operand, depth, row, k * kDepth), 0, kDepth * sizeof(T));
    }
  }

  // The last line of the formulas.
  void leave_row(const Buffers& b, const Sums& s, int64_t row, int64_t local) const {
    const int64_t place = row * g.width, change = row * g.modulation_stride;
    const V mean = set(b.mean[local]), rstd = set(b.rstd[local]);
    float* dm = b.dm + local * depth * kDepth;
    V total = set(0.0F), aligned = total;
    for (int64_t i = 0; i < g.width; i += kLanes) {
      const int64_t count = g.width - i;
      const V weight = load_part(g.norm_weight + i, count);
      const V n = (g.x.get(place + i, count) - mean) * rstd;
      V dl = load_part(dm + i, count);
      if (modulated()) {
        const V l = fma(n, weight, load_part(g.norm_bias + i, count));
        g.dshift.put(place + i, dl, count);
        g.dscale.put(place + i, dl * l, count);
        dl = fma(dl, g.scale.get(change + i, count), dl);
      }
      accumulate(s.dnorm_weight + i, dl * n);
      accumulate(s.dnorm_bias + i, dl);
      const V dn = dl * weight;
      store(dm + i, dn);
      total = total + dn;
      aligned = fma(dn, n, aligned);
    }
    const float scale = 1.0F / static_cast<float>(g.width);
    const V middle = set(sum(total) * scale), along = set(sum(aligned) * scale);
    for (int64_t i = 0; i < g.width; i += kLanes) {
      const int64_t count = g.width - i;
      const V n = (g.x.get(place + i, count) - mean) * rstd;
      const V dx = (load(dm + i) - middle - n * along) * rstd;
      g.dx.put(place + i, g.dout.get(place + i, count) + dx, count);
    }
  }

  // f(h) and f'(h) of up to kLanes numbers; zero for rows that do not exist.
  void activate(const Buffers& b, V h, bool exists, int64_t local, int64_t column) const {
    V value = set(0.0F), slope = value;
    if (exists) F::apply(h, value, slope);
    store(at(b.hidden, hidden_depth, local, column), value);
    store(at(b.slope, hidden_depth, local, column), slope);
  }

  struct Recompute {  // h = m W_1^T + b_1
    const MlpBackward& of;
    const Buffers& b;
    int64_t count;
    void row(int64_t block, int64_t panel, int64_t row, const float* c) {
      const int64_t local = block * kBlock + row, column = panel * kBlock;
      for (int64_t i = 0; i < kBlock; i += kLanes) {
        const int64_t numbers = larger(0, of.g.hidden - column - i);
        const V h = load(c + i) + load_part(of.g.fc1_bias + column + i, numbers);
        of.activate(b, h, local < count, local, column + i);
      }
    }
  };

  struct Inner {  // dh = c * f'(h)
    const MlpBackward& of;
    const Buffers& b;
    const Sums& s;
    void row(int64_t block, int64_t panel, int64_t row, const float* c) {
      const int64_t local = block * kBlock + row, column = panel * kBlock;
      A* out = at(b.hidden, of.hidden_depth, local, column);
      const A* slope = at(b.slope, of.hidden_depth, local, column);
      for (int64_t i = 0; i < kBlock; i += kLanes) {
        const V dh = load(c + i) * load(slope + i);
        accumulate(s.dfc1_bias + column + i, dh);
        store(out + i, dh);
      }
    }
  };

  struct Outer {  // dm
    const MlpBackward& of;
    const Buffers& b;
    void row(int64_t block, int64_t panel, int64_t row, const float* c) {
      float* out = b.dm + ((block * kBlock + row) * of.depth + panel) * kDepth;
      for (int64_t i = 0; i < kBlock; i += kLanes) store(out + i, load(c + i));
    }
  };

  void chunk(const Buffers& b, const Sums& s, int64_t row0, int64_t count, bool first) const {
    const int64_t blocks = ceil_div(count, kBlock);
    const int64_t in = depth * kTileSize, panel = depth * kPanelStep;
    const int64_t hidden_in = hidden_depth * kTileSize, hidden_panel = hidden_depth * kPanelStep;
    for (int64_t local = 0; local < blocks * kBlock; ++local) {
      if (local < count) {
        enter_row(b, s, row0 + local, local);
      } else {
        clear_row(b.m, depth, local);
        clear_row(b.du, depth, local);
      }
    }
    if (g.h.p == nullptr) {
      const Segment<M> up = {b.m, static_cast<const W*>(g.fc1), depth, in, panel};
      Recompute epilogue{*this, b, count};
      multiply(&up, 1, blocks, 0, hidden_depth, epilogue);
    } else {
      for (int64_t local = 0; local < blocks * kBlock; ++local) {
        for (int64_t i = 0; i < hidden_depth * kDepth; i += kLanes) {
          const int64_t numbers = g.hidden - i;
          const bool exists = local < count && numbers > 0;
          const V h = exists ? g.h.get((row0 + local) * g.hidden + i, numbers) : set(0.0F);
          activate(b, h, exists, local, i);
        }
      }
    }
    to_panels(b.hidden, blocks, hidden_depth, b.panels);
    to_transposed(b.du, blocks, depth, b.transposed);
    add_weight_gradient<M>(b.transposed, depth, b.panels, hidden_depth, blocks, s.dfc2_weight,
                           first);
    const Segment<M> back = {b.du, static_cast<const W*>(g.fc2_transposed), depth, in, panel};
    Inner inner{*this, b, s};
    multiply(&back, 1, blocks, 0, hidden_depth, inner);
    to_panels(b.m, blocks, depth, b.panels);
    to_transposed(b.hidden, blocks, hidden_depth, b.transposed);
    add_weight_gradient<M>(b.transposed, hidden_depth, b.panels, depth, blocks, s.dfc1_weight,
                           first);
    const Segment<M> down = {b.hidden, static_cast<const W*>(g.fc1_transposed), hidden_depth,
                             hidden_in, hidden_panel};
    Outer outer{*this, b};
    multiply(&down, 1, blocks, 0, depth, outer);
    for (int64_t local = 0; local < count; ++local) leave_row(b, s, row0 + local, local);
  }

  void run(int32_t threads) const {
    parallel_for(threads, plan.groups, [&](int64_t group, int32_t worker) {
      const TileScope tiles;
      Arena one{buffers + worker * buffer_size};
      const Buffers b = take(one);
      const int64_t offset = group * stride;
      const Sums s = {sums.dfc1_weight + offset,  sums.dfc2_weight + offset,
                      sums.dnorm_weight + offset, sums.dnorm_bias + offset,
                      sums.dfc1_bias + offset,    sums.dfc2_bias + offset};
      clear(s.dnorm_weight, (3 * depth + hidden_depth) * kDepth);
      const int64_t begin = group * plan.per_group;
      const int64_t end = smaller(g.rows, begin + plan.per_group);
      for (int64_t row = begin; row < end; row += plan.chunk) {
        chunk(b, s, row, smaller(plan.chunk, end - row), row == begin);
      }
    });
    const int64_t groups = plan.groups;
    reduce_weight_gradient(threads, sums.dfc1_weight, groups, stride, g.hidden, g.width,
                           g.dfc1_weight);
    reduce_weight_gradient(threads, sums.dfc2_weight, groups, stride, g.width, g.hidden,
                           g.dfc2_weight);
    reduce_vector(sums.dnorm_weight, groups, stride, g.width, g.dnorm_weight);
    reduce_vector(sums.dnorm_bias, groups, stride, g.width, g.dnorm_bias);
    reduce_vector(sums.dfc1_bias, groups, stride, g.hidden, g.dfc1_bias);
    reduce_vector(sums.dfc2_bias, groups, stride, g.width, g.dfc2_bias);
  }
};

}  // namespace
}  // namespace FASTFAR_TARGET
}  // namespace fastfar

#endif  // FASTFAR_KERNELS_CPU_MLP_GRADIENT_H_
