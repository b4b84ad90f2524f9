// denoise_loop on every instruction set and in both arithmetics against the formulas of its source,
// in double, row by row. The folding of LayerNorm and of the final shift is tested in Python.
#include "common.h"

using test::as_used;
using test::Buffer;
using test::check;

namespace {

struct Sizes {
  int64_t rows, halves, width, depth, channels, condition, steps, rows_per_task, ahead;
};

int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A matrix (outputs, inputs) and the float32 numbers that go with it.
struct Matrix {
  std::vector<float> w;
  int64_t n, k;
  Matrix(test::Draws& draws, int64_t outputs, int64_t inputs, float scale) : n(outputs), k(inputs) {
    for (int64_t i = 0; i < n * k; ++i) w.push_back(draws.gauss(scale));
  }
  // w x with the weights that an arithmetic uses.
  std::vector<double> times(int32_t dtype, const std::vector<double>& x) const {
    std::vector<double> y(static_cast<size_t>(n), 0.0);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        y[static_cast<size_t>(i)] +=
            as_used(dtype, w[static_cast<size_t>(i * k + j)]) * x[static_cast<size_t>(j)];
      }
    }
    return y;
  }
};

struct Vector {
  std::vector<float> v;
  Vector(test::Draws& draws, int64_t used, int64_t padded, float scale, float mean = 0.0F) {
    for (int64_t i = 0; i < padded; ++i) v.push_back(i < used ? mean + draws.gauss(scale) : 0.0F);
  }
  double operator[](int64_t i) const { return static_cast<double>(v[static_cast<size_t>(i)]); }
};

double silu(double x) { return x / (1.0 + std::exp(-x)); }

// A head in the layout of fastfar/ops/_head.py.
struct Head {
  struct Block {
    Matrix modulation, gate, fc1, fc2;
    Vector modulation_bias, gate_bias, bias1, bias2;
  };
  const Sizes& s;
  int64_t columns, half_out, out_columns;
  Matrix condition;
  Vector base_bias, level_weight, input_bias;
  std::vector<Vector> input;
  std::vector<Block> blocks;
  Matrix scale, output, output_shift;
  Vector scale_bias, output_bias;

  Head(const Sizes& sizes, test::Draws& d)
      : s(sizes),
        columns(up(s.width, 32)),
        half_out(up(s.channels, 16)),
        out_columns(up(2 * half_out, 32)),
        condition(d, s.width, s.condition, 0.3F),
        base_bias(d, s.width, columns, 0.1F),
        level_weight(d, s.width, columns, 0.05F),
        input_bias(d, s.width, columns, 0.1F),
        scale(d, s.width, s.width, 0.1F),
        output(d, out_columns, s.width, 0.1F),
        output_shift(d, out_columns, s.width, 0.1F),
        scale_bias(d, s.width, columns, 0.1F, 1.0F),
        output_bias(d, out_columns, out_columns, 0.1F) {
    for (int64_t p = 0; p < s.channels; ++p) input.emplace_back(d, s.width, columns, 0.5F);
    for (int64_t b = 0; b < s.depth; ++b) {
      const int64_t w = s.width;
      blocks.push_back(Block{{d, 2 * w, w, 0.1F},
                             {d, w, w, 0.1F},
                             {d, w, w, 0.1F},
                             {d, w, w, 0.1F},
                             {d, 2 * w, 2 * w, 0.3F},
                             {d, w, columns, 0.1F},
                             {d, w, columns, 0.1F},
                             {d, w, columns, 0.1F}});
    }
  }

  Buffer<uint8_t> weights(int32_t dtype) const {
    std::vector<uint8_t> bytes;
    const auto add = [&](const float* w, int64_t n, int64_t k) {
      const Buffer<uint8_t> packed = test::pack(dtype, w, n, k);
      bytes.insert(bytes.end(), packed.data(), packed.data() + packed.size());
    };
    const auto append = [&](const Matrix& m) { add(m.w.data(), m.n, m.k); };
    append(condition);
    for (const Block& block : blocks) {
      append(block.modulation);
      append(block.gate);
      append(block.fc1);
      append(block.fc2);
    }
    append(scale);
    for (int64_t panel = 0; panel < out_columns; panel += 32) {
      add(output.w.data() + panel * s.width, 32, s.width);
      add(output_shift.w.data() + panel * s.width, 32, s.width);
    }
    Buffer<uint8_t> result(static_cast<int64_t>(bytes.size()));
    std::memcpy(result.data(), bytes.data(), bytes.size());
    return result;
  }

