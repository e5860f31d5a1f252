// The forward pass of a stack of dense layers. Included by stack_impl.h only.
//
// The rows are cut into blocks and a layer's columns into panels of 64; one (block, panel) tile is one product and its
// epilogue while the product is in the L1 cache. Usually a worker takes a block through all layers, so that hidden
// activations never leave its L2; when there are fewer blocks than threads, all tiles of one layer run before the next.
// Where the cuts fall depends on the shapes alone, never on the threads.

namespace fastenc {
namespace FASTENC_ISA {

// Runs task(i) for i in [0, count), each once, in any order. Every worker calls make_task for a task (and buffers) of
// its own and draws indices until none is left, so that a slow core does less.
template <class MakeTask>
inline void run_tasks(const Runtime& runtime, bool parallel, int64_t count, const MakeTask& make_task) {
  if (!parallel || count <= 1) {
    auto task = make_task();
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  struct Context {
    const MakeTask& make_task;
    int64_t count;
    std::atomic<int64_t> next;
  } context{make_task, count, {0}};
  runtime.parallel_for(
      std::min(runtime.threads, count),
      [](void* pointer, int64_t, int64_t) {
        Context& shared = *static_cast<Context*>(pointer);
        auto task = shared.make_task();
        for (int64_t i = shared.next++; i < shared.count; i = shared.next++) task(i);
      },
      &context);
}

// Gives back the tile registers that a bf16 brgemm may have taken on this thread.
template <class Op>
struct BrgemmGuard {
  const Runtime& runtime;
  ~BrgemmGuard() {
    if constexpr (std::is_same_v<Op, BFloat16>)
      if (runtime.brgemm_release != nullptr) runtime.brgemm_release(/* is_vnni */ true);
  }
};

// How M rows are cut and shared out.
struct Schedule {
  int64_t M;
  int64_t block_rows;
  int64_t blocks;
  bool parallel;
  bool layerwise;  // one layer at a time over all tiles, rather than one block at a time through all layers

  FASTENC_INLINE Schedule(int64_t rows, int64_t least_rows, int64_t multiply_adds_per_row, int64_t threads) : M(rows) {
    block_rows = std::max(least_rows, rows_per_block(M));
    blocks = ceil_div(M, block_rows);
    parallel = threads > 1 && M * multiply_adds_per_row >= kParallelWork;
    layerwise = parallel && blocks < threads;
  }
  FASTENC_INLINE int64_t rows(int64_t block) const { return std::min(block_rows, M - block * block_rows); }
};

FASTENC_INLINE int64_t multiply_adds_per_row(const Layer* layers, int64_t depth) {
  int64_t count = 0;
  for (int64_t l = 0; l < depth; ++l) count += layers[l].in * layers[l].out;
  return count;
}

FASTENC_INLINE int64_t panel_count(int64_t columns) { return ceil_div(columns, kPanel); }
FASTENC_INLINE int64_t panel_columns(int64_t columns, int64_t panel) {
  return std::min(kPanel, columns - panel * kPanel);
}
// Where a panel of packed rows begins, times their depth.
FASTENC_INLINE int64_t panel_offset(int64_t columns, int64_t panel) {
  const int64_t whole = std::min(panel, columns / kPanel);
  return whole * padded(kPanel) + (panel > whole ? padded(columns - whole * kPanel) : 0);
}
// What all panels take, times their depth.
FASTENC_INLINE int64_t panels_size(int64_t columns) { return panel_offset(columns, panel_count(columns)); }

// out[r, :] = act(C[r, :] + bias) for a tile; also the value before act if preact, and the value as next layer's
// operand if next. ld of C is kPanel; the others' are given.
template <class Activation, class T, class Op>
inline void forward_epilogue(int64_t rows, int64_t cols, const float* bias, const float* C, T* preact, T* out,
                             int64_t ld_out, Op* next, int64_t ld_next) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < cols; j += kLanes) {
      const int64_t count = std::min(kLanes, cols - j);
      const Vec z = load(C + r * kPanel + j) + load(bias + j);
      if (preact != nullptr) store_part(z, preact + r * ld_out + j, count);
      const Vec y = Activation::forward(z);
      if (out != nullptr) {
        store_part(y, out + r * ld_out + j, count);
        __builtin_prefetch(out + r * ld_out + j + kPanel, /* for writing */ 1);
      }
      if (next != nullptr) store_part(y, next + r * ld_next + j, count);
    }
}

template <class T, class Op>
class Forward {
 public:
  Forward(const ForwardArgs& args, const Runtime& runtime)
      : args_(args),
        runtime_(runtime),
        schedule_(args.M, kLeastRows, multiply_adds_per_row(args.layers, args.depth), runtime.threads),
        plans_(args.depth) {
    int64_t packed_size = 0;
    for (int64_t l = 0; l < args.depth; ++l) {
      const Layer& layer = args.layers[l];
      Plan& plan = plans_.get()[l];
      // Packing costs about in * out / 5 multiply-adds' time, summing up a dot product's lanes about 64 each.
      plan.dot = args.M <= 2 || args.M * 48 <= layer.in;
      plan.depth = packed_depth<Op>(layer.in);
      plan.offset = packed_size;
      if (!plan.dot) packed_size += plan.depth * panels_size(layer.out);
      // An operand may be read where it lies, if it has the right type and (for bf16) no odd pair at the end.
      plan.in_place = std::is_same_v<T, Op> && (plan.dot || plan.depth == layer.in);
      widest_ = std::max(widest_, round_up(layer.out, kLanes));
      if (l > 0 && (!plan.in_place || args.outs[l - 1] == nullptr)) hidden_ = true;
    }
    const Plan& first = plans_.get()[0];
    const bool plain_x = args.x.col_stride == 1 && args.x.row_stride >= args.layers[0].in;
    copy_x_ = !(plain_x && (first.in_place || first.dot));
    run(packed_size);
  }

