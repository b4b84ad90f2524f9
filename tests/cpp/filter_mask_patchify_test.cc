// filter_mask_patchify and its adjoint on every instruction set: an oracle in double, all kinds of
// levels, masks, odd sizes, threads, scratch full of NaN, guard bands, refused arguments.
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common.h"
#include "fastfar_cpu.h"

namespace {

using test::Buffer;
using test::check;

struct Case {
  int64_t batch, channels, size, patch;
  bool mask;
};

constexpr int64_t kLevels = 5;
constexpr Case kCases[] = {{1, 1, 1, 1, false},  {8, 3, 5, 1, true},    {7, 2, 6, 2, true},
                           {3, 16, 16, 1, true}, {2, 17, 16, 4, false}, {4, 2, 21, 3, true},
                           {2, 1, 32, 32, true}, {3, 4, 18, 1, false}};

float as_float(float x) { return x; }
float as_float(uint16_t x) { return test::from_bf16(x); }
void put(float& to, float x) { to = x; }
void put(uint16_t& to, float x) { to = test::to_bf16(x); }

// One case's numbers: random matrices (the operation need not know where they come from).
template <class T>
struct Problem {
  Case c;
  int64_t grid, stride, count;
  Buffer<float> matrices, transposed;
  Buffer<int64_t> level;
  Buffer<uint8_t> mask;

  explicit Problem(const Case& each)
      : c(each),
        grid(c.size / c.patch),
        stride((c.size + 15) / 16 * 16),
        count(c.batch * c.channels * c.size * c.size),
        matrices((kLevels + 1) * c.size * stride),
        transposed((kLevels + 1) * c.size * stride),
        level(c.batch),
        mask(c.batch * grid * grid) {
    test::Draws draws(static_cast<uint64_t>(c.size));
    for (float& number : matrices) number = 0.0F;
    for (float& number : transposed) number = 0.0F;
    for (int64_t k = 0; k <= kLevels; ++k)
      for (int64_t i = 0; i < c.size; ++i)
        for (int64_t j = 0; j < c.size; ++j)
          matrices[(k * c.size + i) * stride + j] = transposed[(k * c.size + j) * stride + i] =
              draws.gauss();
    for (int64_t b = 0; b < c.batch; ++b) level[b] = b % (kLevels + 2) - 1;
    for (uint8_t& number : mask) number = static_cast<uint8_t>(draws.bits() % 2 == 0 ? 0 : 7);
    // A whole row of tokens, which is not computed at all.
    for (int64_t x = 0; grid > 1 && x < grid; ++x) mask[grid * grid * (c.batch - 1) + x] = 1;
  }

  bool masked(int64_t b, int64_t y, int64_t x) const {
    return c.mask && mask[(b * grid + y / c.patch) * grid + x / c.patch] != 0;
  }
  int64_t latent_at(int64_t b, int64_t channel, int64_t y, int64_t x) const {
    return ((b * c.channels + channel) * c.size + y) * c.size + x;
  }
  int64_t token_at(int64_t b, int64_t channel, int64_t y, int64_t x) const {
    const int64_t p = c.patch;
    return ((b * grid + y / p) * grid + x / p) * c.channels * p * p + (channel * p + y % p) * p +
           x % p;
  }
  double matrix(int64_t b, int64_t i, int64_t j) const {
    if (level[b] == 0) return 0.0;
    if (level[b] == -1 || level[b] == kLevels) return i == j ? 1.0 : 0.0;
    return static_cast<double>(matrices[(level[b] * c.size + i) * stride + j]);
  }

  // Tokens of a latent, or (adjoint) latent of tokens; `size` of each result's terms with it.
  void oracle(const Buffer<T>& in, bool adjoint, std::vector<double>& out,
              std::vector<double>& magnitude) const {
    out.assign(static_cast<size_t>(count), 0.0);
    magnitude = out;
    const int64_t n = c.size;
    std::vector<double> half(static_cast<size_t>(n * n)), half_size(half);
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t channel = 0; channel < c.channels; ++channel) {
        const auto a = [&](int64_t i, int64_t j) {
          return adjoint ? matrix(b, j, i) : matrix(b, i, j);
        };
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t j = 0; j < n; ++j) {
            double sum = 0.0, total = 0.0;
            for (int64_t k = 0; k < n; ++k) {
              const double x =
                  !adjoint          ? static_cast<double>(as_float(in[latent_at(b, channel, k, j)]))
                  : masked(b, k, j) ? 0.0
                                    : static_cast<double>(as_float(in[token_at(b, channel, k, j)]));
              sum += a(i, k) * x;
              total += std::fabs(a(i, k) * x);
            }
            half[static_cast<size_t>(i * n + j)] = sum;
            half_size[static_cast<size_t>(i * n + j)] = total;
          }
        }
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t j = 0; j < n; ++j) {
            const auto at = static_cast<size_t>(adjoint ? latent_at(b, channel, i, j)
                                                        : token_at(b, channel, i, j));
            if (!adjoint && masked(b, i, j)) continue;
            for (int64_t k = 0; k < n; ++k) {
              out[at] += half[static_cast<size_t>(i * n + k)] * a(j, k);
              magnitude[at] += half_size[static_cast<size_t>(i * n + k)] * std::fabs(a(j, k));
            }
          }
        }
      }
    }
  }
};

