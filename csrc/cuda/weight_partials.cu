#include "weight_partials.cuh"

namespace fastenc::cuda {

int64_t weight_parts(int64_t M, int64_t N, int64_t K) {
  return M == 0 || N == 0 || K == 0 ? 1 : divide_up(M, weight_part_rows(M, N, K));
}

Status weight_partials(const WeightPartials& args, Stream stream) {
  if (args.N == 0 || args.K == 0) return 0;
  return with_arithmetic(args.arithmetic, [&](auto arithmetic) {
    constexpr Arithmetic kArithmetic = decltype(arithmetic)::value;
    return launch<weight_partials_kernel<kArithmetic>>(
        weight_partials_geometry<kArithmetic>(weight_parts(args.M, args.N, args.K), args.N, args.K), stream, args,
        weight_part_rows(args.M, args.N, args.K));
  });
}

}  // namespace fastenc::cuda
