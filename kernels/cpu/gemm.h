// Matrix products with packed weights, in blocks of 32 rows x 32 outputs, with the work that
// follows a product (its epilogue) done row by row between the tile instructions of the next block.
//
//   A operand   rows in tiles of 16 x 32 numbers, each contiguous: [row tile][k tile][16][32];
//               two row tiles are one block, so rows are padded to multiples of 32
//   weights     see fastfar_packed_bytes: panels of 32 outputs
//   C           32 x 32 float32 on the stack, in cache when the epilogue reads it
//
// AMX: 2 x 2 tiles keep C in registers over all of K. The first 16 KB of a panel are to stay in L1
// for all blocks; the rest of it and A are loaded with the streaming hint, so that they do not push
// them out; the next panel is prefetched to L2.
// Included by kernel sources only.
#ifndef FASTFAR_KERNELS_CPU_GEMM_H_
#define FASTFAR_KERNELS_CPU_GEMM_H_

#include "fastfar_cpu.h"
#include "threads.h"
#include "vec.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

constexpr int64_t kTile = 16;   // rows of a tile
constexpr int64_t kDepth = 32;  // numbers of a tile's row
constexpr int64_t kBlock = 32;  // rows of a block, outputs of a panel
constexpr int64_t kTileSize = kTile * kDepth;
constexpr int64_t kPanelStep = kBlock * kDepth;  // weights of a panel per k tile

// The two arithmetics. W: packed weights, A: the other operand.
struct Bfloat16 {
  using W = bf16;
#if defined(__AVX512BF16__)
  using A = bf16;
#else
  using A = float;  // without bfloat16 products there is nothing to gain from rounding it
#endif
};
struct Float32 {
  using W = float;
  using A = float;
};

inline int64_t depth_of(int64_t k) { return ceil_div(k, kDepth); }
inline int64_t padded_rows(int64_t rows) { return ceil_div(rows, kBlock) * kBlock; }
inline int64_t padded_columns(int64_t k) { return depth_of(k) * kDepth; }
// Numbers of an A operand, and of one panel.
inline int64_t operand_size(int64_t rows, int64_t k) {
  return padded_rows(rows) * padded_columns(k);
}
inline int64_t panel_size(int64_t k) { return depth_of(k) * kPanelStep; }

// Where (row, column) of an A operand lies; the numbers up to the next multiple of 32 follow it.
template <class A>
inline A* at(A* a, int64_t depth, int64_t row, int64_t column) {
  // Unsigned: divisions by powers of two that are single shifts.
  const auto r = static_cast<uint64_t>(row), c = static_cast<uint64_t>(column);
  const auto tile = static_cast<int64_t>(r / kTile) * depth + static_cast<int64_t>(c / kDepth);
  return a + tile * kTileSize + static_cast<int64_t>(r % kTile * kDepth + c % kDepth);
}

// Hands out parts of one block of memory, each at a multiple of 64 bytes. Started at nullptr, it
// only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    char* result = base == nullptr ? nullptr : base + used;
    used += ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
    return reinterpret_cast<T*>(result);
  }
};

// Calls f(task, worker) for every task, on several threads.
template <class F>
inline void parallel_for(int32_t threads, int64_t count, const F& f) {
  parallel(
      threads, count,
      [](void* context, int64_t task, int32_t worker) {
        (*static_cast<const F*>(context))(task, worker);
      },
      const_cast<F*>(&f));
}

// --- the block product of each instruction set -----------------------------------------------

#if defined(__AMX_BF16__) || defined(__AMXBF16__)  // gcc and new clang, old clang
#define FASTFAR_HAS_TILES 1

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "the size that LDTILECFG reads");

// While one lives, the thread's eight tiles are 16 rows of 64 bytes.
struct TileScope {
  TileScope() {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = 16;
    }
    // The intrinsic tells the compiler of 8 of the 64 bytes: without this barrier it may drop the
    // stores above.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

#else

struct TileScope {
  TileScope() {}
};

#endif

template <class M>
struct Segment {
  const typename M::A* a;  // first row tile
  const typename M::W* b;  // first panel
  int64_t depth;           // k tiles of this product
  int64_t a_stride;        // numbers between row tiles
  int64_t b_stride;        // numbers between panels
};

// An epilogue may have expect(block, panel, row), called for the rows of a block while its
// product is being computed: for what row(...) will read from memory.
template <class E>
inline auto expect_row(const E& epilogue, int64_t block, int64_t panel, int64_t row, int)
    -> decltype(epilogue.expect(block, panel, row)) {
  epilogue.expect(block, panel, row);
}
template <class E>
inline void expect_row(const E&, int64_t, int64_t, int64_t, long) {}

// The epilogue of a block whose product is done, row by row; `next_` is the block at work.
template <class E>
struct Pending {
  E* epilogue;
  const float* c = nullptr;
  int64_t block = 0, panel = 0, row = kBlock;
  int64_t next_block = 0, next_panel = 0, next_row = 0;

