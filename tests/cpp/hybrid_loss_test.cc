// hybrid_loss and its backward on every instruction set against the formulas in double: rows at
// t = 0 (likelihood of a bin) and beyond (divergence), any number of channels.
#include "common.h"

using test::Buffer;
using test::check;

namespace {

constexpr double kLeast = 1e-12;

double cdf(double z) {
  return 0.5 * (1.0 + std::tanh(std::sqrt(2.0 / 3.14159265358979324) * (z + 0.044715 * z * z * z)));
}

// The bound of one number as a function of v.
double bound(const float* t, bool first, double eps, double v, double target, double noised) {
  const double f = (v + 1.0) / 2.0, posterior = double{t[5]};
  const double l = f * double{t[4]} + (1.0 - f) * posterior;
  const double predicted = double{t[0]} * noised - double{t[1]} * eps;
  const double mean = double{t[2]} * predicted + double{t[3]} * noised;
  const double truth = double{t[2]} * target + double{t[3]} * noised;
  if (!first) {
    return 0.5 * (l - posterior - 1.0 + std::exp(posterior - l) +
                  (truth - mean) * (truth - mean) * std::exp(-l));
  }
  const double inverse = std::exp(-0.5 * l);
  const double upper = cdf(inverse * (target - mean + 1.0 / 255.0));
  const double lower = cdf(inverse * (target - mean - 1.0 / 255.0));
  const double mass = target < -0.999 ? upper : target > 0.999 ? 1.0 - lower : upper - lower;
  return -std::log(mass > kLeast ? mass : kLeast);
}

void run_case(int64_t rows, int64_t numbers) {
  test::Draws draws(8);
  constexpr int64_t kTimesteps = 3;
  // As in the cosine schedule near t = 0, at its middle and at its end.
  Buffer<float> table(kTimesteps * 6);
  const float values[] = {1.00003F, 0.0064F, 1.0F,   0.0F,  -10.1F, -10.8F,  1.4F,   1.0F,  0.01F,
                          0.98F,    -5.8F,   -5.81F, 20.0F, 19.9F,  0.0002F, 0.999F, -4.0F, -4.2F};
  for (int64_t i = 0; i < kTimesteps * 6; ++i) table[i] = values[i];
  const Buffer<float> output = draws.normal(2 * rows * numbers, 0.7F);
  const Buffer<float> target = draws.normal(rows * numbers), noise = draws.normal(rows * numbers);
  const Buffer<float> noised = draws.normal(rows * numbers), dloss = draws.normal(rows);
  Buffer<int64_t> timestep(rows);
  for (int64_t row = 0; row < rows; ++row) timestep[row] = row % kTimesteps;

  std::vector<double> loss, gradient(static_cast<size_t>(2 * rows * numbers));
  for (int64_t row = 0; row < rows; ++row) {
    double total = 0.0;
    for (int64_t i = 0; i < numbers; ++i) {
      const int64_t place = row * numbers + i;
      const double eps = double{output[2 * row * numbers + i]};
      const double v = double{output[(2 * row + 1) * numbers + i]};
      const double difference = eps - double{noise[place]};
      const auto at = [&](double w) {
        return bound(table.data() + timestep[row] * 6, timestep[row] == 0, eps, w,
                     double{target[place]}, double{noised[place]}) /
               std::log(2.0);
      };
      total += difference * difference + at(v);
      const double scale = double{dloss[row]} / static_cast<double>(numbers);
      gradient[static_cast<size_t>(2 * row * numbers + i)] = 2.0 * difference * scale;
      gradient[static_cast<size_t>((2 * row + 1) * numbers + i)] =
          scale * (at(v + 1e-5) - at(v - 1e-5)) / 2e-5;
    }
    loss.push_back(total / static_cast<double>(numbers));
  }

  Buffer<float> first_loss(1), first_gradient(1);
  for (int32_t threads = 1; threads <= 4; ++threads) {
    Buffer<float> got(rows), dgot(2 * rows * numbers);
    fastfar_hybrid_loss_args args = {};
    args.dtype = FASTFAR_FLOAT32;
    args.threads = threads;
    args.rows = rows;
    args.numbers = numbers;
    args.num_timesteps = kTimesteps;
    args.output_N2P = output.data();
    args.target_NP = target.data();
    args.noise_NP = noise.data();
    args.noised_NP = noised.data();
    args.timestep_N = timestep.data();
    args.table_T6 = table.data();
    args.loss_N = got.data();
    check(fastfar_hybrid_loss(&args) == 0, "refused");
    fastfar_hybrid_loss_backward_args back = {};
    back.dtype = FASTFAR_FLOAT32;
    back.threads = threads;
    back.rows = rows;
    back.numbers = numbers;
    back.num_timesteps = kTimesteps;
    back.output_N2P = output.data();
    back.target_NP = target.data();
    back.noise_NP = noise.data();
    back.noised_NP = noised.data();
    back.timestep_N = timestep.data();
    back.table_T6 = table.data();
    back.dloss_N = dloss.data();
    back.doutput_N2P = dgot.data();
    check(fastfar_hybrid_loss_backward(&back) == 0, "refused");
    got.check_guards("loss");
    dgot.check_guards("gradient");
    if (threads > 1) {
      check(got == first_loss && dgot == first_gradient, "%d threads give other bits", threads);
      continue;
    }
    const double error = test::relative_error(got, loss);
    const double derror = test::relative_error(dgot, gradient);
    check(error < 2e-5, "(%lld, %lld): loss %.2e", (long long)rows, (long long)numbers, error);
    check(derror < 1e-4, "(%lld, %lld): gradient %.2e", (long long)rows, (long long)numbers,
          derror);
    first_loss = std::move(got);
    first_gradient = std::move(dgot);
    timestep[rows - 1] = kTimesteps;
    check(fastfar_hybrid_loss(&args) == FASTFAR_ERROR_ARGUMENT, "accepted a timestep too far");
    timestep[rows - 1] = (rows - 1) % kTimesteps;
  }
}

void run(int32_t) {
  constexpr int64_t kSizes[][2] = {{1, 1}, {3, 16}, {7, 5}, {130, 33}};
  for (const auto& size : kSizes) run_case(size[0], size[1]);
}

}  // namespace

int main() {
  test::each_isa(run);
  return test::finish();
}
