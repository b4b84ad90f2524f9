// attention on every instruction set and in both arithmetics against the formula in double.
#include "common.h"

using test::Buffer;
using test::check;

namespace {

struct Sizes {
  int64_t batch, length, heads, width;
  bool mask;
};

// The number in memory, whatever its type.
double value(float x) { return static_cast<double>(x); }
double value(uint16_t x) { return static_cast<double>(test::from_bf16(x)); }

template <class T>
std::vector<double> exact(const Sizes& s, const Buffer<T>& qkv, const uint8_t* mask) {
  const int64_t columns = s.heads * s.width;
  std::vector<double> out(static_cast<size_t>(s.batch * s.length * columns), 0.0);
  const auto at = [&](int64_t b, int64_t p, int64_t which, int64_t h, int64_t e) {
    return value(qkv[(((b * s.length + p) * 3 + which) * s.heads + h) * s.width + e]);
  };
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.heads; ++h) {
      for (int64_t i = 0; i < s.length; ++i) {
        std::vector<double> score(static_cast<size_t>(s.length), -INFINITY);
        double top = -INFINITY, sum = 0.0;
        for (int64_t j = 0; j < s.length; ++j) {
          if (mask != nullptr && mask[b * s.length + j] == 0) continue;
          double dot = 0.0;
          for (int64_t e = 0; e < s.width; ++e) dot += at(b, i, 0, h, e) * at(b, j, 1, h, e);
          score[static_cast<size_t>(j)] = dot / std::sqrt(static_cast<double>(s.width));
          top = std::fmax(top, score[static_cast<size_t>(j)]);
        }
        if (std::isinf(top)) continue;  // no key at all: zeros
        for (double& x : score) sum += x = std::exp(x - top);
        for (int64_t j = 0; j < s.length; ++j) {
          for (int64_t e = 0; e < s.width; ++e) {
            out[static_cast<size_t>((b * s.length + i) * columns + h * s.width + e)] +=
                score[static_cast<size_t>(j)] / sum * at(b, j, 2, h, e);
          }
        }
      }
    }
  }
  return out;
}

template <class T>
std::vector<double> widened(const Buffer<T>& x) {
  std::vector<double> result;
  for (int64_t i = 0; i < x.size(); ++i) result.push_back(value(x[i]));
  return result;
}

template <class T>
void run_case(const Sizes& s, int32_t dtype, Buffer<T> qkv, double limit) {
  test::Draws draws(11);
  Buffer<uint8_t> mask(s.batch * s.length);
  for (uint8_t& x : mask) x = draws.index(3) != 0;
  for (int64_t i = 0; i < s.length; ++i) mask[i] = s.batch == 1;  // of several, one has no key
  const std::vector<double> expected = exact(s, qkv, s.mask ? mask.data() : nullptr);
  Buffer<T> first(qkv.size() / 3);
  for (int32_t threads = 1; threads <= 4; ++threads) {
    fastfar_attention_args args = {};
    args.dtype = dtype;
    args.threads = threads;
    args.batch = s.batch;
    args.length = s.length;
    args.heads = s.heads;
    args.width = s.width;
    args.qkv_BS3HE = qkv.data();
    args.key_mask_BS = s.mask ? mask.data() : nullptr;
    Buffer<T> out(qkv.size() / 3);
    Buffer<uint8_t> scratch(fastfar_attention_scratch(&args));
    args.out_BSD = threads == 1 ? first.data() : out.data();
    check(fastfar_attention(&args) == FASTFAR_ERROR_ARGUMENT, "accepted no scratch");
    args.scratch = scratch.data();
    check(fastfar_attention(&args) == 0, "refused");
    scratch.check_guards("scratch");
    if (threads > 1) {
      check(out == first, "%d threads give other bits", threads);
      continue;
    }
    const double error = test::relative_error(widened(first), expected);
    check(error < limit, "(%lld, %lld, %lld, %lld) dtype %d: error %.2e", (long long)s.batch,
          (long long)s.length, (long long)s.heads, (long long)s.width, dtype, error);
  }
}

void run(int32_t) {
  constexpr Sizes kSizes[] = {{1, 1, 1, 1, false},  {2, 3, 2, 5, true},    {1, 33, 1, 32, false},
                              {2, 70, 2, 80, true}, {1, 300, 1, 20, true}, {1, 64, 3, 33, false}};
  for (const Sizes& s : kSizes) {
    test::Draws draws(3);
    const int64_t count = s.batch * s.length * 3 * s.heads * s.width;
    run_case(s, FASTFAR_FLOAT32, draws.normal(count), 2e-6);
    run_case(s, FASTFAR_BFLOAT16, draws.normal_bf16(count), 6e-3);
  }
  fastfar_attention_args args = {};
  check(fastfar_attention_scratch(&args) < 0, "accepted no threads");
}

}  // namespace

int main() {
  test::each_isa(run);
  return test::finish();
}
