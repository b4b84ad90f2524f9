// groupnorm_silu: y = GroupNorm(x), followed by SiLU if asked, on channels-last numbers.
//
// Two passes over memory. An image is cut into chunks of positions that fit into L1. The first pass
// takes the mean and the sum of squared deviations of every group in every chunk, reading the chunk
// twice from L1, so that no offset of the data costs digits; they are merged in double. The second
// pass applies y = silu((x - m) a + b), with m, a and b of every channel and image. The chunks
// depend on the sizes alone, so that the result does not depend on the number of threads.
#include "gemm.h"
#include "ops.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

constexpr int64_t kChunk = 8192;  // numbers of a chunk
constexpr int64_t kMaxRows = 64;  // positions of a chunk: the terms of a float32 sum
constexpr int64_t kVectors = 8;   // of channels, summed together

struct Plan {
  int64_t rows, chunks;   // positions per chunk, chunks per image
  float* moments;         // (image, chunk, group, 2)
  double* totals;         // (group, 2)
  float* factors;         // (image, 3, channel): m, a, b
  float* channels;        // of each worker
  int64_t channels_step;  // its numbers
  int64_t bytes;

  explicit Plan(const fastfar_groupnorm_silu_args& args) {
    rows = larger(1, smaller(kMaxRows, kChunk / larger(1, args.channels)));
    chunks = ceil_div(args.positions, rows);
    channels_step = 2 * ceil_div(args.channels, 16) * 16;
    Arena arena{static_cast<char*>(args.scratch)};
    moments = arena.take<float>(args.batch * chunks * args.groups * 2);
    totals = arena.take<double>(2 * args.groups);
    factors = arena.take<float>(3 * args.batch * args.channels);
    channels = arena.take<float>(args.threads * channels_step);
    bytes = arena.used;
  }
};

// out[c] = the sum over rows of x, or of (x - mean[c])^2, for N vectors of channels.
template <int64_t N, bool kSquares, class T>
inline void sum_columns(const T* x, int64_t stride, int64_t rows, int64_t part, const float* mean,
                        float* out) {
  V sums[N], centre[N];
#pragma GCC unroll 8
  for (int64_t v = 0; v < N; ++v) {
    sums[v] = set(0.0F);
    centre[v] = kSquares ? load(mean + v * kLanes) : set(0.0F);
  }
  for (int64_t row = 0; row < rows; ++row, x += stride) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < N; ++v) {
      const V value = N == 1 ? load_part(x, part) : load(x + v * kLanes);
      const V deviation = value - centre[v];
      sums[v] = kSquares ? fma(deviation, deviation, sums[v]) : sums[v] + value;
    }
  }
#pragma GCC unroll 8
  for (int64_t v = 0; v < N; ++v) store(out + v * kLanes, sums[v]);
}

// For all channels; mean and out have room for whole vectors.
template <bool kSquares, class T>
inline void sum_channels(const T* x, int64_t channels, int64_t rows, const float* mean,
                         float* out) {
  int64_t c = 0;
  for (; c + kVectors * kLanes <= channels; c += kVectors * kLanes) {
    sum_columns<kVectors, kSquares>(x + c, channels, rows, kLanes, mean + c, out + c);
  }
  for (; c < channels; c += kLanes) {
    sum_columns<1, kSquares>(x + c, channels, rows, channels - c, mean + c, out + c);
  }
}

// (mean, sum of squared deviations) of every group of one chunk.
template <class T>
void chunk_moments(const T* x, int64_t rows, int64_t channels, int64_t groups, float* mean,
                   float* sums, float* moments_G2) {
  const int64_t width = channels / groups;
  sum_channels<false>(x, channels, rows, mean, sums);
  for (int64_t g = 0; g < groups; ++g) {
    double total = 0.0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) total += static_cast<double>(sums[c]);
    moments_G2[2 * g] = static_cast<float>(total / static_cast<double>(rows * width));
    for (int64_t c = g * width; c < (g + 1) * width; ++c) mean[c] = moments_G2[2 * g];
  }
  sum_channels<true>(x, channels, rows, mean, sums);
  for (int64_t g = 0; g < groups; ++g) {
    double total = 0.0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) total += static_cast<double>(sums[c]);
    moments_G2[2 * g + 1] = static_cast<float>(total);
  }
}

