#include "crew.h"

namespace fastenc {

namespace {

constexpr int kSpins = 4000;  // some 30 us: longer than tasks of small batches differ in

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
  for (int64_t seen = done.load(); seen < target; seen = done.load()) done.wait(seen);
}

}  // namespace fastenc
