// layernorm_mlp_residual: y = x + W_2 gelu(W_1 LN(x) + b_1) + b_2.
#include "linear.h"
#include "ops.h"
#include "rows.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

template <class M>
struct Scratch {
  LinearPlan plan1, plan2;
  Arena arena;
  typename M::A *normalised, *hidden;
  float *row, *partial;

  explicit Scratch(const fastfar_layernorm_mlp_residual_args& args)
      : plan1(args.threads, args.rows, args.hidden, args.width, sizeof(typename M::A)),
        plan2(args.threads, args.rows, args.width, args.hidden, sizeof(typename M::A)),
        arena{static_cast<char*>(args.scratch)} {
    normalised = arena.take<typename M::A>(operand_size(args.rows, args.width));
    hidden = arena.take<typename M::A>(operand_size(args.rows, args.hidden));
    row = arena.take<float>(args.threads * padded_columns(args.width));
    partial = arena.take<float>(args.threads * larger(plan1.partial_size(), plan2.partial_size()));
  }
};

template <class M>
void run(const fastfar_layernorm_mlp_residual_args& args) {
  const Scratch<M> scratch(args);
  const Numbers x_MD{const_cast<void*>(args.x_MD), args.x_dtype}, out_MD{args.out_MD, args.x_dtype};
  const int64_t width = args.width, hidden = args.hidden, hidden_depth = depth_of(hidden);
  normalise(args.threads, args.rows, width, x_MD, args.norm_weight, args.norm_bias, args.eps,
            scratch.normalised, scratch.row);
  // A panel of the first layer's outputs is one k tile of the second layer. Behind the last output
  // the sum, the bias and so the GELU are 0, as an A operand needs it.
  linear<M>(args.threads, scratch.plan1, scratch.normalised, args.fc1, scratch.partial,
            [&](int64_t row, int64_t column, const float* c) {
              auto* out = at(scratch.hidden, hidden_depth, row, column);
              for (int64_t i = 0; i < kBlock; i += kLanes) {
                const int64_t count = larger(0, hidden - column - i);
                store(out + i, gelu(load(c + i) + load_part(args.fc1_bias + column + i, count)));
              }
            });
  linear<M>(args.threads, scratch.plan2, scratch.hidden, args.fc2, scratch.partial,
            [&](int64_t row, int64_t column, const float* c) {
              add_residual(x_MD, out_MD, args.fc2_bias, row, column, width, c);
            });
}

bool valid(const fastfar_layernorm_mlp_residual_args& args) {
  return args.threads > 0 && args.rows > 0 && args.width > 0 && args.hidden > 0 &&
         (args.dtype == FASTFAR_FLOAT32 || args.dtype == FASTFAR_BFLOAT16) &&
         (args.x_dtype == FASTFAR_FLOAT32 || args.x_dtype == FASTFAR_BFLOAT16);
}

}  // namespace

int64_t layernorm_mlp_residual_scratch(const fastfar_layernorm_mlp_residual_args& args) {
  if (!valid(args)) return FASTFAR_ERROR_ARGUMENT;
  fastfar_layernorm_mlp_residual_args sizes = args;
  sizes.scratch = nullptr;
  return args.dtype == FASTFAR_BFLOAT16 ? Scratch<Bfloat16>(sizes).arena.used
                                        : Scratch<Float32>(sizes).arena.used;
}

int32_t layernorm_mlp_residual(const fastfar_layernorm_mlp_residual_args& args) {
  if (!valid(args) || args.x_MD == nullptr || args.norm_weight == nullptr ||
      args.norm_bias == nullptr || args.fc1 == nullptr || args.fc1_bias == nullptr ||
      args.fc2 == nullptr || args.fc2_bias == nullptr || args.out_MD == nullptr ||
      args.scratch == nullptr) {
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