// The chunks' moments become the image's factors: m = mean, a = weight / std, b = bias. What m
// loses by being rounded goes into b.
void merge(const fastfar_groupnorm_silu_args& args, const Plan& plan, int64_t image) {
  const float* moments = plan.moments + image * plan.chunks * args.groups * 2;
  const int64_t width = args.channels / args.groups;
  const double count = static_cast<double>(args.positions * width);
  for (int64_t i = 0; i < 2 * args.groups; ++i) plan.totals[i] = 0.0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t rows = smaller(plan.rows, args.positions - chunk * plan.rows);
      const double n = static_cast<double>(rows * width);
      for (int64_t g = 0; g < args.groups; ++g) {
        const float* moment = moments + 2 * (chunk * args.groups + g);
        double* total = plan.totals + 2 * g;
        if (pass == 0) {
          total[0] += n / count * static_cast<double>(moment[0]);
        } else {
          const double apart = static_cast<double>(moment[0]) - total[0];
          total[1] += static_cast<double>(moment[1]) + n * apart * apart;
        }
      }
    }
  }
  float* factors = plan.factors + 3 * image * args.channels;
  for (int64_t c = 0; c < args.channels; ++c) {
    const double* total = plan.totals + 2 * (c / width);
    const double variance = total[1] / count + static_cast<double>(args.eps);
    const double scale = static_cast<double>(args.weight_C[c]) / __builtin_sqrt(variance);
    const float mean = static_cast<float>(total[0]);
    const double lost = (total[0] - static_cast<double>(mean)) * scale;
    factors[c] = mean;
    factors[args.channels + c] = static_cast<float>(scale);
    factors[2 * args.channels + c] = static_cast<float>(static_cast<double>(args.bias_C[c]) - lost);
  }
}

template <bool kSilu, class T>
void apply(const T* x, T* y, int64_t rows, int64_t channels, const float* factors_3C) {
  const float *mean = factors_3C, *scale = mean + channels, *shift = scale + channels;
  const int64_t whole = channels / kLanes * kLanes, part = channels - whole;
  for (int64_t row = 0; row < rows; ++row, x += channels, y += channels) {
#pragma GCC unroll 4
    for (int64_t c = 0; c < whole; c += kLanes) {
      const V value = fma(load(x + c) - load(mean + c), load(scale + c), load(shift + c));
      store(y + c, kSilu ? silu_for(y, value) : value);
    }
    if (part != 0) {
      const V centred = load_part(x + whole, part) - load_part(mean + whole, part);
      const V value = fma(centred, load_part(scale + whole, part), load_part(shift + whole, part));
      store_part(y + whole, kSilu ? silu_for(y, value) : value, part);
    }
  }
}

template <class T>
void run(const fastfar_groupnorm_silu_args& args) {
  const Plan plan(args);
  const int64_t tasks = args.batch * plan.chunks;
  const auto first = [&](int64_t task) {
    return ((task / plan.chunks) * args.positions + task % plan.chunks * plan.rows) * args.channels;
  };
  const auto rows = [&](int64_t task) {
    return smaller(plan.rows, args.positions - task % plan.chunks * plan.rows);
  };
  // Threads take several chunks at a time, so that they rarely meet.
  const int64_t together = larger(1, smaller(16, tasks / (8 * larger(1, args.threads))));
  const auto each_chunk = [&](const auto& f) {
    parallel_for(args.threads, ceil_div(tasks, together), [&](int64_t block, int32_t worker) {
      const int64_t end = smaller(tasks, (block + 1) * together);
      for (int64_t task = block * together; task < end; ++task) f(task, worker);
    });
  };
  const T* x = static_cast<const T*>(args.x_BSC);
  T* y = static_cast<T*>(args.y_BSC);
  each_chunk([&](int64_t task, int32_t worker) {
    float* mean = plan.channels + worker * plan.channels_step;
    chunk_moments(x + first(task), rows(task), args.channels, args.groups, mean,
                  mean + plan.channels_step / 2, plan.moments + task * args.groups * 2);
  });
  for (int64_t image = 0; image < args.batch; ++image) merge(args, plan, image);
  each_chunk([&](int64_t task, int32_t) {
    const float* factors = plan.factors + task / plan.chunks * 3 * args.channels;
    const auto f = args.silu != 0 ? apply<true, T> : apply<false, T>;
    f(x + first(task), y + first(task), rows(task), args.channels, factors);
  });
}

}  // namespace

int64_t groupnorm_silu_scratch(const fastfar_groupnorm_silu_args& args) { return Plan(args).bytes; }

int32_t groupnorm_silu(const fastfar_groupnorm_silu_args& args) {
  if (args.batch < 0 || args.positions < 0 || args.groups < 1 || args.channels < 1 ||
      args.channels % args.groups != 0 || args.threads < 1) {
    return FASTFAR_ERROR_ARGUMENT;
  }
  if (args.x_BSC == nullptr || args.y_BSC == nullptr || args.scratch == nullptr ||
      args.weight_C == nullptr || args.bias_C == nullptr) {
    return FASTFAR_ERROR_ARGUMENT;
  }
  if (args.dtype == FASTFAR_FLOAT32) {
    run<float>(args);
  } else if (args.dtype == FASTFAR_BFLOAT16) {
    run<bf16>(args);
  } else {
    return FASTFAR_ERROR_ARGUMENT;
  }
  return 0;
}

}  // namespace FASTFAR_TARGET
}  // namespace fastfar
