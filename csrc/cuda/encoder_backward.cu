#include "encoder_backward.cuh"

namespace fastenc::cuda {

// A single layer that is too wide to hold.
static bool is_wide(const EncoderBackward& args) { return args.depth == 1 && args.layers[0].N > kWidest; }

static DenseBackward as_dense(const EncoderBackward& args) {
  const StackLayer& layer = args.layers[0];
  const void* saved = saves_preact(layer.activation) ? layer.preact : layer.out;
  return {args.arithmetic,
          args.M,
          layer.N,
          args.K,
          args.grad_out,
          args.x,
          layer.weight,
          {saved, layer.N, 1},
          layer.activation,
          args.grad_x,
          args.grads[0].weight,
          args.grads[0].bias,
          args.workspace};
}

int64_t workspace_bytes(const EncoderBackward& args) {
  return is_wide(args) ? workspace_bytes(as_dense(args)) : EncoderBackwardPlan(args).bytes;
}

Status encoder_backward(const EncoderBackward& args, Stream stream) {
  if (is_wide(args)) return dense_backward(as_dense(args), stream);
  const EncoderBackwardPlan plan(args);
  Status status = 0;
  if (plan.geometry.blocks > 0)
    status = with_arithmetic(args.arithmetic, [&](auto arithmetic) {
      return launch<encoder_chain_kernel<decltype(arithmetic)::value>>(plan.geometry, stream, plan.chain);
    });
  for (int64_t i = 0; i < plan.count && args.M > 0 && status == 0; ++i)
    status = weight_partials(plan.partials[i], stream);
  return plan.reduce.sums > 0 && status == 0 ? reduce(plan.reduce, stream) : status;
}

}  // namespace fastenc::cuda
