// The gradients of a narrow stack in three launches:
//
// 1. The chain (encoder_chain.cuh): dZ of each layer, and what is summed on chip.
// 2. The partial sums of the other weights' gradients (weight_partials.cuh), a launch each. As a rule that is the first
//    layer's alone, whose input is wide.
// 3. The sums of both (reduce.cuh).
#pragma once

#include <algorithm>
#include <cmath>

#include "encoder_chain.cuh"

namespace fastenc::cuda {

constexpr int64_t chain_tile_rows(Arithmetic arithmetic) {
  return item_size(arithmetic) == 2 ? ChainTile<uint16_t>::kRows : ChainTile<float>::kRows;
}

constexpr int chain_leading(Arithmetic arithmetic, int width, Sum sum) {
  return item_size(arithmetic) == 2 ? leading<uint16_t>(width, sum) : leading<float>(width, sum);
}

constexpr int64_t chain_shared_bytes(Arithmetic arithmetic, int weight_leading, int g_leading) {
  return item_size(arithmetic) == 2 ? ChainShared<uint16_t>::bytes(weight_leading, g_leading)
                                    : ChainShared<float>::bytes(weight_leading, g_leading);
}

constexpr int64_t count_pieces(int64_t N, int64_t in) { return divide_up(N, 16) * divide_up(in, 16); }

inline int64_t width_below(const EncoderBackward& args, int64_t layer) {
  return layer == 0 ? args.K : args.layers[layer - 1].N;
}

// Of each layer, the first of the pieces of its weight's gradient if the chain sums it, else kNoSum. The layers above
// the first come first: what they save is a launch each. Of the shape alone, as is chain_block_rows: a gradient is the
// same, whichever others are wanted.
struct SumsOnChip {
  int first_piece[kDeepest];

  explicit SumsOnChip(const EncoderBackward& args) {
    int64_t pieces = 0;
    for (int64_t i = 0; i < args.depth; ++i) {
      const int64_t l = (i + 1) % args.depth, N = args.layers[l].N, in = width_below(args, l);
      const bool fits = N <= kWidest && in > 0 && in <= kWidest &&
                        pieces + count_pieces(N, in) <= int64_t{kChainWarps} * kChainPieces;
      first_piece[l] = fits ? static_cast<int>(pieces) : kNoSum;
      if (fits) pieces += count_pieces(N, in);
    }
  }
};

// The rows of a block. With b blocks the chain takes about (bytes of all rows) / b, and the blocks' sums, which every
// block adds to what all share, take b * (bytes of a block's sums) / kFill. This b makes the two equal, and the whole
// least; more than kFill blocks wait for a free multiprocessor.
inline int64_t chain_block_rows(const EncoderBackward& args) {
  constexpr int64_t kFill = 128;  // about as many multiprocessors as an A100 or H100 has
  const SumsOnChip on_chip(args);
  const int64_t tile = chain_tile_rows(args.arithmetic);
  int64_t row = args.layers[args.depth - 1].N, sums = 0;  // numbers
  for (int64_t l = 0; l < args.depth; ++l) {
    row += args.layers[l].N;
    sums += args.layers[l].N * (on_chip.first_piece[l] == kNoSum ? 1 : width_below(args, l) + 1);
  }
  const double rows_bytes = static_cast<double>(args.M) * static_cast<double>(row * item_size(args.arithmetic));
  const double sums_bytes = 8.0 * static_cast<double>(sums);  // written and read
  const double blocks = std::sqrt(rows_bytes * kFill / sums_bytes);
  const int64_t most = blocks < 1 ? 1 : blocks < kFill ? static_cast<int64_t>(blocks) : kFill;
  return divide_up(divide_up(args.M, most), tile) * tile;
}

// All that encoder_backward launches, and the bytes of workspace it takes, from `workspace` on.
struct EncoderBackwardPlan {
  Chain chain = {};
  Geometry geometry = {};  // of the chain; no blocks: it has nothing to do
  WeightPartials partials[kDeepest];
  int64_t count = 0;  // of partials
  Reduce reduce = {};
  int64_t bytes = 0;

  explicit EncoderBackwardPlan(const EncoderBackward& args) : args_(args) {
    reduce.arithmetic = args.arithmetic;
    const SumsOnChip on_chip(args);
    const int last = static_cast<int>(args.depth) - 1;
    int lowest = last + 1;
    for (int l = last; l >= 0; --l) {
      sums_weight_[l] = wants_weight(l) && on_chip.first_piece[l] != kNoSum;
      if (sums_weight_[l] || writes_grad_preact(l) || args.grads[l].bias || (l == 0 && wants_grad_x())) lowest = l;
    }
    if (lowest <= last) plan_chain(on_chip, last, lowest);
    for (int l = 0; l <= last; ++l)
      if (wants_weight(l) && !sums_weight_[l]) plan_partials(l);
  }

