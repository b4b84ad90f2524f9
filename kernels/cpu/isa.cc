// Probe of the machine: CPUID says what the processor has, XGETBV what the operating system saves
// at a context switch, and Linux wants to be asked before a process touches the AMX tiles.
// This file must stay free of instruction-set flags: it runs before anything is known.
#include "isa.h"

#include "fastfar_cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastfar {
namespace {

constexpr const char* kUnknown = "unknown instruction set number";

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  // Returns zeros for a leaf beyond the processor's highest one.
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

constexpr bool has(uint32_t word, int bit) { return ((word >> bit) & 1U) != 0; }

// XCR0, the mask of register state that the operating system saves; 0 without OSXSAVE.
uint64_t saved_state(const Registers& leaf1) {
  if (!has(leaf1.ecx, 27)) return 0;
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

constexpr uint64_t kYmmState = 0x6;       // SSE and AVX
constexpr uint64_t kZmmState = 0xe6;      // and opmask, upper ZMM halves, ZMM16-31
constexpr uint64_t kTileState = 0x60000;  // tile configuration and tile data

// Linux 5.16 and newer grant tile data on request, for the whole process.
bool request_tiles() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}

struct Machine {
  const char* reason[FASTFAR_ISA_COUNT] = {};

  Machine() {
    const Registers leaf1 = cpuid(1, 0);
    const Registers leaf7 = cpuid(7, 0);
    const Registers leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : Registers();
    const uint64_t state = saved_state(leaf1);

    if (!has(leaf7.ebx, 5) || !has(leaf1.ecx, 12) || !has(leaf1.ecx, 29))
      reason[FASTFAR_ISA_AVX2] = "the processor lacks AVX2, FMA or F16C";
    else if ((state & kYmmState) != kYmmState)
      reason[FASTFAR_ISA_AVX2] = "the operating system does not save the AVX registers";

    if (reason[FASTFAR_ISA_AVX2] != nullptr)
      reason[FASTFAR_ISA_AVX512] = reason[FASTFAR_ISA_AVX2];
    else if (!has(leaf7.ebx, 16) || !has(leaf7.ebx, 17) || !has(leaf7.ebx, 30) ||
             !has(leaf7.ebx, 31))
      reason[FASTFAR_ISA_AVX512] = "the processor lacks AVX-512 F, DQ, BW or VL";
    else if ((state & kZmmState) != kZmmState)
      reason[FASTFAR_ISA_AVX512] = "the operating system does not save the AVX-512 registers";

    if (reason[FASTFAR_ISA_AVX512] != nullptr)
      reason[FASTFAR_ISA_AVX512_BF16] = reason[FASTFAR_ISA_AVX512];
    else if (!has(leaf7_1.eax, 5))
      reason[FASTFAR_ISA_AVX512_BF16] = "the processor lacks AVX512_BF16";

    if (reason[FASTFAR_ISA_AVX512_BF16] != nullptr)
      reason[FASTFAR_ISA_AMX] = reason[FASTFAR_ISA_AVX512_BF16];
    else if (!has(leaf7.edx, 22) || !has(leaf7.edx, 24))
      reason[FASTFAR_ISA_AMX] = "the processor lacks AMX-TILE or AMX-BF16";
    else if ((state & kTileState) != kTileState)
      reason[FASTFAR_ISA_AMX] = "the operating system does not save the AMX tiles";
    else if (!request_tiles())
      reason[FASTFAR_ISA_AMX] = "the operating system refused the AMX tile permission";
  }
};

#else  // not x86-64

struct Machine {
  const char* reason[FASTFAR_ISA_COUNT] = {};

  Machine() {
    for (int32_t isa = FASTFAR_ISA_SCALAR + 1; isa < FASTFAR_ISA_COUNT; ++isa)
      reason[isa] = "the processor is not x86-64";
  }
};

#endif

}  // namespace

const char* isa_machine_reason(int32_t isa) {
  static const Machine machine;  // probed once; initialisation is thread-safe
  return isa >= 0 && isa < FASTFAR_ISA_COUNT ? machine.reason[isa] : kUnknown;
}

}  // namespace fastfar
