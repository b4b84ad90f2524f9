// The interface of the library, and the product of gemm.h that all operations use: every
// instruction set, both arithmetics, sums over two segments and over pieces of K, several threads.
// Fails when a set that the machine offers did not run, or one that is not there was accepted.
#include "common.h"

using test::Buffer;
using test::check;

namespace {

struct Case {
  int64_t m, n, k;
};

struct Problem {
  Problem(int32_t dtype, const Case& size)
      : dtype(dtype),
        size(size),
        draws(static_cast<uint64_t>(size.m * 10007 + size.n * 101 + size.k)),
        a_MK(draws.normal(size.m * size.k)),
        b_NK(draws.normal(size.n * size.k)),
        packed(test::pack(dtype, b_NK.data(), size.n, size.k)) {
    for (int64_t i = 0; i < size.m; ++i) {
      for (int64_t j = 0; j < size.n; ++j) {
        double sum = 0.0, absolute = 0.0;
        for (int64_t p = 0; p < size.k; ++p) {
          const double product = test::as_used(dtype, a_MK[i * size.k + p]) *
                                 test::as_used(dtype, b_NK[j * size.k + p]);
          sum += product;
          absolute += std::fabs(product);
        }
        exact.push_back(sum);
        magnitude.push_back(absolute);
      }
    }
  }

  Buffer<float> run(int32_t isa, int32_t segments, int32_t pieces, int32_t threads) {
    Buffer<float> c_MN(size.m * size.n);
    fastfar_selftest_args args = {};
    args.dtype = dtype;
    args.threads = threads;
    args.segments = segments;
    args.pieces = pieces;
    args.m = size.m;
    args.n = size.n;
    args.k = size.k;
    args.a_MK = a_MK.data();
    args.b_NK = packed.data();
    args.c_MN = c_MN.data();
    Buffer<uint8_t> scratch(fastfar_selftest_scratch(&args));
    args.scratch = scratch.data();
    check(fastfar_selftest(&args) == isa, "another instruction set ran");
    c_MN.check_guards("the output");
    scratch.check_guards("the scratch");
    return c_MN;
  }

  bool right(const Buffer<float>& c_MN) const {
    for (size_t i = 0; i < exact.size(); ++i) {
      if (!test::check_close(c_MN.data()[i], exact[i], magnitude[i], size.k,
                             "(%d, %d, %d), dtype %d, number %d", static_cast<int>(size.m),
                             static_cast<int>(size.n), static_cast<int>(size.k), dtype,
                             static_cast<int>(i))) {
        return false;
      }
    }
    return true;
  }

  int32_t dtype;
  Case size;
  test::Draws draws;
  Buffer<float> a_MK, b_NK;
  Buffer<uint8_t> packed;
  std::vector<double> exact, magnitude;
};

void product(int32_t isa) {
  constexpr Case kCases[] = {{1, 1, 1},    {2, 33, 31},    {3, 7, 65},    {16, 16, 32},
                             {17, 15, 33}, {32, 32, 64},   {33, 100, 96}, {61, 1, 97},
                             {1, 257, 40}, {65, 130, 129}, {2, 3, 0},     {100, 31, 320}};
  for (const int32_t dtype : {FASTFAR_FLOAT32, FASTFAR_BFLOAT16}) {
    for (const Case& size : kCases) {
      Problem problem(dtype, size);
      for (const int32_t segments : {1, 2}) {
        for (const int32_t pieces : {1, 2, 5}) {
          const Buffer<float> once = problem.run(isa, segments, pieces, 1);
          if (!problem.right(once)) {
            check(false, "with %d segments, %d pieces", segments, pieces);
            continue;
          }
          for (int32_t threads = 1; threads <= 4; ++threads) {
            check(problem.run(isa, segments, pieces, threads) == once,
                  "(%d, %d, %d), dtype %d: %d threads give other bits", static_cast<int>(size.m),
                  static_cast<int>(size.n), static_cast<int>(size.k), dtype, threads);
          }
        }
      }
    }
  }
}

// A NaN stays in its row (or output) and is not lost; nor is an infinity.
void not_finite(int32_t isa) {
  constexpr Case kSize = {35, 37, 70};
  for (const int32_t dtype : {FASTFAR_FLOAT32, FASTFAR_BFLOAT16}) {
    Problem problem(dtype, kSize);
    problem.a_MK[3 * kSize.k + 69] = NAN;
    problem.b_NK[34 * kSize.k] = INFINITY;
    problem.packed = test::pack(dtype, problem.b_NK.data(), kSize.n, kSize.k);
    const Buffer<float> c_MN = problem.run(isa, 2, 2, 2);
    for (int64_t i = 0; i < kSize.m; ++i) {
      for (int64_t j = 0; j < kSize.n; ++j) {
        const float got = c_MN[i * kSize.n + j];
        const bool expected = i == 3 ? std::isnan(got) : std::isinf(got) == (j == 34);
        check(expected, "%g at (%d, %d)", static_cast<double>(got), static_cast<int>(i),
              static_cast<int>(j));
      }
    }
  }
}

void refusals() {
  float one = 1.0F;
  fastfar_selftest_args good = {};
  good.threads = good.segments = good.pieces = 1;
  good.k = 1;
  good.c_MN = &one;
  check(fastfar_selftest(&good) >= 0, "refused an empty product");
  fastfar_selftest_args bad = good;
  bad.m = -1;
  check(fastfar_selftest(&bad) == FASTFAR_ERROR_ARGUMENT, "accepted m = -1");
  bad = good;
  bad.segments = 3;
  check(fastfar_selftest(&bad) == FASTFAR_ERROR_ARGUMENT, "accepted 3 segments");
  bad = good;
  bad.dtype = 2;
  check(fastfar_selftest(&bad) == FASTFAR_ERROR_ARGUMENT, "accepted dtype 2");
  bad = good;
  bad.m = bad.n = 1;
  check(fastfar_selftest(&bad) == FASTFAR_ERROR_ARGUMENT, "accepted null pointers");
  check(fastfar_selftest(nullptr) == FASTFAR_ERROR_ARGUMENT, "accepted no arguments");
}

void selection() {
  check(fastfar_abi_version() == FASTFAR_ABI_VERSION, "ABI version");
  check(fastfar_isa_count() == FASTFAR_ISA_COUNT, "count of sets");
  check(fastfar_isa_reason(FASTFAR_ISA_SCALAR) == nullptr, "scalar must be usable");
  check(fastfar_isa_selected() == fastfar_isa_best(), "the best set is the default");
  check(fastfar_isa_select(-1) == FASTFAR_ERROR_ARGUMENT, "accepted set -1");
  check(fastfar_isa_select(FASTFAR_ISA_COUNT) == FASTFAR_ERROR_ARGUMENT, "accepted set 5");
  check(fastfar_isa_reason(-1) != nullptr && fastfar_isa_name(-1) == nullptr, "set -1");
  for (int32_t isa = 0; isa < FASTFAR_ISA_COUNT; ++isa) {
    const int32_t before = fastfar_isa_selected();
    const bool usable = fastfar_isa_reason(isa) == nullptr;
    check(fastfar_isa_select(isa) == (usable ? isa : FASTFAR_ERROR_ISA), "choice of set %d", isa);
    check(fastfar_isa_selected() == (usable ? isa : before), "selection after set %d", isa);
  }
}

}  // namespace

int main() {
  selection();
  test::each_isa([](int32_t isa) {
    product(isa);
    not_finite(isa);
    refusals();
  });
  return test::finish();
}
