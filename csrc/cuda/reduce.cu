#include "reduce.cuh"

namespace fastenc::cuda {

Status reduce(const Reduce& args, Stream stream) {
  const Geometry geometry = reduce_geometry(args);
  if (geometry.blocks == 0) return 0;
  return with_arithmetic(args.arithmetic, [&](auto arithmetic) {
    return launch<reduce_kernel<Number<decltype(arithmetic)::value>>>(geometry, stream, args);
  });
}

}  // namespace fastenc::cuda
