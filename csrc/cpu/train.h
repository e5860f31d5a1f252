// The training engine: many whole training steps of a stack of dense layers in one call. Each step gathers its rows,
// runs them forward, takes the loss, runs backward, and updates the parameters in place, by PyTorch's rules.
//
// Raw pointers, sizes; no torch. As the kernels of stack.h, compiled once per instruction set.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "dtype.h"

namespace fastenc {

// In the order of fastenc/training/engine.py. Each is a mean over rows and columns; cross entropy and cosine over rows.
enum class LossKind : int64_t { kMse, kMae, kHuber, kCrossEntropy, kBce, kBceWithLogits, kCosine };

// In the order of fastenc/training/engine.py: the rules of torch.optim.SGD, Adam and AdamW.
enum class OptimizerKind : int64_t { kSgd, kAdam, kAdamW };

// What a group of parameters shares, beside the learning rate.
struct Group {
  double beta1, beta2, eps;  // of Adam and AdamW
  double momentum;           // of SGD
  double weight_decay;
  bool nesterov;
};

// A weight [out, in] or a bias [out], fp32, contiguous, and what its optimiser keeps, all of it PyTorch's own memory.
struct Parameter {
  float* value = nullptr;  // null: there is no such parameter
  bool trained = false;    // the rest is of trained ones only
  int64_t group = 0;
  float* moments[2] = {nullptr, nullptr};  // Adam: exp_avg, exp_avg_sq. SGD: momentum_buffer (null without momentum)
  float* steps = nullptr;                  // Adam: how many steps were taken; raised when a call ends
  float* grad = nullptr;                   // where to leave the gradient of each step, as updated with; null: nowhere
};

struct TrainLayer {
  int64_t in;
  int64_t out;
  ActivationKind activation;
  double dropout;  // probability of dropping an element of the output, in every step
  Parameter weight;
  Parameter bias;
};

// What stays the same from call to call.
struct TrainArgs {
  Dtype dtype;  // of the products: kFloat or kBFloat16; sums, activations, losses and updates are fp32
  int64_t depth;
  const TrainLayer* layers;
  int64_t batch_size;
  LossKind loss;
  OptimizerKind optimizer;
  int64_t group_count;
  const Group* groups;
  double l1;          // times the sign of a weight, added to its gradient
  double clip_norm;   // of all gradients together; 0: no limit
  double clip_value;  // of each element of a gradient; 0: no limit
};

// The steps of one call: rows order[0], order[1], ... in batches of batch_size, the last one of what is left.
struct TrainCall {
  const float* x;  // [any number of rows, layers[0].in]
  int64_t x_stride;
  const float* target;    // [as many rows, layers[depth - 1].out]; cross entropy: probabilities. Null: see labels
  int64_t target_stride;  // may be that of x: an autoencoder
  const int64_t* labels;  // [as many rows]: classes, for cross entropy where target is null
  const float* weights;   // [as many rows]: how many times each counts in the mean, whose divisor stays. Null: once
  const int64_t* order;   // [rows]: which rows
  int64_t rows;
  const double* rates;  // [steps, group_count]: the learning rates
  uint64_t seed;        // of dropout
  int64_t first_step;   // number of the first step, for dropout: steps of equal number and seed drop the same
  double* losses;       // [steps]: the loss of each step, before its update
};

}  // namespace fastenc
