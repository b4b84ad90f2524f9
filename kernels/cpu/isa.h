// Which instruction sets this process may execute. Compiled with the compiler's baseline flags.
#ifndef FASTFAR_KERNELS_CPU_ISA_H_
#define FASTFAR_KERNELS_CPU_ISA_H_

#include <cstdint>

namespace fastfar {

// nullptr when processor and operating system both allow the set, else why not.
// Says nothing about what the library holds: table.cc adds that.
const char* isa_machine_reason(int32_t isa);

}  // namespace fastfar

#endif  // FASTFAR_KERNELS_CPU_ISA_H_
