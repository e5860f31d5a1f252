// Every build of the CPU kernels, forward and backward, on buffers of exactly the right size: AddressSanitizer sees one
// element too far, UBSan the rest. Products are the portable ones, threads one after the other (but scheduled as
// three).
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <vector>

#include "cpu/stack.h"

using namespace fastenc;

namespace {

class Arena {
 public:
  explicit Arena(size_t element_size) : element_size_(element_size) {}
  void* take(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * element_size_;
    buffers_.emplace_back(new unsigned char[bytes]);
    for (size_t i = 0; i < bytes; ++i) buffers_.back()[i] = static_cast<unsigned char>(i * 37 % 61);
    return buffers_.back().get();
  }

 private:
  size_t element_size_;
  std::vector<std::unique_ptr<unsigned char[]>> buffers_;
};

void one_after_the_other(int64_t count, Runtime::Body body, void* context) {
  for (int64_t i = 0; i < count; ++i) body(context, i, i + 1);
}

void run(const Kernels& kernels, int64_t threads, Dtype dtype, int64_t M, const std::vector<int64_t>& widths,
         int64_t first_activation) {
  const Runtime runtime = {one_after_the_other, threads, nullptr, nullptr, nullptr};
  const int64_t depth = static_cast<int64_t>(widths.size()) - 1;
  const int64_t count = static_cast<int64_t>(ActivationKind::kCount);
  Arena arena(dtype == Dtype::kFloat ? 4 : 2);
  std::vector<Layer> layers;
  std::vector<void*> outs, preacts, grad_weights, grad_biases;
  for (int64_t l = 0; l < depth; ++l) {
    const int64_t in = widths[l], out = widths[l + 1];
    const auto activation = static_cast<ActivationKind>((first_activation + l) % count);
    layers.push_back({arena.take(in * out), l % 2 ? nullptr : arena.take(out), in, out, activation});
    outs.push_back(arena.take(M * out));
    preacts.push_back(saves_preact(activation) ? arena.take(M * out) : nullptr);
    grad_weights.push_back(arena.take(in * out));
    grad_biases.push_back(arena.take(out));
  }
  void *x = arena.take(M * widths[0]), *grad_x = arena.take(M * widths[0]), *grad_out = arena.take(M * widths[depth]);
  const std::vector<void*> none(depth, nullptr);
  std::vector<void*> last(depth, nullptr);
  last[depth - 1] = outs[depth - 1];
  for (const bool transposed : {false, true}) {
    const Matrix rows = transposed ? Matrix{x, 1, M} : Matrix{x, widths[0], 1};
    const Matrix grads = transposed ? Matrix{grad_out, 1, M} : Matrix{grad_out, widths[depth], 1};
    kernels.forward({dtype, M, depth, layers.data(), rows, last.data(), none.data()}, runtime);
    kernels.forward({dtype, M, depth, layers.data(), rows, outs.data(), preacts.data()}, runtime);
    kernels.backward({dtype, M, depth, layers.data(), rows, grads, outs.data(), preacts.data(), grad_x,
                      grad_weights.data(), grad_biases.data()},
                     runtime);
    kernels.backward({dtype, M, depth, layers.data(), rows, grads, outs.data(), preacts.data(), nullptr,
                      grad_weights.data(), none.data()},
                     runtime);
  }
}

}  // namespace

int main() {
  std::vector<const Kernels*> builds = {&generic_kernels()};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    builds.push_back(&avx2_kernels());
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    builds.push_back(&avx512_kernels());
#endif
  const std::vector<std::vector<int64_t>> stacks = {{1, 1},      {3, 5},          {17, 65},  {100, 70},
                                                    {7, 129, 3}, {65, 33, 64, 1}, {520, 140}};
  int64_t runs = 0;
  for (const Kernels* kernels : builds)
    for (const int64_t threads : {1, 3})
      for (const Dtype dtype : {Dtype::kFloat, Dtype::kBFloat16, Dtype::kHalf})
        for (const int64_t M : {1, 3, 4, 5, 16, 33, 130, 513})
          for (const auto& widths : stacks)
            for (int64_t activation = runs % 2; activation < 8; activation += 2, ++runs)
              run(*kernels, threads, dtype, M, widths, activation);
  std::printf("%lld runs in %zu builds\n", static_cast<long long>(runs), builds.size());
}
