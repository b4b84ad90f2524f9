// layernorm_attention_residual: y = x + W_o attention(W_qkv LN(x) + b_qkv) + b_o.
#include "attention.h"
#include "ops.h"
#include "rows.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

using Args = fastfar_layernorm_attention_residual_args;

template <class M>
struct Scratch {
  LinearPlan qkv_plan, proj_plan;
  AttentionPlan attention_plan;
  Arena arena;
  typename M::A* operand;  // LN(x), then what attention returns
  typename M::A* qkv_BS3HE;
  float *row, *partial;
  char* attention;  // one AttentionScratch per thread

  explicit Scratch(const Args& args)
      : qkv_plan(args.threads, args.batch * args.length, 3 * args.width, args.width,
                 sizeof(typename M::A)),
        proj_plan(args.threads, args.batch * args.length, args.width, args.width,
                  sizeof(typename M::A)),
        attention_plan(args.threads, args.batch, args.length, args.heads, args.width / args.heads),
        arena{static_cast<char*>(args.scratch)} {
    const int64_t rows = args.batch * args.length;
    operand = arena.take<typename M::A>(operand_size(rows, args.width));
    qkv_BS3HE = arena.take<typename M::A>(rows * 3 * args.width);
    row = arena.take<float>(args.threads * padded_columns(args.width));
    partial =
        arena.take<float>(args.threads * larger(qkv_plan.partial_size(), proj_plan.partial_size()));
    attention = arena.take<char>(args.threads * AttentionScratch<M>::bytes(attention_plan));
  }
};

template <class M>
void run(const Args& args) {
  using A = typename M::A;
  const Scratch<M> scratch(args);
  const int64_t rows = args.batch * args.length, width = args.width, depth = depth_of(width);
  const Numbers x_MD{const_cast<void*>(args.x_BSD), args.x_dtype};
  const Numbers out_MD{args.out_BSD, args.x_dtype};
  normalise(args.threads, rows, width, x_MD, args.norm_weight, args.norm_bias, args.eps,
            scratch.operand, scratch.row);
  linear<M>(args.threads, scratch.qkv_plan, scratch.operand, args.qkv, scratch.partial,
            [&](int64_t row, int64_t column, const float* c) {
              A* out = scratch.qkv_BS3HE + row * 3 * width + column;
              for (int64_t i = 0; i < kBlock && column + i < 3 * width; i += kLanes) {
                const int64_t count = 3 * width - column - i;
                store_part(out + i, load(c + i) + load_part(args.qkv_bias + column + i, count),
                           count);
              }
            });

  const AttentionPlan& plan = scratch.attention_plan;
  const int64_t bytes = AttentionScratch<M>::bytes(plan);
  parallel_for(args.threads, plan.tasks(), [&](int64_t task, int32_t worker) {
    const TileScope tiles;
    Arena arena{scratch.attention + worker * bytes};
    const AttentionScratch<M> own(plan, arena);
    attend(plan, scratch.qkv_BS3HE, args.key_mask_BS, task, own,
           [&](int64_t row, int64_t column, int64_t end, const float* values, float factor) {
             // A head may start anywhere in a k tile; those of other heads write beside it. What
             // lies behind the last number of a row is still zero from the normalised rows.
             A* line = at(scratch.operand, depth, row, 0);
             for (int64_t i = 0; i < end;) {
               const auto place = static_cast<uint64_t>(column + i);
               const int64_t inside = static_cast<int64_t>(place % kDepth);
               const int64_t count = smaller(kLanes, smaller(kDepth - inside, end - i));
               store_part(line + static_cast<int64_t>(place / kDepth) * kTileSize + inside,
                          load_part(values + i, count) * set(factor), count);
               i += count;
             }
           });
  });

  linear<M>(args.threads, scratch.proj_plan, scratch.operand, args.proj, scratch.partial,
            [&](int64_t row, int64_t column, const float* c) {
              add_residual(x_MD, out_MD, args.proj_bias, row, column, width, c);
            });
}

bool valid(const Args& args) {
  return args.threads > 0 && args.batch > 0 && args.length > 0 && args.heads > 0 &&
         args.width > 0 && args.width % args.heads == 0 &&
         (args.dtype == FASTFAR_FLOAT32 || args.dtype == FASTFAR_BFLOAT16) &&
         (args.x_dtype == FASTFAR_FLOAT32 || args.x_dtype == FASTFAR_BFLOAT16);
}

}  // namespace

int64_t layernorm_attention_residual_scratch(const Args& args) {
  if (!valid(args)) return FASTFAR_ERROR_ARGUMENT;
  Args sizes = args;
  sizes.scratch = nullptr;
  return args.dtype == FASTFAR_BFLOAT16 ? Scratch<Bfloat16>(sizes).arena.used
                                        : Scratch<Float32>(sizes).arena.used;
}

int32_t layernorm_attention_residual(const Args& args) {
  if (!valid(args) || args.x_BSD == nullptr || args.norm_weight == nullptr ||
      args.norm_bias == nullptr || args.qkv == nullptr || args.qkv_bias == nullptr ||
      args.proj == nullptr || args.proj_bias == nullptr || args.out_BSD == nullptr ||
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
