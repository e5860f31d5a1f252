// Large results on huge pages.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastenc {

// So much glibc's malloc gives back to the system when it is freed (M_MMAP_THRESHOLD is at most 32 MiB): the next such
// result is new memory again, whose pages Linux clears one by one as they are first written.
constexpr int64_t kFreshBytes = int64_t{32} << 20;

// Asks for huge pages in memory that has not been written yet, where it is that large: one page fault in place of 512.
// Linux may say no, and then the pages are small as ever.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  if (bytes < kFreshBytes) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge, end = (address + bytes) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fastenc
