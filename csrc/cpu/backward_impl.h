// The backward pass of a stack of dense layers. Included by stack_impl.h only.
//
// With dZ_l the gradient at layer l's pre-activation:
//   dZ_l = (dZ_{l+1} @ W_{l+1}) * act_l'    dW_l = dZ_l^T @ out_{l-1}    db_l = sum over rows of dZ_l
// The rows are taken a chunk at a time. First each block of rows runs down the chain, masking every dZ tile once and
// keeping its transpose; then tiles of all weight gradients sum over the chunk's blocks, in order. Nothing is summed in
// an order that depends on the number of threads. Layers below the lowest wanted gradient cost nothing.

namespace fastenc {
namespace FASTENC_ISA {

constexpr int64_t kChunkBytes = 2 << 20;  // of dZ, about: it is written and read again while in the L2 or L3 cache
constexpr int64_t kLeastChunkBlocks = 4, kMostChunkBlocks = 32;
constexpr int64_t kTallPanel = 256;      // outputs in one tile of a weight's gradient, which share a packed operand
constexpr int64_t kFewRows = 4;          // up to here weights are read, and their gradients written, along their rows
constexpr int64_t kLongPanel = 512;      // columns in one tile of an input's gradient then
constexpr int64_t kPackWeightRows = 96;  // from here on packing a weight pays for itself

template <class T, class Op>
class Backward {
 public:
  Backward(const BackwardArgs& args, const Runtime& runtime)
      : args_(args),
        runtime_(runtime),
        schedule_(args.M, packed_depth<Op>(1) * kLeastRows, 2 * multiply_adds_per_row(args.layers, args.depth),
                  runtime.threads),
        plans_(args.depth) {
    bottom_ = 0;
    if (args.grad_x == nullptr)
      while (bottom_ < args.depth && !wants_any(bottom_)) ++bottom_;
    if (bottom_ == args.depth) return;
    single_block_ = schedule_.blocks == 1;
    few_rows_ = args.M <= kFewRows;
    const int64_t chunk_blocks = blocks_per_chunk();
    int64_t packed_size = 0, transposed_size = 0, bias_size = 0, sum_size = 0;
    for (int64_t l = bottom_; l < args.depth; ++l) {
      const Layer& layer = args.layers[l];
      Plan& plan = plans_.get()[l];
      const int64_t padded_out = round_up(layer.out, kLanes);
      plan.packed = needs_grad_in(l) && !few_rows_ && (!std::is_same_v<T, float> || args.M >= kPackWeightRows);
      plan.packed_offset = packed_size;
      if (plan.packed) packed_size += packed_depth<Op>(layer.out) * panels_size(layer.in);
      plan.transposed_offset = transposed_size;
      if (args.grad_weights[l] != nullptr) transposed_size += chunk_blocks * padded_out * schedule_.block_rows;
      plan.bias_offset = bias_size;
      if (args.grad_biases[l] != nullptr) bias_size += (chunk_blocks + 1) * padded_out;
      plan.sum_offset = sum_size;
      if (args.grad_weights[l] != nullptr && !few_rows_ && !std::is_same_v<T, float>) sum_size += layer.out * layer.in;
      widest_ = std::max(widest_, padded_out);
    }
    Scratch<Op> packed(packed_size), transposed(transposed_size);
    Scratch<float> bias_sums(bias_size), weight_sums(sum_size);
    packed_ = packed.get();
    transposed_ = transposed.get();
    bias_sums_ = bias_sums.get();
    weight_sums_ = weight_sums.get();

    if (packed_size > 0) pack_weights(packed_size);
    for (int64_t first = 0; first < schedule_.blocks; first += chunk_blocks) {
      const int64_t last = std::min(first + chunk_blocks, schedule_.blocks);
      run_chain(first, last);
      run_sums(first, last);
    }
  }

 private:
  struct Plan {
    bool packed;
    int64_t packed_offset;      // weight as panels of columns, in packed_
    int64_t transposed_offset;  // dZ^T [blocks of the chunk, out, block_rows], in transposed_
    int64_t bias_offset;        // [1 + blocks of the chunk, out]: the sum so far, then a sum per block, in bias_sums_
    int64_t sum_offset;         // [out, in] in fp32 where the gradient itself is not fp32, in weight_sums_
  };

  int64_t blocks_per_chunk() const {
    int64_t block_bytes = 1;
    for (int64_t l = bottom_; l < args_.depth; ++l)
      if (args_.grad_weights[l] != nullptr)
        block_bytes += schedule_.block_rows * args_.layers[l].out * static_cast<int64_t>(sizeof(Op));
    const int64_t fitting = std::min(kMostChunkBlocks, std::max(kLeastChunkBlocks, kChunkBytes / block_bytes));
    return std::min(fitting, schedule_.blocks);
  }

