// layernorm_linear on every instruction set and in both arithmetics against the formula in double.
#include "common.h"

using test::as_used;
using test::Buffer;
using test::check;

namespace {

struct Sizes {
  int64_t rows, n, k;
};

void run_case(const Sizes& s, int32_t dtype, double limit) {
  test::Draws draws(5);
  const Buffer<float> x = draws.normal(s.rows * s.k), w = draws.normal(s.n * s.k, 0.2F);
  const Buffer<float> scale = draws.normal(s.k), shift = draws.normal(s.k);
  const Buffer<float> bias = draws.normal(s.n);
  const Buffer<uint8_t> packed = test::pack(dtype, w.data(), s.n, s.k);
  constexpr float kEps = 1e-6F;
  std::vector<double> expected;
  for (int64_t row = 0; row < s.rows; ++row) {
    double mean = 0.0, variance = 0.0;
    for (int64_t i = 0; i < s.k; ++i) mean += double{x[row * s.k + i]} / static_cast<double>(s.k);
    for (int64_t i = 0; i < s.k; ++i) {
      variance += std::pow(double{x[row * s.k + i]} - mean, 2) / static_cast<double>(s.k);
    }
    for (int64_t j = 0; j < s.n; ++j) {
      double sum = double{bias[j]};
      for (int64_t i = 0; i < s.k; ++i) {
        const double h = (double{x[row * s.k + i]} - mean) / std::sqrt(variance + double{kEps});
        sum += as_used(dtype, w[j * s.k + i]) * (h * double{scale[i]} + double{shift[i]});
      }
      expected.push_back(sum);
    }
  }
  Buffer<float> first(s.rows * s.n);
  for (int32_t threads = 1; threads <= 4; ++threads) {
    fastfar_layernorm_linear_args args = {};
    args.dtype = dtype;
    args.x_dtype = FASTFAR_FLOAT32;
    args.threads = threads;
    args.rows = s.rows;
    args.n = s.n;
    args.k = s.k;
    args.eps = kEps;
    args.x_MK = x.data();
    args.norm_weight = scale.data();
    args.norm_bias = shift.data();
    args.weight = packed.data();
    args.bias = bias.data();
    Buffer<float> out(s.rows * s.n);
    args.out_MN = threads == 1 ? first.data() : out.data();
    Buffer<uint8_t> scratch(fastfar_layernorm_linear_scratch(&args));
    check(fastfar_layernorm_linear(&args) == FASTFAR_ERROR_ARGUMENT, "accepted no scratch");
    args.scratch = scratch.data();
    check(fastfar_layernorm_linear(&args) == 0, "refused");
    scratch.check_guards("scratch");
    if (threads > 1) check(out == first, "%d threads give other bits", threads);
  }
  const double error = test::relative_error(first, expected);
  check(error < limit, "(%lld, %lld, %lld) dtype %d: error %.2e", (long long)s.rows, (long long)s.n,
        (long long)s.k, dtype, error);
}

void run(int32_t) {
  constexpr Sizes kSizes[] = {{1, 1, 1},    {2, 5, 7},     {3, 32, 32},  {33, 33, 31},
                              {67, 40, 96}, {5, 70, 2600}, {130, 64, 48}};
  for (const Sizes& s : kSizes) {
    run_case(s, FASTFAR_FLOAT32, 2e-6);
    run_case(s, FASTFAR_BFLOAT16, 6e-3);
  }
  fastfar_layernorm_linear_args args = {};
  check(fastfar_layernorm_linear_scratch(&args) < 0, "accepted no threads");
}

}  // namespace

int main() {
  test::each_isa(run);
  return test::finish();
}