  Buffer<float> vectors() const {
    std::vector<float> all;
    const auto append = [&](const Vector& x) { all.insert(all.end(), x.v.begin(), x.v.end()); };
    append(base_bias);
    append(level_weight);
    append(input_bias);
    for (const Vector& row : input) append(row);
    for (const Block& block : blocks) {
      append(block.modulation_bias);
      append(block.gate_bias);
      append(block.bias1);
      append(block.bias2);
    }
    append(scale_bias);
    append(output_bias);
    Buffer<float> result(static_cast<int64_t>(all.size()));
    std::memcpy(result.data(), all.data(), all.size() * sizeof(float));
    return result;
  }

  std::vector<double> normalised(const std::vector<double>& x) const {
    double mean = 0.0, square = 0.0;
    for (double v : x) mean += v / static_cast<double>(x.size());
    for (double v : x) square += (v - mean) * (v - mean) / static_cast<double>(x.size());
    std::vector<double> result;
    for (double v : x) result.push_back((v - mean) / std::sqrt(square + 1e-6));
    return result;
  }

  // [eps | v] of one row.
  std::vector<double> forward(int32_t dtype, const float* z, const float* time, float level,
                              const std::vector<double>& x) const {
    std::vector<double> y = condition.times(dtype, {z, z + s.condition});
    std::vector<double> r;
    for (int64_t i = 0; i < s.width; ++i) {
      const size_t u = static_cast<size_t>(i);
      y[u] = silu(y[u] + base_bias[i] + static_cast<double>(level) * level_weight[i] +
                  static_cast<double>(time[i]));
      r.push_back(input_bias[i]);
      for (int64_t p = 0; p < s.channels; ++p) {
        r[u] += x[static_cast<size_t>(p)] * input[static_cast<size_t>(p)][i];
      }
    }
    for (const Block& block : blocks) {
      const std::vector<double> m = block.modulation.times(dtype, y);
      std::vector<double> h = normalised(r);
      for (int64_t i = 0; i < s.width; ++i) {  // 16 shifts, then 16 scales
        const int64_t shift = i / 16 * 32 + i % 16, scale_at = shift + 16;
        h[static_cast<size_t>(i)] *=
            m[static_cast<size_t>(scale_at)] + block.modulation_bias[scale_at];
        h[static_cast<size_t>(i)] += m[static_cast<size_t>(shift)] + block.modulation_bias[shift];
      }
      std::vector<double> g = block.fc1.times(dtype, h);
      for (int64_t i = 0; i < s.width; ++i) {
        g[static_cast<size_t>(i)] = silu(g[static_cast<size_t>(i)] + block.bias1[i]);
      }
      const std::vector<double> gate = block.gate.times(dtype, y), v = block.fc2.times(dtype, g);
      for (int64_t i = 0; i < s.width; ++i) {
        const size_t u = static_cast<size_t>(i);
        r[u] += (gate[u] + block.gate_bias[i]) * (v[u] + block.bias2[i]);
      }
    }
    const std::vector<double> m = scale.times(dtype, y);
    std::vector<double> h = normalised(r);
    for (int64_t i = 0; i < s.width; ++i) {
      h[static_cast<size_t>(i)] *= m[static_cast<size_t>(i)] + scale_bias[i];
    }
    std::vector<double> out = output.times(dtype, h);
    const std::vector<double> shift = output_shift.times(dtype, y);
    for (int64_t i = 0; i < out_columns; ++i) {
      out[static_cast<size_t>(i)] += shift[static_cast<size_t>(i)] + output_bias[i];
    }
    return out;
  }
};

constexpr int64_t kTableWidth = 11;

