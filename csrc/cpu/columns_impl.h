// The forward pass of few rows where products are our own: out^T = act(W @ x^T + bias). W is read where it lies, along
// its rows; x is what is transposed, which for few rows is less to move than packing the weights. What a layer gives is
// the next one's operand as it is. Included by stack_impl.h only.

namespace fastenc {
namespace FASTENC_ISA {

constexpr int64_t kColumns = 2 * kLanes;  // rows of x in one block: a strip of the product

// Whether forward_columns takes these arguments, and moves less than packing would.
inline bool takes_columns(const ForwardArgs& args, const Runtime& runtime) {
  if (runtime.brgemm_float != nullptr || args.M < kColumns || args.x.col_stride != 1) return false;
  int64_t weights = 0;
  for (int64_t l = 0; l < args.depth; ++l) {
    if (args.preacts[l] != nullptr || (args.outs[l] != nullptr) != (l + 1 == args.depth)) return false;
    if (args.layers[l].in == 0) return false;
    weights += args.layers[l].in * args.layers[l].out;
  }
  return args.M * args.layers[0].in < weights;
}

// Columns [0, cols) of out [N, kColumns]: bias and activation.
template <class Activation>
inline void finish_columns(int64_t N, int64_t cols, const float* bias, float* out) {
  for (int64_t n = 0; n < N; ++n)
    for (int64_t j = 0; j < cols; j += kLanes) {
      float* at = out + n * kColumns + j;
      store(Activation::forward(load(at) + (bias == nullptr ? 0.0f : bias[n])), at);
    }
}

inline void forward_columns(const ForwardArgs& args, const Runtime& runtime) {
  int64_t widest = args.layers[0].in;
  for (int64_t l = 0; l < args.depth; ++l) widest = std::max(widest, round_up(args.layers[l].out, kLanes));
  const bool parallel = runtime.threads > 1 && args.M * multiply_adds_per_row(args.layers, args.depth) >= kParallelWork;
  run_tasks(runtime, parallel, ceil_div(args.M, kColumns), [&] {
    return [&, memory = Scratch<float>(2 * widest * kColumns)](int64_t block) {
      const int64_t row = block * kColumns, rows = std::min(kColumns, args.M - row), cols = round_up(rows, kLanes);
      float *in = memory.get(), *out = in + widest * kColumns;
      transpose(static_cast<const float*>(args.x.data) + row * args.x.row_stride, args.x.row_stride, rows,
                args.layers[0].in, in, kColumns);
      for (int64_t l = 0; l < args.depth; ++l) {
        const Layer& layer = args.layers[l];
        gemm(runtime, layer.out, cols, layer.in, /* lda */ layer.in, /* ldb */ kColumns, /* ldc */ kColumns,
             /* add_C */ false, static_cast<const float*>(layer.weight), in, out);
        with_activation(layer.activation, [&](auto activation) {
          finish_columns<decltype(activation)>(layer.out, cols, static_cast<const float*>(layer.bias), out);
        });
        std::swap(in, out);
      }
      const int64_t N = args.layers[args.depth - 1].out, ld = round_up(N, kLanes);
      float* result = static_cast<float*>(args.outs[args.depth - 1]) + row * N;
      transpose(in, kColumns, N, rows, ld == N ? result : out, ld);
      for (int64_t r = 0; ld > N && r < rows; ++r)
        std::memcpy(result + r * N, out + r * ld, static_cast<size_t>(N) * sizeof(float));
    };
  });
}

}  // namespace FASTENC_ISA
}  // namespace fastenc
