// The yardstick does the work that it says it does, on every instruction set: the products and the
// sums that it hands back are those of an oracle, and grow with the number of rounds.
#include "common.h"

#include <cmath>

using test::Buffer, test::check;

namespace {

int64_t run_peak(int32_t dtype, int32_t threads, int64_t iterations, const Buffer<float>* numbers,
                 Buffer<float>& results) {
  Buffer<int64_t> work(1);
  fastfar_peak_args args = {};
  args.dtype = dtype;
  args.threads = threads;
  args.iterations = iterations;
  args.numbers = numbers == nullptr ? 0 : numbers->size();
  args.buffer = numbers == nullptr ? nullptr : numbers->data();
  args.results = results.data();
  args.work = work.data();
  check(fastfar_peak(&args) >= 0, "refused %lld rounds", static_cast<long long>(iterations));
  return work[0];
}

void check_products(int32_t isa, int32_t dtype, int32_t threads, int64_t iterations) {
  Buffer<float> results(threads);
  const int64_t flops = run_peak(dtype, threads, iterations, nullptr, results);
  const bool pairs = dtype == FASTFAR_BFLOAT16 && isa >= FASTFAR_ISA_AVX512_BF16;
  const double rounds = static_cast<double>(iterations);
  const double expected = pairs ? 0.375 * rounds : 2.0 * (1.0 - std::pow(0.75, rounds));
  for (int64_t i = 0; i < threads; ++i) {
    test::check_close(results[i], expected, expected, 300, "products of thread %d",
                      static_cast<int>(i));
  }
  check(iterations == 0 ? flops == 0 : flops % (threads * iterations) == 0, "count of FLOPs");
  if (pairs && isa == FASTFAR_ISA_AMX) {
    check(flops == threads * iterations * 4 * 2 * 16 * 16 * 32, "FLOPs of the tiles");
  }
}

void check_reads(int32_t threads, int64_t count, int64_t passes) {
  Buffer<float> numbers(count), results(threads);
  for (int64_t i = 0; i < count; ++i) numbers[i] = static_cast<float>(i % 97);
  const int64_t bytes = run_peak(FASTFAR_FLOAT32, threads, passes, &numbers, results);
  const int64_t part = count / threads / 128 * 128;
  check(bytes == threads * passes * part * 4, "%lld bytes", static_cast<long long>(bytes));
  for (int64_t i = 0; i < threads; ++i) {
    double expected = 0.0;
    for (int64_t k = 0; k < part; ++k) expected += static_cast<double>(numbers[i * part + k]);
    check(static_cast<double>(results[i]) == expected * static_cast<double>(passes),
          "sum of thread %d", static_cast<int>(i));
  }
}

void run(int32_t isa) {
  for (const int32_t dtype : {FASTFAR_FLOAT32, FASTFAR_BFLOAT16}) {
    for (const int32_t threads : {1, 3}) {
      for (const int64_t iterations : {0, 1, 2, 7, 40}) {
        check_products(isa, dtype, threads, iterations);
      }
    }
  }
  for (const int64_t count : {0, 127, 128, 1000, 4096}) {
    for (const int32_t threads : {1, 3}) check_reads(threads, count, 2);
  }
  Buffer<float> results(1);
  Buffer<int64_t> work(1);
  fastfar_peak_args args = {FASTFAR_FLOAT32, 1, 1, 0, nullptr, results.data(), work.data()};
  fastfar_peak_args wrong = args;
  wrong.threads = 0;
  check(fastfar_peak(&wrong) == FASTFAR_ERROR_ARGUMENT, "accepted 0 threads");
  wrong = args;
  wrong.dtype = 2;
  check(fastfar_peak(&wrong) == FASTFAR_ERROR_ARGUMENT, "accepted dtype 2");
  wrong = args;
  wrong.iterations = -1;
  check(fastfar_peak(&wrong) == FASTFAR_ERROR_ARGUMENT, "accepted -1 rounds");
  wrong = args;
  wrong.work = nullptr;
  check(fastfar_peak(&wrong) == FASTFAR_ERROR_ARGUMENT, "accepted a null pointer");
}

}  // namespace

int main() {
  test::each_isa(run);
  return test::finish();
}
