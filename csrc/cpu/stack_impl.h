// The kernels' one source, compiled once per instruction set by stack_<isa>.cpp, which defines FASTENC_ISA.
// In this order, each using the ones before it.
// clang-format off
#include "common_impl.h"
#include "simd_impl.h"
#include "gemm_impl.h"
#include "forward_impl.h"
#include "columns_impl.h"
#include "backward_impl.h"
#include "loss_impl.h"
#include "dropout_impl.h"
#include "update_impl.h"
#include "train_impl.h"
#include "train_rows_impl.h"
#include "train_strips_impl.h"
// clang-format on

#define FASTENC_CONCAT_(a, b) a##b
#define FASTENC_CONCAT(a, b) FASTENC_CONCAT_(a, b)
#define FASTENC_STRING_(a) #a
#define FASTENC_STRING(a) FASTENC_STRING_(a)

namespace fastenc {
namespace FASTENC_ISA {

// fp32 multiplies as fp32. bf16 multiplies as bf16 where brgemm can, else widened to fp32, as fp16 always is: products
// of bf16 are exact in fp32 either way.
void forward(const ForwardArgs& args, const Runtime& runtime) {
  if (args.dtype == Dtype::kFloat && takes_columns(args, runtime)) return forward_columns(args, runtime);
  if (args.dtype == Dtype::kFloat) return forward_as<float, float>(args, runtime);
  if (args.dtype == Dtype::kHalf) return forward_as<Half, float>(args, runtime);
  if (runtime.brgemm_bfloat16 != nullptr) return forward_as<BFloat16, BFloat16>(args, runtime);
  return forward_as<BFloat16, float>(args, runtime);
}

void backward(const BackwardArgs& args, const Runtime& runtime) {
  if (args.dtype == Dtype::kFloat) return backward_as<float, float>(args, runtime);
  if (args.dtype == Dtype::kHalf) return backward_as<Half, float>(args, runtime);
  if (runtime.brgemm_bfloat16 != nullptr) return backward_as<BFloat16, BFloat16>(args, runtime);
  return backward_as<BFloat16, float>(args, runtime);
}

void* create_training(const TrainArgs& args) {
  AnyTraining* training;
  if (args.dtype == Dtype::kFloat)
    training = new Training<float>(args);
  else
    training = new Training<BFloat16>(args);
  return training;
}

int64_t run_training(void* training, const TrainCall& call, const Runtime& runtime) {
  return static_cast<AnyTraining*>(training)->run(call, runtime);
}

void destroy_training(void* training) { delete static_cast<AnyTraining*>(training); }

}  // namespace FASTENC_ISA

const Kernels& FASTENC_CONCAT(FASTENC_ISA, _kernels)() {
  static const Kernels kernels = {
      FASTENC_STRING(FASTENC_ISA),
      FASTENC_ISA::forward,
      FASTENC_ISA::backward,
      {FASTENC_ISA::create_training, FASTENC_ISA::run_training, FASTENC_ISA::destroy_training},
  };
  return kernels;
}

}  // namespace fastenc
