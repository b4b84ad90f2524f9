// Weights in tile order: every number at its place on every instruction set, rounded to the nearest
// even, from float32 and bfloat16 in any order, with zeros beyond the matrix.
#include "common.h"

using test::Buffer;
using test::check;

namespace {

constexpr int32_t kTypes[] = {FASTFAR_FLOAT32, FASTFAR_BFLOAT16};

// Position of weight (n, k) in tile order, as fastfar_cpu.h has it.
int64_t place(int32_t dtype, int64_t depth, int64_t n, int64_t k) {
  const int64_t block = ((n / 32) * depth + k / 32) * 1024;
  if (dtype == FASTFAR_FLOAT32) return block + (k % 32) * 32 + n % 32;
  return block + (n % 32 / 16) * 512 + (k % 32 / 2 * 16 + n % 16) * 2 + k % 2;
}

// The packed matrix, number by number.
template <class T>
std::vector<T> expected(int32_t dtype, const std::vector<float>& w_NK, int64_t n, int64_t k) {
  const int64_t depth = (k + 31) / 32;
  std::vector<T> result(static_cast<size_t>((n + 31) / 32 * depth * 1024), T{0});
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      const float weight = w_NK[static_cast<size_t>(i * k + j)];
      T& out = result[static_cast<size_t>(place(dtype, depth, i, j))];
      if constexpr (sizeof(T) == 4) {
        out = weight;
      } else {
        out = test::to_bf16(weight);
      }
    }
  }
  return result;
}

template <class T>
bool same(T a, T b) {
  float x, y;
  if constexpr (sizeof(T) == 4) {
    x = a, y = b;
  } else {
    x = test::from_bf16(a), y = test::from_bf16(b);
  }
  return (std::isnan(x) && std::isnan(y)) || std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <class T>
void compare(const Buffer<uint8_t>& packed, const std::vector<T>& truth, const char* what) {
  check(packed.size() == static_cast<int64_t>(truth.size() * sizeof(T)), "%s: size", what);
  const T* got = reinterpret_cast<const T*>(packed.data());
  for (size_t i = 0; i < truth.size(); ++i) {
    if (same(got[i], truth[i])) continue;
    check(false, "%s: number %zu of the packed matrix", what, i);
    return;
  }
}

// A matrix with strides of its own.
template <class T>
struct Source {
  Source(const std::vector<float>& w_NK, int64_t n, int64_t k, int64_t stride_n, int64_t stride_k,
         int64_t shift)
      : w(n > 0 && k > 0 ? (n - 1) * stride_n + (k - 1) * stride_k + 1 : 1, shift) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        const float weight = w_NK[static_cast<size_t>(i * k + j)];
        T& to = w[i * stride_n + j * stride_k];
        if constexpr (sizeof(T) == 4) {
          to = weight;
        } else {
          to = test::to_bf16(weight);
        }
      }
    }
  }
  Buffer<T> w;
};

template <class T>
void run_source(const std::vector<float>& w_NK, int64_t n, int64_t k, int32_t dtype,
                int64_t stride_n, int64_t stride_k) {
  Source<T> source(w_NK, n, k, stride_n, stride_k, 1);
  char what[120];
  std::snprintf(what, sizeof(what), "(%d, %d) of %d bytes, strides %d and %d, as %d",
                static_cast<int>(n), static_cast<int>(k), static_cast<int>(sizeof(T)),
                static_cast<int>(stride_n), static_cast<int>(stride_k), static_cast<int>(dtype));
  fastfar_pack_args args = {};
  args.dtype = dtype;
  args.source_dtype = sizeof(T) == 4 ? FASTFAR_FLOAT32 : FASTFAR_BFLOAT16;
  args.n = n;
  args.k = k;
  args.stride_n = stride_n;
  args.stride_k = stride_k;
  args.w = source.w.data();
  Buffer<uint8_t> packed(fastfar_packed_bytes(dtype, n, k));
  args.packed = packed.data();
  args.threads = 1;
  check(fastfar_pack(&args) >= 0, "%s: refused", what);
  packed.check_guards(what);
  if (dtype == FASTFAR_FLOAT32) {
    compare(packed, expected<float>(dtype, w_NK, n, k), what);
  } else {
    compare(packed, expected<uint16_t>(dtype, w_NK, n, k), what);
  }
  if (n * k < 1 << 16) return;
  for (args.threads = 2; args.threads <= 4; ++args.threads) {
    Buffer<uint8_t> again(packed.size());
    args.packed = again.data();
    check(fastfar_pack(&args) >= 0 && again == packed, "%s: %d threads", what, args.threads);
  }
}