  bool wants_any(int64_t l) const { return args_.grad_weights[l] != nullptr || args_.grad_biases[l] != nullptr; }
  bool needs_grad_in(int64_t l) const { return l > bottom_ || (l == 0 && args_.grad_x != nullptr); }

  void pack_weights(int64_t packed_size) {
    int64_t panels = 0;
    for (int64_t l = bottom_; l < args_.depth; ++l)
      panels += plans_.get()[l].packed ? panel_count(args_.layers[l].in) : 0;
    const bool parallel = runtime_.threads > 1 && packed_size * 5 >= kParallelWork;
    run_tasks(runtime_, parallel, panels, [&] {
      return [&](int64_t panel) {
        int64_t l = bottom_;
        while (!plans_.get()[l].packed || panel >= panel_count(args_.layers[l].in)) {
          if (plans_.get()[l].packed) panel -= panel_count(args_.layers[l].in);
          ++l;
        }
        const Layer& layer = args_.layers[l];
        const int64_t cols = panel_columns(layer.in, panel);
        pack_block<T, Op>({layer.weight, layer.in, 1}, 0, layer.out, panel * kPanel, cols, panel_data(l, panel),
                          padded(cols));
      };
    });
  }

  Op* panel_data(int64_t l, int64_t panel) {
    const Layer& layer = args_.layers[l];
    return packed_ + plans_.get()[l].packed_offset + panel_offset(layer.in, panel) * packed_depth<Op>(layer.out);
  }

  // dZ of two layers in turn, [rows, round_up(out, kLanes)], for a block (or, layerwise, for all).
  struct Buffers {
    Op* dz[2];
    int64_t first_block;
  };

  void run_chain(int64_t first, int64_t last) {
    const int64_t top = args_.depth - 1;
    const int64_t buffer_rows = schedule_.layerwise ? (last - first) * schedule_.block_rows : schedule_.block_rows;
    const int64_t size = buffer_rows * widest_;
    if (schedule_.layerwise) {
      Scratch<Op> dz(2 * size);
      const Buffers buffers = {{dz.get(), dz.get() + size}, first};
      for (int64_t block = first; block < last; ++block) load_grad_out(buffers, block, first);
      for (int64_t l = top; l >= bottom_ && needs_grad_in(l); --l) {
        const int64_t panels = in_tiles(l);
        run_tasks(runtime_, true, (last - first) * panels, [&] {
          return [&, guard = BrgemmGuard<Op>{runtime_}](int64_t i) {
            grad_in_tile(buffers, l, first + i / panels, i % panels, first);
          };
        });
      }
      return;
    }
    struct Worker {
      Backward* self;
      int64_t first;
      Scratch<Op> dz;
      Buffers buffers;
      BrgemmGuard<Op> guard;
      void operator()(int64_t i) {
        const int64_t block = first + i;
        buffers.first_block = block;
        self->load_grad_out(buffers, block, first);
        for (int64_t l = self->args_.depth - 1; l >= self->bottom_ && self->needs_grad_in(l); --l)
          for (int64_t panel = 0; panel < self->in_tiles(l); ++panel)
            self->grad_in_tile(buffers, l, block, panel, first);
      }
      Worker(Backward* backward, int64_t first_block, int64_t count)
          : self(backward), first(first_block), dz(2 * count), guard{backward->runtime_} {
        buffers = {{dz.get(), dz.get() + count}, 0};
      }
    };
    run_tasks(runtime_, schedule_.parallel, last - first, [&] { return Worker(this, first, size); });
  }

  void load_grad_out(const Buffers& buffers, int64_t block, int64_t first) {
    const int64_t top = args_.depth - 1, out = args_.layers[top].out, row = block * schedule_.block_rows;
    const Matrix& grad_out = args_.grad_out;
    for (int64_t col = 0; col < out; col += kPanel) {
      const int64_t cols = std::min(kPanel, out - col);
      if (grad_out.col_stride == 1) {
        const T* grad = static_cast<const T*>(grad_out.data) + row * grad_out.row_stride + col;
        finish_dz(buffers, top, block, col, cols, first, grad, grad_out.row_stride);
        continue;
      }
      T gathered[kPanel * kPanel];
      for (int64_t r = 0; r < schedule_.rows(block); ++r)
        contiguous_row(grad_out, row + r, col, cols, gathered + r * kPanel);
      finish_dz(buffers, top, block, col, cols, first, gathered, kPanel);
    }
  }

