#include "crew.h"

#include <thread>

namespace fastenc {

namespace {

// Waking a sleeper takes longer than a step of a small batch, so a worker stays awake for some milliseconds; but it
// soon offers its core to others, among which may be the very thread that it waits for.
constexpr int kSpins = 2000;
constexpr int kYields = 4000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

void finish_tasks(std::atomic<int64_t>& done, int64_t count, int64_t target) {
  if (done.fetch_add(count) + count == target) done.notify_all();
}

void wait_for_tasks(std::atomic<int64_t>& done, int64_t target) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (done.load(std::memory_order_acquire) >= target) return;
    pause();
  }
  for (int yield = 0; yield < kYields; ++yield) {
    if (done.load(std::memory_order_acquire) >= target) return;
    std::this_thread::yield();
  }
  for (int64_t seen = done.load(); seen < target; seen = done.load()) done.wait(seen);
}

}  // namespace fastenc