  void step(int64_t rows) {
    for (int64_t i = 0; i < rows && next_row < kBlock; ++i, ++next_row) {
      expect_row(*epilogue, next_block, next_panel, next_row, 0);
    }
    for (; rows > 0 && row < kBlock; --rows, ++row) {
      epilogue->row(block, panel, row, c + row * kBlock);
    }
  }
  void finish() { step(kBlock); }
};

#ifdef FASTFAR_HAS_TILES

constexpr int64_t kHeldSteps = 8;  // k tiles of a panel, 16 KB, that are to stay in L1

// Two row tiles times one panel, added to tiles 0..3.
template <class E>
inline void add_product(const Segment<Bfloat16>& s, int64_t block, int64_t panel, int64_t lines,
                        int64_t rows_per_step, Pending<E>& pending) {
  const bf16* a0 = s.a + 2 * block * s.a_stride;
  const bf16* a1 = a0 + s.a_stride;
  const bf16* b = s.b + panel * s.b_stride;
  const char* next =
      reinterpret_cast<const char*>(s.b + (panel + 1) * s.b_stride) + 64 * lines * s.depth * block;
  // All loads before the products, and the prefetches between: measured faster than each load
  // before its first use.
  const auto finish_step = [&] {
    _tile_stream_loadd(5, a1, 64);
    for (int64_t i = 0; i < lines; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    pending.step(rows_per_step);
    a0 += kTileSize;
    a1 += kTileSize;
    b += kPanelStep;
  };
  int64_t k = 0;
  for (; k < smaller(s.depth, kHeldSteps); ++k) {
    _tile_stream_loadd(4, a0, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kTileSize, 64);
    finish_step();
  }
  for (; k < s.depth; ++k) {
    _tile_stream_loadd(4, a0, 64);
    _tile_stream_loadd(6, b, 64);
    _tile_stream_loadd(7, b + kTileSize, 64);
    finish_step();
  }
}

template <class E>
inline void block_product(const Segment<Bfloat16>* segments, int count, int64_t block,
                          int64_t panel, int64_t lines, int64_t rows_per_step, const float* start,
                          float* c, Pending<E>& pending) {
  __asm__ volatile("" ::: "memory");  // tile loads read what the compiler may still hold back
  if (start == nullptr) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    constexpr int64_t kStride = kBlock * sizeof(float);
    _tile_loadd(0, start, kStride);
    _tile_loadd(1, start + kTile, kStride);
    _tile_loadd(2, start + kTile * kBlock, kStride);
    _tile_loadd(3, start + kTile * kBlock + kTile, kStride);
  }
  for (int i = 0; i < count; ++i) {
    add_product(segments[i], block, panel, lines, rows_per_step, pending);
  }
  constexpr int64_t kStride = kBlock * sizeof(float);
  _tile_stored(0, c, kStride);
  _tile_stored(1, c + kTile, kStride);
  _tile_stored(2, c + kTile * kBlock, kStride);
  _tile_stored(3, c + kTile * kBlock + kTile, kStride);
  __asm__ volatile("" ::: "memory");
}

#endif

// Sets of rows and columns whose sums stay in registers.
#if defined(__AVX512F__)
constexpr int64_t kHeldRows = 8;
#else
constexpr int64_t kHeldRows = 4;
#endif
constexpr int64_t kHeldColumns = 2 * kLanes;

#if defined(__AVX512F__)
inline V even_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline V odd_of(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
}
inline __m512i load_pairs(const bf16* p) { return _mm512_loadu_si512(p); }
#elif defined(__AVX2__)
inline V even_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline V odd_of(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
}
inline __m256i load_pairs(const bf16* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
#else
struct Pairs {
  bf16 x[2 * kLanes];
};
inline Pairs load_pairs(const bf16* p) {
  Pairs pairs;
  std::memcpy(pairs.x, p, sizeof(pairs.x));
  return pairs;
}
inline V even_of(const Pairs& p) {
  return V{from_bf16(p.x[0]), from_bf16(p.x[2]), from_bf16(p.x[4]), from_bf16(p.x[6])};
}
inline V odd_of(const Pairs& p) {
  return V{from_bf16(p.x[1]), from_bf16(p.x[3]), from_bf16(p.x[5]), from_bf16(p.x[7])};
}
#endif

// One k tile: kHeldRows rows (32 numbers apart) times kHeldColumns outputs from `column` on.
inline void add_tile(const float* a, const float* b, int64_t column, V (*c)[2]) {
  for (int64_t k = 0; k < kDepth; ++k) {
    const V b0 = load(b + k * kBlock + column), b1 = load(b + k * kBlock + column + kLanes);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kHeldRows; ++r) {
      const V x = set(a[r * kDepth + k]);
      c[r][0] = fma(x, b0, c[r][0]);
      c[r][1] = fma(x, b1, c[r][1]);
    }
  }
}

inline const bf16* pairs_at(const bf16* b, int64_t pair, int64_t column) {
  return b + (column / kTile) * kTileSize + (pair * kTile + column % kTile) * 2;
}

inline void add_tile(const float* a, const bf16* b, int64_t column, V (*c)[2]) {
  for (int64_t p = 0; p < kDepth / 2; ++p) {
    const auto p0 = load_pairs(pairs_at(b, p, column));
    const auto p1 = load_pairs(pairs_at(b, p, column + kLanes));
    const V even0 = even_of(p0), odd0 = odd_of(p0), even1 = even_of(p1), odd1 = odd_of(p1);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kHeldRows; ++r) {
      const V x = set(a[r * kDepth + 2 * p]), y = set(a[r * kDepth + 2 * p + 1]);
      c[r][0] = fma(y, odd0, fma(x, even0, c[r][0]));
      c[r][1] = fma(y, odd1, fma(x, even1, c[r][1]));
    }
  }
}

