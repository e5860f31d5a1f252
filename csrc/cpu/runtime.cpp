#include "runtime.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>
#include <vector>
#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace fastenc {

namespace {

void parallel_for(int64_t count, Runtime::Body body, void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

// libtorch exports brgemm, but the stable ABI does not declare it.
void* find_in_libtorch(const char* name) {
#if defined(_WIN32)
  return nullptr;
#else
#if defined(__APPLE__)
  static void* const library = dlopen("libtorch_cpu.dylib", RTLD_LAZY | RTLD_NOLOAD);
#else
  static void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
#endif
  return library == nullptr ? nullptr : dlsym(library, name);
#endif
}

// brgemm throws, or falls back to something slower, on CPUs without it; a symbol may also change its meaning. So each
// is tried once on exact integers before it is trusted.
template <class Element, class Brgemm>
bool works(Brgemm brgemm, Element one, Element two, bool vnni) {
  constexpr int64_t kSize = 16;
  std::vector<Element> A(kSize * kSize, one), B(kSize * kSize, two);
  std::vector<float> C(kSize * kSize, 1.0f);
  try {
    brgemm(kSize, kSize, kSize, kSize, kSize, kSize, /* add_C */ true, A.data(), B.data(), C.data(), vnni);
  } catch (...) {
    return false;
  }
  for (const float c : C)
    if (c != 1.0f + 2.0f * kSize) return false;
  return true;
}

bool has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}

struct State {
  const Kernels* kernels;
  Runtime borrowed;
};

State choose(const std::string& isa, bool brgemm) {
  State state = {nullptr, {parallel_for, 1, nullptr, nullptr, nullptr}};
#if defined(__x86_64__)
  if ((isa == "auto" || isa == "avx512") && has_avx512()) state.kernels = &avx512_kernels();
  if (state.kernels == nullptr && (isa == "auto" || isa == "avx2") && has_avx2()) state.kernels = &avx2_kernels();
#endif
  if (state.kernels == nullptr && (isa == "auto" || isa == "generic")) state.kernels = &generic_kernels();
  if (state.kernels == nullptr) throw std::invalid_argument("this CPU cannot run kernels built for '" + isa + "'");
  if (!brgemm || !has_avx512()) return state;

  const auto brgemm_float =
      reinterpret_cast<Runtime::BrgemmFloat>(find_in_libtorch("_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb"));
  const auto brgemm_bfloat16 = reinterpret_cast<Runtime::BrgemmBFloat16>(
      find_in_libtorch("_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"));
  const auto release = reinterpret_cast<void (*)(bool)>(find_in_libtorch("_ZN2at6native7cpublas14brgemm_releaseEb"));
  if (brgemm_float != nullptr && works(brgemm_float, 1.0f, 2.0f, /* vnni */ false))
    state.borrowed.brgemm_float = brgemm_float;
  const uint16_t one = 0x3f80, two = 0x4000;  // in bf16
  if (brgemm_bfloat16 != nullptr && release != nullptr && works(brgemm_bfloat16, one, two, /* vnni */ true)) {
    release(true);
    state.borrowed.brgemm_bfloat16 = brgemm_bfloat16;
    state.borrowed.brgemm_release = release;
  }
  return state;
}

State& state() {
  static State current = choose("auto", true);
  return current;
}

}  // namespace

const Kernels& kernels() { return *state().kernels; }

Runtime runtime() {
  Runtime borrowed = state().borrowed;
  borrowed.threads = torch::stable::get_num_threads();
  return borrowed;
}

std::string configure(const std::string& isa, bool brgemm) {
  state() = choose(isa, brgemm);
  const Runtime& borrowed = state().borrowed;
  std::string text = state().kernels->name;
  if (borrowed.brgemm_float == nullptr && borrowed.brgemm_bfloat16 == nullptr) return text + ", no brgemm";
  text += ", brgemm for ";
  if (borrowed.brgemm_float != nullptr) text += "float32";
  if (borrowed.brgemm_float != nullptr && borrowed.brgemm_bfloat16 != nullptr) text += " and ";
  if (borrowed.brgemm_bfloat16 != nullptr) text += "bfloat16";
  return text;
}

bool leaves_to_aten(int64_t M, int64_t N, int64_t K, bool training, bool in_stack) {
  constexpr int64_t kFewRows = 4;              // a gradient of which is a few outer products
  constexpr int64_t kSomeRows = 32;            // of which our products are ahead,
  constexpr int64_t kFewerRows = 15;           // and these in training a stack or a layer
  constexpr int64_t kVastWeight = 1536 << 10;  // of so many elements: reading and writing them counts
  constexpr int64_t kLeastWork = 512 << 10;    // multiply-adds: below it is a call's own time that counts
  constexpr int64_t kLargeWeight = 64 << 10;   // elements: writing its gradient is what takes time
  constexpr int64_t kHugeWeight = 600 << 10;   // the same in a stack
  constexpr int64_t kWideWeight = 128 << 10;   // elements of a weight of which the products take all the time,
  constexpr int64_t kWideBothWays = 256;       // or its features on both sides
  if (state().borrowed.brgemm_float != nullptr) return false;
  if (M <= kFewRows) return training && N * K >= (in_stack ? kHugeWeight : kLargeWeight);
  const bool large = training && (in_stack || N * K >= kVastWeight);
  if (M <= (large ? kFewerRows : kSomeRows)) return false;
  if (training || in_stack) return N * K >= kWideWeight || std::min(N, K) >= kWideBothWays;
  return M * N * K >= kLeastWork;
}

bool leaves_steps_to_aten(int64_t batch, int64_t N, int64_t K) {
  constexpr int64_t kFewRows = 32;  // in a batch: one block of the engine, which brings each weight from afar once
  constexpr int64_t kWide = 512, kWideForFew = 1024;
  return state().borrowed.brgemm_float == nullptr && std::min(N, K) >= (batch <= kFewRows ? kWideForFew : kWide);
}

double brgemm_gflops(bool bfloat16) {
  constexpr int64_t kRows = 64, kCols = 64, kDepth = 768, kCalls = 400;
  const Runtime borrowed = runtime();
  if (bfloat16 ? borrowed.brgemm_bfloat16 == nullptr : borrowed.brgemm_float == nullptr) return 0.0;
  const auto round = [&](int64_t, int64_t) {
    std::vector<uint16_t> A16(kRows * kDepth, 0x3f80), B16(kDepth * kCols, 0x3f80);
    std::vector<float> A(kRows * kDepth, 1.0f), B(kDepth * kCols, 1.0f), C(kRows * kCols);
    for (int64_t call = 0; call < kCalls; ++call) {
      if (bfloat16)
        borrowed.brgemm_bfloat16(kRows, kCols, kDepth, kDepth, kCols, kCols, false, A16.data(), B16.data(), C.data(),
                                 true);
      else
        borrowed.brgemm_float(kRows, kCols, kDepth, kDepth, kCols, kCols, false, A.data(), B.data(), C.data(), false);
    }
    if (bfloat16) borrowed.brgemm_release(true);
  };
  double best = 0.0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    const auto start = std::chrono::steady_clock::now();
    torch::stable::parallel_for(0, borrowed.threads, 1, round);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, 2.0 * kRows * kCols * kDepth * kCalls * static_cast<double>(borrowed.threads) / seconds);
  }
  return best * 1e-9;
}

}  // namespace fastenc
