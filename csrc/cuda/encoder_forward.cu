#include "encoder_forward.cuh"

namespace fastenc::cuda {
namespace {

template <Arithmetic kArithmetic, int kWarps>
Status launch_warps(const EncoderForward& args, bool wide, Stream stream) {
  return launch<encoder_forward_kernel<kArithmetic, kWarps>>(
      encoder_forward_geometry<kArithmetic, kWarps>(args.M, wide), stream, args, encoder_steps(args));
}

}  // namespace

Status encoder_forward(const EncoderForward& args, Stream stream) {
  if (args.M == 0) return 0;
  const bool wide = ends_wide(args);
  return with_arithmetic(args.arithmetic, [&](auto arithmetic) {
    constexpr Arithmetic kArithmetic = decltype(arithmetic)::value;
    return wants_eight_warps(args.M, wide) ? launch_warps<kArithmetic, 8>(args, wide, stream)
                                           : launch_warps<kArithmetic, 4>(args, wide, stream);
  });
}

}  // namespace fastenc::cuda