 private:
  struct Plan {
    bool dot;
    bool in_place;
    int64_t depth;   // the layer's in, padded as Op needs
    int64_t offset;  // of its panels in packed_
  };

  // A worker's (or, layerwise, everybody's) copies of activations, in Op: of x, and of two layers in turn.
  struct Buffers {
    Op* x;
    Op* hidden[2];
    int64_t first_block;
  };

  void run(int64_t packed_size) {
    Scratch<Op> packed(packed_size);
    packed_ = packed.get();
    if (packed_size > 0) pack_weights(packed_size);
    const int64_t buffer_rows = schedule_.layerwise ? schedule_.blocks * schedule_.block_rows : schedule_.block_rows;
    const int64_t x_size = copy_x_ ? buffer_rows * plans_.get()[0].depth : 0;
    const int64_t hidden_size = hidden_ ? buffer_rows * widest_ : 0;
    if (schedule_.layerwise) {
      Scratch<Op> x(x_size), hidden(2 * hidden_size);
      const Buffers buffers = {x.get(), {hidden.get(), hidden.get() + hidden_size}, 0};
      for (int64_t block = 0; block < schedule_.blocks; ++block) copy_x(buffers, block);
      for (int64_t l = 0; l < args_.depth; ++l) {
        const int64_t panels = panel_count(args_.layers[l].out);
        run_tasks(runtime_, true, schedule_.blocks * panels, [&] {
          return [&, guard = BrgemmGuard<Op>{runtime_}](int64_t i) { tile(buffers, l, i / panels, i % panels); };
        });
      }
      return;
    }
    struct Worker {
      Forward* self;
      Scratch<Op> x, hidden;
      Buffers buffers;
      BrgemmGuard<Op> guard;
      void operator()(int64_t block) {
        buffers.first_block = block;
        self->copy_x(buffers, block);
        for (int64_t l = 0; l < self->args_.depth; ++l)
          for (int64_t panel = 0; panel < panel_count(self->args_.layers[l].out); ++panel)
            self->tile(buffers, l, block, panel);
      }
      Worker(Forward* forward, int64_t x_count, int64_t hidden_count)
          : self(forward), x(x_count), hidden(2 * hidden_count), guard{forward->runtime_} {
        buffers = {x.get(), {hidden.get(), hidden.get() + hidden_count}, 0};
      }
    };
    run_tasks(runtime_, schedule_.parallel, schedule_.blocks, [&] { return Worker(this, x_size, hidden_size); });
  }

  void pack_weights(int64_t packed_size) {
    int64_t panels = 0;
    for (int64_t l = 0; l < args_.depth; ++l) panels += plans_.get()[l].dot ? 0 : panel_count(args_.layers[l].out);
    // Moving an element costs about as much as 5 multiply-adds.
    const bool parallel = runtime_.threads > 1 && packed_size * 5 >= kParallelWork;
    run_tasks(runtime_, parallel, panels, [&] {
      return [&](int64_t panel) {
        int64_t l = 0;
        while (plans_.get()[l].dot || panel >= panel_count(args_.layers[l].out)) {
          if (!plans_.get()[l].dot) panel -= panel_count(args_.layers[l].out);
          ++l;
        }
        const Layer& layer = args_.layers[l];
        const int64_t cols = panel_columns(layer.out, panel);
        pack_transposed(static_cast<const T*>(layer.weight) + panel * kPanel * layer.in, cols, layer.in,
                        panel_data(l, panel), padded(cols));
      };
    });
  }

  Op* panel_data(int64_t l, int64_t panel) {
    return packed_ + plans_.get()[l].offset + panel_offset(args_.layers[l].out, panel) * plans_.get()[l].depth;
  }