// Numbers that are hard to round, among others.
std::vector<float> weights(int64_t count, bool representable) {
  constexpr uint32_t kHard[] = {0x00000000, 0x80000000, 0x3f808000, 0x3f818000, 0x3f808001,
                                0x3f807fff, 0xbf808000, 0x7f7fffff, 0xff7fffff, 0x7f800000,
                                0xff800000, 0x7f800001, 0x7fc00000, 0xffc12345, 0x7fffffff,
                                0x00000001, 0x00008000, 0x00018000, 0x00018001, 0x807fffff,
                                0x00800000, 0x3fffffff, 0x33333333, 0x7f7f8000};
  test::Draws draws(5);
  std::vector<float> result(static_cast<size_t>(count));
  for (float& value : result) {
    value = draws.gauss();
    if (draws.index(4) == 0) std::memcpy(&value, &kHard[draws.index(24)], sizeof(value));
    if (representable) value = test::from_bf16(test::to_bf16(value));
  }
  return result;
}

void run(int32_t /*isa*/) {
  constexpr int64_t kSizes[][2] = {{1, 1},   {2, 3},   {32, 32},  {31, 33},  {33, 31},
                                   {16, 48}, {5, 100}, {130, 64}, {300, 257}};
  for (const auto& size : kSizes) {
    const int64_t n = size[0], k = size[1];
    const auto any = weights(n * k, false), short_ones = weights(n * k, true);
    const int64_t strides[][2] = {{k, 1}, {1, n}, {k + 3, 1}, {1, n + 5}, {2 * k, 2}, {3, 3 * n}};
    for (const auto& stride : strides) {
      for (const int32_t dtype : kTypes) {
        run_source<float>(any, n, k, dtype, stride[0], stride[1]);
        run_source<uint16_t>(short_ones, n, k, dtype, stride[0], stride[1]);
      }
    }
  }
  // One row or one column for all (stride 0).
  std::vector<float> same_rows, same_columns;
  for (int i = 0; i < 40 * 35; ++i) {
    same_rows.push_back(0.1F * static_cast<float>(i % 35));
    same_columns.push_back(0.1F * static_cast<float>(i / 35));
  }
  for (const int32_t dtype : kTypes) {
    run_source<float>(same_rows, 40, 35, dtype, 0, 1);
    run_source<float>(same_columns, 40, 35, dtype, 1, 0);
  }

  Buffer<float> w(1);
  w[0] = 1.0F;
  Buffer<uint8_t> packed(fastfar_packed_bytes(FASTFAR_FLOAT32, 1, 1));
  fastfar_pack_args good = {};
  good.n = good.k = good.stride_n = good.stride_k = good.threads = 1;
  good.w = w.data();
  good.packed = packed.data();
  check(fastfar_pack(&good) >= 0, "refused what is right");
  fastfar_pack_args bad = good;
  bad.dtype = 2;
  check(fastfar_pack(&bad) == FASTFAR_ERROR_ARGUMENT, "accepted dtype 2");
  bad = good;
  bad.source_dtype = -1;
  check(fastfar_pack(&bad) == FASTFAR_ERROR_ARGUMENT, "accepted source dtype -1");
  bad = good;
  bad.w = nullptr;
  check(fastfar_pack(&bad) == FASTFAR_ERROR_ARGUMENT, "accepted no weights");
  bad = good;
  bad.n = -1;
  check(fastfar_pack(&bad) == FASTFAR_ERROR_ARGUMENT, "accepted -1 rows");
  check(fastfar_pack(nullptr) == FASTFAR_ERROR_ARGUMENT, "accepted no arguments");
}

}  // namespace

int main() {
  test::each_isa(run);
  return test::finish();
}
