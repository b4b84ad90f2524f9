// linear and its backward on every instruction set, in both arithmetics and on 1 to 4 threads,
// against the formulas in double.
#include "mlp_oracle.h"

using test::Buffer;
using test::check;

namespace {

void run_case(int64_t rows, int64_t n, int64_t k, int32_t dtype, double limit) {
  test::Draws draws(6);
  const int64_t stride = k + 3;
  const Buffer<float> x = draws.normal(rows * stride), w = draws.normal(n * k);
  const Buffer<float> bias = draws.normal(n), dout = draws.normal(rows * n);
  const test::Doubles used = test::weights(w, n * k, dtype);
  test::Doubles exact[4];  // out, dx, dw, db
  exact[0].assign(static_cast<size_t>(rows * n), 0.0);
  exact[1].assign(static_cast<size_t>(rows * k), 0.0);
  exact[2].assign(static_cast<size_t>(n * k), 0.0);
  exact[3].assign(static_cast<size_t>(n), 0.0);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = 0; j < n; ++j) {
      const double d = double{dout[row * n + j]};
      double sum = double{bias[j]};
      for (int64_t i = 0; i < k; ++i) {
        const double weight = used[static_cast<size_t>(j * k + i)];
        sum += double{x[row * stride + i]} * weight;
        exact[1][static_cast<size_t>(row * k + i)] += d * weight;
        exact[2][static_cast<size_t>(j * k + i)] += d * double{x[row * stride + i]};
      }
      exact[0][static_cast<size_t>(row * n + j)] = sum;
      exact[3][static_cast<size_t>(j)] += d;
    }
  }
  const Buffer<uint8_t> weight = test::pack(dtype, w.data(), n, k);
  const Buffer<uint8_t> weight_transposed =
      test::pack(dtype, test::transposed(w, n, k).data(), k, n);
  std::vector<Buffer<float>> first;
  for (int32_t threads = 1; threads <= 4; ++threads) {
    const int64_t sizes[4] = {rows * n, rows * k, n * k, n};
    std::vector<Buffer<float>> results;
    for (const int64_t each : sizes) results.emplace_back(each);
    fastfar_linear_args args = {};
    args.dtype = dtype;
    args.x_dtype = args.out_dtype = FASTFAR_FLOAT32;
    args.threads = threads;
    args.rows = rows;
    args.n = n;
    args.k = k;
    args.x_stride = stride;
    args.x_MK = x.data();
    args.weight = weight.data();
    args.bias = bias.data();
    args.out_MN = results[0].data();
    Buffer<uint8_t> scratch(fastfar_linear_scratch(&args));
    check(fastfar_linear(&args) == FASTFAR_ERROR_ARGUMENT, "accepted no scratch");
    args.scratch = scratch.data();
    check(fastfar_linear(&args) == 0, "refused");
    scratch.check_guards("scratch");

    fastfar_linear_backward_args back = {};
    back.dtype = dtype;
    back.x_dtype = back.out_dtype = FASTFAR_FLOAT32;
    back.threads = threads;
    back.rows = rows;
    back.n = n;
    back.k = k;
    back.x_stride = stride;
    back.x_MK = x.data();
    back.weight_transposed = weight_transposed.data();
    back.dout_MN = dout.data();
    back.dx_MK = results[1].data();
    back.dweight = results[2].data();
    back.dbias = results[3].data();
    Buffer<uint8_t> more(fastfar_linear_backward_scratch(&back));
    back.scratch = more.data();
    check(fastfar_linear_backward(&back) == 0, "refused");
    more.check_guards("scratch of the backward");
    for (size_t i = 0; i < 4; ++i) {
      results[i].check_guards("result");
      if (threads > 1) {
        check(results[i] == first[i], "%d threads give other bits in %d", threads,
              static_cast<int>(i));
        continue;
      }
      const double error = test::relative_error(results[i], exact[i]);
      check(error < limit, "(%lld, %lld, %lld) dtype %d, result %d: error %.2e", (long long)rows,
            (long long)n, (long long)k, dtype, static_cast<int>(i), error);
      first.push_back(std::move(results[i]));
    }
    Buffer<float> again(n * k);  // without dx
    back.dx_MK = nullptr;
    back.weight_transposed = nullptr;
    back.dweight = again.data();
    check(fastfar_linear_backward(&back) == 0 && again == first[2], "other sums without dx");
  }
}

void run(int32_t) {
  constexpr int64_t kSizes[][3] = {{1, 1, 1},   {2, 16, 48},  {3, 33, 31},
                                   {7, 5, 129}, {65, 96, 64}, {1100, 33, 17}};
  for (const auto& size : kSizes) {
    run_case(size[0], size[1], size[2], FASTFAR_FLOAT32, 2e-6);
    run_case(size[0], size[1], size[2], FASTFAR_BFLOAT16, 6e-3);
  }
  fastfar_linear_args args = {};
  check(fastfar_linear_scratch(&args) < 0, "accepted no threads");
}

}  // namespace

int main() {
  test::each_isa(run);
  return test::finish();
}
