#include "cuda_case.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace fastenc::cuda::test {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kGuard = 0;  // red zones stand in for guards, and must be just beside a buffer
#else
constexpr int64_t kGuard = 256;
#endif
constexpr unsigned char kGuardByte = 0x5a;

void write(Arithmetic arithmetic, void* data, int64_t index, float value) {
  if (item_size(arithmetic) == 4) {
    static_cast<float*>(data)[index] = value;
  } else if (arithmetic == Arithmetic::kHalf) {
    static_cast<Half*>(data)[index] = from_float<Half>(value);
  } else {
    static_cast<BFloat16*>(data)[index] = from_float<BFloat16>(value);
  }
}

}  // namespace

float read(Arithmetic arithmetic, const void* data, int64_t index) {
  if (item_size(arithmetic) == 4) return static_cast<const float*>(data)[index];
  if (arithmetic == Arithmetic::kHalf) return to_float(static_cast<const Half*>(data)[index]);
  return to_float(static_cast<const BFloat16*>(data)[index]);
}

Case::Case(const std::string& line) {
  std::istringstream words(line);
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    if (equals == std::string::npos) throw std::invalid_argument("not key=value: " + word);
    values_[word.substr(0, equals)] = word.substr(equals + 1);
  }
  op = text("op");
  arithmetic = static_cast<Arithmetic>(number("arithmetic"));
  M = number("M");
  widths = numbers("widths");
  for (const int64_t kind : numbers("activations")) activations.push_back(static_cast<ActivationKind>(kind));
}

std::string Case::text(const std::string& key) const {
  const auto found = values_.find(key);
  if (found == values_.end()) throw std::invalid_argument("a case without " + key);
  return found->second;
}

int64_t Case::number(const std::string& key) const { return std::stoll(text(key)); }

std::vector<int64_t> Case::numbers(const std::string& key) const {
  std::vector<int64_t> numbers;
  std::istringstream parts(text(key));
  for (std::string part; std::getline(parts, part, ',');) numbers.push_back(std::stoll(part));
  return numbers;
}

Buffers::Buffers(Arithmetic arithmetic, uint64_t seed, bool integers)
    : arithmetic_(arithmetic), random_(seed * 0x9e3779b97f4a7c15u | 1), integers_(integers) {}

Buffers::~Buffers() {
  for (const Buffer& buffer : buffers_) std::free(buffer.base - kGuard);
}

unsigned char* Buffers::take(int64_t bytes, bool output) {
  auto* memory = static_cast<unsigned char*>(std::malloc(static_cast<size_t>(bytes + 2 * kGuard)));
  if (!memory) throw std::bad_alloc();
  std::memset(memory, kGuardByte, static_cast<size_t>(bytes + 2 * kGuard));
  buffers_.push_back({memory + kGuard, bytes, output});
  return buffers_.back().base;
}

Matrix Buffers::matrix(int64_t rows, int64_t cols, const std::string& kind, float scale) {
  int64_t row_stride = cols, col_stride = 1, offset = 0;
  if (kind == "transposed") {
    row_stride = 1;
    col_stride = rows;
  } else if (kind == "expanded") {
    row_stride = 0;
  } else if (kind == "scalar") {
    row_stride = col_stride = 0;
  } else if (kind == "misaligned") {
    offset = 1;
  } else if (kind == "padded") {
    row_stride = cols + 3;
  } else if (kind == "strided") {
    col_stride = 2;
    row_stride = 2 * cols + 1;
  } else if (kind == "reversed") {
    row_stride = -cols;
    offset = (rows > 0 ? rows - 1 : 0) * cols;
  } else if (kind != "contiguous") {
    throw std::invalid_argument("no such strides: " + kind);
  }
  const bool empty = rows == 0 || cols == 0;
  const int64_t last = (rows - 1) * (row_stride > 0 ? row_stride : 0) + (cols - 1) * col_stride;
  const int64_t count = empty ? offset : offset + last + 1;
  unsigned char* data = take(count * item_size(arithmetic_), /* output */ false);
  for (int64_t i = 0; i < count; ++i) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    const auto bits = static_cast<int64_t>(random_ >> 40);
    const float any = static_cast<float>(bits - (1 << 23)) / (1 << 23);
    write(arithmetic_, data, i, scale * (integers_ ? static_cast<float>(bits % 5 - 2) : any));
  }
  return {data + offset * item_size(arithmetic_), row_stride, col_stride};
}

Matrix Buffers::input(const Case& c, const std::string& name, int64_t rows, int64_t cols, float scale) {
  const Matrix result = matrix(rows, cols, c.text(name), scale);
  if (c.text("infinite") == name) write(arithmetic_, const_cast<void*>(result.data), 0, INFINITY);
  return result;
}

Matrix Buffers::saved(int64_t rows, int64_t cols, const std::string& kind) {
  const bool integers = std::exchange(integers_, false);
  const Matrix result = matrix(rows, cols, kind);
  integers_ = integers;
  return result;
}

void* Buffers::output_bytes(int64_t bytes) {
  unsigned char* data = take(bytes, /* output */ true);
  std::memset(data, 0xff, static_cast<size_t>(bytes));
  return data;
}

void* Buffers::workspace(int64_t bytes) {
  unsigned char* data = take(bytes, /* output */ false);
  std::memset(data, 0xff, static_cast<size_t>(bytes));
  return data;
}

uint64_t Buffers::digest() const {
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (const Buffer& buffer : buffers_)
    for (int64_t i = 0; buffer.output && i < buffer.bytes; ++i) hash = (hash ^ buffer.base[i]) * 1099511628211u;
  return hash;
}

std::string Buffers::damage() const {
  for (size_t b = 0; b < buffers_.size(); ++b)
    for (int64_t i = 0; i < kGuard; ++i) {
      const std::string which = " buffer " + std::to_string(b) + " of " + std::to_string(buffers_[b].bytes) + " bytes";
      if (buffers_[b].base[-i - 1] != kGuardByte) return std::to_string(i + 1) + " bytes before" + which;
      if (buffers_[b].base[buffers_[b].bytes + i] != kGuardByte) return std::to_string(i) + " bytes past" + which;
    }
  return "";
}

}  // namespace fastenc::cuda::test
