// What the C++ tests share. Each is a plain program: it runs an operation on every instruction set
// of the machine against an oracle in double, and exits with 1 if anything was wrong.
//
//   #include "common.h"
//   using test::Buffer, test::check;
//
//   void run(int32_t isa) {
//     test::Draws draws(7);                          // the same numbers in every run
//     Buffer<float> x_ME = draws.normal(m * e);      // input, 64-byte aligned, guard bands of NaN
//     Buffer<uint16_t> y_ME = draws.normal_bf16(m * e);
//     Buffer<float> out_ME(m * e);                   // output or scratch: full of NaN
//     Buffer<uint8_t> scratch(fastfar_op_scratch(m, e));
//     Buffer<uint8_t> w = test::pack(FASTFAR_BFLOAT16, w_NK.data(), n, k);
//     fastfar_op_args args = {...};
//     check(fastfar_op(&args) == 0, "refused %d rows", m);  // printf's formats
//     test::check_close(out_ME[i], exact, sum_of_absolute_terms, k, "row %d", i);
//     check(test::relative_error(out_ME, exact_ME) < 1e-5, "too far");
//     out_ME.check_guards("out"); scratch.check_guards("scratch");
//     check(out_ME == again_ME, "differs from run to run");   // bit by bit
//   }
//   int main() { test::each_isa(run); return test::finish(); }
//
// A buffer's guards are NaN, so that what was read beside it shows in the result, and are compared
// in check_guards (and by the destructor), so that a write is seen. With AddressSanitizer they are
// poisoned: touching one ends the program.
#ifndef FASTFAR_TESTS_CPP_COMMON_H_
#define FASTFAR_TESTS_CPP_COMMON_H_

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "fastfar_cpu.h"

#if defined(__SANITIZE_ADDRESS__)
#define FASTFAR_TESTS_POISON 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTFAR_TESTS_POISON 1
#endif
#endif
#ifdef FASTFAR_TESTS_POISON
#include <sanitizer/asan_interface.h>
#endif