  // dZ_l @ W_l for one tile: of grad_x, or, times the activation's derivative, of dZ_{l-1}.
  void grad_in_tile(const Buffers& buffers, int64_t l, int64_t block, int64_t panel, int64_t first) {
    const Layer& layer = args_.layers[l];
    const int64_t row = block * schedule_.block_rows, rows = schedule_.rows(block);
    const int64_t ld_dz = round_up(layer.out, kLanes);
    const Op* dz = buffers.dz[l % 2] + (block - buffers.first_block) * schedule_.block_rows * ld_dz;
    if (few_rows_) return grad_in_few_rows(buffers, l, panel, dz, ld_dz);
    const int64_t col = panel * kPanel, cols = panel_columns(layer.in, panel);
    float C[kPanel * kPanel] __attribute__((aligned(64)));
    if (layer.out == 0) {
      std::memset(C, 0, sizeof C);
    } else if (plans_.get()[l].packed) {
      gemm(runtime_, rows, round_up(cols, kLanes), packed_depth<Op>(layer.out), ld_dz, padded(cols), kPanel,
           /* add_C */ false, dz, panel_data(l, panel), C);
    } else if constexpr (std::is_same_v<T, float>) {
      gemm(runtime_, rows, cols, layer.out, ld_dz, layer.in, kPanel, /* add_C */ false, dz,
           static_cast<const float*>(layer.weight) + col, C);
    }
    if (l > bottom_) return finish_dz(buffers, l - 1, block, col, cols, first, C, kPanel);
    T* grad_x = static_cast<T*>(args_.grad_x) + row * layer.in + col;
    for (int64_t r = 0; r < rows; ++r) convert_row(C + r * kPanel, grad_x + r * layer.in, cols);
  }

  // The same for at most kFewRows rows: weights in the order in which they lie.
  void grad_in_few_rows(const Buffers& buffers, int64_t l, int64_t panel, const Op* dz, int64_t ld_dz) {
    const Layer& layer = args_.layers[l];
    const int64_t col = panel * kLongPanel, cols = std::min(kLongPanel, layer.in - col);
    float C[kFewRows * kLongPanel] __attribute__((aligned(64))) = {};
    add_few_rows(args_.M, cols, layer.out, dz, ld_dz, static_cast<const T*>(layer.weight) + col, layer.in, C,
                 kLongPanel);
    for (int64_t sub = 0; sub < cols; sub += kPanel) {
      const int64_t sub_cols = std::min(kPanel, cols - sub);
      if (l > bottom_) {
        finish_dz(buffers, l - 1, 0, col + sub, sub_cols, 0, C + sub, kLongPanel);
        continue;
      }
      T* grad_x = static_cast<T*>(args_.grad_x) + col + sub;
      for (int64_t r = 0; r < args_.M; ++r) convert_row(C + r * kLongPanel + sub, grad_x + r * layer.in, sub_cols);
    }
  }

