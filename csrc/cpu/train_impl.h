// The training engine: what it keeps, and who does what when. Included by stack_impl.h only.
//
// A step goes through phases (crew.h). Rows: each task takes a block of rows forward, through the loss and down the
// chain of dZ, keeping what the gradients of the weights need (activations, and dZ transposed) for all rows of a chunk.
// Sums: each task takes a strip of rows of one weight, sums its gradient over the chunk and, in the last chunk of the
// batch, updates it while it is in the L1 cache. A batch is one chunk unless it is large. Clipping the norm needs one
// phase more, between sums and updates.
//
// Weights stand in the module's own memory, where dZ @ W reads them, and transposed in panels of kPanel outputs, for
// the forward pass; the update writes both. Where sums are cut depends on the shapes alone, never on the threads.

namespace fastenc {
namespace FASTENC_ISA {

constexpr int64_t kStrip = 32;                     // rows of a weight in one task
constexpr int64_t kSumRows = 128;                  // rows of the batch in one product of a weight's gradient
constexpr int64_t kTrainChunkRows = 4 * kSumRows;  // rows of a chunk
constexpr int64_t kMostBlockRows = 32;
constexpr uint64_t kKeysPerStep = 64;     // dropout: a layer's key is seed + step * kKeysPerStep + layer
constexpr int64_t kSharedWork = 1 << 18;  // multiply-adds of a step below which one worker is faster than two

// Rows of one step, or of a part of its batch.
struct Chunk {
  int64_t number;  // of the call's chunks
  int64_t step;
  int64_t first;       // of the step, in the order
  int64_t batch_rows;  // of the step
  int64_t row;         // of the chunk, in the batch
  int64_t rows;

  FASTENC_INLINE bool opens() const { return row == 0; }
  FASTENC_INLINE bool closes() const { return row + rows == batch_rows; }
};

// Inside, this thread takes and gives denormal numbers as zeros, where the CPU can. The moments of a dead unit's
// weights fade away through the denormals, hundreds of steps long, and each operation on those takes many times as
// long.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(__builtin_ia32_stmxcsr()) {
    __builtin_ia32_ldmxcsr(before_ | kFlushToZero | kDenormalsAreZero);
  }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(before_); }

 private:
  static constexpr unsigned kFlushToZero = 1u << 15, kDenormalsAreZero = 1u << 6;
  unsigned before_;
#endif
};

// In every dtype.
class AnyTraining {
 public:
  virtual ~AnyTraining() = default;
  virtual int64_t run(const TrainCall& call, const Runtime& runtime) = 0;
};

template <class Op>
class Training : public AnyTraining {
 public:
  explicit Training(const TrainArgs& args);
  int64_t run(const TrainCall& call, const Runtime& runtime) override;

 private:
  static constexpr bool kFloat = std::is_same_v<Op, float>;

  struct Plan {
    int64_t ld_in, ld_out;  // of rows of activations
    int64_t packed;         // W^T in panels of outputs, in packed_
    int64_t packed_back;    // bf16: W in pairs of outputs, in packed_back_
    int64_t acts;           // the layer's input [chunk_rows, ld_in], in acts_ and, bf16, as pairs of rows in pairs_
    int64_t transposed;     // dZ^T [ld_out, ld_transposed], in transposed_
    int64_t biases;         // in biases_, and in each block's part of bias_sums_
    int64_t gradient;       // [out, ld_in], in gradients_
    int64_t first_strip;
    int64_t hidden;  // of the layer's preacts and scales in a worker's memory
  };

  // Memory of one worker, [block_rows, ...] but for tile, and the latest step sizes it worked out.
  struct Worker {
    float* tile;     // [the larger of block_rows and kStrip, kPanel]: a product
    float* out;      // [ld_out of the last layer]
    float* grad;     // the same: the loss's gradient at it
    float* preacts;  // of all layers, each [ld_out] at plan.hidden
    float* scales;   // of dropout, likewise
    Op* dz[2];       // [widest]: of two layers in turn
    BFloat16* rows;  // [kStrip, kPanel]: of a weight
    Update update;
    int64_t update_group;  // the group, its parameter's steps and the call's step that `update` is for
    double update_steps;
    int64_t update_step;
  };

