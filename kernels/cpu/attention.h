// Softmax attention of one head over a few queries: softmax(q k^T / sqrt E) v. Keys and values are
// packed as the weights of two products (see gemm.h), of which the first gives scores in float32,
// for 32 or more queries at once, and the second takes their exponentials as its A operand.
// Included by kernel sources only.
#ifndef FASTFAR_KERNELS_CPU_ATTENTION_H_
#define FASTFAR_KERNELS_CPU_ATTENTION_H_

#include "linear.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

constexpr int64_t kQueryBlocks = 4;         // at most, computed together
constexpr int64_t kScoreBytes = 512 << 10;  // of a core's L2

// How attention over (batch, length, 3, heads, width) is cut: tasks are (image, head, queries).
struct AttentionPlan {
  int64_t batch, length, heads, width;
  int64_t keys;           // padded
  int64_t blocks;         // of 32 queries, computed together
  int64_t splits, split;  // of the queries of a head; groups of `blocks` blocks in one
  AttentionPlan(int32_t threads, int64_t b, int64_t s, int64_t h, int64_t e)
      : batch(b), length(s), heads(h), width(e), keys(padded_columns(s)) {
    const int64_t total = ceil_div(s, kBlock);
    const int64_t most = kScoreBytes / (kBlock * keys * static_cast<int64_t>(sizeof(float)));
    blocks = smaller(total, smaller(kQueryBlocks, larger(1, most)));
    const int64_t sets = ceil_div(total, blocks);
    const int64_t wanted = threads > 1 ? ceil_div(kTasksPerThread * threads, b * h) : 1;
    split = ceil_div(sets, smaller(sets, wanted));
    splits = ceil_div(sets, split);
  }
  int64_t tasks() const { return batch * heads * splits; }
};

// What one thread works in.
template <class M>
struct AttentionScratch {
  typename M::W *keys, *values;
  typename M::A *queries, *weights;
  float *scores, *mask, *inverse_sums;

  AttentionScratch(const AttentionPlan& plan, Arena& arena) {
    const int64_t rows = plan.blocks * kBlock;
    keys = arena.take<typename M::W>(plan.keys * padded_columns(plan.width));
    values = arena.take<typename M::W>(plan.keys * padded_columns(plan.width));
    queries = arena.take<typename M::A>(operand_size(rows, plan.width));
    weights = arena.take<typename M::A>(operand_size(rows, plan.keys));
    scores = arena.take<float>(rows * plan.keys);
    mask = arena.take<float>(plan.keys);
    inverse_sums = arena.take<float>(rows);
  }
  static int64_t bytes(const AttentionPlan& plan) {
    Arena arena{nullptr};
    const AttentionScratch unused(plan, arena);
    static_cast<void>(unused);
    return arena.used;
  }
};

// Where number `i` of 32 inputs and output `j` of 32 lie in a step of a panel.
inline int64_t place_in_panel(const float*, int64_t i, int64_t j) { return i * kBlock + j; }
inline int64_t place_in_panel(const bf16*, int64_t i, int64_t j) {
  return j / kTile * kTileSize + (i / 2 * kTile + j % kTile) * 2 + i % 2;
}

// One step of a panel, number by number: out(i, j) = x[i * stride_i + j * stride_j], 0 outside.
template <class T, class W>
inline void pack_step(const T* x, int64_t stride_i, int64_t count_i, int64_t stride_j,
                      int64_t count_j, W* out) {
  for (int64_t i = 0; i < kDepth; ++i) {
    for (int64_t j = 0; j < kBlock; ++j) {
      const bool inside = i < count_i && j < count_j;
      store_one(out + place_in_panel(out, i, j),
                inside ? to_float(x[i * stride_i + j * stride_j]) : 0.0F);
    }
  }
}