  // grad, the gradient at layer l's output, times the derivative: dZ. Stored for the layer below, transposed for the
  // weight's gradient, and summed for the bias's.
  template <class Grad>
  void finish_dz(const Buffers& buffers, int64_t l, int64_t block, int64_t col, int64_t cols, int64_t first,
                 const Grad* grad, int64_t ld_grad) {
    const Layer& layer = args_.layers[l];
    const Plan& plan = plans_.get()[l];
    const int64_t row = block * schedule_.block_rows, rows = schedule_.rows(block);
    const int64_t padded_out = round_up(layer.out, kLanes);
    // fp32: the tile of dZ. bf16: its rows two by two, as pairs of bf16 in 32-bit words.
    float tile[kPanel * kPanel] __attribute__((aligned(64)));
    Op* dz = nullptr;
    int64_t ld_dz = padded_out;
    if (needs_grad_in(l))
      dz = buffers.dz[l % 2] + (block - buffers.first_block) * schedule_.block_rows * padded_out + col;
    if constexpr (std::is_same_v<Op, float>) {
      if (dz == nullptr) {
        dz = tile;
        ld_dz = kPanel;
      }
    }
    const void* saved = saves_preact(layer.activation) ? args_.preacts[l] : args_.outs[l];
    Vec sums[kPanel / kLanes] = {};
    with_activation(layer.activation, [&](auto activation) {
      using Activation = decltype(activation);
      const auto dz_at = [&](int64_t r, int64_t j, int64_t count) {
        const Grad* g = grad + r * ld_grad + j;
        if constexpr (std::is_same_v<Grad, T>) __builtin_prefetch(g + kPanel);
        const Vec value = count == kLanes ? load(g) : load_part(g, count);
        if constexpr (std::is_same_v<Activation, Identity>) {
          return value;
        } else {
          const T* s = static_cast<const T*>(saved) + (row + r) * layer.out + col + j;
          __builtin_prefetch(s + kPanel);
          const Vec at = count == kLanes ? load(s) : load_part(s, count);
          const Vec masked = Activation::backward(value, at);
          return count == kLanes ? masked : zero_behind(masked, count);
        }
      };
      for (int64_t r = 0; r < rows; r += std::is_same_v<Op, float> ? 1 : 2)
        for (int64_t j = 0; j < cols; j += kLanes) {
          const int64_t count = std::min(kLanes, cols - j);
          const Vec z = dz_at(r, j, count);
          sums[j / kLanes] += z;
          if constexpr (std::is_same_v<Op, float>) {
            store(z, dz + r * ld_dz + j);
          } else {
            const Vec odd = r + 1 < rows ? dz_at(r + 1, j, count) : Vec{};
            sums[j / kLanes] += odd;
            const IntVec low = round_to_bfloat16(z), high = round_to_bfloat16(odd);
            if (dz != nullptr) {
              store_bits(low, dz + r * ld_dz + j);
              if (r + 1 < rows) store_bits(high, dz + (r + 1) * ld_dz + j);
            }
            store(math::bit_cast<Vec>(low | (high << 16)), tile + r / 2 * kPanel + j);
          }
        }
    });
    if (args_.grad_biases[l] != nullptr) {
      float* bias_sums = bias_sums_ + plan.bias_offset + (block - first + 1) * padded_out + col;
      for (int64_t j = 0; j < cols; j += kLanes) store(sums[j / kLanes], bias_sums + j);
    }
    if (args_.grad_weights[l] != nullptr) {
      Op* dst = transposed_ + plan.transposed_offset + ((block - first) * padded_out + col) * schedule_.block_rows;
      if constexpr (std::is_same_v<Op, float>)
        transpose(dz, ld_dz, rows, cols, dst, schedule_.block_rows);
      else
        transpose(tile, kPanel, ceil_div(rows, 2), cols, reinterpret_cast<float*>(dst), schedule_.block_rows / 2);
    }
  }

  // Adds the blocks [first, last) to the gradients of weights and biases.
  void run_sums(int64_t first, int64_t last) {
    int64_t tiles = 0;
    for (int64_t l = bottom_; l < args_.depth; ++l) tiles += sum_tiles(l);
    run_tasks(runtime_, schedule_.parallel, tiles, [&] {
      return [&, guard = BrgemmGuard<Op>{runtime_}](int64_t i) {
        int64_t l = bottom_;
        while (i >= sum_tiles(l)) i -= sum_tiles(l++);
        const int64_t panels = ceil_div(args_.layers[l].out, kTallPanel);
        if (args_.grad_weights[l] != nullptr) weight_tile(l, i % panels, i / panels, first, last);
        if (args_.grad_biases[l] != nullptr && i < panels) bias_tile(l, i, first, last);
      };
    });
  }

  // Tiles of a layer's inputs.
  int64_t in_tiles(int64_t l) const { return ceil_div(args_.layers[l].in, few_rows_ ? kLongPanel : kPanel); }

  int64_t sum_tiles(int64_t l) const {
    const Layer& layer = args_.layers[l];
    if (!wants_any(l)) return 0;
    const bool weight = args_.grad_weights[l] != nullptr;
    return ceil_div(layer.out, kTallPanel) * (weight && !few_rows_ ? std::max<int64_t>(1, panel_count(layer.in)) : 1);
  }