#if defined(__AVX512BF16__)
inline void add_tile(const bf16* a, const bf16* b, int64_t column, V (*c)[2]) {
  for (int64_t p = 0; p < kDepth / 2; ++p) {
    const auto b0 = reinterpret_cast<__m512bh>(load_pairs(pairs_at(b, p, column)));
    const auto b1 = reinterpret_cast<__m512bh>(load_pairs(pairs_at(b, p, column + kLanes)));
#pragma GCC unroll 8
    for (int64_t r = 0; r < kHeldRows; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * kDepth + 2 * p, sizeof(pair));
      const auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
      c[r][0] = _mm512_dpbf16_ps(c[r][0], x, b0);
      c[r][1] = _mm512_dpbf16_ps(c[r][1], x, b1);
    }
  }
}
#endif

template <class M, class E>
inline void block_product(const Segment<M>* segments, int count, int64_t block, int64_t panel,
                          int64_t /*lines*/, int64_t /*rows_per_step*/, const float* start,
                          float* c, Pending<E>& pending) {
  pending.finish();
  for (int64_t row = 0; row < kBlock; row += kHeldRows) {
    for (int64_t column = 0; column < kBlock; column += kHeldColumns) {
      V sums[kHeldRows][2];
      for (int64_t r = 0; r < kHeldRows; ++r) {
        for (int64_t v = 0; v < 2; ++v) {
          sums[r][v] = set(0.0F);
        }
      }
      for (int i = 0; i < count; ++i) {
        const Segment<M>& s = segments[i];
        const auto* a = s.a + (2 * block + row / kTile) * s.a_stride + (row % kTile) * kDepth;
        const auto* b = s.b + panel * s.b_stride;
        for (int64_t k = 0; k < s.depth; ++k) {
          add_tile(a + k * kTileSize, b + k * kPanelStep, column, sums);
        }
      }
      for (int64_t r = 0; r < kHeldRows; ++r) {
        for (int64_t v = 0; v < 2; ++v) {
          const int64_t place = (row + r) * kBlock + column + v * kLanes;
          // Added last: a sum of sums over pieces of K is more exact than one chain over K.
          store(c + place, start == nullptr ? sums[r][v] : load(start + place) + sums[r][v]);
        }
      }
    }
  }
}

// --- the product ------------------------------------------------------------------------------

// For every panel in panel0..panel1 - 1 and every block of 32 rows: C = the sum of the segments'
// products, then epilogue.row(block, panel, row, c) for its 32 rows, c being 32 numbers.
// `partial`, where given, holds C of every (panel - panel0, block): loaded first if `resume`, and
// taking the result in the epilogue's stead if `suspend`; so that K can be cut into pieces.
// A TileScope must be alive in the calling thread.
template <class M, class E>
inline void multiply(const Segment<M>* segments, int count, int64_t blocks, int64_t panel0,
                     int64_t panel1, E& epilogue, float* partial = nullptr, bool resume = false,
                     bool suspend = false) {
  alignas(64) float c[2][kBlock * kBlock];
  Pending<E> pending{&epilogue};
  const int64_t lines = ceil_div(kBlock, blocks);  // to prefetch per k tile
  int64_t depth = 0;
  for (int i = 0; i < count; ++i) depth += segments[i].depth;
  const int64_t rows_per_step = ceil_div(kBlock, depth);
  bool turn = false;
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    for (int64_t block = 0; block < blocks; ++block) {
      float* kept = nullptr;
      if (partial != nullptr) {
        kept = partial + ((panel - panel0) * blocks + block) * kBlock * kBlock;
      }
      float* out = suspend ? kept : c[turn ? 1 : 0];
      pending.next_block = block;
      pending.next_panel = panel;
      pending.next_row = suspend ? kBlock : 0;
      block_product(segments, count, block, panel, lines, rows_per_step, resume ? kept : nullptr,
                    out, pending);
      pending.finish();
      if (!suspend) pending = Pending<E>{&epilogue, out, block, panel, 0, 0, 0, kBlock};
      turn = !turn;
    }
  }
  pending.finish();
}

// For products that are suspended: they stay in `partial`.
struct NoEpilogue {
  void row(int64_t, int64_t, int64_t, const float*) {}
};

}  // namespace
}  // namespace FASTFAR_TARGET
}  // namespace fastfar

#endif  // FASTFAR_KERNELS_CPU_GEMM_H_
