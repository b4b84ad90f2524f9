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
// xhat is LayerNorm without affine. With bfloat16 weights the operands y, h, g and the gate are
// bfloat16 where the processor multiplies it; all else is float32.
#include "denoise_loop.h"
#include "ops.h"
#include "rows.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

constexpr float kEps = 1e-6F;

// Columns of fastfar_denoise_loop_args.table.
enum {
  kX0FromX,
  kX0FromEps,
  kA,
  kB,
  kC,
  kLow,
  kHigh,
  kNoise,
  kLinear,
  kFractionMin,
  kFractionMax,
  kTableWidth
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
  int64_t rows, blocks;   // a row for every token and half, and up to 31 that only fill a block up
  int64_t depth;          // k tiles of an operand of `width` columns
  int64_t ahead;          // diffusion steps whose modulations are computed at once
  int64_t operand;        // numbers of an operand of `width` columns

  Task(const fastfar_denoise_loop_args& arguments, const Sizes& sizes, const Buffers<M>& buffers,
       int64_t first_token, int64_t count)
      : args(arguments),
        s(sizes),
        m(buffers),
        first(first_token),
        tokens(count),
        rows(padded_rows(arguments.halves * count)),
        blocks(rows / kBlock),
        depth(depth_of(sizes.width)),
        ahead(arguments.steps_ahead),
        operand(operand_size(rows, sizes.width)) {}

  // A product of an operand with `width` columns.
  Segment<M> by_width(const A* a, const W* b, int64_t stride) const {
    return Segment<M>{a, b, depth, depth * kTileSize, stride};
  }

  template <class E>
  void product(const A* a, const W* b, int64_t panels, E epilogue, int64_t sets = 1) const {
    const Segment<M> segment = by_width(a, b, s.w);
    multiply(&segment, 1, sets * blocks, 0, panels, epilogue);
  }