 private:
  bool wants_grad_x() const { return args_.grad_x && args_.K > 0; }
  bool wants_weight(int l) const { return args_.grads[l].weight && width_below(args_, l) > 0; }
  // Without an activation the last layer's dZ is there already.
  bool writes_grad_preact(int l) const {
    const bool is_grad_out = l == args_.depth - 1 && args_.layers[l].activation == ActivationKind::kIdentity;
    return wants_weight(l) && !sums_weight_[l] && !is_grad_out;
  }

  void* take(int64_t wanted) {
    constexpr int64_t kAlignment = 256;
    const int64_t at = bytes;
    bytes += divide_up(wanted, kAlignment) * kAlignment;
    return args_.workspace ? static_cast<unsigned char*>(args_.workspace) + at : nullptr;
  }

  // Room among a block's sums, from a sector on.
  int64_t take_sums(int64_t numbers) {
    const int64_t at = chain.stride;
    chain.stride += divide_up(numbers, 8) * 8;
    return at;
  }

  void plan_chain(const SumsOnChip& on_chip, int last, int lowest) {
    chain.M = args_.M;
    chain.rows_per_block = chain_block_rows(args_);
    chain.last = last;
    chain.lowest = lowest;
    chain.grad_out = args_.grad_out;
    chain.grad_x = args_.grad_x;
    int widest = chain_width(args_.layers[last].N, 0), widest_read = widest;
    bool has_saved = false;  // the layer above reads, as its input, what this one's derivative is made of
    for (int l = last; l >= lowest; --l) {
      const StackLayer& of = args_.layers[l];
      ChainLayer& layer = chain.layers[l];
      layer.N = of.N;
      layer.in = width_below(args_, l);
      layer.activation = of.activation;
      if (l > lowest || (l == 0 && wants_grad_x())) layer.weight = of.weight;
      if (of.activation != ActivationKind::kIdentity && !has_saved)
        layer.saved = {saves_preact(of.activation) ? of.preact : of.out, of.N, 1};
      if (sums_weight_[l]) layer.input = l == 0 ? args_.x : Matrix{args_.layers[l - 1].out, layer.in, 1};
      has_saved = layer.input.data && l > lowest && reads_out(args_.layers[l - 1].activation);
      if (writes_grad_preact(l)) layer.grad_preact = take(args_.M * of.N * item_size(args_.arithmetic));
      layer.first_piece = on_chip.first_piece[l];
      layer.weight_at = sums_weight_[l] ? take_sums(of.N * layer.in) : kNoSum;
      layer.bias_at = args_.grads[l].bias ? take_sums(of.N) : kNoSum;
      widest = std::max(widest, chain_width(of.N, 0));
      if (layer.weight.data || layer.input.data) widest_read = std::max(widest_read, chain_width(layer.in, 0));
    }
    const Sum rows_sum = args_.arithmetic == Arithmetic::kTf32 ? Sum::kInner : Sum::kOuter;
    chain.weight_leading = chain_leading(args_.arithmetic, widest_read, Sum::kOuter);
    chain.rows_leading = chain_leading(args_.arithmetic, widest_read, rows_sum);
    chain.leading = chain_leading(args_.arithmetic, widest, rows_sum);
    const int64_t blocks = args_.M == 0 ? 0 : divide_up(args_.M, chain.rows_per_block);
    geometry = {blocks, kChainThreads, chain_shared_bytes(args_.arithmetic, chain.weight_leading, chain.leading)};
    chain.sums = static_cast<float*>(take(blocks * chain.stride * static_cast<int64_t>(sizeof(float))));
    for (int l = last; l >= lowest; --l) {
      const ChainLayer& layer = chain.layers[l];
      if (layer.weight_at != kNoSum) add(layer.weight_at, args_.grads[l].weight, layer.N * layer.in);
      if (layer.bias_at != kNoSum) add(layer.bias_at, args_.grads[l].bias, layer.N);
    }
  }

  void add(int64_t at, void* out, int64_t numbers) {
    reduce.sum[reduce.sums++] = {chain.sums + at, geometry.blocks, chain.stride, out, numbers};
  }

  void plan_partials(int l) {
    const int64_t N = args_.layers[l].N, K = width_below(args_, l), parts = weight_parts(args_.M, N, K);
    const Matrix input = l == 0 ? args_.x : Matrix{args_.layers[l - 1].out, K, 1};
    const Matrix grad_preact = writes_grad_preact(l) ? Matrix{chain.layers[l].grad_preact, N, 1} : args_.grad_out;
    float* sums = static_cast<float*>(take(parts * N * K * static_cast<int64_t>(sizeof(float))));
    partials[count++] = {args_.arithmetic, args_.M, N, K, grad_preact, input, sums};
    reduce.sum[reduce.sums++] = {sums, args_.M == 0 ? 0 : parts, N * K, args_.grads[l].weight, N * K};
  }

  const EncoderBackward& args_;
  bool sums_weight_[kDeepest] = {};
};

}  // namespace fastenc::cuda
