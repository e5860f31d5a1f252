// The emulated GPU, piece by piece, for test_simt.py: each function runs one block or a few of a kernel made for it.
#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cuda/gpu.cuh"

using namespace fastenc::cuda;

namespace {

// Launches are of one block, of one warp unless said otherwise.
void run(const std::function<void()>& kernel, unsigned threads = 32, size_t shared_bytes = 0, unsigned blocks = 1) {
  simt::launch({blocks}, {threads}, shared_bytes, kernel);
}

float* floats() { return reinterpret_cast<float*>(shared_memory()); }

// Wrong programs, by name.
const std::map<std::string, std::function<void()>> kWrong = {
    {"some return before a barrier",
     [] {
       run(
           [] {
             if (thread() < 40) sync_block();
           },
           64);
     }},
    {"some return before a shuffle",
     [] {
       run([] {
         if (lane() < 31) shuffle_xor(1.0f, 1);
       });
     }},
    {"halves of a warp at different places",
     [] {
       run([] {
         if (lane() < 16)
           shuffle_xor(1.0f, 1);
         else
           sync_warp();
       });
     }},
    {"one lane at the block's barrier",
     [] {
       run([] {
         if (lane() == 0)
           sync_block();
         else
           sync_warp();
       });
     }},
    {"misaligned load", [] { run([] { load_shared(reinterpret_cast<const float*>(shared_memory() + 2)); }, 32, 64); }},
    {"misaligned store",
     [] { run([] { store_shared(reinterpret_cast<Word<16>*>(shared_memory() + 8), Word<16>{}); }, 32, 64); }},
    {"misaligned copy",
     [] {
       static const float from[8] = {};
       run([] { copy_async<16>(shared_memory(), from + 1, 16); }, 32, 64);
     }},
    {"misaligned rows of ldmatrix",
     [] {
       run(
           [] {
             uint32_t r[4];
             load_matrices(r, shared_memory() + 8);
           },
           32, 64);
     }},
    {"a copy that is not committed",
     [] {
       static const float from[4] = {};
       run([] { copy_async<4>(floats() + lane(), from, 4); }, 32, 128);
     }},
    {"33 threads", [] { run([] {}, 33); }},
    {"2048 threads", [] { run([] {}, 2048); }},
    {"no blocks", [] { run([] {}, 32, 0, 0); }},
    {"more shared memory than every GPU has", [] { run([] {}, 32, 101377); }},
};

}  // namespace

