// denoise_loop: all diffusion steps of one outer step for all tokens.
//
// A task owns some tokens for the whole loop, so nothing is shared between threads but the weights,
// which all of them read in the same order. With guidance a token has two rows, its conditional one
// and, further down, its unconditional one. One diffusion step of a task (w wide, d blocks):
//
//   y = silu(base + time)                       base = W_c z + level w_l + b, once per outer step
//   r = W_in x + b                              the same for both rows of a token
//   d times:  h = xhat(r) scale' + shift'       [shift' | scale'] = y W_m', LN's affine folded in
//             gate = y W_g + b_g
//             g = silu(h W_1 + b_1)
//             r += gate (g W_2 + b_2)
//   out = (xhat(r) (1 + y W_s)) W_f + y W_fh + b  the final shift went through W_f beforehand
//   x = a x + b x0 + c x0_previous + s n         x0 from the guided eps
//
// xhat is LayerNorm without affine. Everything but the products' bfloat16 operands is float32.
#include "gemm.h"
#include "ops.h"
#include "rows.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

constexpr float kEps = 1e-6F;

// Columns of fastfar_denoise_loop_args.table.
enum { kX0FromX, kX0FromEps, kA, kB, kC, kLogLow, kLogHigh, kNoise, kTableWidth };

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
  int64_t block_vectors() const { return 2 * width + 3 * columns; }
  // base bias, level weight, input bias, input weight
  int64_t first_vectors() const { return (3 + channels) * columns; }
};

// One task's buffers, cut from its scratch.
template <class M>
struct Buffers {
  using A = typename M::A;
  A *z, *y, *h, *g;
  float *base, *r, *gate, *statistics, *out, *x, *x0;
  int64_t bytes;

  Buffers(const Sizes& s, int64_t tokens, int64_t halves, char* scratch) {
    char* const start = scratch;
    const int64_t rows = halves * padded_rows(tokens);
    const auto cut = [&scratch](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<decltype(+pointer)>(scratch);
      scratch += ceil_div(count * static_cast<int64_t>(sizeof(*pointer)), 64) * 64;
    };
    cut(y, operand_size(rows, s.width));
    cut(h, operand_size(rows, s.width));
    cut(g, operand_size(rows, s.width));
    cut(r, rows * s.stride);
    cut(gate, rows * s.stride);
    cut(base, rows * s.stride);
    cut(statistics, 2 * rows);
    cut(out, rows * s.out_panels * kBlock);
    cut(x, tokens * s.channels);
    cut(x0, tokens * s.channels);
    cut(z, operand_size(rows, s.condition));
    bytes = scratch - start;
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
  void prefetch(int64_t block, int64_t panel, int64_t row) const {
    prefetch_line(r + (block * kBlock + row) * stride + panel * kTile);
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
      store(out + j, silu(load(c + j) + load(bias + panel * kBlock + j)));
    }
  }
};

// r += gate (c + bias).
struct Gate {
  const float *bias, *gate;
  float* r;
  int64_t stride;

