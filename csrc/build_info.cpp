// In a file of its own, as each commit compiles it anew.
#include "build_info.h"

namespace fastenc {

std::vector<std::pair<const char*, const char*>> build_info() {
#define FACT(name, value) {#name, value},
  return {
      FACT(cxx_version, __VERSION__)  //
#include "build_info.inc"             // written by setup.py
  };
#undef FACT
}

}  // namespace fastenc
