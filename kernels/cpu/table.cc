// The table operation x instruction set, the choice of its row, and the C entry points.
#include <atomic>

#include "fastfar_cpu.h"
#include "isa.h"
#include "ops.h"

namespace fastfar {

// CMake defines FASTFAR_HAS_<ISA> for every set that the compiler could build.
FASTFAR_DECLARE_TARGET(scalar)
#ifdef FASTFAR_HAS_AVX2
FASTFAR_DECLARE_TARGET(avx2)
#endif
#ifdef FASTFAR_HAS_AVX512
FASTFAR_DECLARE_TARGET(avx512)
#endif
#ifdef FASTFAR_HAS_AVX512_BF16
FASTFAR_DECLARE_TARGET(avx512_bf16)
#endif
#ifdef FASTFAR_HAS_AMX
FASTFAR_DECLARE_TARGET(amx)
#endif

namespace {

struct Target {
  const char* name;
  const Ops* ops;  // nullptr: not in this build
};

// In the order of the FASTFAR_ISA_ numbers.
constexpr Target kTargets[FASTFAR_ISA_COUNT] = {
    {"scalar", &scalar::kOps},
#ifdef FASTFAR_HAS_AVX2
    {"avx2", &avx2::kOps},
#else
    {"avx2", nullptr},
#endif
#ifdef FASTFAR_HAS_AVX512
    {"avx512", &avx512::kOps},
#else
    {"avx512", nullptr},
#endif
#ifdef FASTFAR_HAS_AVX512_BF16
    {"avx512_bf16", &avx512_bf16::kOps},
#else
    {"avx512_bf16", nullptr},
#endif
#ifdef FASTFAR_HAS_AMX
    {"amx", &amx::kOps},
#else
    {"amx", nullptr},
#endif
};

std::atomic<int32_t> g_selected{-1};  // -1: nobody has asked yet

bool known(int32_t isa) { return isa >= 0 && isa < FASTFAR_ISA_COUNT; }

const Ops& ops() { return *kTargets[fastfar_isa_selected()].ops; }

}  // namespace
}  // namespace fastfar

using fastfar::g_selected;
using fastfar::known;
using fastfar::kTargets;
using fastfar::ops;

int32_t fastfar_abi_version(void) { return FASTFAR_ABI_VERSION; }

int32_t fastfar_isa_count(void) { return FASTFAR_ISA_COUNT; }

const char* fastfar_isa_name(int32_t isa) { return known(isa) ? kTargets[isa].name : nullptr; }

const char* fastfar_isa_reason(int32_t isa) {
  const char* reason = fastfar::isa_machine_reason(isa);
  if (reason != nullptr) return reason;
  return kTargets[isa].ops != nullptr ? nullptr
                                      : "the compiler that built this library cannot produce it";
}

int32_t fastfar_isa_best(void) {
  int32_t isa = FASTFAR_ISA_COUNT - 1;
  while (isa > FASTFAR_ISA_SCALAR && fastfar_isa_reason(isa) != nullptr) --isa;
  return isa;
}

int32_t fastfar_isa_selected(void) {
  const int32_t isa = g_selected.load(std::memory_order_relaxed);
  return isa >= 0 ? isa : fastfar_isa_best();
}

int32_t fastfar_isa_select(int32_t isa) {
  if (!known(isa)) return FASTFAR_ERROR_ARGUMENT;
  if (fastfar_isa_reason(isa) != nullptr) return FASTFAR_ERROR_ISA;
  g_selected.store(isa, std::memory_order_relaxed);
  return isa;
}

#define FASTFAR_DEFINE(op)                                \
  int32_t fastfar_##op(const fastfar_##op##_args* args) { \
    if (args == nullptr) return FASTFAR_ERROR_ARGUMENT;   \
    return ops().op(*args);                               \
  }
FASTFAR_EACH_OP(FASTFAR_DEFINE)

#define FASTFAR_DEFINE_SCRATCH(op)                                  \
  int64_t fastfar_##op##_scratch(const fastfar_##op##_args* args) { \
    if (args == nullptr) return FASTFAR_ERROR_ARGUMENT;             \
    return ops().op##_scratch(*args);                               \
  }
FASTFAR_EACH_SCRATCH(FASTFAR_DEFINE_SCRATCH)

int64_t fastfar_packed_bytes(int32_t dtype, int64_t n, int64_t k) {
  const int64_t size = dtype == FASTFAR_BFLOAT16 ? 2 : 4;
  return size * ((n + 31) / 32 * 32) * ((k + 31) / 32 * 32);
}