// Runs the operation that Args belongs to, and gives what it wrote.
template <class Args, class T, class Scratch, class Run>
Buffer<T> call(const Problem<T>& p, int32_t dtype, int32_t threads, const Buffer<T>& in,
               bool adjoint, Scratch scratch_bytes, Run run) {
  Buffer<T> out(p.count, 1);
  Args args = {};
  args.dtype = dtype;
  args.threads = threads;
  args.batch = p.c.batch;
  args.channels = p.c.channels;
  args.size = p.c.size;
  args.patch = p.c.patch;
  args.levels = kLevels;
  args.stride = p.stride;
  args.matrices = p.matrices.data();
  args.transposed = p.transposed.data();
  args.level_B = p.level.data();
  args.mask_BL = p.c.mask ? p.mask.data() : nullptr;
  // One of the two pointers is const: the input.
  const void* from = in.data();
  void* to = out.data();
  if constexpr (std::is_const_v<std::remove_pointer_t<decltype(args.latent_BCHW)>>) {
    args.latent_BCHW = from;
    args.tokens_BLP = to;
  } else {
    args.tokens_BLP = from;
    args.latent_BCHW = to;
  }
  Buffer<uint8_t> scratch(threads * scratch_bytes(&args));
  args.scratch = scratch.data();
  check(run(&args) == 0, "refused size %lld", static_cast<long long>(p.c.size));
  out.check_guards(adjoint ? "the latent" : "the tokens");
  scratch.check_guards("scratch");

  const auto refused = [&](const char* what) {
    check(run(&args) == FASTFAR_ERROR_ARGUMENT, "accepted %s", what);
  };
  args.dtype = 2;
  refused("dtype 2");
  args.dtype = dtype;
  args.patch = p.c.size + 1;
  refused("a patch that does not fit");
  args.patch = p.c.patch;
  args.stride = p.c.size - 1;
  refused("a short stride");
  args.stride = p.stride;
  args.levels = kLevels - 1;
  if (p.c.batch == 7) refused("a level out of range");
  args.levels = kLevels;
  args.scratch = nullptr;
  refused("no scratch");
  return out;
}

template <class T>
void run_case(const Case& c, int32_t dtype) {
  const Problem<T> p(c);
  test::Draws draws(3);
  Buffer<T> in(p.count, 1);
  for (T& number : in) put(number, draws.gauss());
  for (const bool adjoint : {false, true}) {
    std::vector<double> expected, magnitude;
    p.oracle(in, adjoint, expected, magnitude);
    const auto one = [&](int32_t threads) {
      return adjoint ? call<fastfar_filter_mask_patchify_backward_args>(
                           p, dtype, threads, in, adjoint,
                           fastfar_filter_mask_patchify_backward_scratch,
                           fastfar_filter_mask_patchify_backward)
                     : call<fastfar_filter_mask_patchify_args>(p, dtype, threads, in, adjoint,
                                                               fastfar_filter_mask_patchify_scratch,
                                                               fastfar_filter_mask_patchify);
    };
    const Buffer<T> first = one(1);
    for (int64_t i = 0; i < p.count; ++i) {
      const auto at = static_cast<size_t>(i);
      const double got = static_cast<double>(as_float(first[i]));
      const double rounding = dtype == FASTFAR_BFLOAT16 ? 0.004 * std::fabs(expected[at]) : 0.0;
      const double limit =
          2.0 * static_cast<double>(c.size) * 6e-8 * magnitude[at] + rounding + 1e-37;
      if (!check(std::fabs(got - expected[at]) <= limit,
                 "size %lld patch %lld adjoint %d at %lld: %.9g, expected %.9g",
                 static_cast<long long>(c.size), static_cast<long long>(c.patch), adjoint,
                 static_cast<long long>(i), got, expected[at])) {
        break;
      }
    }
    for (int32_t threads = 2; threads <= 4; ++threads) {
      check(one(threads) == first, "%d threads give another result", threads);
    }
  }
}

void run(int32_t) {
  for (const Case& c : kCases) {
    run_case<float>(c, FASTFAR_FLOAT32);
    run_case<uint16_t>(c, FASTFAR_BFLOAT16);
  }
  check(fastfar_filter_mask_patchify(nullptr) == FASTFAR_ERROR_ARGUMENT, "accepted null");
  check(fastfar_filter_mask_patchify_backward(nullptr) == FASTFAR_ERROR_ARGUMENT, "accepted null");
}

}  // namespace

int main() {
  test::each_isa(run);
  return test::finish();
}
