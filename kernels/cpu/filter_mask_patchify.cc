// filter_mask_patchify: x_i = A_i x A_i^T per channel, masked tokens zero, written in token order.
//
// A task is an image's block of channels. Every channel is copied to scratch as float32 once; then
// the rows of A x A^T are made four at a time in registers, only those that hold a visible token,
// and scattered into the tokens. Level 0 and the identity levels skip the products. The backward
// operation is the adjoint, A_i^T g A_i of the visible tokens' gradients.
#include "gemm.h"
#include "ops.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

constexpr int64_t kRows = 4;       // rows of a product that share the loads of its right factor
constexpr int64_t kChannels = 16;  // of a task

// Both operations have these fields; `in` is the latent (forward) or the tokens (backward).
struct Sizes {
  int64_t channels, size, stride, patch, grid, levels;
  const float *left, *right;  // tables of matrices: y = left x right
  const int64_t* level_B;
  const uint8_t* mask_BL;

  int64_t token_numbers() const { return channels * patch * patch; }
  int64_t image_numbers() const { return channels * size * size; }
  bool masked(int64_t image, int64_t y, int64_t x) const {
    return mask_BL != nullptr && mask_BL[(image * grid + y) * grid + x] != 0;
  }
  bool row_masked(int64_t image, int64_t y) const {
    for (int64_t x = 0; x < grid; ++x) {
      if (!masked(image, y, x)) return false;
    }
    return true;
  }
  // Where the patch (y, x) of a channel starts in the tokens of an image.
  int64_t token_at(int64_t y, int64_t x, int64_t channel) const {
    return (y * grid + x) * token_numbers() + channel * patch * patch;
  }
  const float* matrix(const float* table, int64_t level) const {
    return table + level * size * stride;
  }
};

// out_r = sum over k of factor_r[k] x_k for kRows rows; x has `size` rows of `stride` numbers.
void product(const float* const* factor, const float* x, int64_t size, int64_t stride, float* out) {
  for (int64_t column = 0; column < stride; column += kLanes) {
    V sums[kRows];
    for (V& sum : sums) sum = set(0.0F);
    for (int64_t k = 0; k < size; ++k) {
      const V row = load(x + k * stride + column);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; ++r) sums[r] = fma(set(factor[r][k]), row, sums[r]);
    }
    for (int64_t r = 0; r < kRows; ++r) store(out + r * stride + column, sums[r]);
  }
}

// The rows of y = left x right that are asked for, in groups: emit(row, y's row) for each.
template <class Emit>
class Rows {
 public:
  Rows(const Sizes& sizes, int64_t level, const float* x, float* scratch, const Emit& emit)
      : sizes_(sizes),
        left_(sizes.matrix(sizes.left, level)),
        right_(sizes.matrix(sizes.right, level)),
        x_(x),
        scratch_(scratch),
        emit_(emit) {}

  void add(int64_t row) {
    rows_[count_++] = row;
    if (count_ == kRows) flush();
  }
  void flush() {
    if (count_ == 0) return;
    const int64_t stride = sizes_.stride;
    const float* factor[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      factor[r] = left_ + rows_[smaller(r, count_ - 1)] * stride;
    }
    product(factor, x_, sizes_.size, stride, scratch_);
    for (int64_t r = 0; r < kRows; ++r) factor[r] = scratch_ + r * stride;
    float* y = scratch_ + kRows * stride;
    product(factor, right_, sizes_.size, stride, y);
    for (int64_t r = 0; r < count_; ++r) emit_(rows_[r], y + r * stride);
    count_ = 0;
  }

 private:
  const Sizes& sizes_;
  const float *left_, *right_, *x_;
  float* scratch_;
  const Emit& emit_;
  int64_t rows_[kRows] = {};
  int64_t count_ = 0;
};

