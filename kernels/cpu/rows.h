// Rows of activations: LayerNorm statistics, and normalised rows as an A operand (see gemm.h).
// Included by kernel sources only.
#ifndef FASTFAR_KERNELS_CPU_ROWS_H_
#define FASTFAR_KERNELS_CPU_ROWS_H_

#include "gemm.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

// Mean and 1 / sqrt(variance + eps) of n >= 1 numbers, the variance being that of the population.
// Two passes: the second one sums deviations from the first one's mean, and corrects both results
// by the mean that is left in the deviations, so that a large offset of the row costs no digits.
inline void row_statistics(const float* x, int64_t n, float eps, float& mean, float& rstd) {
  const float count = static_cast<float>(n);
  const int64_t whole = n / kLanes * kLanes;
  int64_t i = 0;
  V s0 = set(0.0F), s1 = s0, s2 = s0, s3 = s0;
  for (; i + 4 * kLanes <= whole; i += 4 * kLanes) {
    s0 = s0 + load(x + i);
    s1 = s1 + load(x + i + kLanes);
    s2 = s2 + load(x + i + 2 * kLanes);
    s3 = s3 + load(x + i + 3 * kLanes);
  }
  for (; i < whole; i += kLanes) s0 = s0 + load(x + i);
  float total = sum((s0 + s1) + (s2 + s3));
  for (; i < n; ++i) total += x[i];
  const float first = total / count;

  const V center = set(first);
  V d0 = set(0.0F), d1 = d0, q0 = d0, q1 = d0;  // deviations and their squares
  for (i = 0; i + 2 * kLanes <= whole; i += 2 * kLanes) {
    const V a = load(x + i) - center, b = load(x + i + kLanes) - center;
    d0 = d0 + a;
    d1 = d1 + b;
    q0 = fma(a, a, q0);
    q1 = fma(b, b, q1);
  }
  for (; i < whole; i += kLanes) {
    const V a = load(x + i) - center;
    d0 = d0 + a;
    q0 = fma(a, a, q0);
  }
  float left = sum(d0 + d1), squares = sum(q0 + q1);
  for (; i < n; ++i) {
    const float a = x[i] - first;
    left += a;
    squares += a * a;
  }
  const float shift = left / count;
  const float variance = squares / count - shift * shift;
  mean = first + shift;
  rstd = 1.0F / __builtin_sqrtf((variance > 0.0F ? variance : 0.0F) + eps);
}

// Row `row` of an A operand of `depth` k tiles: (x - mean) rstd weight + bias, zero from n on.
// weight and bias may be null (1 and 0).
template <class A>
inline void write_normalised(A* a, int64_t depth, int64_t row, const float* x, int64_t n,
                             float mean, float rstd, const float* weight, const float* bias) {
  const V center = set(mean), factor = set(rstd);
  for (int64_t k = 0; k < depth; ++k) {
    A* out = at(a, depth, row, k * kDepth);
    for (int64_t i = 0; i < kDepth; i += kLanes) {
      const int64_t column = k * kDepth + i, count = n - column;
      if (count <= 0) {
        store(out + i, set(0.0F));
        continue;
      }
      V y = (load_part(x + column, count) - center) * factor;
      if (weight != nullptr) y = y * load_part(weight + column, count);
      if (bias != nullptr) y = y + load_part(bias + column, count);
      if (count < kLanes) {  // behind the last number y is -mean rstd: zero it
        alignas(64) float part[kLanes];
        store(part, y);
        y = load_part(part, count);
      }
      store(out + i, y);
    }
  }
}

// Activations of either dtype (FASTFAR_FLOAT32 or FASTFAR_BFLOAT16), by index.
struct Numbers {
  void* p;
  int32_t dtype;

  V get(int64_t index, int64_t count) const {
    return dtype == FASTFAR_FLOAT32 ? load_part(static_cast<const float*>(p) + index, count)
                                    : load_part(static_cast<const bf16*>(p) + index, count);
  }
  // Asks for the line of a number that will be read, or be written.
  void expect(int64_t index) const { prefetch(static_cast<const char*>(p) + bytes(index)); }
  void expect_to_write(int64_t index) const {
    prefetch_to_write(static_cast<char*>(p) + bytes(index));
  }
  int64_t bytes(int64_t index) const { return dtype == FASTFAR_FLOAT32 ? 4 * index : 2 * index; }
  void put(int64_t index, V x, int64_t count) const {
    if (dtype == FASTFAR_FLOAT32) {
      store_part(static_cast<float*>(p) + index, x, count);
    } else {
      store_part(static_cast<bf16*>(p) + index, x, count);
    }
  }
};

// a = LN(x) weight + bias for all rows of x_MK. `buffers` has room for a row of padded_columns(k)
// float32 per thread; bfloat16 rows are widened there.
template <class A>
inline void normalise(int32_t threads, int64_t rows, int64_t k, const Numbers& x_MK,
                      const float* weight, const float* bias, float eps, A* a, float* buffers) {
  const int64_t depth = depth_of(k);
  parallel_for(threads, ceil_div(rows, kTile), [&](int64_t task, int32_t worker) {
    float* buffer = buffers + worker * padded_columns(k);
    for (int64_t row = task * kTile; row < smaller(rows, (task + 1) * kTile); ++row) {
      const float* x = static_cast<const float*>(x_MK.p) + row * k;
      if (x_MK.dtype != FASTFAR_FLOAT32) {
        for (int64_t i = 0; i < k; i += kLanes) store(buffer + i, x_MK.get(row * k + i, k - i));
        x = buffer;
      }
      float mean, rstd;
      row_statistics(x, k, eps, mean, rstd);
      write_normalised(a, depth, row, x, k, mean, rstd, weight, bias);
    }
  });
}

// out = x + (c + bias) for 32 columns of a row, fewer at the end of it. Rows are far apart in
// memory and come in blocks of 32: the same columns of the next block are fetched meanwhile.
inline void add_residual(const Numbers& x, const Numbers& out, const float* bias, int64_t row,
                         int64_t column, int64_t width, const float* c) {
  for (int64_t i = 0; i < kBlock && column + i < width; i += kLanes) {
    const int64_t count = width - column - i, place = row * width + column + i;
    if (i % 16 == 0) {
      x.expect(place + kBlock * width);
      out.expect_to_write(place + kBlock * width);
    }
    const V sum = load(c + i) + load_part(bias + column + i, count);
    out.put(place, x.get(place, count) + sum, count);
  }
}

}  // namespace
}  // namespace FASTFAR_TARGET
}  // namespace fastfar

#endif  // FASTFAR_KERNELS_CPU_ROWS_H_
