#include "preact_gradient.cuh"

namespace fastenc::cuda {

PartialSums column_sums(const PreactGradient& args) {
  const int64_t parts = gradient_parts(args.M, args.N, columns_each(item_size(args.arithmetic)));
  return {static_cast<const float*>(args.workspace), parts, args.N, args.grad_bias, args.N};
}

int64_t workspace_bytes(const PreactGradient& args) {
  return args.grad_bias ? column_sums(args).parts * args.N * int64_t{sizeof(float)} : 0;
}

Status preact_gradient_pass(const PreactGradient& args, Stream stream) {
  if (args.N == 0 || (args.M == 0 && !args.grad_bias)) return 0;
  return with_arithmetic(args.arithmetic, [&](auto arithmetic) {
    using T = Number<decltype(arithmetic)::value>;
    return launch<preact_gradient_kernel<T>>(preact_gradient_geometry<T>(args.M, args.N), stream, args,
                                             args.grad_bias ? static_cast<float*>(args.workspace) : nullptr,
                                             gradient_part_rows(args.M, args.N, columns_each(sizeof(T))),
                                             is_wide<T>(args));
  });
}

Status preact_gradient(const PreactGradient& args, Stream stream) {
  if (const Status status = preact_gradient_pass(args, stream)) return status;
  if (!args.grad_bias) return 0;
  return reduce({args.arithmetic, 1, {column_sums(args)}}, stream);
}

}  // namespace fastenc::cuda
