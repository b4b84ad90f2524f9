// pack: a matrix of weights in the order in which the products of gemm.h read it.
#include "gemm.h"
#include "ops.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

template <class T>
float read(const void* w, int64_t index) {
  return to_float(static_cast<const T*>(w)[index]);
}

template <class T>
void pack_as(const fastfar_pack_args& args) {
  const int64_t depth = depth_of(args.k);
  for (int64_t panel = 0; panel < ceil_div(args.n, kBlock); ++panel) {
    for (int64_t block = 0; block < depth; ++block) {
      for (int64_t i = 0; i < kDepth; ++i) {
        for (int64_t j = 0; j < kBlock; ++j) {
          const int64_t n = panel * kBlock + j, k = block * kDepth + i;
          const bool inside = n < args.n && k < args.k;
          const int64_t source = n * args.stride_n + k * args.stride_k;
          const int64_t base = (panel * depth + block) * kPanelStep;
          if (args.dtype == FASTFAR_FLOAT32) {
            float* out = static_cast<float*>(args.packed) + base + i * kBlock + j;
            *out = inside ? read<T>(args.w, source) : 0.0F;
          } else {
            bf16* out = static_cast<bf16*>(args.packed) + base + (j / kTile) * kTileSize +
                        ((i / 2) * kTile + j % kTile) * 2 + i % 2;
            *out = inside ? to_bf16(read<T>(args.w, source)) : bf16{0};
          }
        }
      }
    }
  }
}

}  // namespace

int32_t pack(const fastfar_pack_args& args) {
  if (args.n < 0 || args.k < 0 || args.w == nullptr || args.packed == nullptr) {
    return FASTFAR_ERROR_ARGUMENT;
  }
  if (args.dtype != FASTFAR_FLOAT32 && args.dtype != FASTFAR_BFLOAT16) return FASTFAR_ERROR_ARGUMENT;
  if (args.source_dtype == FASTFAR_FLOAT32) {
    pack_as<float>(args);
  } else if (args.source_dtype == FASTFAR_BFLOAT16) {
    pack_as<bf16>(args);
  } else {
    return FASTFAR_ERROR_ARGUMENT;
  }
  return 0;
}

}  // namespace FASTFAR_TARGET
}  // namespace fastfar
