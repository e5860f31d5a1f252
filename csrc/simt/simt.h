// Runs CUDA kernels on a CPU, to find their mistakes: not for speed.
//
// Each GPU thread is a fiber. A block runs to its end on one thread of the system, its fibers switched only where they
// meet: at barriers and at what a warp does together. The order between meetings is a schedule to choose; a right
// kernel gives the same bits under all of them. Shared memory starts as NaN. Asynchronous copies land as late, or as
// early, as the PTX manual allows. Under AddressSanitizer and ThreadSanitizer the fibers are made known to them; only
// barriers order memory, so that ThreadSanitizer sees races within a block.
//
// A kernel's misuse of the machine (a barrier that not all reach, a misaligned address) is a Fault.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Which fiber runs next: in the order of their numbers, against it, at random; or one warp as far ahead of the others
// as barriers allow.
enum class Order { kForward, kReverse, kRandom, kGreedy };

struct Schedule {
  Order order = Order::kForward;
  bool late_copies = true;  // asynchronous copies land when waited for; else at once
  uint64_t seed = 1;
};
void set_schedule(const Schedule& schedule);

// A mistake to make on purpose, chosen by its name: PLANTED(name) in a kernel is true while it is.
constexpr uint64_t name_hash(const char* name) {
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  while (*name) hash = (hash ^ static_cast<unsigned char>(*name++)) * 1099511628211u;
  return hash;
}
inline uint64_t planted = 0;
#define PLANTED(name) (simt::planted == std::integral_constant<uint64_t, simt::name_hash(#name)>::value)

// Runs kernel() once for every thread of every block.
void launch(Dim3 grid, Dim3 block, size_t shared_bytes, std::function<void()> kernel);

// Where the running fiber is.
Dim3 thread_index();
Dim3 block_index();
Dim3 block_size();
Dim3 grid_size();
unsigned thread_number();  // in its block
unsigned lane();           // thread_number() % 32
void* shared_memory();

// What threads do together. `site` names it in a Fault.
void block_barrier();
void warp_barrier();
// Every lane of the warp gives `bytes`, at most 64, and sees what all gave, until its next exchange: [32][64].
using Given = const unsigned char (*)[64];
Given exchange(const void* given, size_t bytes, const char* site);

// Asynchronous copies of the running fiber.
void copy_async(void* shared, const void* global, int bytes, int source_bytes);
void commit_copies();
void wait_copies(size_t left);

// The emulator's own reads and writes are not the kernel's: ThreadSanitizer must not see them.
class Quiet {
 public:
  Quiet();
  ~Quiet();
};

// Memory traffic, counted while `counting`: for each place in the source, accesses by whole warps and what they cost.
struct Traffic {
  int64_t accesses = 0;  // by one warp each
  int64_t bytes = 0;     // that its lanes asked for; the same bytes asked for twice count once
  int64_t moved = 0;     // global: 32 bytes for each sector touched
  int64_t passes = 0;    // shared: trips to the banks
  int64_t least = 0;     // shared: trips without a conflict
};
enum class Space { kGlobalLoad, kGlobalStore, kSharedLoad, kSharedStore };
using Site = std::pair<std::string, Space>;  // "file:line"
inline bool counting = false;
void count_access(Space space, const void* address, int bytes, const char* file, int line);
inline void note(Space space, const void* address, int bytes, const char* file, int line) {
  if (counting) count_access(space, address, bytes, file, line);
}
const std::map<Site, Traffic>& traffic();
void forget_traffic();

struct LaunchRecord {
  std::string kernel;  // as typeid gives it: a type with the kernel's mangled name in it
  Dim3 grid, block;
  size_t shared_bytes;
};
inline const char* kernel_name = "";          // of the next launch
inline bool running = true;                   // else launches are recorded and not run
const std::vector<LaunchRecord>& launches();  // since forget_traffic

// Of simt.cpp and traffic.cpp with each other.
void record_launch(Dim3 grid, Dim3 block, size_t shared_bytes);
void count_block();

}  // namespace simt
