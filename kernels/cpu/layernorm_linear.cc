// layernorm_linear: y = W LN(x) + b.
#include "linear.h"
#include "ops.h"
#include "rows.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

template <class M>
struct Scratch {
  LinearPlan plan;
  Arena arena;
  typename M::A* normalised;
  float *row, *partial;

  explicit Scratch(const fastfar_layernorm_linear_args& args)
      : plan(args.threads, args.rows, args.n, args.k, sizeof(typename M::A)),
        arena{static_cast<char*>(args.scratch)} {
    normalised = arena.take<typename M::A>(operand_size(args.rows, args.k));
    row = arena.take<float>(args.threads * padded_columns(args.k));
    partial = arena.take<float>(args.threads * plan.partial_size());
  }
};

template <class M>
void run(const fastfar_layernorm_linear_args& args) {
  const Scratch<M> scratch(args);
  const Numbers x_MK{const_cast<void*>(args.x_MK), args.x_dtype}, out_MN{args.out_MN, args.x_dtype};
  normalise(args.threads, args.rows, args.k, x_MK, args.norm_weight, args.norm_bias, args.eps,
            scratch.normalised, scratch.row);
  linear<M>(args.threads, scratch.plan, scratch.normalised, args.weight, scratch.partial,
            [&](int64_t row, int64_t column, const float* c) {
              for (int64_t i = 0; i < kBlock && column + i < args.n; i += kLanes) {
                const int64_t count = args.n - column - i;
                const V bias = load_part(args.bias + column + i, count);
                out_MN.put(row * args.n + column + i, load(c + i) + bias, count);
              }
            });
}

bool valid(const fastfar_layernorm_linear_args& args) {
  return args.threads > 0 && args.rows > 0 && args.n > 0 && args.k > 0 &&
         (args.dtype == FASTFAR_FLOAT32 || args.dtype == FASTFAR_BFLOAT16) &&
         (args.x_dtype == FASTFAR_FLOAT32 || args.x_dtype == FASTFAR_BFLOAT16);
}

}  // namespace

int64_t layernorm_linear_scratch(const fastfar_layernorm_linear_args& args) {
  if (!valid(args)) return FASTFAR_ERROR_ARGUMENT;
  fastfar_layernorm_linear_args sizes = args;
  sizes.scratch = nullptr;
  return args.dtype == FASTFAR_BFLOAT16 ? Scratch<Bfloat16>(sizes).arena.used
                                        : Scratch<Float32>(sizes).arena.used;
}

int32_t layernorm_linear(const fastfar_layernorm_linear_args& args) {
  if (!valid(args) || args.x_MK == nullptr || args.norm_weight == nullptr ||
      args.norm_bias == nullptr || args.weight == nullptr || args.bias == nullptr ||
      args.out_MN == nullptr || args.scratch == nullptr) {
    return FASTFAR_ERROR_ARGUMENT;
  }
  if (args.dtype == FASTFAR_BFLOAT16) {
    run<Bfloat16>(args);
  } else {
    run<Float32>(args);
  }
  return 0;
}

}  // namespace FASTFAR_TARGET
}  // namespace fastfar
