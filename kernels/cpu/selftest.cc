// selftest: c_MN = bf16(a_MK) bf16(b_KN), float32 accumulation.
//
// Not an operation of the model: it is the smallest kernel that uses what each instruction set is
// there for, and it travels the way that every later kernel will (C ABI, table, one copy per set).
// The matrices are cut into 16x16 outputs and 32-deep panels, zero-padded on the stack:
//   a_tile  16 rows x 32 bf16, row-major
//   b_tile  16 pairs x 16 columns x 2 bf16: element (2p, j) beside (2p + 1, j), as AMX and
//           AVX512_BF16 both read it
//   c_tile  16 x 16 float32
// Only multiply_tile differs between the sets.
#include <cstdint>
#include <cstring>

#include "fastfar_cpu.h"
#include "ops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef FASTFAR_TARGET
#error "compile this file through CMakeLists.txt, once per instruction set"
#endif

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

constexpr int64_t kRows = 16;
constexpr int64_t kCols = 16;
constexpr int64_t kPairs = 16;
constexpr int64_t kDepth = 2 * kPairs;

struct alignas(64) Tiles {
  uint16_t a[kRows * kDepth];
  uint16_t b[kPairs * kCols * 2];
  float c[kRows * kCols];
};

// Rounds to the nearest bfloat16, ties to even; a NaN stays a (quiet) NaN.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>((bits >> 16) | 0x40U);
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

#if defined(__AMX_BF16__) || defined(__AMXBF16__)  // gcc and new clang, old clang

constexpr int32_t kIsa = FASTFAR_ISA_AMX;

struct alignas(64) TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "the size that LDTILECFG reads");

// The intrinsics tell the compiler of 8 of the configuration's 64 bytes, and of nothing that a
// tile load reads: without a barrier it may drop or delay the stores before them.
inline void memory_barrier() { __asm__ volatile("" ::: "memory"); }

void begin() {
  TileConfig config = {};
  config.palette = 1;
  for (int tile = 0; tile < 3; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

void end() { _tile_release(); }

void multiply_tile(Tiles& t) {
  memory_barrier();
  _tile_loadd(0, t.c, kCols * sizeof(float));
  _tile_loadd(1, t.a, kDepth * sizeof(uint16_t));
  _tile_loadd(2, t.b, 2 * kCols * sizeof(uint16_t));
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, t.c, kCols * sizeof(float));
  memory_barrier();
}

#else

void begin() {}
void end() {}

#if defined(__AVX512F__)

// The pair (a[i][2p], a[i][2p + 1]) as one 32-bit word in every lane.
inline __m512i pair_of_a(const Tiles& t, int64_t i, int64_t p) {
  int32_t pair;
  std::memcpy(&pair, &t.a[i * kDepth + 2 * p], sizeof(pair));
  return _mm512_set1_epi32(pair);
}

#if defined(__AVX512BF16__)

constexpr int32_t kIsa = FASTFAR_ISA_AVX512_BF16;

inline __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

#else

constexpr int32_t kIsa = FASTFAR_ISA_AVX512;

// A bfloat16 is the upper half of a float32: shift the even element up, mask the odd one.
inline __m512 even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 odd(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
}

inline __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_fmadd_ps(odd(a), odd(b), _mm512_fmadd_ps(even(a), even(b), sum));
}

#endif

void multiply_tile(Tiles& t) {
  for (int64_t i = 0; i < kRows; ++i) {
    __m512 sum = _mm512_load_ps(t.c + i * kCols);
    for (int64_t p = 0; p < kPairs; ++p)
      sum = dot_pairs(sum, pair_of_a(t, i, p), _mm512_load_si512(t.b + p * kCols * 2));
    _mm512_store_ps(t.c + i * kCols, sum);
  }
}

#elif defined(__AVX2__)

constexpr int32_t kIsa = FASTFAR_ISA_AVX2;

inline __m256 even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 odd(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
}

void multiply_tile(Tiles& t) {
  constexpr int64_t kLanes = 8;
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t j = 0; j < kCols; j += kLanes) {
      __m256 sum = _mm256_load_ps(t.c + i * kCols + j);
      for (int64_t p = 0; p < kPairs; ++p) {
        int32_t pair;
        std::memcpy(&pair, &t.a[i * kDepth + 2 * p], sizeof(pair));
        const __m256i a = _mm256_set1_epi32(pair);
        const __m256i b =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(t.b + (p * kCols + j) * 2));
        sum = _mm256_fmadd_ps(odd(a), odd(b), _mm256_fmadd_ps(even(a), even(b), sum));
      }
      _mm256_store_ps(t.c + i * kCols + j, sum);
    }
  }
}

#else

constexpr int32_t kIsa = FASTFAR_ISA_SCALAR;

inline float from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

void multiply_tile(Tiles& t) {
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t p = 0; p < kDepth; ++p)
      for (int64_t j = 0; j < kCols; ++j)
        t.c[i * kCols + j] +=
            from_bf16(t.a[i * kDepth + p]) * from_bf16(t.b[((p / 2) * kCols + j) * 2 + p % 2]);
}

#endif  // which vector set
#endif  // AMX or not

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

int32_t selftest(const fastfar_selftest_args& args) {
  const int64_t m = args.m, n = args.n, k = args.k;
  const float *a_MK = args.a_MK, *b_KN = args.b_KN;
  float* c_MN = args.c_MN;
  if (m < 0 || n < 0 || k < 0) return FASTFAR_ERROR_ARGUMENT;
  if (a_MK == nullptr || b_KN == nullptr || c_MN == nullptr) return FASTFAR_ERROR_ARGUMENT;
  Tiles t;
  begin();
  for (int64_t i0 = 0; i0 < m; i0 += kRows) {
    const int64_t rows = smaller(kRows, m - i0);
    for (int64_t j0 = 0; j0 < n; j0 += kCols) {
      const int64_t cols = smaller(kCols, n - j0);
      std::memset(t.c, 0, sizeof(t.c));
      for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
        const int64_t depth = smaller(kDepth, k - k0);
        std::memset(t.a, 0, sizeof(t.a));
        std::memset(t.b, 0, sizeof(t.b));
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t p = 0; p < depth; ++p)
            t.a[i * kDepth + p] = to_bf16(a_MK[(i0 + i) * k + k0 + p]);
        for (int64_t p = 0; p < depth; ++p)
          for (int64_t j = 0; j < cols; ++j)
            t.b[((p / 2) * kCols + j) * 2 + p % 2] = to_bf16(b_KN[(k0 + p) * n + j0 + j]);
        multiply_tile(t);
      }
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) c_MN[(i0 + i) * n + j0 + j] = t.c[i * kCols + j];
    }
  }
  end();
  return kIsa;
}

}  // namespace FASTFAR_TARGET
}  // namespace fastfar
