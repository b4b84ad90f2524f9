/* The flat C interface of fastfar's native CPU library: the only header that is seen from outside.
 *
 * Rules that hold for every operation `int32_t fastfar_<op>(const fastfar_<op>_args*)`:
 *   - no framework types: tensors cross as pointers, sizes and strides in elements;
 *   - row-major and contiguous unless a stride says otherwise;
 *   - nothing is allocated: the caller passes outputs and scratch. Scratch needs no initial value
 *     and starts at a multiple of 64 bytes; `fastfar_<op>_scratch` says how many bytes;
 *   - `threads` is how many threads may work, the calling one among them (see threads.h);
 *   - a negative result is one of the FASTFAR_ERROR_ codes, anything else is a success.
 *
 * Shape suffixes as in the Python package: M rows, N output features, K input features, B image,
 * S position, D transformer width, H attention head, E width of a head, W width of the denoising
 * MLP, P numbers of a token, T diffusion step.
 *
 * Instruction sets are numbered from the slowest to the fastest. One is selected per process (the
 * fastest usable one unless fastfar_isa_select says otherwise) and every operation runs on it.
 */
#ifndef FASTFAR_CPU_H_
#define FASTFAR_CPU_H_

#include <stdint.h>

#define FASTFAR_ABI_VERSION 2

#define FASTFAR_ISA_SCALAR 0
#define FASTFAR_ISA_AVX2 1
#define FASTFAR_ISA_AVX512 2
#define FASTFAR_ISA_AVX512_BF16 3
#define FASTFAR_ISA_AMX 4
#define FASTFAR_ISA_COUNT 5

#define FASTFAR_ERROR_ARGUMENT (-1) /* null pointer, negative size, number out of range */
#define FASTFAR_ERROR_ISA (-2)      /* this machine or this build cannot serve that set */

/* Numbers in memory, and the arithmetic of an operation: FLOAT32 multiplies float32, BFLOAT16
 * rounds both factors of a product to bfloat16. Sums are float32 in both. */
#define FASTFAR_FLOAT32 0
#define FASTFAR_BFLOAT16 1

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

/* --- weights in tile order -------------------------------------------------------------------- */

/* Bytes of a packed (n, k) matrix. Panels of 32 outputs, one after the other; in each, one block
 * for every 32 inputs: two tiles of (16 input pairs, 16 outputs, 2) in bfloat16, or (32 inputs, 32
 * outputs) in float32. Rows and columns beyond n and k are zero. The same for every instruction
 * set. */
FASTFAR_API int64_t fastfar_packed_bytes(int32_t dtype, int64_t n, int64_t k);

/* packed = w_NK in tile order; rounded to the nearest even, a NaN stays one. */
typedef struct {
  int32_t dtype;        /* of the packed weights */
  int32_t source_dtype; /* of w */
  int64_t n, k;
  int64_t stride_n, stride_k; /* of w; a transpose swaps them */
  const void* w;
  void* packed; /* fastfar_packed_bytes(dtype, n, k) bytes, 64-byte aligned */
  int32_t threads;
} fastfar_pack_args;
FASTFAR_API int32_t fastfar_pack(const fastfar_pack_args* args);

/* --- the transformer -------------------------------------------------------------------------- */

/* Weights are packed and of dtype `dtype`, which is that of the products; x and out are of
 * `x_dtype`; vectors (norms, biases) are float32. `scratch` has fastfar_<op>_scratch bytes, for all
 * threads together; these functions read only the numbers of the arguments, no pointer. LayerNorms,
 * residuals, softmax and everything else beside the products are computed in float32. */

/* out = softmax(q k^T / sqrt E) v over the positions whose key_mask is not 0 (NULL: all of them);
 * 0 for images without such a position, as in PyTorch. */
typedef struct {
  int32_t dtype; /* of qkv, of the products and of out */
  int32_t threads;
  int64_t batch, length, heads, width; /* B, S, H, E */
  const void* qkv_BS3HE;
  const uint8_t* key_mask_BS;
  void* out_BSD; /* D = H E */
  void* scratch;
} fastfar_attention_args;
FASTFAR_API int32_t fastfar_attention(const fastfar_attention_args* args);
FASTFAR_API int64_t fastfar_attention_scratch(const fastfar_attention_args* args);

/* out = x + W_o attention(W_qkv LN(x) + b_qkv) + b_o; out may be x. */
typedef struct {
  int32_t dtype, x_dtype;
  int32_t threads;
  int64_t batch, length, heads, width; /* B, S, H, D */
  float eps;
  const void* x_BSD;
  const float *norm_weight, *norm_bias;
  const void* qkv; /* (3 D, D) */
  const float* qkv_bias;
  const void* proj; /* (D, D) */
  const float* proj_bias;
  const uint8_t* key_mask_BS;
  void* out_BSD;
  void* scratch;
} fastfar_layernorm_attention_residual_args;
FASTFAR_API int32_t
fastfar_layernorm_attention_residual(const fastfar_layernorm_attention_residual_args* args);
FASTFAR_API int64_t
fastfar_layernorm_attention_residual_scratch(const fastfar_layernorm_attention_residual_args* args);

