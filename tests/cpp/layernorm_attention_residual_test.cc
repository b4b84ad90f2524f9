// layernorm_attention_residual on every instruction set and in both arithmetics against the formula
// in double, in place as well.
#include "common.h"

using test::as_used;
using test::Buffer;
using test::check;

namespace {

struct Sizes {
  int64_t batch, length, heads, width;
  bool mask;
};
constexpr float kEps = 1e-6F;
using Rows = std::vector<std::vector<double>>;

struct Layer {
  Buffer<float> norm_weight, norm_bias, qkv, qkv_bias, proj, proj_bias;

  Layer(int64_t width, test::Draws& d)
      : norm_weight(d.normal(width)),
        norm_bias(d.normal(width)),
        qkv(d.normal(3 * width * width, 1.0F / std::sqrt(static_cast<float>(width)))),
        qkv_bias(d.normal(3 * width, 0.3F)),
        proj(d.normal(width * width, 1.0F / std::sqrt(static_cast<float>(width)))),
        proj_bias(d.normal(width)) {}
};

std::vector<double> linear(int32_t dtype, const Buffer<float>& w, const Buffer<float>& bias,
                           const std::vector<double>& x) {
  std::vector<double> y;
  const int64_t k = static_cast<int64_t>(x.size());
  for (int64_t j = 0; j < bias.size(); ++j) {
    double sum = double{bias[j]};
    for (int64_t i = 0; i < k; ++i) sum += as_used(dtype, w[j * k + i]) * x[static_cast<size_t>(i)];
    y.push_back(sum);
  }
  return y;
}

std::vector<double> normalised(const Layer& layer, const float* x, int64_t n) {
  double mean = 0.0, variance = 0.0;
  const double count = static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) mean += double{x[i]} / count;
  for (int64_t i = 0; i < n; ++i) variance += std::pow(double{x[i]} - mean, 2) / count;
  std::vector<double> h;
  for (int64_t i = 0; i < n; ++i) {
    const double y = (double{x[i]} - mean) / std::sqrt(variance + double{kEps});
    h.push_back(y * double{layer.norm_weight[i]} + double{layer.norm_bias[i]});
  }
  return h;
}

// What the heads give for one position of an image with these rows of queries, keys and values.
std::vector<double> attended(const Sizes& s, const Rows& qkv, const uint8_t* mask, size_t i) {
  const size_t width = static_cast<size_t>(s.width), heads = static_cast<size_t>(s.heads);
  const size_t part = width / heads;
  std::vector<double> out(width, 0.0);
  for (size_t h = 0; h < heads; ++h) {
    double sum = 0.0;
    for (size_t j = 0; j < qkv.size(); ++j) {
      if (mask != nullptr && mask[j] == 0) continue;
      double dot = 0.0;
      for (size_t e = h * part; e < (h + 1) * part; ++e) dot += qkv[i][e] * qkv[j][width + e];
      const double weight = std::exp(dot / std::sqrt(static_cast<double>(part)));
      sum += weight;
      for (size_t e = h * part; e < (h + 1) * part; ++e) out[e] += weight * qkv[j][2 * width + e];
    }
    for (size_t e = h * part; e < (h + 1) * part; ++e) out[e] /= sum;
  }
  return out;
}

void run_case(const Sizes& s, int32_t dtype, double limit) {
  test::Draws draws(9);
  const Layer layer(s.width, draws);
  const Buffer<float> x = draws.normal(s.batch * s.length * s.width);
  Buffer<uint8_t> mask(s.batch * s.length);
  for (uint8_t& each : mask) each = draws.index(3) != 0;
  for (int64_t b = 0; b < s.batch; ++b) mask[b * s.length] = 1;
  std::vector<double> expected;
  for (int64_t b = 0; b < s.batch; ++b) {
    Rows qkv;
    for (int64_t i = 0; i < s.length; ++i) {
      const float* row = x.data() + (b * s.length + i) * s.width;
      qkv.push_back(linear(dtype, layer.qkv, layer.qkv_bias, normalised(layer, row, s.width)));
    }
    for (int64_t i = 0; i < s.length; ++i) {
      const uint8_t* kept = s.mask ? mask.data() + b * s.length : nullptr;
      const std::vector<double> y = linear(dtype, layer.proj, layer.proj_bias,
                                           attended(s, qkv, kept, static_cast<size_t>(i)));
      for (int64_t e = 0; e < s.width; ++e) {
        expected.push_back(double{x[(b * s.length + i) * s.width + e]} + y[static_cast<size_t>(e)]);
      }
    }
  }
  const Buffer<uint8_t> qkv = test::pack(dtype, layer.qkv.data(), 3 * s.width, s.width);
  const Buffer<uint8_t> proj = test::pack(dtype, layer.proj.data(), s.width, s.width);
  Buffer<float> first(x.size());
  for (int32_t threads = 1; threads <= 4; ++threads) {
    Buffer<float> out = x.copy();  // the last run is in place
    fastfar_layernorm_attention_residual_args args = {};
    args.dtype = dtype;
    args.x_dtype = FASTFAR_FLOAT32;
    args.threads = threads;
    args.batch = s.batch;
    args.length = s.length;
    args.heads = s.heads;
    args.width = s.width;
    args.eps = kEps;
    args.x_BSD = threads == 4 ? out.data() : x.data();
    args.norm_weight = layer.norm_weight.data();
    args.norm_bias = layer.norm_bias.data();
    args.qkv = qkv.data();
    args.qkv_bias = layer.qkv_bias.data();
    args.proj = proj.data();
    args.proj_bias = layer.proj_bias.data();
    args.key_mask_BS = s.mask ? mask.data() : nullptr;
    args.out_BSD = threads == 1 ? first.data() : out.data();
    Buffer<uint8_t> scratch(fastfar_layernorm_attention_residual_scratch(&args));
    check(fastfar_layernorm_attention_residual(&args) == FASTFAR_ERROR_ARGUMENT, "no scratch");
    args.scratch = scratch.data();
    check(fastfar_layernorm_attention_residual(&args) == 0, "refused");
    scratch.check_guards("scratch");
    if (threads > 1) check(out == first, "%d threads give other bits", threads);
  }
  const double error = test::relative_error(first, expected);
  check(error < limit, "(%lld, %lld, %lld, %lld) dtype %d: error %.2e", (long long)s.batch,
        (long long)s.length, (long long)s.heads, (long long)s.width, dtype, error);
}

void run(int32_t) {
  constexpr Sizes kSizes[] = {{1, 1, 1, 1, false},  {2, 3, 2, 6, true},     {1, 33, 1, 32, false},
                              {2, 37, 3, 48, true}, {1, 65, 2, 160, false}, {1, 9, 3, 99, true}};
  for (const Sizes& s : kSizes) {
    run_case(s, FASTFAR_FLOAT32, 2e-6);
    run_case(s, FASTFAR_BFLOAT16, 1e-2);
  }
  fastfar_layernorm_attention_residual_args args = {};
  check(fastfar_layernorm_attention_residual_scratch(&args) < 0, "accepted no threads");
}

}  // namespace

int main() {
  test::each_isa(run);
  return test::finish();
}