namespace test {

// --- checks -----------------------------------------------------------------------------------

inline int g_failures = 0;
inline const char* g_isa = "library";  // what is being tested, for the messages

// Counts and prints a failure; the message is formatted as by printf.
__attribute__((format(printf, 2, 3))) inline bool check(bool ok, const char* format, ...) {
  if (ok) return true;
  constexpr int kPrinted = 40;
  if (++g_failures <= kPrinted) {
    std::printf("FAILED %s: ", g_isa);
    va_list arguments;
    va_start(arguments, format);
    std::vprintf(format, arguments);
    va_end(arguments);
    std::printf("\n");
  }
  return false;
}

// What main returns.
inline int finish() {
  std::printf("%d failures\n", g_failures);
  return g_failures == 0 ? 0 : 1;
}

// Calls run(isa) with every instruction set of this machine selected in turn, says "ran <isa>" or
// why not, and selects the best one again at the end.
template <class F>
inline void each_isa(const F& run) {
  for (int32_t isa = 0; isa < FASTFAR_ISA_COUNT; ++isa) {
    g_isa = fastfar_isa_name(isa);
    if (fastfar_isa_reason(isa) != nullptr) {
      std::printf("skipped %s: %s\n", g_isa, fastfar_isa_reason(isa));
      continue;
    }
    check(fastfar_isa_select(isa) == isa, "refused though usable");
    run(isa);
    std::printf("ran %s\n", g_isa);
    std::fflush(stdout);
  }
  g_isa = "library";
  fastfar_isa_select(fastfar_isa_best());
}

// --- bfloat16, by arithmetic other than the kernels' ---------------------------------------------

inline float from_bf16(uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// The nearest bfloat16, ties to even.
inline float rounded(float value) {
  if (value == 0.0F || !std::isfinite(value)) return value;
  int exponent = 0;
  std::frexp(value, &exponent);
  const int unit = (exponent < -125 ? -125 : exponent) - 8;  // of the last of 8 bits; denormals
  return std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
}

inline uint16_t to_bf16(float value) {
  const float near = rounded(value);
  uint32_t bits;
  std::memcpy(&bits, &near, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16 | (std::isnan(value) ? 0x40U : 0U));
}

// --- buffers ----------------------------------------------------------------------------------

// `count` numbers at a multiple of 64 bytes (plus `shift` numbers, to try other alignments), full
// of NaN (integers: of 0xffd5), between two guards of 256 bytes.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count, int64_t shift = 0)
      : count_(count), bytes_(static_cast<size_t>(count) * sizeof(T)) {
    const size_t before = kGuard + static_cast<size_t>(shift) * sizeof(T);
    size_ = (before + bytes_ + kGuard + 63) / 64 * 64;
    block_ = static_cast<unsigned char*>(std::aligned_alloc(64, size_));
    if (block_ == nullptr) std::abort();
    for (size_t i = 0; i < size_; ++i) block_[i] = poison(i);
    begin_ = block_ + before;
    guard(true);
  }
  Buffer(Buffer&& other) noexcept
      : count_(other.count_),
        bytes_(other.bytes_),
        size_(other.size_),
        block_(std::exchange(other.block_, nullptr)),
        begin_(other.begin_) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(count_, other.count_);
    std::swap(bytes_, other.bytes_);
    std::swap(size_, other.size_);
    std::swap(block_, other.block_);
    std::swap(begin_, other.begin_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (block_ == nullptr) return;
    check_guards("a buffer");
    guard(false);
    std::free(block_);
  }

  T* data() { return reinterpret_cast<T*>(begin_); }
  const T* data() const { return reinterpret_cast<const T*>(begin_); }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  T* begin() { return data(); }
  T* end() { return data() + count_; }

  // Bit by bit, so that equal NaNs are equal.
  bool operator==(const Buffer& other) const {
    return count_ == other.count_ && std::memcmp(begin_, other.begin_, bytes_) == 0;
  }

  // Full of NaN again, as for a second run with the same scratch.
  void refill() {
    for (size_t i = 0; i < bytes_; ++i)
      begin_[i] = poison(static_cast<size_t>(begin_ - block_) + i);
  }
  // The same numbers in a buffer of their own.
  Buffer copy(int64_t shift = 0) const {
    Buffer result(count_, shift);
    if (count_ > 0) std::memcpy(result.begin_, begin_, bytes_);
    return result;
  }

  // Whether nothing was written beside the numbers. A guard is reported once, then restored.
  void check_guards(const char* name) {
    guard(false);
    bool whole = true;
    for (size_t i = 0; i < size_; ++i) {
      if (block_ + i >= begin_ && block_ + i < begin_ + bytes_) continue;
      whole = whole && block_[i] == poison(i);
      block_[i] = poison(i);
    }
    guard(true);
    check(whole, "wrote beside %s", name);
  }

 private:
  static constexpr size_t kGuard = 256;

  // 0xffd5 repeated: NaN as bfloat16, float32 and double.
  static unsigned char poison(size_t i) { return i % 2 == 0 ? 0xd5 : 0xff; }

  void guard([[maybe_unused]] bool on) {
#ifdef FASTFAR_TESTS_POISON
    unsigned char* after = begin_ + bytes_;
    if (on) {
      ASAN_POISON_MEMORY_REGION(block_, static_cast<size_t>(begin_ - block_));
      ASAN_POISON_MEMORY_REGION(after, static_cast<size_t>(block_ + size_ - after));
    } else {
      ASAN_UNPOISON_MEMORY_REGION(block_, size_);
    }
#endif
  }

  int64_t count_;
  size_t bytes_, size_ = 0;
  unsigned char *block_ = nullptr, *begin_ = nullptr;
};

// --- numbers ----------------------------------------------------------------------------------

// Deterministic draws; most are not representable in bfloat16.
class Draws {
 public:
  explicit Draws(uint64_t seed = 1) : state_(seed * 0x9e3779b97f4a7c15U + 1) {}

