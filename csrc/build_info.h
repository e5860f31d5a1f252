// How the extensions were built.
#pragma once

#include <utility>
#include <vector>

namespace fastenc {

// Name and value of each fact that is known.
std::vector<std::pair<const char*, const char*>> build_info();

}  // namespace fastenc
