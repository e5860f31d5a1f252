#include "dense_forward.cuh"

namespace fastenc::cuda {
namespace {

template <Arithmetic kArithmetic, class Tile, Sum kSumWeight>
Status launch_tiles(const DenseForward& args, Stream stream) {
  return launch<dense_forward_kernel<kArithmetic, Tile, kSumWeight>>(
      dense_forward_geometry<kArithmetic, Tile, kSumWeight>(args.M, args.N), stream, args);
}

}  // namespace

Status dense_forward(const DenseForward& args, Stream stream) {
  if (args.M == 0 || args.N == 0) return 0;
  const bool large = wants_large_tiles(args.M, args.N);
  const bool transposed = args.weight.row_stride == 1 && args.weight.col_stride != 1;
  return with_arithmetic(args.arithmetic, [&](auto arithmetic) {
    constexpr Arithmetic kArithmetic = decltype(arithmetic)::value;
    if (large && transposed) return launch_tiles<kArithmetic, LargeTile, Sum::kOuter>(args, stream);
    if (large) return launch_tiles<kArithmetic, LargeTile, Sum::kInner>(args, stream);
    if (transposed) return launch_tiles<kArithmetic, SmallTile, Sum::kOuter>(args, stream);
    return launch_tiles<kArithmetic, SmallTile, Sum::kInner>(args, stream);
  });
}

}  // namespace fastenc::cuda