// Keys: inputs are the numbers of a head, outputs the positions.
template <class T, class W>
inline void pack_keys(const T* x, int64_t stride, int64_t width, int64_t count, W* out) {
  pack_step(x, 1, width, stride, count, out);
}
#if defined(__AVX512F__)
inline void pack_keys(const bf16* x, int64_t stride, int64_t width, int64_t count, bf16* out) {
  if (width % 2 != 0 || stride % 2 != 0) return pack_step(x, 1, width, stride, count, out);
  for (int64_t j = 0; j < kBlock; j += kTile) {
    transpose_words(x + j * stride, stride / 2, count - j, smaller(kTile, width / 2),
                    out + j / kTile * kTileSize, kTile);
  }
}
inline void pack_keys(const float* x, int64_t stride, int64_t width, int64_t count, float* out) {
  for (int64_t j = 0; j < kBlock; j += kTile) {
    for (int64_t i = 0; i < kDepth; i += kTile) {
      transpose_words(x + j * stride + i, stride, count - j, larger(0, smaller(kTile, width - i)),
                      out + i * kBlock + j, kBlock);
    }
  }
}
#endif

// Values: inputs are the positions, outputs the numbers of a head.
template <class T, class W>
inline void pack_values(const T* x, int64_t stride, int64_t width, int64_t count, W* out) {
  pack_step(x, stride, count, 1, width, out);
}
inline void pack_values(const bf16* x, int64_t stride, int64_t width, int64_t count, bf16* out) {
  for (int64_t j = 0; j < kBlock; j += kTile) {
    for (int64_t i = 0; i < kDepth; i += 2) {
      const bf16* even = i < count ? x + i * stride + j : nullptr;
      const bf16* odd = i + 1 < count ? x + (i + 1) * stride + j : nullptr;
      interleave(even, odd, width - j, out + j / kTile * kTileSize + i * kTile);
    }
  }
}

// Scores of some queries in blocks of 32 x 32, those of a panel of 32 keys side by side.
struct Scores {
  const float* c;
  int64_t panels, blocks;
  int64_t open;       // panels without a masked key
  const float* mask;  // per key: 0, or -infinity where it is masked
  float factor;       // log2 e / sqrt E

  V get(int64_t row, int64_t panel, int64_t i) const {
    const int64_t block = panel * blocks + row / kBlock;
    const V x = load(c + block * kBlock * kBlock + row % kBlock * kBlock + i);
    return panel < open ? x : x + load(mask + panel * kBlock + i);
  }
};

// Two rows of an A operand, so that more is under way at once: weights = exp((scores - their
// maximum) / sqrt E), inverse_sums = 1 / their sum, or 0 where all keys are masked.
template <class A>
inline void softmax_rows(const Scores& scores, const int64_t (&row)[2], A* weights,
                         float* inverse_sums) {
  V top[2][2];
  for (int r = 0; r < 2; ++r) top[r][0] = top[r][1] = set(-__builtin_inff());
  for (int64_t panel = 0; panel < scores.panels; ++panel) {
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      V* const m = top[i / kLanes % 2];
      for (int r = 0; r < 2; ++r) m[r] = max(m[r], scores.get(row[r], panel, i));
    }
  }
  const V factor = set(scores.factor);
  V shift[2], sums[2];
  bool none[2];
  for (int r = 0; r < 2; ++r) {
    const float most = largest(max(top[0][r], top[1][r]));
    none[r] = most < -3.0e38F;
    shift[r] = set(none[r] ? 0.0F : -most * scores.factor);
    sums[r] = set(0.0F);
  }
  for (int64_t panel = 0; panel < scores.panels; ++panel) {
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      for (int r = 0; r < 2; ++r) {
        const V x = fma(scores.get(row[r], panel, i), factor, shift[r]);
        V p = power_of_two(x);
        if (panel >= scores.open) p = select_less(x, set(-126.0F), set(0.0F), p);
        sums[r] = sums[r] + p;
        store(at(weights, scores.panels, row[r], panel * kBlock) + i, p);
      }
    }
  }
  for (int r = 0; r < 2; ++r) inverse_sums[row[r]] = none[r] ? 0.0F : 1.0F / sum(sums[r]);
}

