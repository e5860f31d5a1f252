// A narrow stack of dense layers, forward, in one launch.
//
// A block owns 64 or 128 rows of x, 16 to a warp, and takes them through all layers. In shared memory are
//   kEncoderStages chunks of weights, [128][kStep], which the block's warps share;
//   a tile for each warp. It holds in turn the warp's rows of x, in kEncoderStages chunks of [16][kStep]; a layer's
//     sums, [16][128] in fp32; and its outputs, rounded, [16][128], which are the next layer's inputs.
//
// The layers are one list of steps. A step multiplies a chunk of kStep (64 bytes) of a layer's inputs by the weights of
// all its outputs, or of kWideChunk outputs of a wide layer. What it needs from memory is copied two steps ahead of it,
// whatever its layer, so that the next layer's weights are on their way while the present one computes. When a layer
// has its sums, nobody needs its inputs any more, and the sums leave the registers for the tile. There a lane takes
// four columns of four rows at a time through the bias and the activation. Row r of the outputs ends before row r + 1
// of the sums begins: going down the rows, outputs take the place of sums that have been read. A wide layer, always the
// last, does need its inputs for its other outputs. It puts its sums behind them, and its outputs nowhere in the tile.
//
// Warps read no tile but their own. Only the chunks of weights are shared, and the barrier of each step sees to them.
//
// Widths are padded on chip alone, to multiples of 32. Padded inputs meet padded weights, both zero. A padded output
// would be activation(0), which can be 0.5, or NaN where the inputs are infinite: it is set to zero. Rows from M on are
// zero in x, and are not stored.
#pragma once

#include "pack.cuh"

namespace fastenc::cuda {

constexpr int kEncoderStages = 3;
constexpr int kWideChunk = 64;

// Where a step is: the layer, and which chunk of its outputs and of its inputs.
template <int kStep>
struct EncoderStep {
  int layer = 0, output_chunk = 0, input_chunk = 0;

  FASTENC_INLINE int64_t n() const { return int64_t{output_chunk} * kWideChunk; }
  FASTENC_INLINE int64_t k() const { return int64_t{input_chunk} * kStep; }
  FASTENC_INLINE int64_t inputs(const EncoderForward& args) const { return layer ? args.layers[layer - 1].N : args.K; }
  // The outputs that it makes.
  FASTENC_INLINE int outputs(const EncoderForward& args) const {
    const int64_t N = args.layers[layer].N, left = N - n();
    return static_cast<int>(N <= kWidest || left < kWideChunk ? left : kWideChunk);
  }
  FASTENC_INLINE bool ends_sums(const EncoderForward& args) const { return k() + kStep >= inputs(args); }
  FASTENC_INLINE void advance(const EncoderForward& args) {
    const bool ends_layer = n() + outputs(args) >= args.layers[layer].N;
    if (!ends_sums(args)) {
      ++input_chunk;
    } else {
      input_chunk = 0;
      output_chunk = ends_layer ? 0 : output_chunk + 1;
      layer += ends_layer;
    }
  }
};

template <Arithmetic kArithmetic, int kWarps>
struct EncoderForwardPlan {
  using T = Number<kArithmetic>;
  static constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kStep = 64 / sizeof(T);
  static constexpr int kChunkLeading = leading<T>(kStep), kTileLeading = leading<T>(kWidest);
  static constexpr int kSumsLeading = leading<float>(kWidest, Sum::kOuter);
  static constexpr int kWideSumsLeading = leading<float>(kWideChunk, Sum::kOuter);
  static constexpr int kWeights = static_cast<int>(kWidest) * kChunkLeading;  // elements of a chunk
  static constexpr int kRowsOfX = 16 * kChunkLeading;                         // likewise

