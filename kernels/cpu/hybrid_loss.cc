// hybrid_loss: the training loss of the denoising MLP, one value per row, and its derivative.
//
//   loss = mean_P (eps - noise)^2 + mean_P bound / log 2
//   bound = KL(posterior || model) = 1/2 (l - p - 1 + e^(p - l) + d^2 e^-l),  or at t = 0
//           -log of the model's mass in the bin of width 2/255 around the target
// with l = f log_beta + (1 - f) p, f = (v + 1) / 2, p the posterior's log variance and d the
// distance of the means. In the bound eps is a constant: its derivative is that of v alone.
//
// The normal distribution function is (1 + tanh(g(z))) / 2 = 1 / (1 + e^(-2 g(z))). It is odd
// around z = 0, so differences are taken in the lower tail, where no digits are lost.
#include "gemm.h"
#include "ops.h"
#include "rows.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

constexpr float kSlope = 0.797884561F;  // sqrt(2 / pi)
constexpr float kCubic = 0.044715F;
constexpr float kHalfBin = 1.0F / 255.0F;
constexpr float kLeast = 1e-12F;
constexpr float kInverseLog2 = 1.44269504F;
constexpr int64_t kRowsPerTask = 64;

// A probability and its derivative by z.
struct Mass {
  V value, slope;
};

Mass normal_cdf(V z) {
  const V square = z * z;
  const V g = z * fma(square, set(kCubic), set(1.0F)) * set(2.0F * kSlope);
  const V p = set(1.0F) / (set(1.0F) + exponential(set(0.0F) - g));
  const V dg = fma(square, set(3.0F * kCubic), set(1.0F)) * set(2.0F * kSlope);
  return {p, p * (set(1.0F) / (set(1.0F) + exponential(g))) * dg};
}

// log max(p, 1e-12), and the derivative's factor: 1 / p, or 0 below the limit.
V safe_log(V p) { return logarithm(max(p, set(kLeast))); }
V safe_inverse(V p) {
  return select_less(p, set(kLeast), set(0.0F), set(1.0F) / max(p, set(kLeast)));
}

// bound and d bound / d l, for one vector of numbers at t = 0.
void first_step(V target, V mean, V log_variance, V& bound, V& slope) {
  const V centred = target - mean;
  const V inverse = exponential(log_variance * set(-0.5F));
  const V zu = inverse * (centred + set(kHalfBin)), zl = inverse * (centred - set(kHalfBin));
  const Mass upper = normal_cdf(zu), lower = normal_cdf(zl);
  const V zero = set(0.0F);
  const Mass not_upper = normal_cdf(zero - zu), not_lower = normal_cdf(zero - zl);
  const V inside =
      select_less(zero, centred, not_lower.value - not_upper.value, upper.value - lower.value);
  // d z / d l = -z / 2.
  const V du = upper.slope * zu * set(-0.5F), dl = lower.slope * zl * set(-0.5F);
  const V inner = safe_log(inside), inner_slope = (du - dl) * safe_inverse(inside);
  const V below = safe_log(upper.value), below_slope = du * safe_inverse(upper.value);
  const V above = safe_log(not_lower.value);
  const V above_slope = zero - dl * safe_inverse(not_lower.value);
  const V low = set(-0.999F), high = set(0.999F);
  bound = zero - select_less(target, low, below, select_less(high, target, above, inner));
  slope = zero - select_less(target, low, below_slope,
                             select_less(high, target, above_slope, inner_slope));
}

struct Row {
  V recip, recip_m1, mean_x0, log_beta, log_posterior;
  bool first;
  explicit Row(const float* t, bool is_first)
      : recip(set(t[0])),
        recip_m1(set(t[1])),
        mean_x0(set(t[2])),
        log_beta(set(t[4])),
        log_posterior(set(t[5])),
        first(is_first) {}
  // See bound and slope above; the means differ by mean_x0 (x0 - predicted x0).
  void bound(V eps, V v, V target, V noised, V mean_xt, V& value, V& slope) const {
    const V f = fma(v, set(0.5F), set(0.5F));
    const V l = f * log_beta + (set(1.0F) - f) * log_posterior;
    const V predicted = recip * noised - recip_m1 * eps;
    if (first) {
      first_step(target, mean_x0 * predicted + mean_xt * noised, l, value, slope);
      return;
    }
    const V d = mean_x0 * (target - predicted);
    const V ratio = exponential(log_posterior - l);
    const V distance = d * d * exponential(set(0.0F) - l);
    value = set(0.5F) * (l - log_posterior - set(1.0F) + ratio + distance);
    slope = set(0.5F) * (set(1.0F) - ratio - distance);
  }
};