  // A strip: rows [row, row + rows) of a layer's weight.
  struct Strip {
    int64_t layer;
    int64_t row;
    int64_t rows;
  };

  // Where a worker is in the sequence of one kind's phases.
  struct Place {
    int64_t round = 0;
    int64_t target = 0;  // tasks in all rounds so far
  };

  bool trains(int64_t l) const { return args_.layers[l].weight.trained || args_.layers[l].bias.trained; }
  bool clips_norm() const { return args_.clip_norm > 0.0; }
  int64_t chunks_per_step() const { return ceil_div(args_.batch_size, chunk_rows_); }
  // What the loss is the mean of.
  int64_t loss_terms(const Chunk& chunk) const {
    const bool of_rows = args_.loss == LossKind::kCrossEntropy || args_.loss == LossKind::kCosine;
    return chunk.batch_rows * (of_rows ? 1 : args_.layers[args_.depth - 1].out);
  }
  // Not a power of 2: rows that far apart would share few sets of the L1 cache.
  int64_t ld_transposed() const { return round_up(chunk_rows_, 2 * kLanes) + 2 * kLanes; }

  int64_t worker_size() const {  // in floats
    return std::max(block_rows_, kStrip) * kPanel + block_rows_ * 4 * widest_ + 2 * hidden_size_ + kStrip * kPanel;
  }
  void reserve_workers(int64_t count);
  Worker worker(int64_t me);
  int64_t first_strip_of(int64_t me) const;
  void work_as(int64_t me);
  template <class Task>
  void run_phase(std::atomic<int64_t>& done, Claim* claims, Place& place, int64_t count, int64_t first,
                 const Task& task);

  // train_rows_impl.h
  void rows_task(const Worker& worker, const Chunk& chunk, int64_t block);
  void gather(const Chunk& chunk, int64_t row, int64_t rows);
  void pair_input(int64_t l, int64_t row, int64_t rows);
  void forward(const Worker& worker, const Chunk& chunk, int64_t l, int64_t row, int64_t rows);
  template <class Activation>
  void forward_tile(const Worker& worker, const Chunk& chunk, int64_t l, int64_t row, int64_t rows, int64_t col,
                    int64_t cols);
  void take_loss(const Worker& worker, const Chunk& chunk, int64_t row, int64_t rows);
  void grad_in(const Worker& worker, int64_t l, int64_t row, int64_t rows);
  void finish_dz(const Worker& worker, int64_t l, int64_t row, int64_t rows, int64_t col, int64_t cols,
                 const float* grad, int64_t ld_grad);

  // train_strips_impl.h
  Strip strip(int64_t index) const;
  void pack(const Worker& worker, int64_t index);
  void pack_weight(const Worker& worker, const Strip& strip, int64_t col, int64_t cols);
  void pack_bias(const Strip& strip);
  void strip_task(Worker& worker, const Chunk& chunk, int64_t index);
  void weight_sums(const Chunk& chunk, const Strip& strip, int64_t col, int64_t cols, float* sums, int64_t ld_sums);
  void bias_sums(const Chunk& chunk, const Strip& strip);
  void clipped_task(Worker& worker, int64_t step, int64_t index);
  Update update(Worker& worker, const Parameter& parameter, int64_t step);
  void update_weight(Worker& worker, int64_t step, const Strip& strip, int64_t col, int64_t cols, const float* gradient,
                     int64_t ld_gradient);
  void update_bias(Worker& worker, int64_t step, const Strip& strip);
  void apply(const Update& update, const Parameter& parameter, int64_t offset, int64_t stride, int64_t rows,
             int64_t cols, const float* gradient, int64_t ld_gradient);
  void finish_loss(const Chunk& chunk);

