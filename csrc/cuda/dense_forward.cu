#include "dense_forward.cuh"

namespace fastenc::cuda {

Status dense_forward(const DenseForward& args, Stream stream) {
  if (args.M == 0 || args.N == 0) return 0;
  return with_arithmetic(args.arithmetic, [&](auto arithmetic) {
    constexpr Arithmetic kArithmetic = decltype(arithmetic)::value;
    if (wants_large_tiles(args.M, args.N))
      return launch<dense_forward_kernel<kArithmetic, LargeTile>>(
          dense_forward_geometry<kArithmetic, LargeTile>(args.M, args.N), stream, args);
    return launch<dense_forward_kernel<kArithmetic, SmallTile>>(
        dense_forward_geometry<kArithmetic, SmallTile>(args.M, args.N), stream, args);
  });
}

}  // namespace fastenc::cuda
