// Sizes, element types and scratch memory. Included by stack_impl.h only, into each instruction set's own namespace: a
// shared function of which the linker kept the AVX-512 build would break older machines.
#include "crew.h"
#include "stack.h"
#include "std_headers.h"
#include "train.h"

namespace fastenc {
namespace FASTENC_ISA {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// Floats in one vector.
#if defined(FASTENC_AVX512)
constexpr int64_t kLanes = 16;
#elif defined(FASTENC_AVX2)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
constexpr int64_t kPanel = 64;      // columns in one tile of a product
constexpr int64_t kLeastRows = 16;  // in one block of rows

FASTENC_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTENC_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Floats from one row of an operand of our own to the next: whole vectors. Where products are our own, which read a
// strip of the second operand down its rows, not an even number of cache lines: such rows share few sets of the L1
// cache.
FASTENC_INLINE int64_t padded(int64_t columns) {
  const int64_t vectors = round_up(columns, kLanes);
#if defined(FASTENC_AVX512)
  return vectors;
#else
  constexpr int64_t kLine = 16;
  return vectors % (2 * kLine) == 0 ? vectors + kLine : vectors;
#endif
}

// Uninitialised memory, aligned to a cache line. Throws std::bad_alloc.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count = 0) : data_(nullptr) { allocate(count); }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

  // In place of what was there, `count` elements of zero bytes.
  void renew_as_zeros(int64_t count) {
    std::free(data_);
    data_ = nullptr;
    allocate(count);
    if (data_ != nullptr) std::memset(static_cast<void*>(data_), 0, byte_count(count));
  }

 private:
  static size_t byte_count(int64_t count) {
    return static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
  }

  void allocate(int64_t count) {
    if (count <= 0) return;
    data_ = static_cast<T*>(std::aligned_alloc(64, byte_count(count)));
    if (data_ == nullptr) throw std::bad_alloc();
  }

  T* data_;
};

// Multiply-adds below which a second thread costs more than it brings (a parallel region takes about 5 us).
constexpr int64_t kParallelWork = int64_t{1} << 21;

// Rows per block. A block's activations stay in the L2 cache; small batches make small blocks, to have enough of them.
FASTENC_INLINE int64_t rows_per_block(int64_t M) { return M >= 512 ? 64 : M >= 128 ? 32 : kLeastRows; }

}  // namespace FASTENC_ISA
}  // namespace fastenc
