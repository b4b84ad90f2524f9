// layernorm_mlp_residual_backward on every instruction set, in both arithmetics and on 1 to 4
// threads, against the formulas in double.
#include "mlp_oracle.h"

using test::Buffer;
using test::check;

namespace {

void run_case(int64_t rows, int64_t width, int64_t hidden, int32_t dtype, double limit) {
  test::Draws draws(4);
  const int64_t size = rows * width, matrix = width * hidden;
  const Buffer<float> x = draws.normal(size), dout = draws.normal(size);
  const Buffer<float> norm_weight = draws.normal(width), norm_bias = draws.normal(width);
  const Buffer<float> w1 = draws.normal(matrix, 1.0F / std::sqrt(static_cast<float>(width)));
  const Buffer<float> w2 = draws.normal(matrix, 1.0F / std::sqrt(static_cast<float>(hidden)));
  const Buffer<float> b1 = draws.normal(hidden);

  test::MlpOracle oracle;
  oracle.rows = static_cast<size_t>(rows);
  oracle.width = static_cast<size_t>(width);
  oracle.hidden = static_cast<size_t>(hidden);
  oracle.gelu = true;
  oracle.eps = 1e-6;
  oracle.x = widened(x, size);
  oracle.dout = widened(dout, size);
  oracle.shift.assign(static_cast<size_t>(size), 0.0);
  oracle.scale = oracle.shift;
  oracle.gate.assign(static_cast<size_t>(size), 1.0);
  oracle.norm_weight = widened(norm_weight, width);
  oracle.norm_bias = widened(norm_bias, width);
  oracle.w1 = weights(w1, matrix, dtype);
  oracle.b1 = widened(b1, hidden);
  oracle.w2 = weights(w2, matrix, dtype);
  oracle.b2.assign(static_cast<size_t>(width), 0.0);
  oracle.run();

  const Buffer<uint8_t> fc1 = test::pack(dtype, w1.data(), hidden, width);
  const Buffer<uint8_t> fc1_transposed =
      test::pack(dtype, transposed(w1, hidden, width).data(), width, hidden);
  const Buffer<uint8_t> fc2_transposed =
      test::pack(dtype, transposed(w2, width, hidden).data(), hidden, width);

  std::vector<Buffer<float>> first;
  for (int32_t threads = 1; threads <= 4; ++threads) {
    const int64_t sizes[7] = {size, width, width, hidden, width, matrix, matrix};
    std::vector<Buffer<float>> results;
    for (const int64_t each : sizes) results.emplace_back(each);
    fastfar_layernorm_mlp_residual_backward_args args = {};
    args.dtype = dtype;
    args.x_dtype = FASTFAR_FLOAT32;
    args.threads = threads;
    args.rows = rows;
    args.width = width;
    args.hidden = hidden;
    args.eps = 1e-6F;
    args.x_MD = x.data();
    args.norm_weight = norm_weight.data();
    args.norm_bias = norm_bias.data();
    args.fc1 = fc1.data();
    args.fc1_bias = b1.data();
    args.fc1_transposed = fc1_transposed.data();
    args.fc2_transposed = fc2_transposed.data();
    args.dout_MD = dout.data();
    args.dx_MD = results[0].data();
    args.dnorm_weight = results[1].data();
    args.dnorm_bias = results[2].data();
    args.dfc1_bias = results[3].data();
    args.dfc2_bias = results[4].data();
    args.dfc1_weight = results[5].data();
    args.dfc2_weight = results[6].data();
    Buffer<uint8_t> scratch(fastfar_layernorm_mlp_residual_backward_scratch(&args));
    check(fastfar_layernorm_mlp_residual_backward(&args) == FASTFAR_ERROR_ARGUMENT,
          "accepted no scratch");
    args.scratch = scratch.data();
    check(fastfar_layernorm_mlp_residual_backward(&args) == 0, "refused");
    scratch.check_guards("scratch");
    const test::Doubles* exact[7] = {&oracle.dx,  &oracle.dnorm_weight, &oracle.dnorm_bias,
                                     &oracle.db1, &oracle.db2,          &oracle.dw1,
                                     &oracle.dw2};
    for (size_t i = 0; i < 7; ++i) {
      results[i].check_guards("result");
      if (threads > 1) {
        check(results[i] == first[i], "%d threads give other bits in %d", threads,
              static_cast<int>(i));
        continue;
      }
      const double error = test::relative_error(results[i], *exact[i]);
      check(error < limit, "(%lld, %lld, %lld) dtype %d, result %d: error %.2e", (long long)rows,
            (long long)width, (long long)hidden, dtype, static_cast<int>(i), error);
      first.push_back(std::move(results[i]));
    }
  }
}

void run(int32_t) {
  constexpr int64_t kSizes[][3] = {
      {1, 16, 64}, {2, 5, 7}, {3, 33, 40}, {67, 48, 96}, {1050, 8, 33}};
  for (const auto& size : kSizes) {
    run_case(size[0], size[1], size[2], FASTFAR_FLOAT32, 5e-6);
    run_case(size[0], size[1], size[2], FASTFAR_BFLOAT16, 2e-2);
  }
  fastfar_layernorm_mlp_residual_backward_args args = {};
  check(fastfar_layernorm_mlp_residual_backward_scratch(&args) < 0, "accepted no threads");
}

}  // namespace

int main() {
  test::each_isa(run);
  return test::finish();
}