// Calls write(row, column, count, values, factor): numbers `column`, ..., `column` + `count` - 1
// (count <= 32) of row b * length + s of the output are factor * values[0], .... A TileScope must
// be alive.
template <class M, class T, class Write>
inline void attend(const AttentionPlan& plan, const T* qkv_BS3HE, const uint8_t* mask_BS,
                   int64_t task, const AttentionScratch<M>& scratch, const Write& write) {
  const int64_t length = plan.length, width = plan.width, depth = depth_of(width);
  const int64_t stride = 3 * plan.heads * width, key_depth = depth_of(plan.keys);
  const int64_t group0 = task % plan.splits * plan.split;
  const int64_t head = task / plan.splits % plan.heads, image = task / plan.splits / plan.heads;
  const T* q = qkv_BS3HE + image * length * stride + head * width;
  const T* k = q + plan.heads * width;
  const T* v = k + plan.heads * width;

  for (int64_t s = 0; s < plan.keys; s += kBlock) {
    const int64_t count = smaller(kBlock, length - s);
    for (int64_t e = 0; e < depth; ++e) {
      const int64_t inside = smaller(kDepth, width - e * kDepth);
      pack_keys(k + s * stride + e * kDepth, stride, inside, count,
                scratch.keys + (s / kBlock * depth + e) * kPanelStep);
      pack_values(v + s * stride + e * kDepth, stride, inside, count,
                  scratch.values + (e * key_depth + s / kDepth) * kPanelStep);
    }
    for (int64_t j = s; j < s + kBlock; ++j) {
      const bool kept = j < length && (mask_BS == nullptr || mask_BS[image * length + j] != 0);
      scratch.mask[j] = kept ? 0.0F : -__builtin_inff();
    }
  }

  const float factor = 1.44269504F / __builtin_sqrtf(static_cast<float>(width));
  for (int64_t group = group0; group < group0 + plan.split; ++group) {
    const int64_t first = group * plan.blocks * kBlock;
    const int64_t rows = smaller(plan.blocks * kBlock, length - first);
    if (rows <= 0) break;
    const int64_t blocks = ceil_div(rows, kBlock);
    for (int64_t row = 0; row < rows; ++row) {
      const T* x = q + (first + row) * stride;
      for (int64_t e = 0; e < depth * kDepth; e += kLanes) {
        const V part = e < width ? load_part(x + e, width - e) : set(0.0F);
        store(at(scratch.queries, depth, row, e), part);
      }
    }
    const Segment<M> score = {scratch.queries, scratch.keys, depth, depth * kTileSize,
                              depth * kPanelStep};
    NoEpilogue none;
    multiply(&score, 1, blocks, 0, key_depth, none, scratch.scores, false, true);
    const Scores scores{scratch.scores, key_depth, blocks, mask_BS == nullptr ? length / kBlock : 0,
                        scratch.mask,   factor};
    for (int64_t row = 0; row < rows; row += 2) {
      softmax_rows(scores, {row, smaller(row + 1, rows - 1)}, scratch.weights,
                   scratch.inverse_sums);
    }
    const Segment<M> mix = {scratch.weights, scratch.values, key_depth, key_depth * kTileSize,
                            key_depth * kPanelStep};
    const auto hand_over = [&](int64_t row, int64_t column, const float* c) {
      write(image * length + first + row, head * width + column, smaller(kBlock, width - column), c,
            scratch.inverse_sums[row]);
    };
    EachRow<decltype(hand_over)> epilogue{hand_over, 0, rows};
    multiply(&mix, 1, blocks, 0, depth, epilogue);
  }
}

}  // namespace
}  // namespace FASTFAR_TARGET
}  // namespace fastfar

#endif  // FASTFAR_KERNELS_CPU_ATTENTION_H_
