// The training engine without torch, on buffers of exactly the right size, its workers plain threads that come
// together, late or never: for the sanitizers, and for the same bits however it is run.
//
// Usage: train_threads PASSES [MISTAKE]. Each pass runs every stack, batch size and dtype once, with other losses,
// optimisers and options. MISTAKE is the name of a PLANTED(name) in csrc/cpu. The exit status is 1 where bits differ.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/stack.h"
#include "cpu/train.h"

using namespace fastenc;

namespace {

std::string mistake;
int64_t crews = 0;  // calls that asked for more than one worker

enum Arrival { kTogether, kFirstLate, kOthersLate, kEverySecond, kOnlyFirst, kArrivals };
Arrival arrival = kTogether;

void parallel_for(int64_t count, Runtime::Body body, void* context) {
  ++crews;
  // A worker whose number does not begin a range never comes.
  const int64_t span = arrival == kOnlyFirst ? count : arrival == kEverySecond ? 2 : 1;
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < count; begin += span)
    threads.emplace_back([=] {
      const bool late = arrival == (begin == 0 ? kFirstLate : kOthersLate);
      if (late) std::this_thread::sleep_for(std::chrono::milliseconds(1 + begin));
      body(context, begin, std::min(begin + span, count));
    });
  for (std::thread& thread : threads) thread.join();
}

struct Setup {
  Dtype dtype;
  std::vector<int64_t> widths;
  int64_t batch_size;
  int64_t rows;
  uint32_t seed;
};

std::string described(const Setup& setup) {
  std::string text = setup.dtype == Dtype::kFloat ? "float" : "bfloat16";
  for (const int64_t width : setup.widths) text += " " + std::to_string(width);
  return text + ", batch " + std::to_string(setup.batch_size) + ", seed " + std::to_string(setup.seed);
}

// Memory that ends where a page begins that nobody may touch: sanitizers do not see masked vector instructions.
template <class T>
struct Guarded {
  using value_type = T;
  static constexpr size_t kPage = 4096;
  static size_t pages_size(size_t count) { return (count * sizeof(T) + kPage - 1) / kPage * kPage; }

  T* allocate(size_t count) {
    const size_t size = pages_size(count);
    void* memory = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    char* end = static_cast<char*>(memory) + size;
    mprotect(end, kPage, PROT_NONE);
    return reinterpret_cast<T*>(end) - count;
  }
  void deallocate(T* data, size_t count) {
    munmap(reinterpret_cast<char*>(data + count) - pages_size(count), pages_size(count) + kPage);
  }
  bool operator==(const Guarded&) const { return true; }
};

template <class T>
using Buffer = std::vector<T, Guarded<T>>;  // made at its full size at once: one that grows has room to spare
using Floats = Buffer<float>;

