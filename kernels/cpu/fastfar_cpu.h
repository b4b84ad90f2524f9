/* The flat C interface of fastfar's native CPU library: the only header that is seen from outside.
 *
 * Rules that hold for every function:
 *   - no framework types: tensors cross as pointers, sizes in elements, strides only where stated;
 *   - nothing is allocated: the caller passes outputs and scratch;
 *   - a negative result is one of the FASTFAR_ERROR_ codes, anything else is a success.
 *
 * Instruction sets are numbered from the slowest to the fastest. One is selected per process (the
 * fastest usable one unless fastfar_isa_select says otherwise) and every operation runs on it.
 */
#ifndef FASTFAR_CPU_H_
#define FASTFAR_CPU_H_

#include <stdint.h>

#define FASTFAR_ABI_VERSION 1

#define FASTFAR_ISA_SCALAR 0
#define FASTFAR_ISA_AVX2 1
#define FASTFAR_ISA_AVX512 2
#define FASTFAR_ISA_AVX512_BF16 3
#define FASTFAR_ISA_AMX 4
#define FASTFAR_ISA_COUNT 5

#define FASTFAR_ERROR_ARGUMENT (-1) /* null pointer, negative size, number out of range */
#define FASTFAR_ERROR_ISA (-2)      /* this machine or this build cannot serve that set */

#define FASTFAR_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* FASTFAR_ABI_VERSION of the library, to be compared with the number its caller was written for. */
FASTFAR_API int32_t fastfar_abi_version(void);

/* Number of instruction sets that this interface knows, usable or not. */
FASTFAR_API int32_t fastfar_isa_count(void);

/* Name of a set ("scalar", "avx2", "avx512", "avx512_bf16", "amx"); NULL when out of range. */
FASTFAR_API const char* fastfar_isa_name(int32_t isa);

/* NULL when the set is usable, else the reason: processor, operating system or compiler. */
FASTFAR_API const char* fastfar_isa_reason(int32_t isa);

/* The fastest usable set; at least FASTFAR_ISA_SCALAR. */
FASTFAR_API int32_t fastfar_isa_best(void);

/* The set that operations run on now. */
FASTFAR_API int32_t fastfar_isa_selected(void);

/* Selects a set for all later calls of this process; returns it, or an error code. */
FASTFAR_API int32_t fastfar_isa_select(int32_t isa);

/* c_MN = bf16(a_MK) bf16(b_KN): float32 operands rounded to bfloat16 (nearest even), products
 * summed in float32. Row-major and contiguous; any m, n, k >= 0. Returns the instruction set whose
 * code ran, which proves the dispatch, or an error code. */
FASTFAR_API int32_t fastfar_selftest(int64_t m, int64_t n, int64_t k, const float* a_MK,
                                     const float* b_KN, float* c_MN);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* FASTFAR_CPU_H_ */
