// Workers that go through phases of tasks together without a barrier. Each phase is a number of tasks; whoever comes
// claims tasks that nobody has, its own share first, and waits only for tasks that others are in the middle of. So a
// worker that comes late, or never, holds nobody up, and a core that is busy elsewhere does less.
#pragma once

#include <atomic>
#include <cstdint>

// A mistake that a test's build makes on purpose; see tests/native/planted.h.
#ifndef PLANTED
#define PLANTED(name) false
#endif

namespace fastenc {

// Who has a task: the latest round in which it was claimed. Rounds are numbered from 1.
struct alignas(64) Claim {
  std::atomic<int64_t> round;
};

// Adds `count` finished tasks and, if that makes `target`, wakes those who sleep.
void finish_tasks(std::atomic<int64_t>& done, int64_t count, int64_t target);

// Waits until `done` is at least `target`: a short while awake, then asleep, so that the core is free for whoever is
// late.
void wait_for_tasks(std::atomic<int64_t>& done, int64_t target);

}  // namespace fastenc
