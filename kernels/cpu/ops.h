// What each instruction set must provide: one function per operation, gathered in one table.
//
// Every kernel source <op>.cc is compiled once per instruction set with FASTFAR_TARGET set to its
// name, and puts all it defines into namespace fastfar::FASTFAR_TARGET, so that no two copies can
// be merged by the linker. For the same reason kernel sources use no standard library templates.
#ifndef FASTFAR_KERNELS_CPU_OPS_H_
#define FASTFAR_KERNELS_CPU_OPS_H_

#include <cstdint>

#include "fastfar_cpu.h"

// Every operation, by name: `int32_t fastfar_<op>(const fastfar_<op>_args*)` in fastfar_cpu.h,
// `int32_t <op>(const fastfar_<op>_args&)` in <op>.cc. A new operation adds its name here.
#define FASTFAR_EACH_OP(X)           \
  X(adaln_mlp_block)                 \
  X(adaln_mlp_block_backward)        \
  X(attention)                       \
  X(denoise_loop)                    \
  X(filter_mask_patchify)            \
  X(filter_mask_patchify_backward)   \
  X(groupnorm_silu)                  \
  X(hybrid_loss)                     \
  X(hybrid_loss_backward)            \
  X(layernorm_attention_residual)    \
  X(layernorm_linear)                \
  X(layernorm_mlp_residual)          \
  X(layernorm_mlp_residual_backward) \
  X(linear)                          \
  X(linear_backward)                 \
  X(pack)                            \
  X(peak)                            \
  X(selftest)

// Operations with `int64_t fastfar_<op>_scratch(const fastfar_<op>_args*)`, which is
// `int64_t <op>_scratch(const fastfar_<op>_args&)` in <op>.cc.
#define FASTFAR_EACH_SCRATCH(X)      \
  X(adaln_mlp_block)                 \
  X(adaln_mlp_block_backward)        \
  X(attention)                       \
  X(denoise_loop)                    \
  X(filter_mask_patchify)            \
  X(filter_mask_patchify_backward)   \
  X(groupnorm_silu)                  \
  X(layernorm_attention_residual)    \
  X(layernorm_linear)                \
  X(layernorm_mlp_residual)          \
  X(layernorm_mlp_residual_backward) \
  X(linear)                          \
  X(linear_backward)                 \
  X(selftest)

namespace fastfar {

#define FASTFAR_MEMBER(op) int32_t (*op)(const fastfar_##op##_args&);
#define FASTFAR_SCRATCH_MEMBER(op) int64_t (*op##_scratch)(const fastfar_##op##_args&);
struct Ops {
  FASTFAR_EACH_OP(FASTFAR_MEMBER)
  FASTFAR_EACH_SCRATCH(FASTFAR_SCRATCH_MEMBER)
};
#undef FASTFAR_MEMBER
#undef FASTFAR_SCRATCH_MEMBER

#define FASTFAR_FUNCTION(op) int32_t op(const fastfar_##op##_args&);
#define FASTFAR_SCRATCH(op) int64_t op##_scratch(const fastfar_##op##_args&);
#define FASTFAR_ENTRY(op) &op,
#define FASTFAR_SCRATCH_ENTRY(op) &op##_scratch,

// Declares the functions of one instruction set and its table `kOps`.
#define FASTFAR_DECLARE_TARGET(target)                                    \
  namespace target {                                                      \
  FASTFAR_EACH_OP(FASTFAR_FUNCTION)                                       \
  FASTFAR_EACH_SCRATCH(FASTFAR_SCRATCH)                                   \
  constexpr Ops kOps = {FASTFAR_EACH_OP(FASTFAR_ENTRY)                    \
                            FASTFAR_EACH_SCRATCH(FASTFAR_SCRATCH_ENTRY)}; \
  }

}  // namespace fastfar

#endif  // FASTFAR_KERNELS_CPU_OPS_H_