  // The epilogue of a product that was kept for `ahead` steps, for the rows of step q of them.
  template <class E>
  void resume(const float* kept, int64_t q, int64_t panels, E epilogue) const {
    for (int64_t panel = 0; panel < panels; ++panel) {
      const float* c = kept + (panel * ahead + q) * rows * kBlock;
      for (int64_t i = 0; i < rows; ++i) {
        epilogue.row(i / kBlock, panel, i % kBlock, c + i * kBlock);
      }
    }
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
        store_part(at(m.z, z_depth, token, k), load_part(z + k, count), count);
      }
    }
    const Segment<M> segment{m.z, weights, z_depth, z_depth * kTileSize, panel_size(s.condition)};
    Base base{vectors, vectors + s.columns, args.level, m.base, s.stride};
    multiply(&segment, 1, blocks, 0, s.panels, base);
  }

  // y_RW = silu(base + time).
  void activate(const float* time, A* y) const {
    for (int64_t i = 0; i < rows; ++i) {
      const float* base = m.base + i * s.stride;
      for (int64_t k = 0; k < s.width; k += kLanes) {
        A* out = at(y, depth, i, k);
        store(out, silu_for(out, load(base + k) + load(time + k)));
      }
    }
  }

  // r = W_in x + b and its statistics, for both rows of a token.
  void project(const float* weight_PW, const float* bias) const {
    constexpr int64_t kTokens = 4, kVectors = kBlock / kLanes;
    for (int64_t i = 0; i < tokens; i += kTokens) {
      for (int64_t k = 0; k < s.columns; k += kBlock) {
        V sums[kTokens][kVectors];
        for (int64_t v = 0; v < kVectors; ++v) {
          for (int64_t q = 0; q < kTokens; ++q) sums[q][v] = load(bias + k + v * kLanes);
        }
        for (int64_t p = 0; p < s.channels; ++p) {
          const float* weight = weight_PW + p * s.columns + k;
          for (int64_t q = 0; q < kTokens; ++q) {
            const V x = set(m.x[smaller(i + q, tokens - 1) * s.channels + p]);
            for (int64_t v = 0; v < kVectors; ++v) {
              sums[q][v] = fma(x, load(weight + v * kLanes), sums[q][v]);
            }
          }
        }
        for (int64_t q = 0; q < kTokens && i + q < tokens; ++q) {
          for (int64_t v = 0; v < kVectors; ++v) {
            float* r = m.r + (i + q) * s.stride + k + v * kLanes;
            store(r, sums[q][v]);
            if (args.halves == 2) store(r + tokens * s.stride, sums[q][v]);
          }
        }
      }
      for (int64_t q = i; q < smaller(i + kTokens, tokens); ++q) {
        statistics_of(q);
        if (args.halves == 2) std::memcpy(m.statistics + 2 * (tokens + q), m.statistics + 2 * q, 8);
      }
    }
  }

  void statistics_of(int64_t i) const {
    row_statistics(m.r + i * s.stride, s.width, kEps, m.statistics[2 * i], m.statistics[2 * i + 1]);
  }

  // The learned deviation of the noise: from its variance, or from the logarithm of that.
  static V deviation(const float* table, const float* variance) {
    V fraction = (load(variance) + set(1.0F)) * set(0.5F);
    fraction = min(set(table[kFractionMax]), max(set(table[kFractionMin]), fraction));
    const V mixed = fma(fraction, set(table[kHigh] - table[kLow]), set(table[kLow]));
    if (table[kLinear] != 0.0F) return square_root(max(set(0.0F), mixed));
    return exponential(set(0.5F) * mixed);
  }

  // x = a x + b x0 + c x0_previous + s n, for this task's tokens.
  void update(const float* table, const float* noise) const {
    const int64_t stride = s.out_panels * kBlock;
    const bool noisy = table[kNoise] != 0.0F;
    for (int64_t i = 0; i < tokens; ++i) {
      const float* conditional = m.out + i * stride;
      const float* free = conditional + tokens * stride;
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
          const V sigma = set(table[kNoise]) * deviation(table, conditional + s.eps_columns + p);
          next = fma(sigma, load_part(noise + (first + i) * s.channels + p, count), next);
        }
        store_part(m.x0 + i * s.channels + p, x0, count);
        store_part(m.x + i * s.channels + p, next, count);
      }
    }
  }

  // The modulations of steps t .. t + count - 1, which do not depend on x: few rows of many steps
  // are as many rows, and the weights are read once for them.
  void modulate_ahead(const W* weights, const float* vectors, int64_t t, int64_t count) const {
    for (int64_t q = 0; q < count; ++q) {
      activate(args.time_TW + (t + q) * s.width, m.y + q * operand);
    }
    float* kept = m.kept;
    for (int64_t block = 0; block < s.depth; ++block) {
      product(m.y, weights, s.modulation_panels(), Keep{kept, ahead * rows}, count);
      product(m.y, weights + s.modulation_panels() * s.w, s.panels,
              KeepGate<A>{vectors + 2 * s.width, m.gate + block * ahead * operand, depth}, count);
      kept += s.modulation_panels() * ahead * rows * kBlock;
      weights += s.block_weights();
      vectors += s.block_vectors();
    }
    product(m.y, weights, s.panels, Keep{kept, ahead * rows}, count);
  }

  // One diffusion step, number q of those whose modulations are known. `weights` and `vectors`
  // start at the first block's.
  void step(const W* weights, const float* vectors, int64_t t, int64_t q) const {
    const bool known = ahead > 1;
    const A* const y = m.y + q * operand;
    const float* kept = m.kept;
    project(args.vectors + 3 * s.columns, args.vectors + 2 * s.columns);
    for (int64_t block = 0; block < s.depth; ++block) {
      if (block > 0) all_statistics();
      const Modulate<A> modulate{m.r, m.statistics, vectors, m.h, s.stride, depth};
      const float* const bias = vectors + 2 * s.width;  // b_g, b_1, b_2
      A* const gate = m.gate + (known ? (block * ahead + q) * operand : 0);
      if (known) {
        resume(kept, q, s.modulation_panels(), modulate);
        kept += s.modulation_panels() * ahead * rows * kBlock;
      } else {
        product(y, weights, s.modulation_panels(), modulate);
        product(y, weights + s.modulation_panels() * s.w, s.panels, KeepGate<A>{bias, gate, depth});
      }
      weights += (s.modulation_panels() + s.panels) * s.w;
      product(m.h, weights, s.panels, Silu<A>{bias + s.columns, m.g, depth});
      weights += s.panels * s.w;
      product(m.g, weights, s.panels, Gate<A>{bias + 2 * s.columns, gate, m.r, s.stride, depth});
      weights += s.panels * s.w;
      vectors += s.block_vectors();
    }
    all_statistics();
    const Scale<A> scale{m.r, m.statistics, vectors, m.h, s.stride, depth};
    if (known) {
      resume(kept, q, s.panels, scale);
    } else {
      product(y, weights, s.panels, scale);
    }
    weights += s.panels * s.w;
    const Segment<M> both[2] = {by_width(m.h, weights, 2 * s.w),
                                by_width(y, weights + s.w, 2 * s.w)};
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
    std::memset(m.y, 0, sizeof(A) * static_cast<size_t>(ahead * operand));
    std::memset(m.h, 0, sizeof(A) * static_cast<size_t>(operand));
    std::memset(m.g, 0, sizeof(A) * static_cast<size_t>(operand));
    condition(weights, args.vectors);
    const size_t numbers = static_cast<size_t>(tokens * s.channels);
    std::memcpy(m.x, args.initial_NP + first * s.channels, numbers * sizeof(float));
    std::memset(m.x0, 0, numbers * sizeof(float));
    const W* const first_block = weights + s.panels * panel_size(s.condition);
    const float* const block_vectors = args.vectors + s.first_vectors();
    for (int64_t t = 0; t < args.steps; t += ahead) {
      const int64_t count = smaller(ahead, args.steps - t);
      if (ahead > 1) {
        modulate_ahead(first_block, block_vectors, t, count);
      } else {
        activate(args.time_TW + t * s.width, m.y);
      }
      for (int64_t q = 0; q < count; ++q) step(first_block, block_vectors, t + q, q);
    }
    std::memcpy(args.out_NP + first * s.channels, m.x, numbers * sizeof(float));
  }
};