  // In bytes.
  static constexpr int kChunks = kEncoderStages * kWeights * static_cast<int>(sizeof(T));
  static constexpr int kInputs = 16 * kTileLeading * static_cast<int>(sizeof(T));
  static constexpr int kSums = 16 * kSumsLeading * static_cast<int>(sizeof(float));
  static constexpr int kWideSums = 16 * kWideSumsLeading * static_cast<int>(sizeof(float));
  static_assert(kEncoderStages * kRowsOfX * sizeof(T) <= kInputs && kInputs <= kSums);
  FASTENC_INLINE static constexpr int tile_bytes(bool wide) {
    return wide && kInputs + kWideSums > kSums ? kInputs + kWideSums : kSums;
  }
};

FASTENC_INLINE bool ends_wide(const EncoderForward& args) { return args.layers[args.depth - 1].N > kWidest; }

// From sums to outputs: 16 rows from `row` on, of the outputs from `n` on.
//
// sums   [16, columns]  fp32, in rows of sums_leading
// tile   [16, columns]  the outputs for the next layer, in rows of tile_leading; may lie over sums so that row r ends
//                       before row r + 1 of sums begins; null: there is no next layer
template <class T>
FASTENC_DEVICE void finish_outputs(const StackLayer& layer, int64_t M, int64_t row, int64_t n, int columns,
                                   const float* sums, int sums_leading, T* tile, int tile_leading) {
  constexpr int kEach = 4, kRowsEach = 4;
  const int across = columns > 64 ? 32 : columns / kEach, down = 32 / across;  // lanes along a row, and rows
  const bool packed = allows_packs<kEach, T>(layer.out, layer.N) && allows_packs<kEach, T>(layer.preact, layer.N);
  const int apart = packed ? 1 : across, c = lane() % across * (packed ? kEach : 1);
  const int64_t col = n + c;
  const int count = count_inside<kEach>(col, layer.N, apart);
  float shift[kEach] = {};
  if (const T* const bias = static_cast<const T*>(layer.bias))
    load_numbers(shift, bias + col, apart, count + PLANTED(ForwardBiasTooFar),
                 packed && allows_packs<kEach, T>(bias, 0));

#pragma unroll 1
  for (int rows = 0; rows < 16; rows += kRowsEach * down) {
    const int first = rows + lane() / across;
    float z[kRowsEach][kEach];
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
      load_sums(z[i], sums + (first + i * down) * sums_leading + c, apart, packed);
#pragma unroll
      for (int e = 0; e < kEach; ++e) z[i][e] += shift[e];
    }
    const auto store = [&](void* to) {
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i) {
        const int64_t r = row + first + i * down;
        if (to && r < M + PLANTED(ForwardRowTooFar))
          store_numbers(static_cast<T*>(to) + r * layer.N + col, z[i], apart, count, packed);
      }
    };
    if (!PLANTED(ForwardPreactAfterActivation)) store(layer.preact);
    with_activation(layer.activation, [&](auto activation) {
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i)
#pragma unroll
        for (int e = 0; e < kEach; ++e) z[i][e] = decltype(activation)::forward(z[i][e]);
    });
    if (PLANTED(ForwardPreactAfterActivation)) store(layer.preact);
    store(layer.out);
    if (!tile) continue;
    if (!PLANTED(ForwardNoBarrierBeforeOutputs)) sync_warp();  // these rows' sums have been read
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
      T* const to = tile + (first + i * down) * tile_leading + c;
      Pack<T, kEach> pack;
#pragma unroll
      for (int e = 0; e < kEach; ++e)
        pack.numbers[e] = from_float<T>(e < count || PLANTED(ForwardPaddedColumn) ? z[i][e] : 0.0f);
      if (packed) {
        store_shared(reinterpret_cast<Pack<T, kEach>*>(to), pack);
      } else {
#pragma unroll
        for (int e = 0; e < kEach; ++e) store_shared(to + e * apart, pack.numbers[e]);
      }
    }
  }
}