// The sum of the first `count` lanes; what is behind may be anything.
float sum_part(V x, int64_t count) {
  if (count >= kLanes) return sum(x);
  alignas(64) float part[kLanes];
  store(part, x);
  float total = 0.0F;
  for (int64_t i = 0; i < count; ++i) total += part[i];
  return total;
}

template <class Args>
struct Inputs {
  const Args& a;
  Numbers output, target, noise, noised;
  explicit Inputs(const Args& args)
      : a(args),
        output{const_cast<void*>(args.output_N2P), args.dtype},
        target{const_cast<void*>(args.target_NP), args.dtype},
        noise{const_cast<void*>(args.noise_NP), args.dtype},
        noised{const_cast<void*>(args.noised_NP), args.dtype} {}

  // Calls f(place in the row, count, eps - noise, bound, slope) for every vector of the row.
  template <class F>
  void each(int64_t row, const F& f) const {
    const float* table = a.table_T6 + a.timestep_N[row] * 6;
    const Row at(table, a.timestep_N[row] == 0);
    const int64_t numbers = a.numbers;
    for (int64_t i = 0; i < numbers; i += kLanes) {
      const int64_t count = numbers - i, place = row * numbers + i;
      const V eps = output.get(2 * row * numbers + i, count);
      const V v = output.get((2 * row + 1) * numbers + i, count);
      V bound, slope;
      at.bound(eps, v, target.get(place, count), noised.get(place, count), set(table[3]), bound,
               slope);
      f(i, count, eps - noise.get(place, count), bound, slope * (at.log_beta - at.log_posterior));
    }
  }

  bool valid() const {
    if (a.threads <= 0 || a.rows < 0 || a.numbers <= 0 || a.num_timesteps <= 0 ||
        (a.dtype != FASTFAR_FLOAT32 && a.dtype != FASTFAR_BFLOAT16) || a.output_N2P == nullptr ||
        a.target_NP == nullptr || a.noise_NP == nullptr || a.noised_NP == nullptr ||
        a.timestep_N == nullptr || a.table_T6 == nullptr) {
      return false;
    }
    for (int64_t row = 0; row < a.rows; ++row) {
      if (a.timestep_N[row] < 0 || a.timestep_N[row] >= a.num_timesteps) return false;
    }
    return true;
  }
};

template <class F>
void each_row(int32_t threads, int64_t rows, const F& f) {
  parallel_for(threads, ceil_div(rows, kRowsPerTask), [&](int64_t task, int32_t) {
    for (int64_t row = task * kRowsPerTask; row < smaller(rows, (task + 1) * kRowsPerTask); ++row) {
      f(row);
    }
  });
}

}  // namespace

int32_t hybrid_loss(const fastfar_hybrid_loss_args& args) {
  const Inputs<fastfar_hybrid_loss_args> inputs(args);
  if (!inputs.valid() || args.loss_N == nullptr) return FASTFAR_ERROR_ARGUMENT;
  each_row(args.threads, args.rows, [&](int64_t row) {
    float total = 0.0F;
    inputs.each(row, [&](int64_t, int64_t count, V difference, V bound, V) {
      total += sum_part(fma(bound, set(kInverseLog2), difference * difference), count);
    });
    args.loss_N[row] = total / static_cast<float>(args.numbers);
  });
  return 0;
}

int32_t hybrid_loss_backward(const fastfar_hybrid_loss_backward_args& args) {
  const Inputs<fastfar_hybrid_loss_backward_args> inputs(args);
  if (!inputs.valid() || args.dloss_N == nullptr || args.doutput_N2P == nullptr) {
    return FASTFAR_ERROR_ARGUMENT;
  }
  const Numbers doutput = {args.doutput_N2P, args.dtype};
  each_row(args.threads, args.rows, [&](int64_t row) {
    const float scale = args.dloss_N[row] / static_cast<float>(args.numbers);
    const int64_t numbers = args.numbers;
    inputs.each(row, [&](int64_t i, int64_t count, V difference, V, V slope) {
      doutput.put(2 * row * numbers + i, difference * set(2.0F * scale), count);
      doutput.put((2 * row + 1) * numbers + i, slope * set(0.5F * kInverseLog2 * scale), count);
    });
  });
  return 0;
}

}  // namespace FASTFAR_TARGET
}  // namespace fastfar