/* out_MN = LN(x_MK) w^T + b. */
typedef struct {
  int32_t dtype, x_dtype;
  int32_t threads;
  int64_t rows, n, k;
  float eps;
  const void* x_MK;
  const float *norm_weight, *norm_bias;
  const void* weight; /* (N, K) */
  const float* bias;
  void* out_MN;
  void* scratch;
} fastfar_layernorm_linear_args;
FASTFAR_API int32_t fastfar_layernorm_linear(const fastfar_layernorm_linear_args* args);
FASTFAR_API int64_t fastfar_layernorm_linear_scratch(const fastfar_layernorm_linear_args* args);

/* out = x + W_2 gelu(W_1 LN(x) + b_1) + b_2, with the exact GELU; out may be x. */
typedef struct {
  int32_t dtype, x_dtype;
  int32_t threads;
  int64_t rows, width, hidden;
  float eps;
  const void* x_MD;
  const float *norm_weight, *norm_bias;
  const void* fc1; /* (hidden, D) */
  const float* fc1_bias;
  const void* fc2; /* (D, hidden) */
  const float* fc2_bias;
  void* out_MD;
  void* scratch;
} fastfar_layernorm_mlp_residual_args;
FASTFAR_API int32_t fastfar_layernorm_mlp_residual(const fastfar_layernorm_mlp_residual_args* args);
FASTFAR_API int64_t
fastfar_layernorm_mlp_residual_scratch(const fastfar_layernorm_mlp_residual_args* args);

/* --- the denoising MLP ------------------------------------------------------------------------ */

/* x of every token after all diffusion steps; formulas in denoise_loop.cc, layout of the weights in
 * fastfar/ops/_head.py. All steps of a token run on one thread. */
typedef struct {
  int32_t dtype; /* of the weights */
  int32_t threads;
  int64_t rows;   /* tokens */
  int64_t halves; /* 2: guidance, 1: none */
  int64_t width, depth, channels, condition_width;
  int64_t steps;
  int64_t rows_per_task;
  int64_t steps_ahead; /* steps whose modulations are computed at once; 1: within each step */
  const void* weights; /* packed */
  const float* vectors;
  const float* condition_MD; /* halves * rows, conditional rows first */
  const float* time_TW;      /* time embedding of every step, in the order in which steps are run */
  const float* table; /* (steps, 11): x0 from x, x0 from eps, a, b, c, variance of the noise at
                         v = -1 and at v = 1, factor of the noise (0: none), 1 where these are
                         variances and 0 where they are logarithms of such, bounds of (v + 1) / 2 */
  const float* initial_NP;
  const float* noise_TNP;
  float level, guidance_scale, x0_low, x0_high;
  float* out_NP;
  void* scratch;
} fastfar_denoise_loop_args;
FASTFAR_API int32_t fastfar_denoise_loop(const fastfar_denoise_loop_args* args);

FASTFAR_API int64_t fastfar_denoise_loop_scratch(const fastfar_denoise_loop_args* args);

/* --- frequency levels ------------------------------------------------------------------------- */

/* tokens = the visible patches of A_i x A_i^T per channel, each image at its own level i: -1 and
 * `levels` leave it as it is, 0 makes it zero; masked tokens are zero. */
typedef struct {
  int32_t dtype; /* of latent and tokens */
  int32_t threads;
  int64_t batch, channels, size, patch, levels;
  int64_t stride;          /* of a matrix' rows: size, rounded up to a multiple of 16 */
  const float* matrices;   /* (levels + 1, size, stride): A_i; 0 from column `size` on */
  const float* transposed; /* the same: A_i^T */
  const int64_t* level_B;
  const uint8_t* mask_BL; /* not 0 where a token is masked; or NULL */
  const void* latent_BCHW;
  void* tokens_BLP;
  void* scratch; /* threads * fastfar_filter_mask_patchify_scratch */
} fastfar_filter_mask_patchify_args;
FASTFAR_API int32_t fastfar_filter_mask_patchify(const fastfar_filter_mask_patchify_args* args);

