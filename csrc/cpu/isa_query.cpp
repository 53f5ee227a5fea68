// The private operators by which Python asks for the instruction set.
#include "cpu/isa.h"
#include "torch/registration.h"

namespace {

using namespace resq::cpu;

std::string cpu_isa() { return isa_name(current_isa()); }

// For every set that this machine cannot run, "name: what is missing", separated by semicolons.
std::string cpu_isa_missing() {
  static const Features have = detect_features();
  std::string lines;
  for (Isa isa : kAllIsas) {
    const std::string missing = missing_features(isa, have);
    if (missing.empty()) continue;
    lines += (lines.empty() ? "" : "; ") + std::string(isa_name(isa)) + ": " + missing;
  }
  return lines;
}

}  // namespace

RESQ_IMPL(CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isa_missing", TORCH_BOX(&cpu_isa_missing));
}
