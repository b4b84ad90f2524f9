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
#define FASTFAR_EACH_OP(X) \
  X(pack)                  \
  X(selftest)

namespace fastfar {

#define FASTFAR_MEMBER(op) int32_t (*op)(const fastfar_##op##_args&);
struct Ops {
  FASTFAR_EACH_OP(FASTFAR_MEMBER)
};
#undef FASTFAR_MEMBER

#define FASTFAR_FUNCTION(op) int32_t op(const fastfar_##op##_args&);
#define FASTFAR_ENTRY(op) &op,

// Declares the functions of one instruction set and its table `kOps`.
#define FASTFAR_DECLARE_TARGET(target)                        \
  namespace target {                                          \
  FASTFAR_EACH_OP(FASTFAR_FUNCTION)                           \
  constexpr Ops kOps = {FASTFAR_EACH_OP(FASTFAR_ENTRY)};      \
  }

}  // namespace fastfar

#endif  // FASTFAR_KERNELS_CPU_OPS_H_
