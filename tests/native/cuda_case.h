// What the native tests of the CUDA kernels share: a case, read from a line of text, and buffers of exactly its sizes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "cuda/gpu.cuh"

namespace fastenc::cuda::test {

// "key=value ..."; a list has commas.
class Case {
 public:
  explicit Case(const std::string& line);
  std::string text(const std::string& key) const;
  int64_t number(const std::string& key) const;
  std::vector<int64_t> numbers(const std::string& key) const;

  std::string op;
  Arithmetic arithmetic;
  int64_t M;
  std::vector<int64_t> widths;  // K, then the outputs of each layer
  std::vector<ActivationKind> activations;
  int64_t depth() const { return static_cast<int64_t>(activations.size()); }

 private:
  std::map<std::string, std::string> values_;
};

// A number of any of the types.
float read(Arithmetic arithmetic, const void* data, int64_t index);

// Buffers made one by one, so that AddressSanitizer's red zones are just beside each; without it, guards are.
class Buffers {
 public:
  // The numbers of inputs come from `seed`: integers from -2 to 2, or any between -1 and 1.
  Buffers(Arithmetic arithmetic, uint64_t seed, bool integers);
  ~Buffers();
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  // kind: contiguous, transposed, expanded (all rows one), scalar (all numbers one), misaligned (by one element),
  // padded (rows apart), strided (columns apart) or reversed (the last row first).
  Matrix matrix(int64_t rows, int64_t cols, const std::string& kind, float scale = 1.0f);
  // The strides are of the kind that the case has under this name; the first number is Inf if it says so.
  Matrix input(const Case& c, const std::string& name, int64_t rows, int64_t cols, float scale = 1.0f);
  // What a forward pass saved: between -1 and 1, as derivatives are large elsewhere.
  Matrix saved(int64_t rows, int64_t cols, const std::string& kind);
  const void* vector(int64_t count) { return matrix(1, count, "contiguous").data; }
  // NaN until they are written.
  void* output(int64_t count) { return output_bytes(count * item_size(arithmetic_)); }
  void* output_bytes(int64_t bytes);
  void* workspace(int64_t bytes);

  uint64_t digest() const;     // of all outputs' bytes
  std::string damage() const;  // in words; empty: all guards are whole

 private:
  struct Buffer {
    unsigned char* base;
    int64_t bytes;
    bool output;
  };
  unsigned char* take(int64_t bytes, bool output);

  Arithmetic arithmetic_;
  uint64_t random_;
  bool integers_;
  std::vector<Buffer> buffers_;
};

// A number, and how far a right kernel's result may be from it.
struct Bounded {
  double value = 0, error = 0;
};

struct Grid {
  int64_t rows, cols;
  std::vector<Bounded> values;
  Bounded& at(int64_t row, int64_t col) { return values[static_cast<size_t>(row * cols + col)]; }
  const Bounded& at(int64_t row, int64_t col) const { return values[static_cast<size_t>(row * cols + col)]; }
};

Grid exact(Arithmetic arithmetic, const Matrix& matrix, int64_t rows, int64_t cols);
Grid transposed(const Grid& a);
// a [rows, depth] @ b [cols, depth]^T in fp32, in any order.
Grid product(Arithmetic arithmetic, const Grid& a, const Grid& b);
Grid column_sums(const Grid& a);
Grid with_bias(Grid z, const Grid& bias);
Grid activate(ActivationKind activation, Grid z);
Grid differentiate(ActivationKind activation, Grid grad, const Grid& saved);
Grid rounded(Arithmetic arithmetic, Grid a);
// Where a contiguous result is not within the bounds of what it should be, rounded; empty: nowhere.
std::string compare(Arithmetic arithmetic, const char* name, const void* result, const Grid& expected);

// Which gradients a case wants, by the bits of "wanted".
inline bool wants_grad_x(const Case& c) { return c.number("wanted") & 1; }
inline bool wants_grad_weight(const Case& c, int64_t layer) { return c.number("wanted") >> (2 * layer + 1) & 1; }
inline bool wants_grad_bias(const Case& c, int64_t layer) { return c.number("wanted") >> (2 * layer + 2) & 1; }

// Each runs a launcher once and returns where a result is wrong: compare()'s words.
std::string dense_forward_case(const Case& c, Buffers& buffers);
std::string preact_gradient_case(const Case& c, Buffers& buffers);
std::string dense_backward_case(const Case& c, Buffers& buffers);
std::string weight_partials_case(const Case& c, Buffers& buffers);
std::string reduce_case(const Case& c, Buffers& buffers);
std::string encoder_forward_case(const Case& c, Buffers& buffers);
std::string encoder_backward_case(const Case& c, Buffers& buffers);

}  // namespace fastenc::cuda::test
