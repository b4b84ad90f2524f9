// groupnorm_silu on every instruction set: an oracle in double, odd sizes, several chunks, offsets,
// threads, scratch full of NaN, guard bands, refused arguments.
#include <cmath>
#include <cstdint>
#include <vector>

#include "common.h"
#include "fastfar_cpu.h"

namespace {

using test::Buffer;
using test::check;

struct Case {
  int64_t batch, positions, channels, groups;
};

constexpr Case kCases[] = {{1, 1, 1, 1},      {2, 3, 6, 3},    {1, 65, 32, 32}, {3, 130, 24, 4},
                           {1, 257, 128, 32}, {2, 70, 130, 5}, {1, 5, 9000, 3}};
constexpr float kEps = 1e-6F;

// As the network does it: mean and variance of each image and group, then weight, bias and SiLU.
std::vector<double> oracle(const Case& c, const std::vector<double>& x, const Buffer<float>& weight,
                           const Buffer<float>& bias, bool silu) {
  std::vector<double> y(x.size());
  const int64_t width = c.channels / c.groups;
  for (int64_t image = 0; image < c.batch; ++image) {
    for (int64_t group = 0; group < c.groups; ++group) {
      const auto at = [&](int64_t position, int64_t i) {
        return static_cast<size_t>((image * c.positions + position) * c.channels + group * width +
                                   i);
      };
      const double count = static_cast<double>(c.positions * width);
      double mean = 0.0, variance = 0.0;
      for (int64_t p = 0; p < c.positions; ++p)
        for (int64_t i = 0; i < width; ++i) mean += x[at(p, i)] / count;
      for (int64_t p = 0; p < c.positions; ++p)
        for (int64_t i = 0; i < width; ++i)
          variance += (x[at(p, i)] - mean) * (x[at(p, i)] - mean) / count;
      for (int64_t p = 0; p < c.positions; ++p) {
        for (int64_t i = 0; i < width; ++i) {
          const double normal =
              (x[at(p, i)] - mean) / std::sqrt(variance + static_cast<double>(kEps));
          const double value = normal * static_cast<double>(weight[group * width + i]) +
                               static_cast<double>(bias[group * width + i]);
          y[at(p, i)] = silu ? value / (1.0 + std::exp(-value)) : value;
        }
      }
    }
  }
  return y;
}

float as_float(float x) { return x; }
float as_float(uint16_t x) { return test::from_bf16(x); }
void put(float& to, float x) { to = x; }
void put(uint16_t& to, float x) { to = test::to_bf16(x); }

template <class T>
void run_case(const Case& c, int32_t dtype, bool silu, float offset) {
  test::Draws draws(static_cast<uint64_t>(c.channels + c.positions));
  const int64_t count = c.batch * c.positions * c.channels;
  Buffer<float> weight = draws.normal(c.channels), bias = draws.normal(c.channels);
  Buffer<T> x(count, 1);
  std::vector<double> exact_x;
  for (T& number : x) {
    put(number, offset + draws.gauss(2.0F));
    exact_x.push_back(static_cast<double>(as_float(number)));
  }
  const std::vector<double> expected = oracle(c, exact_x, weight, bias, silu);

  Buffer<T> first(count, 1);
  for (int32_t threads = 1; threads <= 4; ++threads) {
    Buffer<T> y(count, 1);
    fastfar_groupnorm_silu_args args = {};
    args.dtype = dtype;
    args.silu = silu ? 1 : 0;
    args.threads = threads;
    args.eps = kEps;
    args.batch = c.batch;
    args.positions = c.positions;
    args.channels = c.channels;
    args.groups = c.groups;
    args.x_BSC = x.data();
    args.weight_C = weight.data();
    args.bias_C = bias.data();
    args.y_BSC = y.data();
    Buffer<uint8_t> scratch(fastfar_groupnorm_silu_scratch(&args));
    args.scratch = scratch.data();
    check(fastfar_groupnorm_silu(&args) == 0, "refused %lld channels",
          static_cast<long long>(c.channels));
    std::vector<float> got;
    for (const T& number : y) got.push_back(as_float(number));
    const double error = test::relative_error(got, expected);
    // A number of size `offset` is known to 2^-24 of it; bfloat16 results are rounded to 2^-9.
    const double limit =
        dtype == FASTFAR_BFLOAT16 ? 4e-3 : 3e-7 + 1e-7 * static_cast<double>(offset);
    check(error < limit, "(%lld, %lld, %lld, %lld) dtype %d silu %d: error %.2e",
          static_cast<long long>(c.batch), static_cast<long long>(c.positions),
          static_cast<long long>(c.channels), static_cast<long long>(c.groups), dtype, silu, error);
    y.check_guards("y");
    scratch.check_guards("scratch");
    if (threads == 1) {
      first = y.copy(1);
      Buffer<T> in_place = x.copy(1);
      scratch.refill();
      args.x_BSC = args.y_BSC = in_place.data();
      fastfar_groupnorm_silu(&args);
      check(in_place == first, "in place it is another result");
    }
    check(y == first, "%d threads give another result", threads);
  }
}

void refuse(fastfar_groupnorm_silu_args args, const char* what) {
  check(fastfar_groupnorm_silu(&args) == FASTFAR_ERROR_ARGUMENT, "accepted %s", what);
}

void run_errors() {
  float number = 1.0F, out = 0.0F;
  Buffer<uint8_t> scratch(4096);
  fastfar_groupnorm_silu_args good = {
      FASTFAR_FLOAT32, 1, 1, kEps, 1, 1, 1, 1, &number, &number, &number, &out, scratch.data()};
  check(fastfar_groupnorm_silu(&good) == 0, "refused good arguments");
  check(fastfar_groupnorm_silu(nullptr) == FASTFAR_ERROR_ARGUMENT, "accepted null");
  auto args = good;
  args.batch = 0;
  check(fastfar_groupnorm_silu(&args) == 0, "refused no images");
  args = good;
  args.dtype = 7;
  refuse(args, "dtype 7");
  args = good;
  args.channels = 0;
  refuse(args, "no channels");
  args = good;
  args.groups = 2;
  refuse(args, "2 groups of 1 channel");
  args = good;
  args.positions = -1;
  refuse(args, "-1 positions");
  args = good;
  args.threads = 0;
  refuse(args, "0 threads");
  args = good;
  args.x_BSC = nullptr;
  refuse(args, "no input");
  args = good;
  args.scratch = nullptr;
  refuse(args, "no scratch");
}

void run(int32_t) {
  for (const Case& c : kCases) {
    for (const bool silu : {true, false}) {
      for (const float offset : {0.0F, 50.0F}) {
        run_case<float>(c, FASTFAR_FLOAT32, silu, offset);
        run_case<uint16_t>(c, FASTFAR_BFLOAT16, silu, offset);
      }
    }
  }
  run_errors();
}

}  // namespace

int main() {
  test::each_isa(run);
  return test::finish();
}
