// What each instruction set must provide: one function per operation, gathered in one table.
//
// Every kernel source <op>.cc is compiled once per instruction set with FASTFAR_TARGET set to its
// name, and puts all it defines into namespace fastfar::FASTFAR_TARGET, so that no two copies can
// be merged by the linker. For the same reason kernel sources use no standard library templates.
#ifndef FASTFAR_KERNELS_CPU_OPS_H_
#define FASTFAR_KERNELS_CPU_OPS_H_

#include <cstdint>

namespace fastfar {

// Operations, with the meaning given in fastfar_cpu.h. Arguments were checked by table.cc.
using SelftestFn = int32_t(int64_t m, int64_t n, int64_t k, const float* a_MK, const float* b_KN,
                           float* c_MN);

struct Ops {
  SelftestFn* selftest;
};

// Declares the functions of one instruction set and its table `kOps`. A new operation adds its
// type and its member above, one line to each half here, and its entry point in table.cc.
#define FASTFAR_DECLARE_TARGET(target) \
  namespace target {                   \
  SelftestFn selftest;                 \
  constexpr Ops kOps = {               \
      &selftest,                       \
  };                                   \
  }

}  // namespace fastfar

#endif  // FASTFAR_KERNELS_CPU_OPS_H_