  void copy_x(const Buffers& buffers, int64_t block) {
    if (!copy_x_) return;
    const int64_t K = args_.layers[0].in, depth = plans_.get()[0].depth;
    T gathered[kPanel];
    for (int64_t r = 0; r < schedule_.rows(block); ++r) {
      Op* dst = buffers.x + ((block - buffers.first_block) * schedule_.block_rows + r) * depth;
      for (int64_t k = 0; k < K; k += kPanel) {
        const int64_t count = std::min(kPanel, K - k);
        convert_row(contiguous_row(args_.x, block * schedule_.block_rows + r, k, count, gathered), dst + k, count);
      }
      if (depth > K) from_float(0.0f, dst + K);
    }
  }

  // One tile of one layer: product, bias, activation, stores.
  void tile(const Buffers& buffers, int64_t l, int64_t block, int64_t panel) {
    const Layer& layer = args_.layers[l];
    const Plan& plan = plans_.get()[l];
    const int64_t row = block * schedule_.block_rows, rows = schedule_.rows(block);
    const int64_t buffer_row = row - buffers.first_block * schedule_.block_rows;
    const int64_t col = panel * kPanel, cols = panel_columns(layer.out, panel);
    const T* weight = static_cast<const T*>(layer.weight) + col * layer.in;
    float C[kPanel * kPanel] __attribute__((aligned(64)));

    const auto product = [&](const auto* A, int64_t lda) {
      using TA = std::remove_cv_t<std::remove_reference_t<decltype(*A)>>;
      if (layer.in == 0) {
        std::memset(C, 0, sizeof C);
      } else if (plan.dot) {
        gemm_nt(rows, cols, layer.in, A, lda, weight, layer.in, C, kPanel);
      } else if constexpr (std::is_same_v<TA, Op>) {
        gemm(runtime_, rows, round_up(cols, kLanes), plan.depth, lda, padded(cols), kPanel, /* add_C */ false, A,
             panel_data(l, panel), C);
      }
    };
    if (l > 0) {
      const Op* A;
      int64_t lda;
      hidden_operand(buffers, l, row, buffer_row, &A, &lda);
      product(A, lda);
    } else if (copy_x_) {
      product(static_cast<const Op*>(buffers.x) + buffer_row * plan.depth, plan.depth);
    } else {
      product(static_cast<const T*>(args_.x.data) + row * args_.x.row_stride, args_.x.row_stride);
    }

    float bias[kPanel] = {};
    if (layer.bias != nullptr) convert_row(static_cast<const T*>(layer.bias) + col, bias, cols);
    T* out = static_cast<T*>(args_.outs[l]);
    T* preact = static_cast<T*>(args_.preacts[l]);
    Op* next = nullptr;
    int64_t ld_next = 0;
    if (l + 1 < args_.depth && !reads_out(l + 1)) {
      ld_next = round_up(layer.out, kLanes);
      next = buffers.hidden[l % 2] + buffer_row * ld_next;
      // The pair of a last odd column.
      if (plans_.get()[l + 1].depth > layer.out && panel + 1 == panel_count(layer.out))
        for (int64_t r = 0; r < rows; ++r) from_float(0.0f, next + r * ld_next + layer.out);
      next += col;
    }
    const int64_t offset = row * layer.out + col;
    with_activation(layer.activation, [&](auto activation) {
      forward_epilogue<decltype(activation), T, Op>(rows, cols, bias, C, preact ? preact + offset : nullptr,
                                                    out ? out + offset : nullptr, layer.out, next, ld_next);
    });
  }

  // Whether layer l reads the output of the layer before it where that was stored.
  bool reads_out(int64_t l) const { return plans_.get()[l].in_place && args_.outs[l - 1] != nullptr; }

  void hidden_operand(const Buffers& buffers, int64_t l, int64_t row, int64_t buffer_row, const Op** A, int64_t* lda) {
    const int64_t width = args_.layers[l].in;
    if (reads_out(l)) {
      *A = static_cast<const Op*>(args_.outs[l - 1]) + row * width;
      *lda = width;
    } else {
      *lda = round_up(width, kLanes);
      *A = buffers.hidden[(l - 1) % 2] + buffer_row * *lda;
    }
  }

  const ForwardArgs& args_;
  const Runtime& runtime_;
  const Schedule schedule_;
  Scratch<Plan> plans_;
  Op* packed_ = nullptr;
  int64_t widest_ = 0;
  bool hidden_ = false;
  bool copy_x_ = false;
};

template <class T, class Op>
inline void forward_as(const ForwardArgs& args, const Runtime& runtime) {
  Forward<T, Op> pass(args, runtime);
}

}  // namespace FASTENC_ISA
}  // namespace fastenc