  const TrainArgs& args_;
  const TrainCall* call_ = nullptr;
  const Runtime* runtime_ = nullptr;
  int64_t block_rows_;
  int64_t chunk_rows_;
  int64_t chunk_blocks_;
  int64_t strips_ = 0;
  int64_t bottom_ = 0;  // the lowest layer that is trained
  int64_t widest_ = 0;
  int64_t biases_size_ = 0;
  int64_t hidden_size_ = 0;
  int64_t multiply_adds_ = 0;  // of a forward pass of one row
  Scratch<Plan> plans_;
  Scratch<Op> packed_, packed_back_, acts_, pairs_, transposed_;
  Scratch<float> gradients_, biases_;
  Scratch<float> bias_sums_;  // [1 + blocks of a chunk, biases_size]: the sum so far, then each block's
  Scratch<double> losses_;    // of each block of the batch
  Scratch<double> squares_;   // of each strip's gradients
  Scratch<Claim> row_claims_, strip_claims_;
  Scratch<float> worker_memory_;
  int64_t reserved_ = 0;  // workers that it serves
  int64_t workers_ = 1;
  int64_t steps_ = 0;
  std::atomic<int64_t> bad_chunk_{0};  // the first whose loss is not finite, or one behind the last
  alignas(64) std::atomic<int64_t> rows_done_{0};
  alignas(64) std::atomic<int64_t> strips_done_{0};
};

template <class Op>
Training<Op>::Training(const TrainArgs& args)
    : args_(args),
      block_rows_(args.batch_size >= 128 || !kFloat ? kMostBlockRows : kLeastRows),
      chunk_rows_(std::min(kTrainChunkRows, round_up(args.batch_size, block_rows_))),
      chunk_blocks_(chunk_rows_ / block_rows_),
      plans_(args.depth) {
  const bool whole_gradients = clips_norm() || args.batch_size > chunk_rows_;
  int64_t packed = 0, packed_back = 0, acts = 0, transposed = 0, gradients = 0;
  while (bottom_ < args.depth && !trains(bottom_)) ++bottom_;
  for (int64_t l = 0; l < args.depth; ++l) {
    const TrainLayer& layer = args.layers[l];
    const int64_t ld_in = padded(layer.in), ld_out = padded(layer.out);
    plans_.get()[l] = {ld_in,      ld_out,       packed,    packed_back, acts,
                       transposed, biases_size_, gradients, strips_,     hidden_size_};
    packed += packed_depth<Op>(layer.in) * panels_size(layer.out);
    packed_back += packed_depth<Op>(layer.out) * ld_in;
    acts += chunk_rows_ * ld_in;
    if (layer.weight.trained) transposed += ld_out * ld_transposed();
    if (layer.weight.trained && whole_gradients) gradients += layer.out * ld_in;
    biases_size_ += ld_out;
    strips_ += ceil_div(layer.out, kStrip);
    hidden_size_ += block_rows_ * ld_out;
    widest_ = std::max(widest_, ld_out);
    multiply_adds_ += layer.in * layer.out;
  }
  packed_.renew_as_zeros(packed);
  if (!kFloat) packed_back_.renew_as_zeros(packed_back);
  acts_.renew_as_zeros(acts);
  if (!kFloat) pairs_.renew_as_zeros(acts);
  transposed_.renew_as_zeros(transposed);
  gradients_.renew_as_zeros(gradients);
  biases_.renew_as_zeros(biases_size_);
  bias_sums_.renew_as_zeros((chunk_blocks_ + 1) * biases_size_);
  losses_.renew_as_zeros(ceil_div(args.batch_size, block_rows_));
  squares_.renew_as_zeros(strips_);
  row_claims_.renew_as_zeros(chunk_blocks_);
  strip_claims_.renew_as_zeros(strips_);
}

template <class Op>
void Training<Op>::reserve_workers(int64_t count) {
  if (count <= reserved_) return;
  worker_memory_.renew_as_zeros(count * worker_size());
  reserved_ = count;
}

template <class Op>
typename Training<Op>::Worker Training<Op>::worker(int64_t me) {
  float* next = worker_memory_.get() + me * worker_size();
  const auto take = [&](int64_t count) {
    float* taken = next;
    next += count;
    return taken;
  };
  Worker worker = {};
  worker.tile = take(std::max(block_rows_, kStrip) * kPanel);
  worker.out = take(block_rows_ * widest_);
  worker.grad = take(block_rows_ * widest_);
  worker.preacts = take(hidden_size_);
  worker.scales = take(hidden_size_);
  for (Op*& dz : worker.dz) dz = reinterpret_cast<Op*>(take(block_rows_ * widest_));
  worker.rows = reinterpret_cast<BFloat16*>(take(kStrip * kPanel));
  worker.update_group = -1;
  return worker;
}