/* The adjoint: gradient of the latent, A_i^T g A_i, from that of the tokens. */
typedef struct {
  int32_t dtype;
  int32_t threads;
  int64_t batch, channels, size, patch, levels, stride;
  const float *matrices, *transposed;
  const int64_t* level_B;
  const uint8_t* mask_BL;
  const void* tokens_BLP; /* gradient of the tokens */
  void* latent_BCHW;      /* gradient of the latent */
  void* scratch;          /* threads * fastfar_filter_mask_patchify_backward_scratch */
} fastfar_filter_mask_patchify_backward_args;
FASTFAR_API int32_t
fastfar_filter_mask_patchify_backward(const fastfar_filter_mask_patchify_backward_args* args);

/* Bytes of scratch per thread; only the sizes of the arguments are read. */
FASTFAR_API int64_t
fastfar_filter_mask_patchify_scratch(const fastfar_filter_mask_patchify_args* args);
FASTFAR_API int64_t fastfar_filter_mask_patchify_backward_scratch(
    const fastfar_filter_mask_patchify_backward_args* args);

/* --- decoding ----------------------------------------------------------------------------------
 */

/* y = silu(GroupNorm(x)), or GroupNorm(x), on channels-last images; the statistics are float32 or
 * better, one pair per image and group of channels / groups channels. */
typedef struct {
  int32_t dtype; /* of x and y */
  int32_t silu;  /* 0: without */
  int32_t threads;
  float eps;
  int64_t batch, positions, channels, groups;
  const void* x_BSC;
  const float *weight_C, *bias_C;
  void* y_BSC;   /* may be x */
  void* scratch; /* fastfar_groupnorm_silu_scratch */
} fastfar_groupnorm_silu_args;
FASTFAR_API int32_t fastfar_groupnorm_silu(const fastfar_groupnorm_silu_args* args);

/* Bytes of scratch for all threads together; only the sizes of the arguments are read. */
FASTFAR_API int64_t fastfar_groupnorm_silu_scratch(const fastfar_groupnorm_silu_args* args);

/* --- training ----------------------------------------------------------------------------------
 */

/* Weights and vectors as for the transformer. Gradients of weights and vectors are float32 sums
 * that do not depend on the number of threads. Transposed weights are packed with n and k swapped.
 * Scratch is for all threads together. */

/* out = x + gate * u, u = W_2 silu(h) + b_2, h = W_1 (LN(x) * (1 + scale) + shift) + b_1. */
typedef struct {
  int32_t dtype;            /* of the packed weights, h and u */
  int32_t x_dtype;          /* of x and out */
  int32_t modulation_dtype; /* of shift, scale and gate */
  int32_t threads;
  int64_t rows, width;
  int64_t modulation_stride; /* between rows of shift, scale and gate */
  float eps;
  const void *x_NW, *shift_NW, *scale_NW, *gate_NW;
  const float *norm_weight, *norm_bias;
  const void* fc1;
  const float* fc1_bias;
  const void* fc2;
  const float* fc2_bias;
  void *h_NW, *u_NW; /* kept for the backward; may be NULL */
  void* out_NW;
  void* scratch;
} fastfar_adaln_mlp_block_args;
FASTFAR_API int32_t fastfar_adaln_mlp_block(const fastfar_adaln_mlp_block_args* args);
FASTFAR_API int64_t fastfar_adaln_mlp_block_scratch(const fastfar_adaln_mlp_block_args* args);

typedef struct {
  int32_t dtype, x_dtype, modulation_dtype;
  int32_t threads;
  int64_t rows, width;
  int64_t modulation_stride; /* of shift, scale and gate; everything else is contiguous */
  float eps;
  const void *x_NW, *shift_NW, *scale_NW, *gate_NW;
  const float *norm_weight, *norm_bias;
  const void *fc1_transposed, *fc2_transposed;
  const void *h_NW, *u_NW; /* of `dtype` */
  const void* dout_NW;
  void *dx_NW, *dshift_NW, *dscale_NW, *dgate_NW;
  float *dnorm_weight, *dnorm_bias, *dfc1_weight, *dfc1_bias, *dfc2_weight, *dfc2_bias;
  void* scratch;
} fastfar_adaln_mlp_block_backward_args;
FASTFAR_API int32_t
fastfar_adaln_mlp_block_backward(const fastfar_adaln_mlp_block_backward_args* args);
FASTFAR_API int64_t
fastfar_adaln_mlp_block_backward_scratch(const fastfar_adaln_mlp_block_backward_args* args);

/* Gradients of layernorm_mlp_residual. */
typedef struct {
  int32_t dtype, x_dtype;
  int32_t threads;
  int64_t rows, width, hidden;
  float eps;
  const void* x_MD;
  const float *norm_weight, *norm_bias;
  const void* fc1; /* (hidden, D) */
  const float* fc1_bias;
  const void *fc1_transposed, *fc2_transposed;
  const void* dout_MD;
  void* dx_MD;
  float *dnorm_weight, *dnorm_bias, *dfc1_weight, *dfc1_bias, *dfc2_weight, *dfc2_bias;
  void* scratch;
} fastfar_layernorm_mlp_residual_backward_args;
FASTFAR_API int32_t
fastfar_layernorm_mlp_residual_backward(const fastfar_layernorm_mlp_residual_backward_args* args);
FASTFAR_API int64_t fastfar_layernorm_mlp_residual_backward_scratch(
    const fastfar_layernorm_mlp_residual_backward_args* args);