// One row of a channel into the visible tokens it belongs to.
template <class T, class S>
void scatter_row(const Sizes& s, int64_t image, int64_t channel, int64_t row, const S* y,
                 T* tokens) {
  const int64_t grid_y = row / s.patch;
  for (int64_t x = 0; x < s.grid; ++x) {
    if (s.masked(image, grid_y, x)) continue;
    T* out = tokens + s.token_at(grid_y, x, channel) + row % s.patch * s.patch;
    for (int64_t j = 0; j < s.patch; ++j) store_one(out + j, to_float(y[x * s.patch + j]));
  }
}

// The other way round: one row of a channel from the tokens, 0 where they are masked.
template <class T, class S>
void gather_row(const Sizes& s, int64_t image, int64_t channel, int64_t row, const T* tokens,
                S* y) {
  const int64_t grid_y = row / s.patch;
  for (int64_t x = 0; x < s.grid; ++x) {
    const T* in = tokens + s.token_at(grid_y, x, channel) + row % s.patch * s.patch;
    const bool masked = s.masked(image, grid_y, x);
    for (int64_t j = 0; j < s.patch; ++j) {
      store_one(y + x * s.patch + j, masked ? 0.0F : to_float(in[j]));
    }
  }
}

template <class T>
void forward(const Sizes& s, int64_t image, int64_t channel, const T* latent, T* tokens,
             float* scratch) {
  const int64_t patch = s.patch, level = s.level_B[image];
  const T* x = latent + channel * s.size * s.size;
  for (int64_t grid_y = 0; grid_y < s.grid; ++grid_y) {
    for (int64_t grid_x = 0; grid_x < s.grid; ++grid_x) {
      if (level != 0 && !s.masked(image, grid_y, grid_x)) continue;
      T* out = tokens + s.token_at(grid_y, grid_x, channel);
      for (int64_t i = 0; i < patch * patch; ++i) store_one(out + i, 0.0F);
    }
  }
  if (level == 0) return;
  const bool identity = level < 0 || level == s.levels;
  float* work = scratch + s.size * s.stride;
  if (!identity) {
    for (int64_t i = 0; i < s.size * s.stride; ++i) {
      const int64_t row = i / s.stride, column = i % s.stride;
      scratch[i] = column < s.size ? to_float(x[row * s.size + column]) : 0.0F;
    }
  }
  const auto emit = [&](int64_t row, const float* y) {
    scatter_row(s, image, channel, row, y, tokens);
  };
  Rows<decltype(emit)> rows(s, identity ? 0 : level, scratch, work, emit);
  for (int64_t grid_y = 0; grid_y < s.grid; ++grid_y) {
    if (s.row_masked(image, grid_y)) continue;
    for (int64_t row = grid_y * patch; row < (grid_y + 1) * patch; ++row) {
      if (identity) {
        scatter_row(s, image, channel, row, x + row * s.size, tokens);
      } else {
        rows.add(row);
      }
    }
  }
  rows.flush();
}

template <class T>
void backward(const Sizes& s, int64_t image, int64_t channel, const T* tokens, T* latent,
              float* scratch) {
  const int64_t level = s.level_B[image];
  T* out = latent + channel * s.size * s.size;
  if (level == 0) {
    for (int64_t i = 0; i < s.size * s.size; ++i) store_one(out + i, 0.0F);
    return;
  }
  if (level < 0 || level == s.levels) {
    for (int64_t row = 0; row < s.size; ++row) {
      gather_row(s, image, channel, row, tokens, out + row * s.size);
    }
    return;
  }
  for (int64_t row = 0; row < s.size; ++row) {
    float* to = scratch + row * s.stride;
    gather_row(s, image, channel, row, tokens, to);
    for (int64_t column = s.size; column < s.stride; ++column) to[column] = 0.0F;
  }
  const auto emit = [&](int64_t row, const float* y) {
    for (int64_t column = 0; column < s.size; ++column) {
      store_one(out + row * s.size + column, y[column]);
    }
  };
  Rows<decltype(emit)> rows(s, level, scratch, scratch + s.size * s.stride, emit);
  for (int64_t row = 0; row < s.size; ++row) rows.add(row);
  rows.flush();
}

