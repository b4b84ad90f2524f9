// Runs the self-test on every instruction set of this machine against a double-precision oracle.
// Fails when a set that the machine offers did not run, when an output is wrong, when a byte beside
// the output was written, or when a set that is not there was accepted.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "fastfar_cpu.h"

namespace {

int g_failures = 0;

void check(bool ok, const char* what, const char* isa) {
  if (ok) return;
  ++g_failures;
  std::printf("FAILED %s: %s\n", isa, what);
}

// The nearest bfloat16 as a float, by arithmetic other than the kernel's: keep 8 bits of mantissa.
float rounded(float value) {
  if (value == 0.0F) return 0.0F;
  int exponent = 0;
  const float mantissa = std::frexp(value, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(mantissa, 8)), exponent - 8);
}

// Deterministic values in [-1, 1) that are not representable in bfloat16.
struct Draws {
  uint32_t state = 1;
  float next() {
    state = state * 1664525U + 1013904223U;
    return static_cast<float>(state >> 8) / 8388608.0F - 1.0F;
  }
};

void run_case(const char* isa, int32_t expected, int64_t m, int64_t n, int64_t k) {
  constexpr size_t kGuard = 64;
  constexpr float kSentinel = -12345.0F;
  Draws draws;
  std::vector<float> a(static_cast<size_t>(m * k) + 1), b(static_cast<size_t>(k * n) + 1);
  for (float& value : a) value = draws.next();
  for (float& value : b) value = draws.next();
  const size_t size = static_cast<size_t>(m * n);
  std::vector<float> c(size + 2 * kGuard, kSentinel);

  const int32_t ran = fastfar_selftest(m, n, k, a.data(), b.data(), c.data() + kGuard);
  check(ran == expected, "another instruction set ran", isa);

  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0.0, magnitude = 0.0;
      for (int64_t p = 0; p < k; ++p) {
        const double product = static_cast<double>(rounded(a[static_cast<size_t>(i * k + p)])) *
                               static_cast<double>(rounded(b[static_cast<size_t>(p * n + j)]));
        sum += product;
        magnitude += std::fabs(product);
      }
      const double got = static_cast<double>(c[kGuard + static_cast<size_t>(i * n + j)]);
      // k roundings of a float32 sum; `not <=` so that a NaN fails too.
      if (!(std::fabs(got - sum) <= static_cast<double>(k) * 6e-8 * magnitude)) {
        std::printf("(%lld, %lld, %lld) at (%lld, %lld): %.9g, expected %.9g\n",
                    static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k),
                    static_cast<long long>(i), static_cast<long long>(j), got, sum);
        check(false, "wrong value", isa);
        return;
      }
    }
  }
  for (size_t g = 0; g < kGuard; ++g) {
    check(c[g] == kSentinel && c[kGuard + size + g] == kSentinel, "wrote beside the output", isa);
  }
}

}  // namespace

int main() {
  constexpr int64_t kSizes[][3] = {{1, 1, 1},    {16, 16, 32}, {3, 7, 5},   {17, 15, 33},
                                   {32, 48, 64}, {1, 33, 129}, {61, 1, 97}, {2, 3, 0}};
  check(fastfar_abi_version() == FASTFAR_ABI_VERSION, "ABI version", "library");
  check(fastfar_isa_count() == FASTFAR_ISA_COUNT, "count of sets", "library");
  check(fastfar_isa_reason(FASTFAR_ISA_SCALAR) == nullptr, "scalar must be usable", "scalar");
  check(fastfar_isa_selected() == fastfar_isa_best(), "the best set is the default", "library");
  check(fastfar_isa_select(-1) == FASTFAR_ERROR_ARGUMENT, "accepted set -1", "library");
  check(fastfar_isa_select(FASTFAR_ISA_COUNT) == FASTFAR_ERROR_ARGUMENT, "accepted set 5",
        "library");
  check(fastfar_isa_reason(-1) != nullptr && fastfar_isa_name(-1) == nullptr, "set -1", "library");

  for (int32_t isa = 0; isa < FASTFAR_ISA_COUNT; ++isa) {
    const char* name = fastfar_isa_name(isa);
    const char* reason = fastfar_isa_reason(isa);
    if (reason != nullptr) {
      const int32_t before = fastfar_isa_selected();
      check(fastfar_isa_select(isa) == FASTFAR_ERROR_ISA, "accepted though unusable", name);
      check(fastfar_isa_selected() == before, "a refused choice changed the selection", name);
      std::printf("skipped %s: %s\n", name, reason);
      continue;
    }
    check(fastfar_isa_select(isa) == isa, "refused though usable", name);
    check(fastfar_isa_selected() == isa, "selection did not hold", name);
    for (const auto& size : kSizes) run_case(name, isa, size[0], size[1], size[2]);
    const float one = 1.0F;
    float out = 0.0F;
    check(fastfar_selftest(-1, 1, 1, &one, &one, &out) == FASTFAR_ERROR_ARGUMENT, "m = -1", name);
    check(fastfar_selftest(1, 1, 1, nullptr, &one, &out) == FASTFAR_ERROR_ARGUMENT, "null", name);
    std::printf("ran %s\n", name);
  }
  std::printf("%d failures\n", g_failures);
  return g_failures == 0 ? 0 : 1;
}