/* out_MN = x_MK w^T + b. */
typedef struct {
  int32_t dtype, x_dtype, out_dtype;
  int32_t threads;
  int64_t rows, n, k;
  int64_t x_stride; /* between rows of x */
  const void* x_MK;
  const void* weight; /* (N, K) */
  const float* bias;  /* NULL: none */
  void* out_MN;
  void* scratch;
} fastfar_linear_args;
FASTFAR_API int32_t fastfar_linear(const fastfar_linear_args* args);
FASTFAR_API int64_t fastfar_linear_scratch(const fastfar_linear_args* args);

typedef struct {
  int32_t dtype, x_dtype, out_dtype; /* dx is of x_dtype, dout of out_dtype */
  int32_t threads;
  int64_t rows, n, k;
  int64_t x_stride;
  const void* x_MK;
  const void* weight_transposed; /* (K, N) */
  const void* dout_MN;
  void* dx_MK; /* NULL: not wanted */
  float *dweight, *dbias;
  void* scratch;
} fastfar_linear_backward_args;
FASTFAR_API int32_t fastfar_linear_backward(const fastfar_linear_backward_args* args);
FASTFAR_API int64_t fastfar_linear_backward_scratch(const fastfar_linear_backward_args* args);

/* loss = mean (eps - noise)^2 + bound / log 2 of every row; formulas in hybrid_loss.cc. */
typedef struct {
  int32_t dtype; /* of output, target, noise and noised */
  int32_t threads;
  int64_t rows, numbers, num_timesteps;
  const void *output_N2P, *target_NP, *noise_NP, *noised_NP;
  const int64_t* timestep_N;
  const float* table_T6; /* by timestep: x0 from x_t, x0 from eps, mean from x0, mean from x_t, log
                            beta, log of the posterior's variance */
  float* loss_N;
} fastfar_hybrid_loss_args;
FASTFAR_API int32_t fastfar_hybrid_loss(const fastfar_hybrid_loss_args* args);

typedef struct {
  int32_t dtype;
  int32_t threads;
  int64_t rows, numbers, num_timesteps;
  const void *output_N2P, *target_NP, *noise_NP, *noised_NP;
  const int64_t* timestep_N;
  const float* table_T6;
  const float* dloss_N;
  void* doutput_N2P;
} fastfar_hybrid_loss_backward_args;
FASTFAR_API int32_t fastfar_hybrid_loss_backward(const fastfar_hybrid_loss_backward_args* args);

/* --- what the machine gives ------------------------------------------------------------------- */

/* Without a buffer: every thread does `iterations` rounds of products whose operands stay in
 * registers, on the units that products of this dtype use in the selected set. With one: every
 * thread streams its part of it `iterations` times. The clock is the caller's. */
typedef struct {
  int32_t dtype; /* of the products */
  int32_t threads;
  int64_t iterations;
  int64_t numbers;     /* of the buffer; each thread reads a multiple of 128 of them */
  const float* buffer; /* or NULL */
  float* results;      /* (threads): of the products 2 (1 - 0.75^iterations) in float32 arithmetic
                          and 0.375 iterations in bfloat16 pairs or tiles; sums of the numbers */
  int64_t* work;       /* one number: FLOPs done, or bytes read, by all threads */
} fastfar_peak_args;
FASTFAR_API int32_t fastfar_peak(const fastfar_peak_args* args);

/* --- proof of dispatch ------------------------------------------------------------------------ */

/* c_MN = a_MK b_NK^T through the product that all operations of the model use; bfloat16 rounds both
 * factors (nearest even). K is cut into `pieces` whose sums are kept in memory, each piece into
 * `segments` (1 or 2) whose sums stay in registers. Any m, n, k >= 0. Returns the instruction set
 * whose code ran. */
typedef struct {
  int32_t dtype, threads;
  int32_t segments, pieces;
  int64_t m, n, k;
  const float* a_MK;
  const void* b_NK; /* packed, of `dtype` */
  float* c_MN;
  void* scratch; /* fastfar_selftest_scratch bytes in all */
} fastfar_selftest_args;
FASTFAR_API int64_t fastfar_selftest_scratch(const fastfar_selftest_args* args);
FASTFAR_API int32_t fastfar_selftest(const fastfar_selftest_args* args);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* FASTFAR_CPU_H_ */
