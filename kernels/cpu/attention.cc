// attention: softmax(q k^T / sqrt E) v over all positions of an image.
#include "attention.h"

#include "ops.h"

namespace fastfar {
namespace FASTFAR_TARGET {
namespace {

AttentionPlan plan_of(const fastfar_attention_args& args) {
  return {args.threads, args.batch, args.length, args.heads, args.width};
}

template <class M, class T>
void run(const fastfar_attention_args& args) {
  const AttentionPlan plan = plan_of(args);
  const int64_t bytes = AttentionScratch<M>::bytes(plan), columns = args.heads * args.width;
  parallel_for(args.threads, plan.tasks(), [&](int64_t task, int32_t worker) {
    const TileScope tiles;
    Arena arena{static_cast<char*>(args.scratch) + worker * bytes};
    const AttentionScratch<M> scratch(plan, arena);
    attend(plan, static_cast<const T*>(args.qkv_BS3HE), args.key_mask_BS, task, scratch,
           [&](int64_t row, int64_t column, int64_t count, const float* values, float factor) {
             T* out = static_cast<T*>(args.out_BSD) + row * columns + column;
             for (int64_t i = 0; i < count; i += kLanes) {
               store_part(out + i, load(values + i) * set(factor), count - i);
             }
           });
  });
}

bool valid(const fastfar_attention_args& args) {
  return args.threads > 0 && args.batch > 0 && args.length > 0 && args.heads > 0 &&
         args.width > 0 && (args.dtype == FASTFAR_FLOAT32 || args.dtype == FASTFAR_BFLOAT16);
}

}  // namespace

int64_t attention_scratch(const fastfar_attention_args& args) {
  if (!valid(args)) return FASTFAR_ERROR_ARGUMENT;
  const AttentionPlan plan = plan_of(args);
  return args.threads * (args.dtype == FASTFAR_BFLOAT16 ? AttentionScratch<Bfloat16>::bytes(plan)
                                                        : AttentionScratch<Float32>::bytes(plan));
}

int32_t attention(const fastfar_attention_args& args) {
  if (!valid(args) || args.qkv_BS3HE == nullptr || args.out_BSD == nullptr ||
      args.scratch == nullptr) {
    return FASTFAR_ERROR_ARGUMENT;
  }
  if (args.dtype == FASTFAR_BFLOAT16) {
    run<Bfloat16, bf16>(args);
  } else {
    run<Float32, float>(args);
  }
  return 0;
}

}  // namespace FASTFAR_TARGET
}  // namespace fastfar