void run_case(const Sizes& s, int32_t dtype) {
  test::Draws draws(static_cast<uint64_t>(s.rows * 31 + s.width));
  const Head head(s, draws);
  const int64_t numbers = s.rows * s.channels;
  Buffer<float> z = draws.normal(s.halves * s.rows * s.condition);
  Buffer<float> time = draws.normal(s.steps * s.width, 0.5F);
  Buffer<float> initial = draws.normal(numbers), noise = draws.normal(s.steps * numbers);
  Buffer<float> table(kTableWidth * s.steps);
  for (int64_t t = 0; t < s.steps; ++t) {
    const bool last = t + 1 == s.steps;
    const bool linear = t % 2 == 1;  // variances with bounds, or their logarithms without
    const float row[kTableWidth] = {1.1F,
                                    0.3F,
                                    0.4F,
                                    0.5F,
                                    t > 0 ? 0.1F : 0.0F,
                                    linear ? 0.05F : -3.0F,
                                    linear ? 0.4F : -1.0F,
                                    last ? 0.0F : 0.9F,
                                    linear ? 1.0F : 0.0F,
                                    linear ? -0.3F : -INFINITY,
                                    linear ? 0.6F : INFINITY};
    std::memcpy(table.data() + kTableWidth * t, row, sizeof(row));
  }
  // The last noise must not be read.
  for (int64_t i = (s.steps - 1) * numbers; i < s.steps * numbers; ++i) noise[i] = NAN;
  Buffer<uint8_t> weights = head.weights(dtype);
  Buffer<float> vectors = head.vectors();

  fastfar_denoise_loop_args args = {};
  args.dtype = dtype;
  args.rows = s.rows;
  args.halves = s.halves;
  args.width = s.width;
  args.depth = s.depth;
  args.channels = s.channels;
  args.condition_width = s.condition;
  args.steps = s.steps;
  args.rows_per_task = s.rows_per_task;
  args.steps_ahead = s.ahead;
  args.weights = weights.data();
  args.vectors = vectors.data();
  args.condition_MD = z.data();
  args.time_TW = time.data();
  args.table = table.data();
  args.initial_NP = initial.data();
  args.noise_TNP = noise.data();
  args.level = 7.0F;
  args.guidance_scale = 2.5F;
  args.x0_low = -1.5F;
  args.x0_high = 2.0F;

  Buffer<float> first(numbers);
  for (int32_t threads = 1; threads <= 4; ++threads) {
    Buffer<float> out(numbers);
    args.threads = threads;
    Buffer<uint8_t> scratch(fastfar_denoise_loop_scratch(&args));
    args.out_NP = out.data();
    args.scratch = scratch.data();
    if (!check(fastfar_denoise_loop(&args) == 0, "refused %lld rows",
               static_cast<long long>(s.rows))) {
      return;
    }
    if (threads == 1)
      std::memcpy(first.data(), out.data(), sizeof(float) * static_cast<size_t>(numbers));
    check(out == first, "%d threads give another result", static_cast<int>(threads));
  }

  std::vector<double> exact;
  for (int64_t n = 0; n < s.rows; ++n) {
    std::vector<double> x, previous(static_cast<size_t>(s.channels), 0.0);
    for (int64_t p = 0; p < s.channels; ++p) {
      x.push_back(static_cast<double>(initial[n * s.channels + p]));
    }
    for (int64_t t = 0; t < s.steps; ++t) {
      const auto out = [&](int64_t half) {
        return head.forward(dtype, z.data() + (half * s.rows + n) * s.condition,
                            time.data() + t * s.width, args.level, x);
      };
      const std::vector<double> conditional = out(0), free = s.halves == 2 ? out(1) : conditional;
      const float* c = table.data() + kTableWidth * t;
      for (int64_t p = 0; p < s.channels; ++p) {
        const size_t u = static_cast<size_t>(p);
        const auto at = [c](int i) { return static_cast<double>(c[i]); };
        const double eps = free[u] + 2.5 * (conditional[u] - free[u]);
        const double x0 = std::fmin(2.0, std::fmax(-1.5, at(0) * x[u] - at(1) * eps));
        double next = at(2) * x[u] + at(3) * x0 + at(4) * previous[u];
        if (c[7] != 0.0F) {
          const double v = conditional[static_cast<size_t>(head.half_out) + u];
          const double fraction = std::fmin(at(10), std::fmax(at(9), (v + 1.0) / 2.0));
          const double mixed = at(5) + fraction * (at(6) - at(5));
          const double deviation =
              c[8] != 0.0F ? std::sqrt(std::fmax(mixed, 0.0)) : std::exp(0.5 * mixed);
          next += at(7) * deviation * static_cast<double>(noise[(t * s.rows + n) * s.channels + p]);
        }
        previous[u] = x0;
        x[u] = next;
      }
    }
    exact.insert(exact.end(), x.begin(), x.end());
  }
  const double error = test::relative_error(first, exact);
  check(error < (dtype == FASTFAR_FLOAT32 ? 1e-5 : 2e-2), "error %.2e at width %lld, %lld rows",
        error, static_cast<long long>(s.width), static_cast<long long>(s.rows));
}

void run(int32_t) {
  constexpr Sizes kCases[] = {
      // rows, halves, width, depth, channels, condition, steps, rows per task, steps ahead
      {1, 1, 16, 1, 1, 3, 1, 1, 1},     {3, 2, 48, 2, 5, 33, 3, 2, 2},
      {2, 2, 32, 1, 16, 32, 2, 64, 1},  {35, 2, 64, 1, 17, 40, 2, 32, 1},
      {5, 1, 80, 3, 33, 70, 2, 3, 2},   {7, 2, 16, 0, 3, 16, 3, 4, 3},
      {19, 2, 48, 2, 16, 20, 5, 10, 2}, {33, 1, 32, 2, 4, 8, 4, 33, 1},
  };
  for (const Sizes& sizes : kCases) {
    run_case(sizes, FASTFAR_FLOAT32);
    run_case(sizes, FASTFAR_BFLOAT16);
  }
  fastfar_denoise_loop_args bad = {};
  check(fastfar_denoise_loop(&bad) == FASTFAR_ERROR_ARGUMENT, "accepted empty arguments");
}

}  // namespace

int main() {
  test::each_isa(run);
  return test::finish();
}
