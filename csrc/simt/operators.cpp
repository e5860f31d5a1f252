#include "operators.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <sstream>

#include "simt.h"

namespace simt {
namespace {

// NaN as half, as bfloat16, and twice as float; no arithmetic makes it.
constexpr uint16_t kPoison = 0x7fd5;
constexpr int64_t kAlignment = 64;  // bytes; what PyTorch's own allocator gives
constexpr int64_t kGuardRows = 128;

struct Guarded {
  Tensor memory;  // of bytes
  int64_t begin, bytes;
};
bool guarding = false;
std::vector<Guarded> guarded;

int64_t round_up(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes,
                std::optional<torch::headeronly::ScalarType> dtype) {
  Tensor plain = torch::stable::new_empty(like, sizes, dtype);
  if (!guarding || plain.numel() == 0) return plain;
  const int64_t item = plain.element_size(), bytes = plain.numel() * item;
  const int64_t guard = round_up(kGuardRows * std::min<int64_t>(plain.size(plain.dim() - 1) * item, 4096));
  Tensor memory = torch::stable::new_empty(like, {(guard + round_up(bytes) + guard) / item}, plain.scalar_type());
  uint16_t* words = static_cast<uint16_t*>(memory.mutable_data_ptr());
  std::fill(words, words + memory.numel() * item / 2, kPoison);
  AtenTensorHandle inside;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(memory.get(), plain.dim(), plain.sizes().data(),
                                                               plain.strides().data(), guard / item, &inside));
  guarded.push_back({memory, guard, bytes});
  return Tensor(inside);
}

namespace {

// The names of the orders, as in simt.h.
void schedule(std::string order, bool late_copies, int64_t seed, std::string planted_name) {
  const std::map<std::string, Order> orders = {{"forward", Order::kForward},
                                               {"reverse", Order::kReverse},
                                               {"random", Order::kRandom},
                                               {"greedy", Order::kGreedy}};
  set_schedule({orders.at(order), late_copies, static_cast<uint64_t>(seed)});
  planted = planted_name.empty() ? 0 : name_hash(planted_name.c_str());
}

void guard(bool on) {
  guarding = on;
  guarded.clear();
}

// How many bytes were written around what was allocated since guard(True).
int64_t stray_writes() {
  int64_t stray = 0;
  for (const Guarded& one : guarded) {
    const unsigned char* memory = static_cast<const unsigned char*>(one.memory.const_data_ptr());
    const int64_t all = one.memory.numel() * one.memory.element_size();
    for (int64_t i = 0; i < all; ++i)
      if (i < one.begin || i >= one.begin + one.bytes) stray += memory[i] != (i % 2 ? kPoison >> 8 : kPoison & 0xff);
  }
  return stray;
}

void count(bool on) {
  counting = on;
  forget_traffic();
}

void run(bool on) { running = on; }

// JSON: {"launches": [[blocks, threads, shared bytes], ...], "kernels": [name of each launch's], "traffic": [{"site":
// "file:line", "space": "global load", "accesses": ..., "bytes": ..., "moved": ..., "passes": ..., "least": ...},
// ...]}, since count(True).
std::string traffic_as_json() {
  const char* names[] = {"global load", "global store", "shared load", "shared store"};
  std::ostringstream json;
  json << "{\"launches\": [";
  const char* separator = "";
  for (const LaunchRecord& launch : launches()) {
    json << separator << "[" << launch.grid.x << ", " << launch.block.x << ", " << launch.shared_bytes << "]";
    separator = ", ";
  }
  json << "], \"kernels\": [";
  separator = "";
  for (const LaunchRecord& launch : launches()) {
    json << separator << "\"" << launch.kernel << "\"";
    separator = ", ";
  }
  json << "], \"traffic\": [";
  separator = "";
  for (const auto& [site, traffic] : traffic()) {
    json << separator << "{\"site\": \"" << site.first << "\", \"space\": \"" << names[static_cast<int>(site.second)]
         << "\", \"accesses\": " << traffic.accesses << ", \"bytes\": " << traffic.bytes
         << ", \"moved\": " << traffic.moved << ", \"passes\": " << traffic.passes << ", \"least\": " << traffic.least
         << "}";
    separator = ", ";
  }
  json << "]}";
  return json.str();
}

}  // namespace
}  // namespace simt

STABLE_TORCH_LIBRARY(fastenc_simt, m) {
  m.def("schedule(str order, bool late_copies, int seed, str planted) -> ()");
  m.def("guard(bool on) -> ()");
  m.def("stray_writes() -> int");
  m.def("count(bool on) -> ()");
  m.def("run(bool on) -> ()");
  m.def("traffic() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastenc_simt, CompositeExplicitAutograd, m) {
  m.impl("schedule", TORCH_BOX(&simt::schedule));
  m.impl("guard", TORCH_BOX(&simt::guard));
  m.impl("stray_writes", TORCH_BOX(&simt::stray_writes));
  m.impl("count", TORCH_BOX(&simt::count));
  m.impl("run", TORCH_BOX(&simt::run));
  m.impl("traffic", TORCH_BOX(&simt::traffic_as_json));
}