// Numbers of scratch per thread: a channel, kRows rows of left x, kRows rows of the result.
template <class Args>
int64_t scratch_numbers(const Args& args) {
  return (args.size + 2 * kRows) * args.stride;
}

template <class Args>
bool valid(const Args& args) {
  if (args.batch < 0 || args.channels < 1 || args.size < 1 || args.patch < 1 || args.levels < 1 ||
      args.size % args.patch != 0 || args.stride < args.size || args.stride % 16 != 0 ||
      args.threads < 1 || (args.dtype != FASTFAR_FLOAT32 && args.dtype != FASTFAR_BFLOAT16)) {
    return false;
  }
  if (args.matrices == nullptr || args.transposed == nullptr || args.level_B == nullptr ||
      args.latent_BCHW == nullptr || args.tokens_BLP == nullptr || args.scratch == nullptr) {
    return false;
  }
  for (int64_t image = 0; image < args.batch; ++image) {
    if (args.level_B[image] < -1 || args.level_B[image] > args.levels) return false;
  }
  return true;
}

// Calls f(sizes, image, channel, scratch) for every channel of every image.
template <class Args, class F>
void each_channel(const Args& args, const float* left, const float* right, const F& f) {
  const Sizes sizes = {args.channels, args.size, args.stride, args.patch,   args.size / args.patch,
                       args.levels,   left,      right,       args.level_B, args.mask_BL};
  const int64_t blocks = ceil_div(args.channels, kChannels);
  parallel_for(args.threads, args.batch * blocks, [&](int64_t task, int32_t worker) {
    float* scratch = static_cast<float*>(args.scratch) + worker * scratch_numbers(args);
    const int64_t begin = task % blocks * kChannels;
    const int64_t end = smaller(args.channels, begin + kChannels);
    for (int64_t channel = begin; channel < end; ++channel) {
      f(sizes, task / blocks, channel, scratch);
    }
  });
}

template <class T>
void run_forward(const fastfar_filter_mask_patchify_args& args) {
  each_channel(args, args.matrices, args.transposed,
               [&](const Sizes& s, int64_t image, int64_t channel, float* scratch) {
                 const int64_t at = image * s.image_numbers();
                 forward(s, image, channel, static_cast<const T*>(args.latent_BCHW) + at,
                         static_cast<T*>(args.tokens_BLP) + at, scratch);
               });
}

template <class T>
void run_backward(const fastfar_filter_mask_patchify_backward_args& args) {
  each_channel(args, args.transposed, args.matrices,
               [&](const Sizes& s, int64_t image, int64_t channel, float* scratch) {
                 const int64_t at = image * s.image_numbers();
                 backward(s, image, channel, static_cast<const T*>(args.tokens_BLP) + at,
                          static_cast<T*>(args.latent_BCHW) + at, scratch);
               });
}

}  // namespace

int64_t filter_mask_patchify_scratch(const fastfar_filter_mask_patchify_args& args) {
  return scratch_numbers(args) * static_cast<int64_t>(sizeof(float));
}

int64_t filter_mask_patchify_backward_scratch(
    const fastfar_filter_mask_patchify_backward_args& args) {
  return scratch_numbers(args) * static_cast<int64_t>(sizeof(float));
}

int32_t filter_mask_patchify(const fastfar_filter_mask_patchify_args& args) {
  if (!valid(args)) return FASTFAR_ERROR_ARGUMENT;
  if (args.dtype == FASTFAR_FLOAT32) {
    run_forward<float>(args);
  } else {
    run_forward<bf16>(args);
  }
  return 0;
}

int32_t filter_mask_patchify_backward(const fastfar_filter_mask_patchify_backward_args& args) {
  if (!valid(args)) return FASTFAR_ERROR_ARGUMENT;
  if (args.dtype == FASTFAR_FLOAT32) {
    run_backward<float>(args);
  } else {
    run_backward<bf16>(args);
  }
  return 0;
}

}  // namespace FASTFAR_TARGET
}  // namespace fastfar
