// Runs launchers of the CUDA kernels over the emulator. For each line that it reads, a case, it writes one: "ok" and a
// digest of the results' bits; or "fault", "wrong" or "guard", and what there was.
#include <exception>
#include <iostream>
#include <map>
#include <string>

#include "cuda_case.h"
#include "simt/simt.h"

using namespace fastenc::cuda::test;

namespace {

const std::map<std::string, std::string (*)(const Case&, Buffers&)> kOps = {
    {"dense_forward", dense_forward_case},
    {"preact_gradient", preact_gradient_case},
    {"dense_backward", dense_backward_case},
    {"weight_partials", weight_partials_case},
    {"reduce", reduce_case},
    {"encoder_forward", encoder_forward_case},
    {"encoder_backward", encoder_backward_case},
};

std::string run(const std::string& line) {
  try {
    const Case c(line);
    simt::planted = simt::name_hash(c.text("planted").c_str());
    simt::set_schedule(
        {static_cast<simt::Order>(c.number("order")), c.number("late") != 0, static_cast<uint64_t>(c.number("seed"))});
    Buffers buffers(c.arithmetic, static_cast<uint64_t>(c.number("seed")), c.number("integers") != 0);
    const std::string wrong = kOps.at(c.op)(c, buffers);
    if (const std::string damage = buffers.damage(); !damage.empty()) return "guard " + damage;
    return wrong.empty() ? "ok " + std::to_string(buffers.digest()) : "wrong " + wrong;
  } catch (const simt::Fault& fault) {
    return std::string("fault ") + fault.what();
  }
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) std::cout << run(line) << std::endl;
}