// A model, its data, its optimiser's state and an engine. Two of the same setup are the same.
class Job {
 public:
  Job(const Kernels& kernels, const Setup& setup) : kernels_(kernels), setup_(setup), random_(setup.seed) {
    const int64_t depth = static_cast<int64_t>(setup.widths.size()) - 1, in = setup.widths[0];
    out_ = setup.widths[depth];
    loss_ = static_cast<LossKind>(pick(7));
    optimizer_ = static_cast<OptimizerKind>(pick(3));
    momentum_ = pick(3) ? 0.9 : 0.0;
    const bool has_labels = loss_ == LossKind::kCrossEntropy && pick(2), leaves_gradients = pick(2);
    const double dropout = pick(2) ? 0.3 : 0.0;
    const int64_t clips = pick(3), frozen = pick(4), without_bias = pick(4);
    const double l1 = pick(2) ? 0.001 : 0.0;
    groups_ = {{0.8, 0.99, 1e-8, momentum_, pick(2) ? 0.01 : 0.0, momentum_ > 0.0 && pick(2)},
               {0.9, 0.999, 1e-8, momentum_, 0.0, false}};
    for (int64_t l = 0; l < depth; ++l) {
      const int64_t from = setup.widths[l], to = setup.widths[l + 1];
      auto activation = static_cast<ActivationKind>(pick(static_cast<int64_t>(ActivationKind::kCount)));
      if (l + 1 == depth && loss_ == LossKind::kBce) activation = ActivationKind::kSigmoid;
      const bool last = l + 1 == depth;
      const Parameter weight = parameter(from * to, !(frozen == 1 && l == 0), 0, leaves_gradients);
      const Parameter bias = without_bias == l ? Parameter{} : parameter(to, frozen != 2 || last, 1, leaves_gradients);
      layers_.push_back({from, to, activation, last ? 0.0 : dropout, weight, bias});
    }
    x_stride_ = in + pick(2) * 3;
    target_stride_ = out_ + pick(2) * 3;
    x_ = random(setup.rows * x_stride_ - (x_stride_ - in), -1.0f);
    if (has_labels) {
      labels_ = Buffer<int64_t>(static_cast<size_t>(setup.rows));
      for (int64_t& label : labels_) label = pick(out_);
    } else {
      target_ = random(setup.rows * target_stride_ - (target_stride_ - out_), 0.0f);
    }
    if (pick(2)) weights_ = random(setup.rows, 0.0f);
    order_ = Buffer<int64_t>(static_cast<size_t>(setup.rows));
    for (int64_t i = 0; i < setup.rows; ++i) order_[i] = setup.rows - 1 - i;
    rates_ = Buffer<double>(static_cast<size_t>(2 * steps()));
    for (int64_t i = 0; i < 2 * steps(); ++i) rates_[i] = (1 + i % 2) * 0.01 / static_cast<double>(1 + i / 2);
    losses_ = Buffer<double>(static_cast<size_t>(steps()), -1.0);
    args_ = {setup.dtype,
             depth,
             layers_.data(),
             setup.batch_size,
             loss_,
             optimizer_,
             /* group_count */ 2,
             groups_.data(),
             l1,
             /* clip_norm */ clips == 1 ? 0.01 : 0.0,
             /* clip_value */ clips == 2 ? 0.001 : 0.0};
    training_ = kernels.engine.create(args_);
  }
  Job(const Job&) = delete;
  ~Job() { kernels_.engine.destroy(training_); }

  int64_t steps() const { return (setup_.rows + setup_.batch_size - 1) / setup_.batch_size; }
  double loss(int64_t step) const { return losses_[step]; }
  // Of the row that comes at `position` of the order.
  void spoil(int64_t position) { x_[order_[position] * x_stride_] = std::nanf(""); }

  // Steps [first, end); how many were taken.
  int64_t run(int64_t first, int64_t end, int64_t workers) {
    const Runtime runtime = {parallel_for, workers, nullptr, nullptr, nullptr};
    const int64_t begin = first * setup_.batch_size, rows = std::min(end * setup_.batch_size, setup_.rows) - begin;
    const TrainCall call = {x_.data(),
                            x_stride_,
                            labels_.empty() ? target_.data() : nullptr,
                            target_stride_,
                            labels_.empty() ? nullptr : labels_.data(),
                            weights_.empty() ? nullptr : weights_.data(),
                            order_.data() + begin,
                            rows,
                            rates_.data() + first * 2,
                            /* seed */ 123456789,
                            first,
                            losses_.data() + first};
    return kernels_.engine.run(training_, call, runtime);
  }

  // The bits of all that training changes; of the losses, those of the first `steps`.
  std::string state(int64_t steps) const {
    std::string bits(reinterpret_cast<const char*>(losses_.data()), static_cast<size_t>(steps) * sizeof(double));
    for (const auto& buffer : buffers_)
      bits.append(reinterpret_cast<const char*>(buffer->data()), buffer->size() * sizeof(float));
    return bits;
  }

 private:
  int64_t pick(int64_t count) { return static_cast<int64_t>(random_() >> 8) % count; }

  Floats random(int64_t count, float lowest) {
    Floats values(static_cast<size_t>(count));
    for (float& value : values) value = lowest + (1.0f - lowest) * static_cast<float>(pick(1000)) / 999.0f;
    return values;
  }

  float* keep(Floats values) { return buffers_.emplace_back(new Floats(std::move(values)))->data(); }

