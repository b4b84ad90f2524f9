// adaln_mlp_block and its backward on every instruction set, in both arithmetics and on 1 to 4
// threads, against the formulas in double.
#include "mlp_oracle.h"

using test::Buffer;
using test::check;

namespace {

void run_case(int64_t rows, int64_t width, int32_t dtype, double limit) {
  test::Draws draws(3);
  const int64_t size = rows * width, stride = 3 * width + 1;  // modulations with a gap
  const Buffer<float> x = draws.normal(size), dout = draws.normal(size);
  const Buffer<float> modulation = draws.normal(rows * stride, 0.5F);
  const Buffer<float> norm_weight = draws.normal(width), norm_bias = draws.normal(width);
  const float spread = 1.0F / std::sqrt(static_cast<float>(width));
  const Buffer<float> w1 = draws.normal(width * width, spread), b1 = draws.normal(width);
  const Buffer<float> w2 = draws.normal(width * width, spread), b2 = draws.normal(width);

  test::MlpOracle oracle;
  oracle.rows = static_cast<size_t>(rows);
  oracle.width = oracle.hidden = static_cast<size_t>(width);
  oracle.gelu = false;
  oracle.eps = 1e-6;
  oracle.x = widened(x, size);
  oracle.dout = widened(dout, size);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < width; ++i) {
      oracle.shift.push_back(double{modulation[row * stride + i]});
      oracle.scale.push_back(double{modulation[row * stride + width + i]});
      oracle.gate.push_back(double{modulation[row * stride + 2 * width + i]});
    }
  }
  oracle.norm_weight = widened(norm_weight, width);
  oracle.norm_bias = widened(norm_bias, width);
  oracle.w1 = weights(w1, width * width, dtype);
  oracle.b1 = widened(b1, width);
  oracle.w2 = weights(w2, width * width, dtype);
  oracle.b2 = widened(b2, width);
  oracle.run();

  const Buffer<uint8_t> fc1 = test::pack(dtype, w1.data(), width, width);
  const Buffer<uint8_t> fc2 = test::pack(dtype, w2.data(), width, width);
  const Buffer<uint8_t> fc1_transposed =
      test::pack(dtype, transposed(w1, width, width).data(), width, width);
  const Buffer<uint8_t> fc2_transposed =
      test::pack(dtype, transposed(w2, width, width).data(), width, width);
  Buffer<uint8_t> h(size * (dtype == FASTFAR_BFLOAT16 ? 2 : 4)), u(h.size());

  std::vector<Buffer<float>> first;
  for (int32_t threads = 1; threads <= 4; ++threads) {
    fastfar_adaln_mlp_block_args args = {};
    args.dtype = dtype;
    args.x_dtype = args.modulation_dtype = FASTFAR_FLOAT32;
    args.threads = threads;
    args.rows = rows;
    args.width = width;
    args.modulation_stride = stride;
    args.eps = 1e-6F;
    args.x_NW = x.data();
    args.shift_NW = modulation.data();
    args.scale_NW = modulation.data() + width;
    args.gate_NW = modulation.data() + 2 * width;
    args.norm_weight = norm_weight.data();
    args.norm_bias = norm_bias.data();
    args.fc1 = fc1.data();
    args.fc1_bias = b1.data();
    args.fc2 = fc2.data();
    args.fc2_bias = b2.data();
    args.h_NW = h.data();
    args.u_NW = u.data();
    std::vector<Buffer<float>> results;
    for (int i = 0; i < 5; ++i) results.emplace_back(size);
    for (int i = 5; i < 9; ++i) results.emplace_back(width);
    for (int i = 9; i < 11; ++i) results.emplace_back(width * width);
    args.out_NW = results[0].data();
    Buffer<uint8_t> scratch(fastfar_adaln_mlp_block_scratch(&args));
    check(fastfar_adaln_mlp_block(&args) == FASTFAR_ERROR_ARGUMENT, "accepted no scratch");
    args.scratch = scratch.data();
    check(fastfar_adaln_mlp_block(&args) == 0, "refused");
    scratch.check_guards("scratch");

    fastfar_adaln_mlp_block_backward_args back = {};
    back.dtype = dtype;
    back.x_dtype = back.modulation_dtype = FASTFAR_FLOAT32;
    back.threads = threads;
    back.rows = rows;
    back.width = width;
    back.modulation_stride = stride;
    back.eps = 1e-6F;
    back.x_NW = x.data();
    back.shift_NW = args.shift_NW;
    back.scale_NW = args.scale_NW;
    back.gate_NW = args.gate_NW;
    back.norm_weight = norm_weight.data();
    back.norm_bias = norm_bias.data();
    back.fc1_transposed = fc1_transposed.data();
    back.fc2_transposed = fc2_transposed.data();
    back.h_NW = h.data();
    back.u_NW = u.data();
    back.dout_NW = dout.data();
    back.dx_NW = results[1].data();
    back.dshift_NW = results[2].data();
    back.dscale_NW = results[3].data();
    back.dgate_NW = results[4].data();
    back.dnorm_weight = results[5].data();
    back.dnorm_bias = results[6].data();
    back.dfc1_bias = results[7].data();
    back.dfc2_bias = results[8].data();
    back.dfc1_weight = results[9].data();
    back.dfc2_weight = results[10].data();
    Buffer<uint8_t> more(fastfar_adaln_mlp_block_backward_scratch(&back));
    check(fastfar_adaln_mlp_block_backward(&back) == FASTFAR_ERROR_ARGUMENT, "accepted no scratch");
    back.scratch = more.data();
    check(fastfar_adaln_mlp_block_backward(&back) == 0, "refused");
    more.check_guards("scratch of the backward");

    const test::Doubles* exact[11] = {&oracle.out,        &oracle.dx,    &oracle.dshift,
                                      &oracle.dscale,     &oracle.dgate, &oracle.dnorm_weight,
                                      &oracle.dnorm_bias, &oracle.db1,   &oracle.db2,
                                      &oracle.dw1,        &oracle.dw2};
    for (size_t i = 0; i < 11; ++i) {
      results[i].check_guards("result");
      if (threads > 1) {
        check(results[i] == first[i], "%d threads give other bits in %d", threads,
              static_cast<int>(i));
        continue;
      }
      const double error = test::relative_error(results[i], *exact[i]);
      check(error < limit, "(%lld, %lld) dtype %d, result %d: error %.2e", (long long)rows,
            (long long)width, dtype, static_cast<int>(i), error);
      first.push_back(std::move(results[i]));
    }
  }
}

void run(int32_t) {
  constexpr int64_t kSizes[][2] = {{1, 16}, {2, 5}, {3, 33}, {33, 48}, {70, 32}, {1100, 17}};
  for (const auto& size : kSizes) {
    run_case(size[0], size[1], FASTFAR_FLOAT32, 5e-6);
    run_case(size[0], size[1], FASTFAR_BFLOAT16, 2e-2);
  }
  fastfar_adaln_mlp_block_args args = {};
  check(fastfar_adaln_mlp_block_scratch(&args) < 0, "accepted no threads");
  check(fastfar_adaln_mlp_block(&args) == FASTFAR_ERROR_ARGUMENT, "accepted nothing");
}

}  // namespace

int main() {
  test::each_isa(run);
  return test::finish();
}
