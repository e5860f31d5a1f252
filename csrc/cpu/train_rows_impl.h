// The training engine's tasks over rows: gather, forward, loss, and the chain of dZ. Included by stack_impl.h only.

namespace fastenc {
namespace FASTENC_ISA {

template <class Op>
void Training<Op>::rows_task(const Worker& worker, const Chunk& chunk, int64_t block) {
  const int64_t row = block * block_rows_, rows = std::min(block_rows_, chunk.rows - row + PLANTED(RowTooMany));
  gather(chunk, row, rows);
  for (int64_t l = 0; l < args_.depth; ++l) forward(worker, chunk, l, row, rows);
  take_loss(worker, chunk, row, rows);
  const int64_t top = args_.depth - 1;
  for (int64_t col = 0; col < args_.layers[top].out; col += kPanel)
    finish_dz(worker, top, row, rows, col, panel_columns(args_.layers[top].out, col / kPanel), worker.grad + col,
              plans_.get()[top].ld_out);
  for (int64_t l = top; l > bottom_; --l) grad_in(worker, l, row, rows);
}

template <class Op>
void Training<Op>::gather(const Chunk& chunk, int64_t row, int64_t rows) {
  const int64_t in = args_.layers[0].in, ld = plans_.get()[0].ld_in;
  const int64_t* order = call_->order + chunk.first + chunk.row + row;
  for (int64_t r = 0; r < rows; ++r) {
    const float* src = call_->x + order[r] * call_->x_stride;
    if (r + 1 < rows) {
      const float* next = call_->x + order[r + 1] * call_->x_stride;
      for (int64_t j = 0; j < in; j += kLanes) __builtin_prefetch(next + j);
    }
    convert_row(src, acts_.get() + (row + r) * ld, in);
  }
  pair_input(0, row, rows);
}

// bf16: layer l's input as an operand of its weight's gradient, rows two by two.
template <class Op>
void Training<Op>::pair_input(int64_t l, int64_t row, int64_t rows) {
  if constexpr (!kFloat) {
    const Plan& plan = plans_.get()[l];
    uint32_t* words = reinterpret_cast<uint32_t*>(pairs_.get() + plan.acts) + row / 2 * plan.ld_in;
    pair_rows(acts_.get() + plan.acts + row * plan.ld_in, plan.ld_in, rows, plan.ld_in, words, plan.ld_in);
  }
}

template <class Op>
void Training<Op>::forward(const Worker& worker, const Chunk& chunk, int64_t l, int64_t row, int64_t rows) {
  const TrainLayer& layer = args_.layers[l];
  const Plan& plan = plans_.get()[l];
  const int64_t depth = packed_depth<Op>(layer.in);
  for (int64_t col = 0; col < layer.out; col += kPanel) {
    const int64_t panel = col / kPanel, cols = panel_columns(layer.out, panel);
    gemm(*runtime_, rows, round_up(cols, kLanes), depth, /* lda */ plan.ld_in, /* ldb */ padded(cols),
         /* ldc */ kPanel, /* add_C */ false, acts_.get() + plan.acts + row * plan.ld_in,
         packed_.get() + plan.packed + panel_offset(layer.out, panel) * depth, worker.tile);
    with_activation(layer.activation, [&](auto activation) {
      forward_tile<decltype(activation)>(worker, chunk, l, row, rows, col, cols);
    });
  }
  if (l + 1 < args_.depth) pair_input(l + 1, row, rows);
}

// Whole vectors are stored: behind a row's end there is room, which bf16 products read and so must be zero.
template <class Op>
template <class Activation>
void Training<Op>::forward_tile(const Worker& worker, const Chunk& chunk, int64_t l, int64_t row, int64_t rows,
                                int64_t col, int64_t cols) {
  const TrainLayer& layer = args_.layers[l];
  const Plan& plan = plans_.get()[l];
  const bool last = l + 1 == args_.depth;
  const float* bias = biases_.get() + plan.biases + col;
  const float drop = static_cast<float>(layer.dropout), keep = static_cast<float>(1.0 / (1.0 - layer.dropout));
  const uint64_t key =
      call_->seed + static_cast<uint64_t>(call_->first_step + chunk.step) * kKeysPerStep + static_cast<uint64_t>(l);
  Op* next = last ? nullptr : acts_.get() + plans_.get()[l + 1].acts + row * plan.ld_out + col;
  const int64_t kept = plan.hidden + col;  // in preacts and scales
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < cols; j += kLanes) {
      const Vec z = load(worker.tile + r * kPanel + j) + load(bias + j);
      Vec y = Activation::forward(z);
      const int64_t at = r * plan.ld_out + j;
      if constexpr (Activation::kSavesPreact) store(z, worker.preacts + kept + at);
      if (drop > 0.0f) {
        const int64_t element = (chunk.row + row + r) * layer.out + col + j;
        const Vec scale = dropout_scale(key, static_cast<uint64_t>(element), drop, keep);
        store(scale, worker.scales + kept + at);
        y *= scale;
      }
      if (last)
        store(y, worker.out + col + at);
      else
        store(cols - j < kLanes ? zero_behind(y, cols - j) : y, next + at);
    }
}

template <class Op>
void Training<Op>::take_loss(const Worker& worker, const Chunk& chunk, int64_t row, int64_t rows) {
  const int64_t top = args_.depth - 1, out = args_.layers[top].out, ld = plans_.get()[top].ld_out;
  const int64_t* order = call_->order + chunk.first + chunk.row + row;
  const float* targets[kMostBlockRows];
  int64_t labels[kMostBlockRows];
  float weights[kMostBlockRows];
  for (int64_t r = 0; r < rows; ++r) {
    weights[r] = call_->weights != nullptr ? call_->weights[order[r]] : 1.0f;
    if (call_->target != nullptr)
      targets[r] = call_->target + order[r] * call_->target_stride;
    else
      labels[r] = call_->labels[order[r]];
  }
  const float factor = static_cast<float>(1.0 / static_cast<double>(loss_terms(chunk)));
  const auto elementwise = [&](auto loss) {
    return elementwise_loss<decltype(loss)>(rows, out, worker.out, ld, targets, weights, factor, worker.grad, ld);
  };
  double total = 0.0;
  switch (args_.loss) {
    case LossKind::kMse: total = elementwise(MseLoss{}); break;
    case LossKind::kMae: total = elementwise(MaeLoss{}); break;
    case LossKind::kHuber: total = elementwise(HuberLoss{}); break;
    case LossKind::kBce: total = elementwise(BceLoss{}); break;
    case LossKind::kBceWithLogits: total = elementwise(BceWithLogitsLoss{}); break;
    case LossKind::kCrossEntropy:
      total = cross_entropy(rows, out, worker.out, ld, targets, call_->target == nullptr ? labels : nullptr, weights,
                            factor, worker.grad, ld);
      break;
    case LossKind::kCosine:
      total = cosine_loss(rows, out, worker.out, ld, targets, weights, factor, worker.grad, ld);
      break;
  }
  losses_.get()[(chunk.row + row) / block_rows_] = total;
  if (!std::isfinite(total)) bad_chunk_.store(chunk.number);
}

// dZ_l @ W_l, in tiles that become dZ_{l-1}.
template <class Op>
void Training<Op>::grad_in(const Worker& worker, int64_t l, int64_t row, int64_t rows) {
  const TrainLayer& layer = args_.layers[l];
  const Plan& plan = plans_.get()[l];
  for (int64_t col = 0; col < layer.in; col += kPanel) {
    const int64_t cols = panel_columns(layer.in, col / kPanel);
    if constexpr (kFloat)
      gemm(*runtime_, rows, cols, layer.out, /* lda */ plan.ld_out, /* ldb */ layer.in, /* ldc */ kPanel,
           /* add_C */ false, worker.dz[l % 2], layer.weight.value + col, worker.tile);
    else
      gemm(*runtime_, rows, round_up(cols, kLanes), packed_depth<Op>(layer.out), /* lda */ plan.ld_out,
           /* ldb */ plan.ld_in, /* ldc */ kPanel, /* add_C */ false, worker.dz[l % 2],
           packed_back_.get() + plan.packed_back + 2 * col, worker.tile);
    finish_dz(worker, l - 1, row, rows, col, cols, worker.tile, kPanel);
  }
}

// grad, the gradient at layer l's output, times the derivative: dZ. Stored for the layer below, transposed for the
// weight's gradient, and summed for the bias's.
template <class Op>
void Training<Op>::finish_dz(const Worker& worker, int64_t l, int64_t row, int64_t rows, int64_t col, int64_t cols,
                             const float* grad, int64_t ld_grad) {
  const TrainLayer& layer = args_.layers[l];
  const Plan& plan = plans_.get()[l];
  const bool last = l + 1 == args_.depth;
  Op* dz = worker.dz[l % 2] + col;
  // bf16: rows of dZ two by two, as pairs of bf16 in 32-bit words.
  float pairs[kFloat ? 1 : kMostBlockRows / 2 * kPanel] __attribute__((aligned(64)));
  Vec sums[kPanel / kLanes] = {};
  const float dropped = layer.dropout > 0.0 ? static_cast<float>(1.0 - layer.dropout) : 1.0f;
  const int64_t kept = plan.hidden + col;
  const float* out = last ? worker.out + col : nullptr;
  const Op* next = last ? nullptr : acts_.get() + plans_.get()[l + 1].acts + row * plan.ld_out + col;
  with_activation(layer.activation, [&](auto activation) {
    using Activation = decltype(activation);
    const auto dz_at = [&](int64_t r, int64_t j) {
      const int64_t at = r * plan.ld_out + j;
      Vec value = load(grad + r * ld_grad + j);
      if (dropped < 1.0f) value *= load(worker.scales + kept + at);
      if constexpr (Activation::kSavesPreact) {
        value = Activation::backward(value, load(worker.preacts + kept + at));
      } else if constexpr (!std::is_same_v<Activation, Identity>) {
        // Where an element was dropped the gradient is zero already, whatever the derivative.
        value = Activation::backward(value, (out == nullptr ? load(next + at) : load(out + at)) * dropped);
      }
      return cols - j < kLanes ? zero_behind(value, cols - j) : value;
    };
    for (int64_t r = 0; r < rows; r += kFloat ? 1 : 2)
      for (int64_t j = 0; j < cols; j += kLanes) {
        const Vec z = dz_at(r, j);
        sums[j / kLanes] += z;
        if constexpr (kFloat) {
          store(z, dz + r * plan.ld_out + j);
        } else {
          const Vec odd = r + 1 < rows ? dz_at(r + 1, j) : Vec{};
          sums[j / kLanes] += odd;
          const IntVec low = round_to_bfloat16(z), high = round_to_bfloat16(odd);
          store_bits(low, dz + r * plan.ld_out + j);
          if (r + 1 < rows) store_bits(high, dz + (r + 1) * plan.ld_out + j);
          store(math::bit_cast<Vec>(low | (high << 16)), pairs + r / 2 * kPanel + j);
        }
      }
  });
  float* bias_sums = bias_sums_.get() + (1 + row / block_rows_) * biases_size_ + plan.biases + col;
  for (int64_t j = 0; j < cols; j += kLanes) store(sums[j / kLanes], bias_sums + j);
  if (!layer.weight.trained) return;
  Op* transposed = transposed_.get() + plan.transposed + col * ld_transposed() + row;
  if constexpr (kFloat)
    transpose(dz, plan.ld_out, rows, cols, transposed, ld_transposed());
  else
    transpose(pairs, kPanel, ceil_div(rows, 2), cols, reinterpret_cast<float*>(transposed), ld_transposed() / 2);
}

}  // namespace FASTENC_ISA
}  // namespace fastenc