// x           [M, K]         fp32 | fp16 | bf16, any strides
// weight of l [N_l, inputs]  dtype of x, any strides; inputs is K, or N of the layer before
// out of l    [M, N_l]       dtype of x, contiguous, or null; preact likewise
// grid        ceil(M / kRows) blocks; one owns kRows rows of all outputs
// shared      kEncoderStages chunks of weights, then a tile for each warp
template <Arithmetic kArithmetic, int kWarps>
FASTENC_KERNEL(32 * kWarps, 16 / kWarps)
encoder_forward_kernel(const EncoderForward args, const int64_t steps) {
  using Plan = EncoderForwardPlan<kArithmetic, kWarps>;
  using T = typename Plan::T;
  constexpr int kStep = Plan::kStep;
  T* const chunks = reinterpret_cast<T*>(shared_memory());
  unsigned char* const place = shared_memory() + Plan::kChunks + warp() * Plan::tile_bytes(ends_wide(args));
  T* const tile = reinterpret_cast<T*>(place);
  const int64_t row = block() * Plan::kRows + warp() * 16;
  EncoderStep<kStep> ahead, here;
  float acc[1][kWidest / 8][4] = {};

  pipeline<kEncoderStages>(
      steps,
      [&](int64_t, int stage) {
        const StackLayer& layer = args.layers[ahead.layer];
        const int64_t inputs = ahead.inputs(args);
        load_tile<Plan::kThreads>(chunks + stage * Plan::kWeights, Plan::kChunkLeading,
                                  round_up(ahead.outputs(args), 32), kStep, Source<T>(layer.weight, layer.N, inputs),
                                  ahead.n(), ahead.k(), thread());
        if (ahead.layer == 0)
          load_tile<32>(tile + stage * Plan::kRowsOfX, Plan::kChunkLeading, 16, kStep,
                        Source<T>(args.x, args.M, inputs), row, ahead.k(), lane());
        ahead.advance(args);
      },
      [&](int64_t, int stage) {
        const StackLayer& layer = args.layers[here.layer];
        const int columns = round_up(here.outputs(args), 32);
        const T* const inputs = here.layer == 0 ? tile + stage * Plan::kRowsOfX : tile + here.k();
        const int inputs_leading = here.layer == 0 ? Plan::kChunkLeading : Plan::kTileLeading;
        if (PLANTED(ForwardStaleWeights)) stage = (stage + kEncoderStages - 1) % kEncoderStages;
        const T* const weights = chunks + stage * Plan::kWeights;
        const auto multiply_columns = [&](int count) {
          multiply<kArithmetic, Sum::kInner, Sum::kInner>(acc, inputs, inputs_leading, weights, Plan::kChunkLeading,
                                                          kStep, count);
        };
        if (columns == kWidest)
          multiply_columns(kWidest);  // the compiler sees that no fragment is left out
        else
          multiply_columns(columns);
        if (here.ends_sums(args)) {
          const bool wide = layer.N > kWidest;
          float* const sums =
              reinterpret_cast<float*>(place + (wide && !PLANTED(ForwardWideOverInputs) ? Plan::kInputs : 0));
          const int sums_leading = wide ? Plan::kWideSumsLeading : Plan::kSumsLeading;
          if (!PLANTED(ForwardNoBarrierBeforeSums)) sync_warp();  // all lanes have read what the sums lie over
          put(sums, sums_leading, acc, columns);
          if (!PLANTED(ForwardNoBarrierAfterSums)) sync_warp();
          finish_outputs(layer, args.M, row, here.n(), columns, sums, sums_leading,
                         here.layer + 1 < args.depth ? tile : nullptr, Plan::kTileLeading);
          for_each(acc, [](int, int, float& sum) {
            if (!PLANTED(ForwardKeptSums)) sum = 0.0f;
          });
        }
        here.advance(args);
      });
}

template <Arithmetic kArithmetic, int kWarps>
constexpr Geometry encoder_forward_geometry(int64_t M, bool wide) {
  using Plan = EncoderForwardPlan<kArithmetic, kWarps>;
  return {divide_up(M, Plan::kRows), Plan::kThreads, Plan::kChunks + kWarps * Plan::tile_bytes(wide)};
}

// Eight warps share their weights where that leaves enough blocks to fill a GPU. With a wide layer they would ask for
// more shared memory than some GPUs have.
constexpr bool wants_eight_warps(int64_t M, bool wide) { return !wide && divide_up(M, 128) >= kMultiprocessors; }

// Steps of the kernel with this arithmetic.
inline int64_t encoder_steps(const EncoderForward& args) {
  const int64_t step = 64 / item_size(args.arithmetic);
  int64_t steps = 0, inputs = args.K;
  for (int64_t l = 0; l < args.depth; ++l) {
    const int64_t N = args.layers[l].N;
    steps += (inputs > 0 ? divide_up(inputs, step) : 1) * (N > kWidest ? divide_up(N, kWideChunk) : 1);
    inputs = N;
  }
  return steps;
}

}  // namespace fastenc::cuda
