// layernorm_mlp_residual on every instruction set and in both arithmetics against the formula in
// double, with float32 and bfloat16 activations, in place as well.
#include "common.h"

using test::as_used;
using test::Buffer;
using test::check;

namespace {

struct Sizes {
  int64_t rows, width, hidden;
};
constexpr float kEps = 1e-6F;

double gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }

struct Layer {
  Buffer<float> norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias;

  Layer(const Sizes& s, test::Draws& d)
      : norm_weight(d.normal(s.width)),
        norm_bias(d.normal(s.width)),
        fc1(d.normal(s.hidden * s.width, 1.0F / std::sqrt(static_cast<float>(s.width)))),
        fc1_bias(d.normal(s.hidden)),
        fc2(d.normal(s.width * s.hidden, 1.0F / std::sqrt(static_cast<float>(s.hidden)))),
        fc2_bias(d.normal(s.width)) {}

  std::vector<double> exact(const Sizes& s, int32_t dtype, const std::vector<float>& x) const {
    std::vector<double> out;
    for (int64_t row = 0; row < s.rows; ++row) {
      const float* r = x.data() + row * s.width;
      double mean = 0.0, variance = 0.0;
      const double count = static_cast<double>(s.width);
      for (int64_t i = 0; i < s.width; ++i) mean += double{r[i]} / count;
      for (int64_t i = 0; i < s.width; ++i) variance += std::pow(double{r[i]} - mean, 2) / count;
      const double factor = 1.0 / std::sqrt(variance + double{kEps});
      std::vector<double> hidden;
      for (int64_t j = 0; j < s.hidden; ++j) {
        double sum = double{fc1_bias[j]};
        for (int64_t i = 0; i < s.width; ++i) {
          sum += as_used(dtype, fc1[j * s.width + i]) *
                 ((double{r[i]} - mean) * factor * double{norm_weight[i]} + double{norm_bias[i]});
        }
        hidden.push_back(gelu(sum));
      }
      for (int64_t i = 0; i < s.width; ++i) {
        double sum = double{fc2_bias[i]} + double{r[i]};
        for (int64_t j = 0; j < s.hidden; ++j) {
          sum += as_used(dtype, fc2[i * s.hidden + j]) * hidden[static_cast<size_t>(j)];
        }
        out.push_back(sum);
      }
    }
    return out;
  }
};

template <class T>
void run_case(const Sizes& s, int32_t dtype, int32_t x_dtype, const Buffer<T>& x,
              const std::vector<float>& numbers, double limit) {
  test::Draws draws(9);
  const Layer layer(s, draws);
  const std::vector<double> expected = layer.exact(s, dtype, numbers);
  const Buffer<uint8_t> fc1 = test::pack(dtype, layer.fc1.data(), s.hidden, s.width);
  const Buffer<uint8_t> fc2 = test::pack(dtype, layer.fc2.data(), s.width, s.hidden);
  Buffer<T> first(x.size());
  for (int32_t threads = 1; threads <= 4; ++threads) {
    Buffer<T> out = x.copy();  // the last run is in place
    fastfar_layernorm_mlp_residual_args args = {};
    args.dtype = dtype;
    args.x_dtype = x_dtype;
    args.threads = threads;
    args.rows = s.rows;
    args.width = s.width;
    args.hidden = s.hidden;
    args.eps = kEps;
    args.x_MD = threads == 4 ? out.data() : x.data();
    args.norm_weight = layer.norm_weight.data();
    args.norm_bias = layer.norm_bias.data();
    args.fc1 = fc1.data();
    args.fc1_bias = layer.fc1_bias.data();
    args.fc2 = fc2.data();
    args.fc2_bias = layer.fc2_bias.data();
    args.out_MD = threads == 1 ? first.data() : out.data();
    Buffer<uint8_t> scratch(fastfar_layernorm_mlp_residual_scratch(&args));
    check(fastfar_layernorm_mlp_residual(&args) == FASTFAR_ERROR_ARGUMENT, "accepted no scratch");
    args.scratch = scratch.data();
    check(fastfar_layernorm_mlp_residual(&args) == 0, "refused");
    scratch.check_guards("scratch");
    if (threads > 1) check(out == first, "%d threads give other bits", threads);
  }
  std::vector<float> got;
  for (int64_t i = 0; i < first.size(); ++i) {
    if constexpr (sizeof(T) == 2) {
      got.push_back(test::from_bf16(first[i]));
    } else {
      got.push_back(first[i]);
    }
  }
  const double error = test::relative_error(got, expected);
  check(error < limit, "(%lld, %lld, %lld) dtypes %d %d: error %.2e", (long long)s.rows,
        (long long)s.width, (long long)s.hidden, dtype, x_dtype, error);
}

void run(int32_t) {
  constexpr Sizes kSizes[] = {{1, 1, 1},    {2, 7, 5},     {3, 32, 32},
                              {35, 33, 70}, {5, 20, 2700}, {70, 48, 96}};
  for (const Sizes& s : kSizes) {
    test::Draws draws(3);
    const Buffer<float> x = draws.normal(s.rows * s.width);
    Buffer<uint16_t> half(x.size());
    std::vector<float> numbers, rounded;
    for (int64_t i = 0; i < x.size(); ++i) {
      half[i] = test::to_bf16(x[i]);
      numbers.push_back(x[i]);
      rounded.push_back(test::from_bf16(half[i]));
    }
    run_case(s, FASTFAR_FLOAT32, FASTFAR_FLOAT32, x, numbers, 2e-6);
    run_case(s, FASTFAR_BFLOAT16, FASTFAR_FLOAT32, x, numbers, 6e-3);
    run_case(s, FASTFAR_BFLOAT16, FASTFAR_BFLOAT16, half, rounded, 8e-3);
  }
  fastfar_layernorm_mlp_residual_args args = {};
  check(fastfar_layernorm_mlp_residual_scratch(&args) < 0, "accepted no threads");
}

}  // namespace

int main() {
  test::each_isa(run);
  return test::finish();
}