template <class M>
int64_t scratch_of_task(const fastfar_denoise_loop_args& args) {
  return Buffers<M>(Sizes(args), args.rows_per_task, args.halves, args.steps_ahead, nullptr).bytes;
}

template <class M>
void run_all(const fastfar_denoise_loop_args& args) {
  const Sizes sizes(args);
  const int64_t bytes = scratch_of_task<M>(args);
  const int64_t tasks = ceil_div(args.rows, args.rows_per_task);
  parallel_for(args.threads, tasks, [&](int64_t task, int32_t worker) {
    const int64_t first = task * args.rows_per_task;
    const int64_t tokens = smaller(args.rows_per_task, args.rows - first);
    const Buffers<M> buffers(sizes, tokens, args.halves, args.steps_ahead,
                             static_cast<char*>(args.scratch) + worker * bytes);
    const TileScope tiles;
    Task<M>(args, sizes, buffers, first, tokens).run();
  });
}

}  // namespace

int64_t denoise_loop_scratch(const fastfar_denoise_loop_args& args) {
  return args.threads * (args.dtype == FASTFAR_FLOAT32 ? scratch_of_task<Float32>(args)
                                                       : scratch_of_task<Bfloat16>(args));
}

int32_t denoise_loop(const fastfar_denoise_loop_args& args) {
  const int64_t sizes[] = {args.rows,        args.width,           args.channels,
                           args.steps,       args.condition_width, args.rows_per_task,
                           args.steps_ahead, args.threads};
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