  void weight_tile(int64_t l, int64_t out_panel, int64_t in_panel, int64_t first, int64_t last) {
    const Layer& layer = args_.layers[l];
    const int64_t row = out_panel * kTallPanel, rows = std::min(kTallPanel, layer.out - row);
    if (few_rows_) return weight_few_rows(l, row, rows);
    const int64_t col = in_panel * kPanel, cols = panel_columns(layer.in, in_panel);
    if (cols <= 0) return;
    const Matrix input = l == 0 ? args_.x : Matrix{args_.outs[l - 1], layer.in, 1};
    // Rows a multiple of 2 KB apart fall on few sets of the L1 cache: then the copy pays for itself.
    const bool collides = input.row_stride % 512 == 0 && rows > kPanel && !single_block_;
    const bool in_place =
        std::is_same_v<T, float> && input.col_stride == 1 && input.row_stride >= layer.in && !collides;
    const int64_t ld = round_up(cols, kLanes);
    float C[kTallPanel * kPanel] __attribute__((aligned(64)));
    Op B[kPanel * kPanel] __attribute__((aligned(64)));
    T* grad = static_cast<T*>(args_.grad_weights[l]) + row * layer.in + col;
    for (int64_t block = first; block < last; ++block) {
      const int64_t block_row = block * schedule_.block_rows, depth = schedule_.rows(block);
      const int64_t padded_out = round_up(layer.out, kLanes);
      const Op* A =
          transposed_ + plans_.get()[l].transposed_offset + ((block - first) * padded_out + row) * schedule_.block_rows;
      const bool add = block > first;
      if constexpr (std::is_same_v<T, float>) {
        if (in_place) {
          float* destination = single_block_ ? reinterpret_cast<float*>(grad) : C;
          gemm(runtime_, rows, cols, depth, schedule_.block_rows, input.row_stride, single_block_ ? layer.in : kPanel,
               add, A, static_cast<const float*>(input.data) + block_row * input.row_stride + col, destination);
          continue;
        }
      }
      pack_block<T, Op>(input, block_row, depth, col, cols, B, ld);
      gemm(runtime_, rows, ld, packed_depth<Op>(depth), schedule_.block_rows, ld, kPanel, add, A, B, C);
    }
    if (in_place && single_block_) return;
    for (int64_t r = 0; r < rows; ++r) {
      float* c = C + r * kPanel;
      if constexpr (std::is_same_v<T, float>) {
        if (first > 0) add_row(grad + r * layer.in, c, cols);
      } else {
        float* sums = weight_sums_ + plans_.get()[l].sum_offset + (row + r) * layer.in + col;
        if (first > 0) add_row(sums, c, cols);
        if (last < schedule_.blocks) convert_row(c, sums, cols);
      }
      if (std::is_same_v<T, float> || last == schedule_.blocks) convert_row(c, grad + r * layer.in, cols);
    }
  }

  // The same for at most kFewRows rows: a sum of so many outer products, written along the gradient's rows.
  void weight_few_rows(int64_t l, int64_t row, int64_t rows) {
    const Layer& layer = args_.layers[l];
    const Matrix input = l == 0 ? args_.x : Matrix{args_.outs[l - 1], layer.in, 1};
    const int64_t ld = round_up(layer.in, kLanes);
    Scratch<float> x(args_.M * ld);
    Scratch<T> gathered(layer.in);
    for (int64_t r = 0; r < args_.M; ++r)
      convert_row(contiguous_row(input, r, 0, layer.in, gathered.get()), x.get() + r * ld, layer.in);
    outer_products(args_.M, rows, layer.in,
                   transposed_ + plans_.get()[l].transposed_offset + row * schedule_.block_rows, schedule_.block_rows,
                   x.get(), ld, static_cast<T*>(args_.grad_weights[l]) + row * layer.in);
  }

  // c += sums.
  static void add_row(const float* sums, float* c, int64_t count) {
    for (int64_t i = 0; i < count; ++i) c[i] += sums[i];
  }

  void bias_tile(int64_t l, int64_t panel, int64_t first, int64_t last) {
    const Layer& layer = args_.layers[l];
    const int64_t padded_out = round_up(layer.out, kLanes);
    const int64_t col = panel * kTallPanel, cols = std::min(kTallPanel, layer.out - col);
    float* sums = bias_sums_ + plans_.get()[l].bias_offset + col;
    for (int64_t j = 0; j < cols; j += kLanes) {
      Vec total = load(sums + padded_out + j);
      for (int64_t block = first + 1; block < last; ++block) total += load(sums + (block - first + 1) * padded_out + j);
      store(first > 0 ? total + load(sums + j) : total, sums + j);
    }
    if (last == schedule_.blocks) convert_row(sums, static_cast<T*>(args_.grad_biases[l]) + col, cols);
  }

  const BackwardArgs& args_;
  const Runtime& runtime_;
  const Schedule schedule_;
  Scratch<Plan> plans_;
  Op* packed_ = nullptr;
  Op* transposed_ = nullptr;
  float* bias_sums_ = nullptr;
  float* weight_sums_ = nullptr;
  int64_t bottom_ = 0;  // the lowest layer that something is wanted of
  int64_t widest_ = 0;
  bool single_block_ = false;
  bool few_rows_ = false;
};

template <class T, class Op>
inline void backward_as(const BackwardArgs& args, const Runtime& runtime) {
  Backward<T, Op> pass(args, runtime);
}

}  // namespace FASTENC_ISA
}  // namespace fastenc
