#include "dense_backward.cuh"

namespace fastenc::cuda {

int64_t workspace_bytes(const DenseBackward& args) { return BackwardPlan(args).bytes; }

Status dense_backward(const DenseBackward& args, Stream stream) {
  const BackwardPlan plan(args);
  if (plan.needs_pass)
    if (const Status status = preact_gradient_pass(plan.gradient, stream)) return status;
  if (args.grad_x)
    if (const Status status = dense_forward(plan.grad_x, stream)) return status;
  if (args.grad_weight)
    if (const Status status = weight_partials(plan.weight, stream)) return status;
  return plan.sums.sums > 0 ? reduce(plan.sums, stream) : 0;
}

}  // namespace fastenc::cuda
