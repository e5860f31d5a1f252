#include "simt.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>

#include "fiber.h"

#if defined(SIMT_THREAD_SANITIZER)
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace simt {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kMostShared = 101376;  // bytes a block can have on every GPU from compute capability 8.0 on

enum class Waits { kNot, kBlock, kWarp };

struct Copy {
  void* shared;
  const void* global;
  int bytes, source_bytes;
};

struct Thread {
  Fiber fiber;
  bool done = false;
  Waits waits = Waits::kNot;
  const char* site = "";
  unsigned block_barriers = 0, warp_barriers = 0, exchanges = 0;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  bool quiet_at_end = false;  // the Quiet under which it ended was never undone
};

struct Warp {
  unsigned char given[2][kWarp][64];
  char barrier_keys[2];
};

struct State {
  Schedule schedule;
  uint64_t random = 1;
  std::function<void()> kernel;
  Dim3 grid, block, block_index;
  unsigned count = 0;    // threads of a block
  unsigned current = 0;  // the one that runs
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  char barrier_keys[2];
  char* shared = nullptr;
  std::string fault;
};

State& state() {
  static State& s = *new State;  // never destroyed: ThreadSanitizer looks at fibers that end
  return s;
}

Thread& current() { return *state().threads[state().current]; }

void acquire([[maybe_unused]] void* key) {
#if defined(SIMT_THREAD_SANITIZER)
  __tsan_acquire(key);
#endif
}

void release([[maybe_unused]] void* key) {
#if defined(SIMT_THREAD_SANITIZER)
  __tsan_release(key);
#endif
}

uint64_t next_random() {
  uint64_t& x = state().random;
  x ^= x << 13;
  x ^= x >> 7;
  return x ^= x << 17;
}

// key: what orders memory, or null: nothing does.
void wait(Waits kind, const char* site, void* key) {
  Thread& thread = current();
  if (key) release(key);
  thread.waits = kind;
  thread.site = site;
  thread.fiber.leave();
  if (key) acquire(key);
}

void thread_entry() {
  const bool was_quiet = [] {
    Quiet quiet;
    return std::exchange(current().quiet_at_end, true);
  }();
#if defined(SIMT_THREAD_SANITIZER)
  if (was_quiet) {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  static_cast<void>(was_quiet);
#endif
  current().fiber.begin();
  try {
    state().kernel();
  } catch (const std::exception& error) {
    Quiet quiet;
    state().fault = error.what();
  }
  const Quiet quiet;
  if (!current().open.empty()) state().fault = "a thread ends with an asynchronous copy that it did not commit";
  current().done = true;
  current().fiber.leave(/* for_good */ true);
}

// Lets those warps go on that wait as a whole; whether there were any.
bool release_warps() {
  State& s = state();
  bool released = false;
  for (unsigned first = 0; first < s.count; first += kWarp) {
    unsigned waiting = 0;
    const char* site = nullptr;
    for (unsigned i = first; i < first + kWarp; ++i) {
      if (s.threads[i]->waits != Waits::kWarp) continue;
      ++waiting;
      if (site && std::strcmp(site, s.threads[i]->site))
        throw Fault(std::string("lanes of a warp are apart: some at ") + site + ", some at " + s.threads[i]->site);
      site = s.threads[i]->site;
    }
    if (waiting < kWarp) continue;
    for (unsigned i = first; i < first + kWarp; ++i) s.threads[i]->waits = Waits::kNot;
    released = true;
  }
  return released;
}

// Runs every thread that can go on until it waits or ends; whether there were any.
bool run_threads(std::vector<unsigned>& order) {
  State& s = state();
  const auto can_go_on = [&](unsigned i) { return !s.threads[i]->done && s.threads[i]->waits == Waits::kNot; };
  if (s.schedule.order == Order::kRandom)
    for (unsigned i = s.count; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  int only_warp = -1;
  if (s.schedule.order == Order::kGreedy) {
    const unsigned warps = s.count / kWarp, offset = s.schedule.seed % warps;
    for (unsigned w = 0; w < warps && only_warp < 0; ++w) {
      const unsigned first = (w + offset) % warps * kWarp;
      for (unsigned i = first; i < first + kWarp; ++i)
        if (can_go_on(i)) only_warp = static_cast<int>(first / kWarp);
    }
  }
  bool ran = false;
  for (const unsigned i : order) {
    if (!can_go_on(i) || (only_warp >= 0 && i / kWarp != static_cast<unsigned>(only_warp))) continue;
    s.current = i;
    ran = true;
    s.threads[i]->fiber.enter();
    if (!s.fault.empty()) throw Fault(s.fault);
  }
  return ran;
}

void run_block() {
  State& s = state();
  std::vector<unsigned> order(s.count);
  for (unsigned i = 0; i < s.count; ++i) {
    order[i] = s.schedule.order == Order::kReverse ? s.count - 1 - i : i;
    Thread& thread = *s.threads[i];
    thread.done = false;
    thread.waits = Waits::kNot;
    thread.block_barriers = thread.warp_barriers = thread.exchanges = 0;
    thread.open.clear();
    thread.groups.clear();
    thread.fiber.start(thread_entry);
  }
  for (;;) {
    const bool ran = run_threads(order);
    if (release_warps() || (ran && s.schedule.order == Order::kGreedy)) continue;
    unsigned live = 0, at_barrier = 0;
    for (unsigned i = 0; i < s.count; ++i) {
      live += !s.threads[i]->done;
      at_barrier += !s.threads[i]->done && s.threads[i]->waits == Waits::kBlock;
    }
    if (!live) return;
    if (at_barrier < s.count)
      throw Fault(at_barrier == live ? "not all threads of a block come to its barrier: some have returned"
                                     : "threads wait for each other at different places");
    for (unsigned i = 0; i < s.count; ++i) s.threads[i]->waits = Waits::kNot;
  }
}

void carry_out(const Copy& copy) {
  unsigned char bytes[16] = {};
  if (copy.source_bytes > 0) std::memcpy(bytes, copy.global, static_cast<size_t>(copy.source_bytes));
  std::memcpy(copy.shared, bytes, static_cast<size_t>(copy.bytes));
}

}  // namespace

Quiet::Quiet() {
#if defined(SIMT_THREAD_SANITIZER)
  AnnotateIgnoreReadsBegin("", 0);
  AnnotateIgnoreWritesBegin("", 0);
#endif
}

Quiet::~Quiet() {
#if defined(SIMT_THREAD_SANITIZER)
  AnnotateIgnoreWritesEnd("", 0);
  AnnotateIgnoreReadsEnd("", 0);
#endif
}

void set_schedule(const Schedule& schedule) {
  state().schedule = schedule;
  state().random = schedule.seed * 0x9e3779b97f4a7c15u | 1;
}

void launch(Dim3 grid, Dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  State& s = state();
  s.grid = grid;
  s.block = block;
  s.count = block.x * block.y * block.z;
  if (s.count == 0 || s.count % kWarp || s.count > 1024)
    throw Fault("a block has " + std::to_string(s.count) + " threads; it needs whole warps, at most 1024 threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    throw Fault("a grid is too large, or empty");
  if (shared_bytes > kMostShared)
    throw Fault("a block asks for " + std::to_string(shared_bytes) + " bytes of shared memory");
  record_launch(grid, block, shared_bytes);
  if (!running) return;
  s.kernel = std::move(kernel);
  s.fault.clear();
  while (s.threads.size() < s.count) s.threads.push_back(std::make_unique<Thread>());
  s.warps.resize(s.count / kWarp);
  std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
  for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  if (s.schedule.order != Order::kForward)
    for (uint64_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[next_random() % i]);
  for (const uint64_t block_number : blocks) {
    s.block_index = {static_cast<unsigned>(block_number % grid.x),
                     static_cast<unsigned>(block_number / grid.x % grid.y),
                     static_cast<unsigned>(block_number / grid.x / grid.y)};
    // For each block anew, of just this size: what lies behind it is another's.
    std::free(s.shared);
    s.shared = shared_bytes ? static_cast<char*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16)) : nullptr;
    if (shared_bytes) std::memset(s.shared, 0xFF, shared_bytes);
    for (unsigned i = 0; i < s.count; ++i) s.threads[i]->fiber.synchronize();
    run_block();
    for (unsigned i = 0; i < s.count; ++i) s.threads[i]->fiber.synchronize();
    count_block();
  }
}

Dim3 thread_index() {
  const State& s = state();
  return {s.current % s.block.x, s.current / s.block.x % s.block.y, s.current / s.block.x / s.block.y};
}
Dim3 block_index() { return state().block_index; }
Dim3 block_size() { return state().block; }
Dim3 grid_size() { return state().grid; }
unsigned thread_number() { return state().current; }
unsigned lane() { return state().current % kWarp; }
void* shared_memory() { return state().shared; }

void block_barrier() {
  const Quiet quiet;
  // Two keys in turn: who arrives at the next barrier must not be seen as having arrived at this one.
  wait(Waits::kBlock, "a block's barrier", &state().barrier_keys[current().block_barriers++ % 2]);
}

void warp_barrier() {
  const Quiet quiet;
  wait(Waits::kWarp, "a warp's barrier",
       &state().warps[state().current / kWarp].barrier_keys[current().warp_barriers++ % 2]);
}

Given exchange(const void* given, size_t bytes, const char* site) {
  const Quiet quiet;
  auto& slots = state().warps[state().current / kWarp].given[current().exchanges++ % 2];
  std::memcpy(slots[lane()], given, bytes);
  wait(Waits::kWarp, site, nullptr);  // it orders no memory
  return slots;
}

void copy_async(void* shared, const void* global, int bytes, int source_bytes) {
  const Copy copy = {shared, global, bytes, source_bytes};
  {
    const Quiet quiet;
    const auto misaligned = [&](const void* address) { return reinterpret_cast<uintptr_t>(address) % bytes != 0; };
    if (misaligned(shared) || misaligned(global))
      throw Fault("cp.async of " + std::to_string(bytes) + " bytes at an address that is no multiple of that");
    current().open.push_back(copy);
  }
  if (!state().schedule.late_copies) carry_out(copy);
}

void commit_copies() {
  const Quiet quiet;
  current().groups.push_back(std::exchange(current().open, {}));
}

void wait_copies(size_t left) {
  std::vector<Copy> landed;
  {
    const Quiet quiet;
    auto& groups = current().groups;
    const auto end = groups.begin() + static_cast<std::ptrdiff_t>(groups.size() > left ? groups.size() - left : 0);
    for (auto group = groups.begin(); group != end; ++group) landed.insert(landed.end(), group->begin(), group->end());
    groups.erase(groups.begin(), end);
  }
  if (state().schedule.late_copies)
    for (const Copy& copy : landed) carry_out(copy);
}

}  // namespace simt
