// denoise_loop's sizes, buffers and epilogues; the formulas are in denoise_loop.cc.
#ifndef FASTFAR_KERNELS_CPU_DENOISE_LOOP_H_
#define FASTFAR_KERNELS_CPU_DENOISE_LOOP_H_

#include "gemm.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

inline int64_t padded_to_tile(int64_t n) { return ceil_div(n, kTile) * kTile; }

// What a head of given sizes consists of; the order is that of fastfar/ops/_head.py.
struct Sizes {
  int64_t width, depth, channels, condition;
  int64_t columns;      // width up to a multiple of 32
  int64_t stride;       // of float32 rows: one cache line more, so that a column is not in one set
  int64_t panels;       // of a matrix with `width` outputs
  int64_t out_panels;   // of [eps | v], each up to a multiple of 16
  int64_t w;            // numbers of a panel with `width` inputs
  int64_t eps_columns;  // where v starts

  explicit Sizes(const fastfar_denoise_loop_args& args)
      : width(args.width),
        depth(args.depth),
        channels(args.channels),
        condition(args.condition_width),
        columns(padded_columns(width)),
        stride(columns + 16),
        panels(ceil_div(width, kBlock)),
        out_panels(ceil_div(2 * padded_to_tile(channels), kBlock)),
        w(panel_size(width)),
        eps_columns(padded_to_tile(channels)) {}

  int64_t modulation_panels() const { return width / kTile; }
  int64_t block_weights() const { return (modulation_panels() + 3 * panels) * w; }
  int64_t kept_panels() const { return depth * modulation_panels() + panels; }
  int64_t block_vectors() const { return 2 * width + 3 * columns; }
  // base bias, level weight, input bias, input weight
  int64_t first_vectors() const { return (3 + channels) * columns; }
};

// One task's buffers, cut from its scratch.
template <class M>
struct Buffers {
  using A = typename M::A;
  A *z, *y, *h, *g, *gate;
  float *base, *r, *statistics, *out, *x, *x0, *kept;
  int64_t bytes;

  Buffers(const Sizes& s, int64_t tokens, int64_t halves, int64_t ahead, char* scratch) {
    const int64_t rows = padded_rows(halves * tokens);
    Arena arena{scratch};
    y = arena.take<A>(ahead * operand_size(rows, s.width));
    h = arena.take<A>(operand_size(rows, s.width));
    g = arena.take<A>(operand_size(rows, s.width));
    gate = arena.take<A>((ahead > 1 ? ahead * s.depth : 1) * operand_size(rows, s.width));
    r = arena.take<float>(rows * s.stride);
    base = arena.take<float>(rows * s.stride);
    statistics = arena.take<float>(2 * rows);
    out = arena.take<float>(rows * s.out_panels * kBlock);
    x = arena.take<float>(tokens * s.channels);
    x0 = arena.take<float>(tokens * s.channels);
    z = arena.take<A>(operand_size(rows, s.condition));
    kept = arena.take<float>(ahead > 1 ? ahead * rows * kBlock * s.kept_panels() : 0);
    bytes = arena.used;
  }
};

// --- epilogues: c is one row of a product, 32 numbers -----------------------------------------

// base = c + bias + level w_l.
struct Base {
  const float *bias, *level_weight;
  float level;
  float* base;
  int64_t stride;

  void row(int64_t block, int64_t panel, int64_t row, const float* c) const {
    const int64_t column = panel * kBlock;
    float* out = base + (block * kBlock + row) * stride + column;
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const V constant = fma(set(level), load(level_weight + column + i), load(bias + column + i));
      store(out + i, load(c + i) + constant);
    }
  }
};

// h = xhat scale' + shift', from 16 shifts and 16 scales.
template <class A>
struct Modulate {
  const float *r, *statistics, *bias;
  A* h;
  int64_t stride, depth;

  void row(int64_t block, int64_t panel, int64_t row, const float* c) const {
    const int64_t i = block * kBlock + row, column = panel * kTile;
    const float* x = r + i * stride + column;
    const float* b = bias + panel * kBlock;
    A* out = at(h, depth, i, column);
    const V mean = set(statistics[2 * i]), rstd = set(statistics[2 * i + 1]);
    for (int64_t j = 0; j < kTile; j += kLanes) {
      const V shift = load(c + j) + load(b + j);
      const V scale = load(c + kTile + j) + load(b + kTile + j);
      store(out + j, fma((load(x + j) - mean) * rstd, scale, shift));
    }
  }
  void expect(int64_t block, int64_t panel, int64_t row) const {
    const int64_t i = block * kBlock + row;
    prefetch(r + i * stride + panel * kTile);
    prefetch_to_write(at(h, depth, i, panel * kTile));
  }
};