  Parameter parameter(int64_t count, bool trained, int64_t group, bool leaves_gradient) {
    Floats values = random(count, -1.0f);
    for (float& value : values) value *= 0.3f;
    Parameter parameter;
    parameter.value = keep(values);
    parameter.trained = trained;
    parameter.group = group;
    if (!trained) return parameter;
    const bool adam = optimizer_ != OptimizerKind::kSgd;
    const Floats zeros(static_cast<size_t>(count));
    if (adam || momentum_ > 0.0) parameter.moments[0] = keep(zeros);
    if (adam) parameter.moments[1] = keep(zeros);
    if (adam) parameter.steps = keep(Floats(1));
    if (leaves_gradient) parameter.grad = keep(zeros);
    return parameter;
  }

  const Kernels& kernels_;
  const Setup setup_;
  std::mt19937 random_;
  std::vector<std::unique_ptr<Floats>> buffers_;
  int64_t out_;
  LossKind loss_;
  OptimizerKind optimizer_;
  double momentum_;
  std::vector<Group> groups_;
  std::vector<TrainLayer> layers_;
  int64_t x_stride_, target_stride_;
  Floats x_, target_, weights_;
  Buffer<int64_t> labels_, order_;
  Buffer<double> rates_, losses_;
  TrainArgs args_;
  void* training_;
};

void require(bool holds, const Setup& setup, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s: %s (arrival %d)\n", described(setup).c_str(), what, arrival);
  std::exit(1);
}

std::string alone(const Kernels& kernels, const Setup& setup) {
  Job job(kernels, setup);
  require(job.run(0, job.steps(), 1) == job.steps(), setup, "a loss is not finite");
  return job.state(job.steps());
}

void check_bits(const Kernels& kernels, const Setup& setup) {
  const std::string expected = alone(kernels, setup);
  require(alone(kernels, setup) == expected, setup, "a second run has other bits");
  arrival = static_cast<Arrival>(setup.seed % kArrivals);
  for (const int64_t workers : {2, 4, 9}) {
    Job job(kernels, setup);
    job.run(0, job.steps(), workers);
    require(job.state(job.steps()) == expected, setup, "more workers make other bits");
    arrival = static_cast<Arrival>((arrival + 1) % kArrivals);
  }
  Job job(kernels, setup);
  job.run(0, 1, 2);
  job.run(1, job.steps(), 4);
  require(job.state(job.steps()) == expected, setup, "two calls make other bits than one");
}

// Not finite: row `row` of the batch of the second step, whose loss is told and which is not taken.
void check_stop(const Kernels& kernels, const Setup& setup, int64_t row) {
  const int64_t position = setup.batch_size + row;
  Job before(kernels, setup);
  before.run(0, 1, 1);
  for (const int64_t workers : {1, 2, 4}) {
    arrival = static_cast<Arrival>((arrival + 1) % kArrivals);
    Job job(kernels, setup);
    job.spoil(position);
    require(job.run(0, job.steps(), workers) == 1, setup, "the step of a bad row is not where training ends");
    require(!std::isfinite(job.loss(1)), setup, "the loss of the bad row's step is not told");
    for (int64_t step = 2; step < job.steps(); ++step)
      require(job.loss(step) == -1.0, setup, "there is a loss of a step that was not to come");
    require(job.state(1) == before.state(1), setup, "the parameters are not as before the bad row's step");
  }
}

}  // namespace

bool is_planted(const char* name) { return mistake == name; }

int main(int argc, char** argv) {
  const int64_t passes = argc > 1 ? std::atoll(argv[1]) : 1;
  if (argc > 2) mistake = argv[2];
  const Kernels& kernels = KERNELS();
  const std::vector<std::vector<int64_t>> stacks = {{1, 1}, {17, 33}, {100, 33, 1}, {100, 130, 33}, {17, 65, 1, 33}};
  uint32_t runs = 0;
  for (int64_t pass = 0; pass < passes; ++pass)
    for (const int64_t batch_size : {1, 7, 32, 130, 700})
      for (const auto& widths : stacks)
        for (const Dtype dtype : {Dtype::kFloat, Dtype::kBFloat16}) {
          const Setup setup = {dtype, widths, batch_size, 2 * batch_size + batch_size / 2 + 1, ++runs};
          check_bits(kernels, setup);
          check_stop(kernels, setup, runs / 2 % 2 ? 0 : batch_size - 1);
        }
  std::printf("%u setups of %s, %lld calls with several workers\n", runs, kernels.name, static_cast<long long>(crews));
}