extern "C" {

void set_schedule(int order, int late, uint64_t seed) {
  simt::set_schedule({static_cast<simt::Order>(order), late != 0, seed});
}

// Each of `threads` threads notes its number at the start, after a barrier of its warp and after one of its block.
void order_of_threads(unsigned threads, int* numbers) {
  run(
      [&] {
        *numbers++ = thread();
        sync_warp();
        *numbers++ = thread();
        sync_block();
        *numbers++ = thread();
      },
      threads);
}

void order_of_blocks(unsigned blocks, int* numbers) {
  run(
      [&] {
        if (thread() == 0) *numbers++ = static_cast<int>(block());
      },
      32, 0, blocks);
}

// The message of the fault that a wrong program makes; empty: none.
const char* fault(const char* name) {
  static std::string message;
  try {
    kWrong.at(name)();
    message.clear();
  } catch (const simt::Fault& fault) {
    message = fault.what();
  }
  return message.c_str();
}

// Names of wrong programs, one a line.
const char* wrong_programs() {
  static std::string names;
  names.clear();
  for (const auto& program : kWrong) names += program.first + "\n";
  return names.c_str();
}

// The bits of a block's shared memory as it finds it; the second block after the first has written.
void fresh_shared_memory(uint32_t* words, int count) {
  run(
      [&] {
        for (int i = lane(); i < count; i += 32) {
          std::memcpy(&words[block() * count + i], floats() + i, 4);
          store_shared(floats() + i, 1.0f);
        }
      },
      32, static_cast<size_t>(count) * 4, 2);
}

// Two groups of copies, of 4.0f and of 3 of 4 bytes: what is there at once, when one group may be left, and at the end.
void copies(uint32_t* seen) {
  static const uint32_t from[2] = {0x11111111, 0x22222222};
  run(
      [&] {
        if (lane()) return;
        auto* words = reinterpret_cast<uint32_t*>(shared_memory());
        copy_async<4>(words, from, 4);
        commit_copies();
        copy_async<4>(words + 1, from + 1, 2);
        commit_copies();
        const auto look = [&] {
          *seen++ = load_shared(words);
          *seen++ = load_shared(words + 1);
        };
        look();
        wait_copies<1>();
        look();
        wait_copies<0>();
        look();
      },
      32, 8);
}

void shuffle(const float* given, int mask, float* got) {
  run([&] { got[lane()] = shuffle_xor(given[lane()], mask); });
}

// rows: [32][8] 16-bit numbers, row l at the address that lane l gives; registers: [32][4].
void ldmatrix(int transposed, const uint16_t* rows, uint32_t* registers) {
  run(
      [&] {
        auto* own = reinterpret_cast<uint16_t*>(shared_memory()) + 8 * lane();
        std::memcpy(own, rows + 8 * lane(), 16);
        sync_warp();
        uint32_t r[4];
        if (transposed)
          load_matrices_transposed(r, own);
        else
          load_matrices(r, own);
        std::copy(r, r + 4, registers + 4 * lane());
      },
      32, 512);
}

// a: [32][4], b: [32][2], d: [32][4], the registers of each lane.
void mma(int arithmetic, const uint32_t* a, const uint32_t* b, float* d) {
  run([&] {
    uint32_t left[4], right[2];
    float sums[4];
    std::copy_n(a + 4 * lane(), 4, left);
    std::copy_n(b + 2 * lane(), 2, right);
    std::copy_n(d + 4 * lane(), 4, sums);
    switch (static_cast<Arithmetic>(arithmetic)) {
      case Arithmetic::kHalf: multiply_add<Half>(sums, left, right); break;
      case Arithmetic::kBFloat16: multiply_add<BFloat16>(sums, left, right); break;
      default: multiply_add_tf32(sums, left, right);
    }
    std::copy_n(sums, 4, d + 4 * lane());
  });
}

void widen(int arithmetic, const uint16_t* from, float* to, int64_t count) {
  const bool half = static_cast<Arithmetic>(arithmetic) == Arithmetic::kHalf;
  for (int64_t i = 0; i < count; ++i) to[i] = half ? to_float(Half{from[i]}) : to_float(BFloat16{from[i]});
}

void narrow(int arithmetic, const float* from, uint16_t* to, int64_t count) {
  const bool half = static_cast<Arithmetic>(arithmetic) == Arithmetic::kHalf;
  for (int64_t i = 0; i < count; ++i)
    to[i] = half ? from_float<Half>(from[i]).bits : from_float<BFloat16>(from[i]).bits;
}

void round_to_tf32(const float* from, uint32_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_tf32(from[i]);
}

// One access of a warp, of `bytes` by each lane at its offset; counts: accesses, bytes, moved, passes, least.
void count_one_access(int shared, int bytes, const int* offsets, int64_t* counts) {
  alignas(128) static unsigned char memory[1 << 14];
  simt::forget_traffic();
  simt::counting = true;
  run(
      [&] {
        const unsigned char* at = (shared ? shared_memory() : memory) + offsets[lane()];
        const auto read = [&](auto word) {
          const auto* address = reinterpret_cast<const decltype(word)*>(at);
          if (shared)
            load_shared(address);
          else
            load_global(address);
        };
        if (bytes == 2) read(Word<2>{});
        if (bytes == 4) read(Word<4>{});
        if (bytes == 8) read(Word<8>{});
        if (bytes == 16) read(Word<16>{});
      },
      32, 1 << 14);
  simt::counting = false;
  const simt::Traffic& traffic = simt::traffic().begin()->second;
  const int64_t all[] = {traffic.accesses, traffic.bytes, traffic.moved, traffic.passes, traffic.least};
  std::copy(std::begin(all), std::end(all), counts);
}

}  // extern "C"
