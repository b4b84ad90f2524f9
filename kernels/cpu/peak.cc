// peak: what this machine gives at best - products whose operands stay in registers, or numbers
// streamed from memory. The yardstick of the benchmarks, not an operation of the model.
//
// float32 products run x = x a + b, which no compiler can shorten and which stays an ordinary
// number for ever; bfloat16 products add the same number over and over.
#include "gemm.h"
#include "ops.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

// Sums in flight: enough to hide the latency of an FMA, few enough to stay in registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 16;
#else
constexpr int kSums = 10;
#endif
constexpr int64_t kFloat32Flops = 2 * kSums * kLanes;  // of one iteration

float total(const V* sums, int64_t count) {
  float lanes[kLanes], result = 0.0F;
  for (int64_t s = 0; s < count; ++s) {
    store(lanes, sums[s]);
    for (const float x : lanes) result += x;
  }
  return result;
}

float float32_products(int64_t iterations) {
  const V a = set(0.75F), b = set(0.5F);  // x tends to 2
  V sums[kSums];
  for (V& x : sums) x = set(0.0F);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
    for (int s = 0; s < kSums; ++s) sums[s] = fma(sums[s], a, b);
  }
  return total(sums, kSums) / (kSums * kLanes);
}

#if defined(FASTFAR_HAS_TILES)

constexpr int64_t kBfloat16Flops = 4 * 2 * kTile * kTile * kDepth;

// Tiles 0..3 are sums, 4..7 operands: the shape of the products of gemm.h without their loads.
float bfloat16_products(int64_t iterations) {
  alignas(64) bf16 a[kTileSize], b[kTileSize];
  alignas(64) float c[4][kTile * kTile];
  for (bf16& x : a) x = to_bf16(0.75F);
  for (bf16& x : b) x = to_bf16(0.5F);
  TileScope tiles;
  __asm__ volatile("" : : "r"(a), "r"(b) : "memory");  // the tile loads below read them
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, a, 64);
  _tile_loadd(5, a, 64);
  _tile_loadd(6, b, 64);
  _tile_loadd(7, b, 64);
  for (int64_t i = 0; i < iterations; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c[0], 64);
  _tile_stored(1, c[1], 64);
  _tile_stored(2, c[2], 64);
  _tile_stored(3, c[3], 64);
  __asm__ volatile("" : : "r"(c) : "memory");
  return (c[0][0] + c[1][0] + c[2][0] + c[3][kTile * kTile - 1]) / (4 * kDepth);
}

#elif defined(__AVX512BF16__)

constexpr int64_t kBfloat16Flops = 2 * 2 * kSums * kLanes;

float bfloat16_products(int64_t iterations) {
  const auto a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f403f40));  // 0.75
  const auto b = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f003f00));  // 0.5
  V sums[kSums];
  for (V& x : sums) x = set(0.0F);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
    for (int s = 0; s < kSums; ++s) sums[s] = _mm512_dpbf16_ps(sums[s], a, b);
  }
  return total(sums, kSums) / (2 * kSums * kLanes);
}

#else  // bfloat16 operands are widened and multiplied as float32

constexpr int64_t kBfloat16Flops = kFloat32Flops;

float bfloat16_products(int64_t iterations) { return float32_products(iterations); }

#endif

// Sum of `count` numbers, a multiple of 8 vectors of every set, read `passes` times.
float read(const float* numbers, int64_t count, int64_t passes) {
  V sums[8];
  for (V& x : sums) x = set(0.0F);
  for (int64_t pass = 0; pass < passes; ++pass) {
    for (int64_t i = 0; i < count; i += 8 * kLanes) {
#pragma GCC unroll 8
      for (int64_t s = 0; s < 8; ++s) sums[s] = sums[s] + load(numbers + i + s * kLanes);
    }
  }
  return total(sums, 8);
}

constexpr int64_t kGrain = 8 * 16;  // numbers: 8 of the widest vectors

}  // namespace

int32_t peak(const fastfar_peak_args& args) {
  if (args.threads < 1 || args.iterations < 0 || args.numbers < 0) return FASTFAR_ERROR_ARGUMENT;
  if (args.results == nullptr || args.work == nullptr) return FASTFAR_ERROR_ARGUMENT;
  if (args.dtype != FASTFAR_FLOAT32 && args.dtype != FASTFAR_BFLOAT16) {
    return FASTFAR_ERROR_ARGUMENT;
  }
  if (args.buffer != nullptr) {
    const int64_t part = args.numbers / args.threads / kGrain * kGrain;
    parallel_for(args.threads, args.threads, [&](int64_t task, int32_t) {
      args.results[task] = read(args.buffer + task * part, part, args.iterations);
    });
    *args.work = args.threads * args.iterations * part * static_cast<int64_t>(sizeof(float));
  } else {
    const bool narrow = args.dtype == FASTFAR_BFLOAT16;
    parallel_for(args.threads, args.threads, [&](int64_t task, int32_t) {
      args.results[task] =
          narrow ? bfloat16_products(args.iterations) : float32_products(args.iterations);
    });
    *args.work = args.threads * args.iterations * (narrow ? kBfloat16Flops : kFloat32Flops);
  }
  return 0;
}

}  // namespace FASTFAR_TARGET
}  // namespace fastfar
