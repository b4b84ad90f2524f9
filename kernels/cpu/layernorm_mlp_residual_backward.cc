// Backward of layernorm_mlp_residual; see mlp_gradient.h. The hidden layer is computed again.
#include "mlp_gradient.h"
#include "ops.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

MlpGradient described(const fastfar_layernorm_mlp_residual_backward_args& a) {
  MlpGradient g = {};
  g.rows = a.rows;
  g.width = a.width;
  g.hidden = a.hidden;
  g.eps = a.eps;
  g.x = {const_cast<void*>(a.x_MD), a.x_dtype};
  g.dout = {const_cast<void*>(a.dout_MD), a.x_dtype};
  g.dx = {a.dx_MD, a.x_dtype};
  g.norm_weight = a.norm_weight;
  g.norm_bias = a.norm_bias;
  g.fc1_bias = a.fc1_bias;
  g.fc1 = a.fc1;
  g.fc1_transposed = a.fc1_transposed;
  g.fc2_transposed = a.fc2_transposed;
  g.dnorm_weight = a.dnorm_weight;
  g.dnorm_bias = a.dnorm_bias;
  g.dfc1_weight = a.dfc1_weight;
  g.dfc1_bias = a.dfc1_bias;
  g.dfc2_weight = a.dfc2_weight;
  g.dfc2_bias = a.dfc2_bias;
  return g;
}

bool is_dtype(int32_t dtype) { return dtype == FASTFAR_FLOAT32 || dtype == FASTFAR_BFLOAT16; }

bool valid(const fastfar_layernorm_mlp_residual_backward_args& a) {
  return a.threads > 0 && a.rows > 0 && a.width > 0 && a.hidden > 0 && is_dtype(a.dtype) &&
         is_dtype(a.x_dtype);
}

}  // namespace

int64_t layernorm_mlp_residual_backward_scratch(
    const fastfar_layernorm_mlp_residual_backward_args& args) {
  if (!valid(args)) return FASTFAR_ERROR_ARGUMENT;
  const MlpGradient g = described(args);
  return args.dtype == FASTFAR_BFLOAT16
             ? MlpBackward<Bfloat16, Gelu>(g, args.threads, nullptr).arena.used
             : MlpBackward<Float32, Gelu>(g, args.threads, nullptr).arena.used;
}

int32_t layernorm_mlp_residual_backward(const fastfar_layernorm_mlp_residual_backward_args& args) {
  if (!valid(args) || args.x_MD == nullptr || args.norm_weight == nullptr ||
      args.norm_bias == nullptr || args.fc1 == nullptr || args.fc1_bias == nullptr ||
      args.fc1_transposed == nullptr || args.fc2_transposed == nullptr || args.dout_MD == nullptr ||
      args.dx_MD == nullptr || args.dnorm_weight == nullptr || args.dnorm_bias == nullptr ||
      args.dfc1_weight == nullptr || args.dfc1_bias == nullptr || args.dfc2_weight == nullptr ||
      args.dfc2_bias == nullptr || args.scratch == nullptr) {
    return FASTFAR_ERROR_ARGUMENT;
  }
  const MlpGradient g = described(args);
  if (args.dtype == FASTFAR_BFLOAT16) {
    MlpBackward<Bfloat16, Gelu>(g, args.threads, args.scratch).run(args.threads);
  } else {
    MlpBackward<Float32, Gelu>(g, args.threads, args.scratch).run(args.threads);
  }
  return 0;
}

}  // namespace FASTFAR_TARGET
}  // namespace fastfar