// h = xhat (c + bias), bias = 1 + b_s.
template <class A>
struct Scale {
  const float *r, *statistics, *bias;
  A* h;
  int64_t stride, depth;

  void row(int64_t block, int64_t panel, int64_t row, const float* c) const {
    const int64_t i = block * kBlock + row, column = panel * kBlock;
    const float* x = r + i * stride + column;
    A* out = at(h, depth, i, column);
    const V mean = set(statistics[2 * i]), rstd = set(statistics[2 * i + 1]);
    for (int64_t j = 0; j < kBlock; j += kLanes) {
      const V scale = load(c + j) + load(bias + column + j);
      store(out + j, (load(x + j) - mean) * rstd * scale);
    }
  }
};

// g = silu(c + bias).
template <class A>
struct Silu {
  const float* bias;
  A* g;
  int64_t depth;

  void row(int64_t block, int64_t panel, int64_t row, const float* c) const {
    A* out = at(g, depth, block * kBlock + row, panel * kBlock);
    for (int64_t j = 0; j < kBlock; j += kLanes) {
      store(out + j, silu_for(out, load(c + j) + load(bias + panel * kBlock + j)));
    }
  }
  void expect(int64_t block, int64_t panel, int64_t row) const {
    prefetch_to_write(at(g, depth, block * kBlock + row, panel * kBlock));
  }
};

// A product's C as it is, for an epilogue later on: [panel][row][32].
struct Keep {
  float* kept;
  int64_t rows;

  void row(int64_t block, int64_t panel, int64_t row, const float* c) const {
    std::memcpy(kept + (panel * rows + block * kBlock + row) * kBlock, c, kBlock * sizeof(float));
  }
};

// gate = c + bias, kept in the layout of an operand: short rows in few cache lines.
template <class A>
struct KeepGate {
  const float* bias;
  A* gate;
  int64_t depth;

  void row(int64_t block, int64_t panel, int64_t row, const float* c) const {
    A* out = at(gate, depth, block * kBlock + row, panel * kBlock);
    for (int64_t j = 0; j < kBlock; j += kLanes) {
      store(out + j, load(c + j) + load(bias + panel * kBlock + j));
    }
  }
  void expect(int64_t block, int64_t panel, int64_t row) const {
    prefetch_to_write(at(gate, depth, block * kBlock + row, panel * kBlock));
  }
};

// r += gate (c + bias).
template <class A>
struct Gate {
  const float* bias;
  const A* gate;
  float* r;
  int64_t stride, depth;

  void row(int64_t block, int64_t panel, int64_t row, const float* c) const {
    const int64_t i = block * kBlock + row, column = panel * kBlock;
    const A* factor = at(gate, depth, i, column);
    float* x = r + i * stride + column;
    for (int64_t j = 0; j < kBlock; j += kLanes) {
      const V value = load(c + j) + load(bias + column + j);
      store(x + j, fma(load(factor + j), value, load(x + j)));
    }
  }
  void expect(int64_t block, int64_t panel, int64_t row) const {
    const int64_t i = block * kBlock + row, column = panel * kBlock;
    prefetch(at(gate, depth, i, column));
    prefetch_to_write(r + i * stride + column);
    prefetch_to_write(r + i * stride + column + kTile);
  }
};

// out = c + bias, rows of `stride` numbers.
struct Output {
  const float* bias;
  float* out;
  int64_t stride;

  void row(int64_t block, int64_t panel, int64_t row, const float* c) const {
    float* to = out + (block * kBlock + row) * stride + panel * kBlock;
    for (int64_t j = 0; j < kBlock; j += kLanes) {
      store(to + j, load(c + j) + load(bias + panel * kBlock + j));
    }
  }
};

}  // namespace
}  // namespace FASTFAR_TARGET
}  // namespace fastfar

#endif  // FASTFAR_KERNELS_CPU_DENOISE_LOOP_H_
