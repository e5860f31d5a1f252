// The training engine's tasks over strips of weights: gradients and updates. Included by stack_impl.h only.

namespace fastenc {
namespace FASTENC_ISA {

template <class Op>
typename Training<Op>::Strip Training<Op>::strip(int64_t index) const {
  int64_t l = args_.depth - 1;
  while (plans_.get()[l].first_strip > index) --l;
  const int64_t row = (index - plans_.get()[l].first_strip) * kStrip;
  return {l, row, std::min(kStrip, args_.layers[l].out - row)};
}

// Makes the copies of a strip of a weight that the products read.
template <class Op>
void Training<Op>::pack(const Worker& worker, int64_t index) {
  const Strip strip = this->strip(index);
  const int64_t in = args_.layers[strip.layer].in;
  for (int64_t col = 0; col < in; col += kPanel) pack_weight(worker, strip, col, panel_columns(in, col / kPanel));
  pack_bias(strip);
}

template <class Op>
void Training<Op>::pack_weight(const Worker& worker, const Strip& strip, int64_t col, int64_t cols) {
  const TrainLayer& layer = args_.layers[strip.layer];
  const Plan& plan = plans_.get()[strip.layer];
  const float* weight = layer.weight.value + strip.row * layer.in + col;
  const int64_t panel = strip.row / kPanel, ld = padded(panel_columns(layer.out, panel));
  Op* packed = packed_.get() + plan.packed + panel_offset(layer.out, panel) * packed_depth<Op>(layer.in);
  if constexpr (kFloat) {
    transpose(weight, layer.in, strip.rows, cols, packed + col * ld + strip.row % kPanel, ld);
  } else {
    // Words of two bf16: of neighbouring inputs for the forward pass, of neighbouring outputs for backward.
    BFloat16* rows = worker.rows;
    for (int64_t r = 0; r < strip.rows; ++r) {
      convert_row(weight + r * layer.in, rows + r * kPanel, cols);
      if (cols % kLanes != 0)  // up to the vector's end
        for (int64_t j = cols; j < round_up(cols, kLanes); ++j) rows[r * kPanel + j].bits = 0;
    }
    transpose(reinterpret_cast<const float*>(rows), kPanel / 2, strip.rows, ceil_div(cols, 2),
              reinterpret_cast<float*>(packed) + col / 2 * ld + strip.row % kPanel, ld);
    if (strip.layer <= bottom_) return;
    uint32_t* words = reinterpret_cast<uint32_t*>(packed_back_.get() + plan.packed_back) + strip.row / 2 * plan.ld_in;
    pair_rows(rows, kPanel, strip.rows, cols, words + col, plan.ld_in);
  }
}

template <class Op>
void Training<Op>::pack_bias(const Strip& strip) {
  const float* bias = args_.layers[strip.layer].bias.value;
  if (bias != nullptr)
    std::memcpy(biases_.get() + plans_.get()[strip.layer].biases + strip.row, bias + strip.row,
                static_cast<size_t>(strip.rows) * sizeof(float));
}

// The gradients of a strip, summed over the chunk; after the last chunk, the update.
template <class Op>
void Training<Op>::strip_task(Worker& worker, const Chunk& chunk, int64_t index) {
  if (index == 0 && chunk.closes()) finish_loss(chunk);
  const Strip strip = this->strip(index);
  const TrainLayer& layer = args_.layers[strip.layer];
  const Plan& plan = plans_.get()[strip.layer];
  const bool at_once = chunk.opens() && chunk.closes() && !clips_norm();
  double squares = 0.0;
  const auto add_squares = [&](const float* value, float l1, float* gradient, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      gradient[i] = penalised(l1, gradient[i], value[i]);
      squares += static_cast<double>(gradient[i]) * static_cast<double>(gradient[i]);
    }
  };
  for (int64_t col = 0; layer.weight.trained && col < layer.in; col += kPanel) {
    const int64_t cols = panel_columns(layer.in, col / kPanel);
    float* sums = at_once ? worker.tile : gradients_.get() + plan.gradient + strip.row * plan.ld_in + col;
    const int64_t ld_sums = at_once ? kPanel : plan.ld_in;
    weight_sums(chunk, strip, col, cols, sums, ld_sums);
    if (!chunk.closes()) continue;
    if (!clips_norm()) {
      update_weight(worker, chunk.step, strip, col, cols, sums, ld_sums);
      continue;
    }
    for (int64_t r = 0; r < strip.rows; ++r)
      add_squares(layer.weight.value + (strip.row + r) * layer.in + col, static_cast<float>(args_.l1),
                  sums + r * ld_sums, cols);
  }
  if (layer.bias.trained) {
    bias_sums(chunk, strip);
    if (chunk.closes() && clips_norm())
      add_squares(layer.bias.value + strip.row, /* l1 */ 0.0f, bias_sums_.get() + plan.biases + strip.row, strip.rows);
    else if (chunk.closes())
      update_bias(worker, chunk.step, strip);
  }
  squares_.get()[index] = squares;
}

// dZ^T @ input over the chunk, in products of kSumRows rows, whatever the chunk.
template <class Op>
void Training<Op>::weight_sums(const Chunk& chunk, const Strip& strip, int64_t col, int64_t cols, float* sums,
                               int64_t ld_sums) {
  const Plan& plan = plans_.get()[strip.layer];
  const Op* transposed = transposed_.get() + plan.transposed + strip.row * ld_transposed();
  const int64_t most = PLANTED(SumsByWorkers) ? kSumRows / workers_ / 2 * 2 : kSumRows;
  for (int64_t row = 0; row < chunk.rows; row += most) {
    const int64_t depth = packed_depth<Op>(std::min(most, chunk.rows - row));
    const Op* input = kFloat ? acts_.get() + plan.acts + row * plan.ld_in + col
                             : pairs_.get() + plan.acts + row * plan.ld_in + 2 * col;
    gemm(*runtime_, strip.rows, round_up(cols, kLanes), depth, /* lda */ ld_transposed(), /* ldb */ plan.ld_in, ld_sums,
         /* add_C */ !chunk.opens() || row > 0, transposed + row, input, sums);
  }
}

template <class Op>
void Training<Op>::bias_sums(const Chunk& chunk, const Strip& strip) {
  float* sums = bias_sums_.get() + plans_.get()[strip.layer].biases + strip.row;
  for (int64_t j = 0; j < strip.rows; j += kLanes) {
    Vec total = chunk.opens() ? Vec{} : load(sums + j);
    for (int64_t block = 0; block < ceil_div(chunk.rows, block_rows_); ++block)
      total += load(sums + (1 + block) * biases_size_ + j);
    store(total, sums + j);
  }
}

// Clips the norm of all gradients together, as torch.nn.utils.clip_grad_norm_, and updates a strip.
template <class Op>
void Training<Op>::clipped_task(Worker& worker, int64_t step, int64_t index) {
  const Strip strip = this->strip(index);
  const TrainLayer& layer = args_.layers[strip.layer];
  const Plan& plan = plans_.get()[strip.layer];
  for (int64_t col = 0; layer.weight.trained && col < layer.in; col += kPanel)
    update_weight(worker, step, strip, col, panel_columns(layer.in, col / kPanel),
                  gradients_.get() + plan.gradient + strip.row * plan.ld_in + col, plan.ld_in);
  if (layer.bias.trained) update_bias(worker, step, strip);
}

template <class Op>
Update Training<Op>::update(Worker& worker, const Parameter& parameter, int64_t step) {
  const double steps = (parameter.steps == nullptr ? 0.0 : static_cast<double>(*parameter.steps)) + step + 1.0;
  if (worker.update_group != parameter.group || worker.update_steps != steps || worker.update_step != step) {
    const double rate = call_->rates[step * args_.group_count + parameter.group];
    worker.update = Update(args_.optimizer, args_.groups[parameter.group], rate, steps);
    worker.update_group = parameter.group;
    worker.update_steps = steps;
    worker.update_step = step;
    if (args_.clip_value > 0.0) worker.update.limit = static_cast<float>(args_.clip_value);
    if (clips_norm()) {
      double squares = 0.0;
      for (int64_t i = 0; i < strips_; ++i) squares += squares_.get()[i];
      worker.update.scale = static_cast<float>(std::min(1.0, args_.clip_norm / (std::sqrt(squares) + 1e-6)));
    }
  }
  return worker.update;
}

template <class Op>
void Training<Op>::update_weight(Worker& worker, int64_t step, const Strip& strip, int64_t col, int64_t cols,
                                 const float* gradient, int64_t ld_gradient) {
  const TrainLayer& layer = args_.layers[strip.layer];
  Update update = this->update(worker, layer.weight, step);
  if (!clips_norm()) update.l1 = static_cast<float>(args_.l1);  // else it is in the gradient already
  apply(update, layer.weight, strip.row * layer.in + col, layer.in, strip.rows, cols, gradient, ld_gradient);
  pack_weight(worker, strip, col, cols);
}

template <class Op>
void Training<Op>::update_bias(Worker& worker, int64_t step, const Strip& strip) {
  const TrainLayer& layer = args_.layers[strip.layer];
  const float* gradient = bias_sums_.get() + plans_.get()[strip.layer].biases + strip.row;
  apply(update(worker, layer.bias, step), layer.bias, strip.row, 0, 1, strip.rows, gradient, 0);
  pack_bias(strip);
}

template <class Op>
void Training<Op>::apply(const Update& update, const Parameter& parameter, int64_t offset, int64_t stride, int64_t rows,
                         int64_t cols, const float* gradient, int64_t ld_gradient) {
  const auto as = [&](auto kind) {
    update_tile<decltype(kind)::value>(update, parameter, offset, stride, rows, cols, gradient, ld_gradient);
  };
  switch (args_.optimizer) {
    case OptimizerKind::kSgd: return as(std::integral_constant<OptimizerKind, OptimizerKind::kSgd>{});
    case OptimizerKind::kAdam: return as(std::integral_constant<OptimizerKind, OptimizerKind::kAdam>{});
    case OptimizerKind::kAdamW: return as(std::integral_constant<OptimizerKind, OptimizerKind::kAdamW>{});
  }
}

// The loss of the batch as far as it has gone: the mean, summed block by block.
template <class Op>
void Training<Op>::finish_loss(const Chunk& chunk) {
  double total = 0.0;
  for (int64_t block = 0; block < ceil_div(chunk.row + chunk.rows, block_rows_); ++block) total += losses_.get()[block];
  call_->losses[chunk.step] = total / static_cast<double>(loss_terms(chunk));
}

}  // namespace FASTENC_ISA
}  // namespace fastenc