  void row(int64_t block, int64_t panel, int64_t row, const float* c) const {
    const int64_t column = panel * kBlock, place = (block * kBlock + row) * stride + column;
    for (int64_t j = 0; j < kBlock; j += kLanes) {
      const V value = load(c + j) + load(bias + column + j);
      store(r + place + j, fma(load(gate + place + j), value, load(r + place + j)));
    }
  }
  void prefetch(int64_t block, int64_t panel, int64_t row) const {
    const int64_t place = (block * kBlock + row) * stride + panel * kBlock;
    prefetch_line(gate + place);
    prefetch_line(gate + place + kTile);
    prefetch_line(r + place);
    prefetch_line(r + place + kTile);
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

// --- one task ---------------------------------------------------------------------------------

template <class M>
struct Task {
  using A = typename M::A;
  using W = typename M::W;
  const fastfar_denoise_loop_args& args;
  const Sizes& s;
  const Buffers<M>& m;
  int64_t first, tokens;  // this task's tokens: first .. first + tokens - 1
  int64_t half, rows, blocks, depth;

  Task(const fastfar_denoise_loop_args& arguments, const Sizes& sizes, const Buffers<M>& buffers,
       int64_t first_token, int64_t count)
      : args(arguments),
        s(sizes),
        m(buffers),
        first(first_token),
        tokens(count),
        half(padded_rows(count)),
        rows(arguments.halves * half),
        blocks(rows / kBlock),
        depth(depth_of(sizes.width)) {}

  // A product of an operand with `width` columns.
  Segment<M> by_width(const A* a, const W* b, int64_t stride) const {
    return Segment<M>{a, b, depth, depth * kTileSize, stride};
  }

  template <class E>
  void product(const A* a, const W* b, int64_t panels, E epilogue) const {
    const Segment<M> segment = by_width(a, b, s.w);
    multiply(&segment, 1, blocks, 0, panels, epilogue);
  }

  // base_RW of all rows. Rows and columns that only fill blocks up are zero everywhere.
  void condition(const W* weights, const float* vectors) const {
    const int64_t z_depth = depth_of(s.condition);
    std::memset(m.z, 0, sizeof(A) * static_cast<size_t>(operand_size(rows, s.condition)));
    for (int64_t token = 0; token < args.halves * tokens; ++token) {
      const int64_t part = token / tokens, i = token % tokens;
      const float* z = args.condition_MD + (part * args.rows + first + i) * s.condition;
      for (int64_t k = 0; k < s.condition; k += kLanes) {
        const int64_t count = smaller(kLanes, s.condition - k);
        store_part(at(m.z, z_depth, part * half + i, k), load_part(z + k, count), count);
      }
    }
    const Segment<M> segment{m.z, weights, z_depth, z_depth * kTileSize, panel_size(s.condition)};
    Base base{vectors, vectors + s.columns, args.level, m.base, s.stride};
    multiply(&segment, 1, blocks, 0, s.panels, base);
  }

  // y_RW = silu(base + time).
  void activate(const float* time) const {
    for (int64_t i = 0; i < rows; ++i) {
      const float* base = m.base + i * s.stride;
      for (int64_t k = 0; k < s.width; k += kLanes) {
        store(at(m.y, depth, i, k), silu(load(base + k) + load(time + k)));
      }
    }
  }

  // r = W_in x + b, for both rows of a token.
  void project(const float* weight_PW, const float* bias) const {
    for (int64_t i = 0; i < tokens; ++i) {
      const float* x = m.x + i * s.channels;
      float* r = m.r + i * s.stride;
      for (int64_t k = 0; k < s.columns; k += 4 * kLanes) {
        V sums[4];
        const int64_t vectors = smaller(4, (s.columns - k) / kLanes);
        for (int64_t v = 0; v < vectors; ++v) sums[v] = load(bias + k + v * kLanes);
        for (int64_t p = 0; p < s.channels; ++p) {
          const V value = set(x[p]);
          const float* weight = weight_PW + p * s.columns + k;
          for (int64_t v = 0; v < vectors; ++v) {
            sums[v] = fma(value, load(weight + v * kLanes), sums[v]);
          }
        }
        for (int64_t v = 0; v < vectors; ++v) {
          store(r + k + v * kLanes, sums[v]);
          if (args.halves == 2) store(r + half * s.stride + k + v * kLanes, sums[v]);
        }
      }
      statistics_of(i);
      if (args.halves == 2) {
        m.statistics[2 * (half + i)] = m.statistics[2 * i];
        m.statistics[2 * (half + i) + 1] = m.statistics[2 * i + 1];
      }
    }
  }

  void statistics_of(int64_t i) const {
    row_statistics(m.r + i * s.stride, s.width, kEps, m.statistics[2 * i],
                   m.statistics[2 * i + 1]);
  }

  // x = a x + b x0 + c x0_previous + s n, for this task's tokens.
  void update(const float* table, const float* noise) const {
    const int64_t stride = s.out_panels * kBlock;
    const bool noisy = table[kNoise] != 0.0F;
    for (int64_t i = 0; i < tokens; ++i) {
      const float* conditional = m.out + i * stride;
      const float* free = conditional + half * stride;
      for (int64_t p = 0; p < s.channels; p += kLanes) {
        const int64_t count = smaller(kLanes, s.channels - p);
        V eps = load(conditional + p);
        if (args.halves == 2) {
          const V unguided = load(free + p);
          eps = fma(set(args.guidance_scale), eps - unguided, unguided);
        }
        const V x = load_part(m.x + i * s.channels + p, count);
        V x0 = set(table[kX0FromX]) * x - set(table[kX0FromEps]) * eps;
        x0 = min(set(args.x0_high), max(set(args.x0_low), x0));
        V next = fma(set(table[kA]), x, set(table[kB]) * x0);
        if (table[kC] != 0.0F) {
          next = fma(set(table[kC]), load_part(m.x0 + i * s.channels + p, count), next);
        }
        if (noisy) {
          const V fraction =
              (load(conditional + s.eps_columns + p) + set(1.0F)) * set(0.5F);
          const V log_variance = fma(fraction, set(table[kLogHigh] - table[kLogLow]),
                                     set(table[kLogLow]));
          const V sigma = set(table[kNoise]) * exponential(set(0.5F) * log_variance);
          next = fma(sigma, load_part(noise + (first + i) * s.channels + p, count), next);
        }
        store_part(m.x0 + i * s.channels + p, x0, count);
        store_part(m.x + i * s.channels + p, next, count);
      }
    }
  }

  // One diffusion step. `weights` and `vectors` start at the first block's.
  void step(const W* weights, const float* vectors, int64_t t) const {
    activate(args.time_TW + t * s.width);
    project(args.vectors + 3 * s.columns, args.vectors + 2 * s.columns);
    for (int64_t block = 0; block < s.depth; ++block) {
      if (block > 0) all_statistics();
      const float* bias = vectors + 2 * s.width;  // b_g, b_1, b_2
      product(m.y, weights, s.modulation_panels(),
              Modulate<A>{m.r, m.statistics, vectors, m.h, s.stride, depth});
      weights += s.modulation_panels() * s.w;
      product(m.y, weights, s.panels, Output{bias, m.gate, s.stride});
      weights += s.panels * s.w;
      product(m.h, weights, s.panels, Silu<A>{bias + s.columns, m.g, depth});
      weights += s.panels * s.w;
      product(m.g, weights, s.panels, Gate{bias + 2 * s.columns, m.gate, m.r, s.stride});
      weights += s.panels * s.w;
      vectors += s.block_vectors();
    }
    all_statistics();
    product(m.y, weights, s.panels,
            Scale<A>{m.r, m.statistics, vectors, m.h, s.stride, depth});
    weights += s.panels * s.w;
    const Segment<M> both[2] = {by_width(m.h, weights, 2 * s.w),
                                by_width(m.y, weights + s.w, 2 * s.w)};
    Output output{vectors + s.columns, m.out, s.out_panels * kBlock};
    multiply(both, 2, blocks, 0, s.out_panels, output);
    update(args.table + t * kTableWidth, args.noise_TNP + t * args.rows * s.channels);
  }

  void all_statistics() const {
    for (int64_t i = 0; i < rows; ++i) statistics_of(i);
  }

  void run() const {
    const W* const weights = static_cast<const W*>(args.weights);
    // Rows that only fill blocks up, and columns beyond the width, stay zero or finite.
    std::memset(m.r, 0, sizeof(float) * static_cast<size_t>(rows * s.stride));
    std::memset(m.statistics, 0, sizeof(float) * static_cast<size_t>(2 * rows));
    A* const operands[] = {m.y, m.h, m.g};
    for (A* const operand : operands) {
      std::memset(operand, 0, sizeof(A) * static_cast<size_t>(operand_size(rows, s.width)));
    }
    condition(weights, args.vectors);
    const size_t numbers = static_cast<size_t>(tokens * s.channels);
    std::memcpy(m.x, args.initial_NP + first * s.channels, numbers * sizeof(float));
    std::memset(m.x0, 0, numbers * sizeof(float));
    const W* const first_block = weights + s.panels * panel_size(s.condition);
    for (int64_t t = 0; t < args.steps; ++t) {
      step(first_block, args.vectors + s.first_vectors(), t);
    }
    std::memcpy(args.out_NP + first * s.channels, m.x, numbers * sizeof(float));
  }
};

template <class M>
int64_t scratch_of_task(const fastfar_denoise_loop_args& args) {
  return Buffers<M>(Sizes(args), args.rows_per_task, args.halves, nullptr).bytes;
}

template <class M>
void run_all(const fastfar_denoise_loop_args& args) {
  const Sizes sizes(args);
  const int64_t bytes = scratch_of_task<M>(args);
  const int64_t tasks = ceil_div(args.rows, args.rows_per_task);
  parallel_for(args.threads, tasks, [&](int64_t task, int32_t worker) {
    const int64_t first = task * args.rows_per_task;
    const int64_t tokens = smaller(args.rows_per_task, args.rows - first);
    const Buffers<M> buffers(sizes, tokens, args.halves,
                             static_cast<char*>(args.scratch) + worker * bytes);
    const TileScope tiles;
    Task<M>(args, sizes, buffers, first, tokens).run();
  });
}

}  // namespace

int64_t denoise_loop_scratch(const fastfar_denoise_loop_args& args) {
  return args.dtype == FASTFAR_FLOAT32 ? scratch_of_task<Float32>(args)
                                       : scratch_of_task<Bfloat16>(args);
}

int32_t denoise_loop(const fastfar_denoise_loop_args& args) {
  const int64_t sizes[] = {args.rows,     args.width,           args.channels, args.steps,
                           args.condition_width, args.rows_per_task, args.threads};
  for (const int64_t size : sizes) {
    if (size < 1) return FASTFAR_ERROR_ARGUMENT;
  }
  if (args.depth < 0 || args.width % kTile != 0) return FASTFAR_ERROR_ARGUMENT;
  if (args.halves != 1 && args.halves != 2) return FASTFAR_ERROR_ARGUMENT;
  if (args.dtype == FASTFAR_FLOAT32) {
    run_all<Float32>(args);
  } else if (args.dtype == FASTFAR_BFLOAT16) {
    run_all<Bfloat16>(args);
  } else {
    return FASTFAR_ERROR_ARGUMENT;
  }
  return 0;
}

}  // namespace FASTFAR_TARGET
}  // namespace fastfar