template <class Op>
int64_t Training<Op>::run(const TrainCall& call, const Runtime& runtime) {
  call_ = &call;
  runtime_ = &runtime;
  steps_ = ceil_div(call.rows, args_.batch_size);
  bad_chunk_.store(steps_ * chunks_per_step());
  const bool shared = 3 * multiply_adds_ * std::min(args_.batch_size, call.rows) >= kSharedWork;
  workers_ = shared ? std::min(runtime.threads, std::max(chunk_blocks_, strips_)) : 1;
  reserve_workers(workers_);
  rows_done_.store(0);
  strips_done_.store(0);
  for (int64_t i = 0; i < chunk_blocks_; ++i) row_claims_.get()[i].round.store(0);
  for (int64_t i = 0; i < strips_; ++i) strip_claims_.get()[i].round.store(0);
  if (workers_ == 1) {
    work_as(0);
  } else {
    runtime.parallel_for(
        workers_, [](void* self, int64_t begin, int64_t) { static_cast<Training*>(self)->work_as(begin); }, this);
  }
  const int64_t taken = bad_chunk_.load() / chunks_per_step();
  for (int64_t l = 0; l < args_.depth; ++l)
    for (const Parameter* parameter : {&args_.layers[l].weight, &args_.layers[l].bias})
      if (parameter->trained && parameter->steps != nullptr) *parameter->steps += static_cast<float>(taken);
  return taken;
}

// Where a worker's own share of the strips begins, in weights. It keeps its share from step to step, in its L2 cache.
template <class Op>
int64_t Training<Op>::first_strip_of(int64_t me) const {
  const int64_t before = multiply_adds_ * me / workers_;
  int64_t i = 0;
  for (int64_t weights = 0; i < strips_; ++i) {
    if (weights >= before) break;
    weights += strip(i).rows * args_.layers[strip(i).layer].in;
  }
  return i % strips_;
}

// Everything that worker `me` does in a call. All workers see the same phases; who does a task is settled by its claim.
template <class Op>
void Training<Op>::work_as(int64_t me) {
  const BrgemmGuard<Op> guard{*runtime_};
  const FlushDenormals flush;
  Worker memory = worker(me);
  Place rows_place, strips_place;
  const int64_t own_strip = first_strip_of(me);
  const auto strip_phase = [&](const auto& task) {
    run_phase(strips_done_, strip_claims_.get(), strips_place, strips_, own_strip, task);
  };
  strip_phase([&](int64_t i) { pack(memory, i); });
  for (int64_t step = 0; step < steps_; ++step) {
    Chunk chunk = {step * chunks_per_step(), step, step * args_.batch_size, 0, 0, 0};
    chunk.batch_rows = std::min(args_.batch_size, call_->rows - chunk.first);
    for (; chunk.row < chunk.batch_rows; chunk.row += chunk.rows, ++chunk.number) {
      chunk.rows = std::min(chunk_rows_, chunk.batch_rows - chunk.row);
      const int64_t blocks = ceil_div(chunk.rows, block_rows_);
      run_phase(rows_done_, row_claims_.get(), rows_place, blocks, me * blocks / workers_,
                [&](int64_t i) { rows_task(memory, chunk, i); });
      // Of a later chunk a worker that is late may know already; it ends there, as all do.
      if (bad_chunk_.load() == chunk.number && !PLANTED(NoStop)) {
        if (me == 0) finish_loss(chunk);
        return;
      }
      strip_phase([&](int64_t i) { strip_task(memory, chunk, i); });
    }
    if (clips_norm()) strip_phase([&](int64_t i) { clipped_task(memory, step, i); });
  }
}

template <class Op>
template <class Task>
void Training<Op>::run_phase(std::atomic<int64_t>& done, Claim* claims, Place& place, int64_t count, int64_t first,
                             const Task& task) {
  place.round += 1;
  place.target += count;
  int64_t finished = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t i = first + k < count ? first + k : first + k - count;
    int64_t seen = claims[i].round.load(std::memory_order_relaxed);
    const bool taken = seen >= place.round || !claims[i].round.compare_exchange_strong(seen, place.round);
    if (taken && !PLANTED(NoClaims)) continue;
    task(i);
    ++finished;
  }
  if (finished > 0) finish_tasks(done, finished, place.target);
  if (!PLANTED(NoWait)) wait_for_tasks(done, place.target);
}

}  // namespace FASTENC_ISA
}  // namespace fastenc
