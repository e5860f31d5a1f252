// The random numbers of dropout. Included by stack_impl.h only.

namespace fastenc {
namespace FASTENC_ISA {

using WordVec = math::Lanes<kLanes>::Words;

// The upper 32 bits of the product of each lane with a constant.
FASTENC_INLINE WordVec high_product(WordVec value, uint32_t factor) {
  using Half = uint32_t __attribute__((vector_size(2 * kLanes)));
  using Wide = uint64_t __attribute__((vector_size(4 * kLanes)));
  Half halves[2];
  std::memcpy(halves, &value, sizeof value);
  for (Half& half : halves) half = __builtin_convertvector((__builtin_convertvector(half, Wide) * factor) >> 32, Half);
  std::memcpy(&value, halves, sizeof value);
  return value;
}

// What dropout multiplies a vector of elements with: 0 with probability p, else keep = 1 / (1 - p). Philox 4x32 with 10
// rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) of the counters counter, counter + 1,
// ...; the same numbers as dropout_scale in fastenc/backends/reference.py.
FASTENC_INLINE Vec dropout_scale(uint64_t key, uint64_t counter, float p, float keep) {
  const uint32_t low = static_cast<uint32_t>(counter), high = static_cast<uint32_t>(counter >> 32);
  WordVec c0 = (WordVec)lane_numbers() + low;
  WordVec c1 = (c0 < low ? WordVec{} + 1u : WordVec{}) + high;
  WordVec c2{}, c3{};
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const WordVec high0 = high_product(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const WordVec high2 = high_product(c2, 0xCD9E8D57u), low2 = c2 * 0xCD9E8D57u;
    c0 = high2 ^ c1 ^ key0;
    c1 = low2;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  // To 31 bits by folding, as Triton's tl.rand does, then to [0, 1).
  const IntVec word = (IntVec)c0;
  const Vec drawn = __builtin_convertvector(word < 0 ? ~word : word, Vec) * 4.6566127342e-10f;
  return drawn < p ? Vec{} : Vec{} + keep;
}

}  // namespace FASTENC_ISA
}  // namespace fastenc
