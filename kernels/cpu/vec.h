// Vectors of float32 for every instruction set: 16 lanes with AVX-512, 8 with AVX2, 4 elsewhere.
// Included by kernel sources only; everything lives in the namespace of one instruction set.
#ifndef FASTFAR_KERNELS_CPU_VEC_H_
#define FASTFAR_KERNELS_CPU_VEC_H_

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef FASTFAR_TARGET
#error "compile this file through CMakeLists.txt, once per instruction set"
#endif

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

using bf16 = uint16_t;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rounds to the nearest bfloat16, ties to even; a NaN stays a (quiet) NaN.
inline bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<bf16>((bits >> 16) | 0x40U);
  return static_cast<bf16>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

inline float from_bf16(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

#if defined(__AVX512F__)

constexpr int64_t kLanes = 16;
using V = __m512;

inline V set(float x) { return _mm512_set1_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V min(V a, V b) { return _mm512_min_ps(a, b); }
inline V max(V a, V b) { return _mm512_max_ps(a, b); }
inline V round(V x) { return _mm512_roundscale_ps(x, 0); }
inline V scale_by_power_of_two(V x, V n) { return _mm512_scalef_ps(x, n); }
inline V square_root(V x) { return _mm512_sqrt_ps(x); }
inline V absolute(V x) { return _mm512_abs_ps(x); }
// mask ? a : b, where the mask is x < y.
inline V select_less(V x, V y, V a, V b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), b, a);
}
inline float sum(V x) { return _mm512_reduce_add_ps(x); }
inline float largest(V x) { return _mm512_reduce_max_ps(x); }
inline V load_bf16(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store_bf16(bf16* p, V x) {
#if defined(__AVX512BF16__)
  const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  const __m512i word = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(word, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i chosen = _mm512_mask_blend_epi32(nan, rounded, quiet);
  const __m256i bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}

#elif defined(__AVX2__)

constexpr int64_t kLanes = 8;
using V = __m256;

inline V set(float x) { return _mm256_set1_ps(x); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V x) { _mm256_storeu_ps(p, x); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V min(V a, V b) { return _mm256_min_ps(a, b); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline V round(V x) { return _mm256_round_ps(x, 0); }
inline V square_root(V x) { return _mm256_sqrt_ps(x); }
inline V absolute(V x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0F), x); }
inline V select_less(V x, V y, V a, V b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_LT_OQ));
}
// x * 2^n for whole n; two factors, so that results below the normal range are right as well.
inline V scale_by_power_of_two(V x, V n) {
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return x * _mm256_castsi256_ps(a) * _mm256_castsi256_ps(b);
}
inline float sum(V x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest(V x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline V load_bf16(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void store_bf16(bf16* p, V x) {
  const __m256i word = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(word, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(word, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

#else  // portable: the compiler's vectors, which become SSE2 or NEON

constexpr int64_t kLanes = 4;
typedef float V __attribute__((vector_size(16), aligned(16)));

inline V set(float x) { return V{x, x, x, x}; }
inline V load(const float* p) {
  V x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline void store(float* p, V x) { std::memcpy(p, &x, sizeof(x)); }
inline V fma(V a, V b, V c) { return a * b + c; }
inline V min(V a, V b) { return a < b ? a : b; }
inline V max(V a, V b) { return a > b ? a : b; }
inline V absolute(V x) { return x < 0.0F ? -x : x; }
inline V select_less(V x, V y, V a, V b) { return x < y ? a : b; }
inline V round(V x) {  // |x| < 2^22
  const V big = set(12582912.0F);
  volatile V shifted = x + big;  // volatile: the sum must not be simplified away
  return shifted - big;
}
inline V scale_by_power_of_two(V x, V n) {
  V result = x;
  for (int64_t i = 0; i < kLanes; ++i) result[i] = __builtin_ldexpf(x[i], static_cast<int>(n[i]));
  return result;
}
inline V square_root(V x) {
  V result = x;
  for (int64_t i = 0; i < kLanes; ++i) result[i] = __builtin_sqrtf(x[i]);
  return result;
}
inline float sum(V x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float largest(V x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
inline V load_bf16(const bf16* p) {
  return V{from_bf16(p[0]), from_bf16(p[1]), from_bf16(p[2]), from_bf16(p[3])};
}
inline void store_bf16(bf16* p, V x) {
  for (int64_t i = 0; i < kLanes; ++i) p[i] = to_bf16(x[i]);
}

#endif

// Asks for the cache line of an address that need not exist.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_to_write(void* p) { __builtin_prefetch(p, 1, 3); }

// Loads or stores numbers of either type.
inline V load(const bf16* p) { return load_bf16(p); }
inline void store(bf16* p, V x) { store_bf16(p, x); }
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return from_bf16(x); }
inline void store_one(float* p, float x) { *p = x; }
inline void store_one(bf16* p, float x) { *p = to_bf16(x); }

// The first `count` (1..kLanes) numbers; the other lanes are zero.
template <class T>
inline V load_part(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  alignas(64) float part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = to_float(p[i]);
  return load(part);
}
template <class T>
inline void store_part(T* p, V x, int64_t count) {
  if (count >= kLanes) return store(p, x);
  alignas(64) float part[kLanes];
  store(part, x);
  for (int64_t i = 0; i < count; ++i) store_one(p + i, part[i]);
}

// e^x, relative error below 2e-7; 0 below -104, infinity above 88.7. NaN stays NaN.
// 2^(x log2 e) = 2^n 2^f with |f| <= 1/2; the Taylor series of 2^f = e^r, |r| <= 0.347, to r^7.
inline V exponential(V x) {
  const V bounded = min(set(89.0F), max(set(-104.0F), x));  // this order keeps a NaN
  const V n = round(bounded * set(1.44269504F));
  V r = fma(n, set(-0.693359375F), bounded);  // log 2 in two parts: n times the first is exact
  r = fma(n, set(2.12194440e-4F), r);
  V p = set(1.0F / 5040.0F);
  p = fma(p, r, set(1.0F / 720.0F));
  p = fma(p, r, set(1.0F / 120.0F));
  p = fma(p, r, set(1.0F / 24.0F));
  p = fma(p, r, set(1.0F / 6.0F));
  p = fma(p, r, set(0.5F));
  p = fma(p, r, set(1.0F));
  p = fma(p, r, set(1.0F));
  return scale_by_power_of_two(p, n);
}

inline V silu(V x) { return x / (set(1.0F) + exponential(set(0.0F) - x)); }

// 2^x for x <= 127, relative error below 2e-7; 2^-126 for all x below, so that nothing is ever a
// denormal, which costs some hundred cycles. NaN stays NaN.
// 2^n 2^f with |f| <= 1/2; 2^f = 1 + f P(f), P of degree 5 with the least maximum of the relative
// error (2e-9), found by weighted least squares whose weights were made to follow the error.
inline V power_of_two(V x) {
  const V bounded = max(set(-126.0F), x);  // this order keeps a NaN
  const V n = round(bounded), f = bounded - n;
  V p = set(1.53533620e-4F);
  p = fma(p, f, set(1.33988750e-3F));
  p = fma(p, f, set(9.61843692e-3F));
  p = fma(p, f, set(5.55033237e-2F));
  p = fma(p, f, set(2.40226477e-1F));
  p = fma(p, f, set(6.93147182e-1F));
  p = fma(p, f, set(1.0F));
  return scale_by_power_of_two(p, n);
}

// The exact GELU, x (1 + erf(x / sqrt 2)) / 2 = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, which has
// no cancellation for negative x. erfc(a / sqrt 2) = 2^(a P(a)), P of degree 9, fitted as above on
// 0 <= a <= 6 to the relative error of erfc down to erfc = 0.001 and to the absolute one beyond
// (both below 1e-8); further out the power only falls. Absolute error below 7e-8 max(1, x).
inline V complementary_error(V absolute_x) {  // erfc(a / sqrt 2)
  const V a = min(set(20.0F), absolute_x);    // this order keeps a NaN
  V p = set(-2.88918489e-8F);
  p = fma(p, a, set(8.62834668e-7F));
  p = fma(p, a, set(-1.10206402e-5F));
  p = fma(p, a, set(7.67119636e-5F));
  p = fma(p, a, set(-2.79916014e-4F));
  p = fma(p, a, set(-1.56613055e-6F));
  p = fma(p, a, set(6.95192721e-3F));
  p = fma(p, a, set(-5.24468161e-2F));
  p = fma(p, a, set(-4.59218413e-1F));
  p = fma(p, a, set(-1.15110445F));
  return power_of_two(p * a);
}
inline V gelu(V x) {
  const V a = min(set(20.0F), absolute(x));
  return fma(a * set(-0.5F), complementary_error(absolute(x)), max(set(0.0F), x));
}

// 1 / x, relative error below 7e-5; 0 for infinity.
inline V rough_reciprocal(V x) {
#if defined(__AVX512F__)
  return _mm512_rcp14_ps(x);
#else
  return set(1.0F) / x;
#endif
}

// x / (1 + e^-x) for results that are rounded to bfloat16: relative error below 2^-12. A cubic for
// 2^f, |f| <= 1/2, with the least maximum of the relative error (7.5e-5), fitted as above.
inline V silu_for_bf16(V x) {
  const V t = max(set(-126.0F), x * set(-1.44269504F));  // this order keeps a NaN
  const V n = round(min(set(200.0F), t)), f = t - n;
  V p = set(5.51715381e-2F);
  p = fma(p, f, set(2.42611147e-1F));
  p = fma(p, f, set(6.93261013e-1F));
  p = fma(p, f, set(9.99928073e-1F));
  return x * rough_reciprocal(set(1.0F) + scale_by_power_of_two(p, n));
}

// silu for a result that is stored where `to` points.
inline V silu_for(const float* /*to*/, V x) { return silu(x); }
inline V silu_for(const bf16* /*to*/, V x) { return silu_for_bf16(x); }

// log x for normal x > 0, relative error of the result below 3e-7 (absolute below 1e-7 near x = 1).
// x = m 2^n with m in [sqrt(1/2), sqrt 2); log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 0.172,
// by its series to s^9.
inline V logarithm(V x) {
  alignas(64) float mantissa[kLanes], power[kLanes];
  store(mantissa, x);
  for (int64_t i = 0; i < kLanes; ++i) {
    uint32_t bits;
    std::memcpy(&bits, mantissa + i, sizeof(bits));
    const uint32_t shifted = bits - 0x3f3504f3U;  // sqrt(1/2)
    power[i] = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
    bits = (shifted & 0x007fffffU) + 0x3f3504f3U;
    std::memcpy(mantissa + i, &bits, sizeof(bits));
  }
  const V m = load(mantissa), n = load(power);
  const V s = (m - set(1.0F)) / (m + set(1.0F)), square = s * s;
  V p = set(2.0F / 9.0F);
  p = fma(p, square, set(2.0F / 7.0F));
  p = fma(p, square, set(2.0F / 5.0F));
  p = fma(p, square, set(2.0F / 3.0F));
  const V low = fma(n, set(-2.12194440e-4F), p * square * s);  // log 2 in two parts, as above
  return fma(n, set(0.693359375F), low + (s + s));
}

// --- 32-bit words in other orders ---------------------------------------------------------------

// out[j * out_stride + i] = in[i * in_stride + j] for i, j in 0..15, strides in words; 0 where
// i >= rows or j >= columns, words that are not read.
inline void transpose_words(const void* in_words, int64_t in_stride, int64_t rows, int64_t columns,
                            void* out_words, int64_t out_stride) {
  const char* in = static_cast<const char*>(in_words);
  char* out = static_cast<char*>(out_words);
  in_stride *= 4;
  out_stride *= 4;
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>(columns >= 16 ? 0xffff : (1 << columns) - 1);
  __m512i x[16], y[16];
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) {
    x[i] = i < rows ? _mm512_maskz_loadu_epi32(mask, in + i * in_stride) : _mm512_setzero_si512();
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; i += 4) {  // x[i + j]: column 4 lane + j of rows i .. i + 3
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 16
  for (int64_t j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(x[j], x[j + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(x[j], x[j + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0xdd);
    _mm512_storeu_si512(out + j * out_stride, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(out + (j + 4) * out_stride, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(out + (j + 8) * out_stride, _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_storeu_si512(out + (j + 12) * out_stride, _mm512_shuffle_i32x4(b, d, 0xdd));
  }
#else
  for (int64_t j = 0; j < 16; ++j) {
    for (int64_t i = 0; i < 16; ++i) {
      uint32_t word = 0;
      if (i < rows && j < columns) std::memcpy(&word, in + i * in_stride + j * 4, 4);
      std::memcpy(out + j * out_stride + i * 4, &word, 4);
    }
  }
#endif
}

// out = a[0], b[0], a[1], b[1], ..., 16 of each; 0 from `count` on and where a pointer is null.
inline void interleave(const bf16* a, const bf16* b, int64_t count, bf16* out) {
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << larger(0, count)) - 1);
  const __mmask16 mask_a = a != nullptr ? mask : __mmask16{0};
  const __mmask16 mask_b = b != nullptr ? mask : __mmask16{0};
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask_a, a));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask_b, b));
  _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  for (int64_t i = 0; i < 16; ++i) {
    out[2 * i] = a != nullptr && i < count ? a[i] : bf16{0};
    out[2 * i + 1] = b != nullptr && i < count ? b[i] : bf16{0};
  }
#endif
}

}  // namespace
}  // namespace FASTFAR_TARGET
}  // namespace fastfar

#endif  // FASTFAR_KERNELS_CPU_VEC_H_
