#include <algorithm>
#include <set>
#include <tuple>

#include "simt.h"

namespace simt {
namespace {

struct Access {
  unsigned lane;
  uintptr_t address;
  int bytes;
};

std::map<Site, Traffic> totals;
std::vector<LaunchRecord> records;
// The n-th time that a warp's lanes come by one place is one access of the warp.
std::map<std::tuple<Site, unsigned, int>, std::vector<Access>> accesses;
std::map<std::pair<Site, unsigned>, int> visits;  // by a thread

int64_t sectors(const std::vector<Access>& lanes) {
  std::set<uintptr_t> touched;
  for (const Access& access : lanes)
    for (uintptr_t sector = access.address / 32; sector <= (access.address + access.bytes - 1) / 32; ++sector)
      touched.insert(sector);
  return static_cast<int64_t>(touched.size());
}

int64_t different_bytes(const std::vector<Access>& lanes) {
  std::set<std::pair<uintptr_t, int>> different;
  for (const Access& access : lanes) different.insert({access.address, access.bytes});
  int64_t bytes = 0;
  for (const auto& access : different) bytes += access.second;
  return bytes;
}

// Shared memory has 32 banks of 4 bytes. One trip serves 8 lanes that ask for 16 bytes each, 16 of 8, or 32; more are
// needed where two of them want different words of one bank.
void count_passes(const std::vector<Access>& lanes, Traffic& traffic) {
  const unsigned together = lanes[0].bytes == 16 ? 8 : lanes[0].bytes == 8 ? 16 : 32;
  for (unsigned first = 0; first < 32; first += together) {
    std::map<uintptr_t, std::set<uintptr_t>> words_of_bank;
    size_t words = 0;
    for (const Access& access : lanes) {
      if (access.lane < first || access.lane >= first + together) continue;
      for (uintptr_t word = access.address / 4; word <= (access.address + access.bytes - 1) / 4; ++word)
        words += words_of_bank[word % 32].insert(word).second;
    }
    size_t trips = 0;
    for (const auto& bank : words_of_bank) trips = std::max(trips, bank.second.size());
    traffic.passes += static_cast<int64_t>(trips);
    traffic.least += static_cast<int64_t>((words + 31) / 32);
  }
}

}  // namespace

void count_access(Space space, const void* address, int bytes, const char* file, int line) {
  const Quiet quiet;
  const std::string path = file;
  const Site site = {path.substr(path.rfind('/') + 1) + ":" + std::to_string(line), space};
  const unsigned thread = thread_number();
  const int visit = visits[{site, thread}]++;
  accesses[{site, thread / 32, visit}].push_back({thread % 32, reinterpret_cast<uintptr_t>(address), bytes});
}

void count_block() {
  for (const auto& [key, lanes] : accesses) {
    const Site& site = std::get<0>(key);
    Traffic& traffic = totals[site];
    ++traffic.accesses;
    traffic.bytes += different_bytes(lanes);
    if (site.second == Space::kGlobalLoad || site.second == Space::kGlobalStore)
      traffic.moved += 32 * sectors(lanes);
    else
      count_passes(lanes, traffic);
  }
  accesses.clear();
  visits.clear();
}

void record_launch(Dim3 grid, Dim3 block, size_t shared_bytes) {
  if (counting) records.push_back({kernel_name, grid, block, shared_bytes});
}

const std::map<Site, Traffic>& traffic() { return totals; }
const std::vector<LaunchRecord>& launches() { return records; }

void forget_traffic() {
  totals.clear();
  records.clear();
}

}  // namespace simt