  uint32_t bits() {  // splitmix64
    uint64_t z = (state_ += 0x9e3779b97f4a7c15U);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
  }
  // In [-1, 1).
  float next() { return static_cast<float>(bits() >> 8) / 8388608.0F - 1.0F; }
  // 0..count - 1.
  int64_t index(int64_t count) { return static_cast<int64_t>(bits()) % count; }
  // About normal: mean 0, variance `scale` squared, the sum of 12 uniform draws.
  float gauss(float scale = 1.0F) {
    float sum = 0.0F;
    for (int i = 0; i < 12; ++i) sum += next();
    return 0.5F * sum * scale;
  }
  Buffer<float> normal(int64_t count, float scale = 1.0F, int64_t shift = 0) {
    Buffer<float> result(count, shift);
    for (float& value : result) value = gauss(scale);
    return result;
  }
  Buffer<uint16_t> normal_bf16(int64_t count, float scale = 1.0F, int64_t shift = 0) {
    Buffer<uint16_t> result(count, shift);
    for (uint16_t& value : result) value = to_bf16(gauss(scale));
    return result;
  }

 private:
  uint64_t state_;
};

// A float32 sum of `terms` rounded products whose absolute values add up to `magnitude`: within
// `terms` (at least 4) roundings of `expected`. False for a NaN.
__attribute__((format(printf, 5, 6))) inline bool check_close(float got, double expected,
                                                              double magnitude, int64_t terms,
                                                              const char* format, ...) {
  const double count = static_cast<double>(terms < 4 ? 4 : terms);
  if (std::fabs(static_cast<double>(got) - expected) <= count * 6e-8 * magnitude + 1e-37) {
    return true;
  }
  char place[200];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(place, sizeof(place), format, arguments);
  va_end(arguments);
  return check(false, "%s: %.9g, expected %.9g", place, static_cast<double>(got), expected);
}

// ||got - expected|| / ||expected||; infinite for a NaN. Both have size() and []: Buffer, vector.
template <class A, class B>
inline double relative_error(const A& got, const B& expected) {
  double difference = 0.0, norm = 0.0;
  if (static_cast<int64_t>(got.size()) != static_cast<int64_t>(expected.size())) return INFINITY;
  for (int64_t i = 0; i < static_cast<int64_t>(got.size()); ++i) {
    const double x = static_cast<double>(got.data()[i]),
                 y = static_cast<double>(expected.data()[i]);
    difference += (x - y) * (x - y);
    norm += y * y;
  }
  const double result = std::sqrt(difference / (norm > 0.0 ? norm : 1.0));
  return std::isfinite(result) ? result : INFINITY;
}

// --- weights ----------------------------------------------------------------------------------

// w_NK (rows one after the other) in tile order, `dtype` FASTFAR_FLOAT32 or FASTFAR_BFLOAT16.
inline Buffer<uint8_t> pack(int32_t dtype, const float* w_NK, int64_t n, int64_t k) {
  Buffer<uint8_t> packed(fastfar_packed_bytes(dtype, n, k));
  fastfar_pack_args args = {};
  args.dtype = dtype;
  args.source_dtype = FASTFAR_FLOAT32;
  args.n = n;
  args.k = k;
  args.stride_n = k;
  args.stride_k = 1;
  args.w = w_NK;
  args.packed = packed.data();
  args.threads = 1;
  check(fastfar_pack(&args) >= 0, "pack refused (%lld, %lld)", static_cast<long long>(n),
        static_cast<long long>(k));
  return packed;
}

// The weight that a product of `dtype` uses.
inline double as_used(int32_t dtype, float weight) {
  return static_cast<double>(dtype == FASTFAR_BFLOAT16 ? rounded(weight) : weight);
}

}  // namespace test

#endif  // FASTFAR_TESTS_CPP_COMMON_H_
