#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/arch.h"
#include "cuda/launch.h"

namespace resq::cuda {

const char* family_name(Family family) {
  switch (family) {
    case Family::kSm80: return "sm80";
    case Family::kSm90: return "sm90";
    case Family::kPortable: return "portable";
    default: return "unsupported";
  }
}

Family select_family(const std::string& forced, int major, int minor) {
  const auto name = [&] { return "sm_" + std::to_string(major) + std::to_string(minor); };
  const Family best = family(major, minor);
  if (best == Family::kUnsupported) {
    throw std::runtime_error(
        "resq: device: expected sm_80 or newer (A100, RTX 30, H100, ...), got " + name());
  }
  if (forced.empty() || forced == family_name(best)) return best;
  if (forced == family_name(Family::kPortable)) return Family::kPortable;
  if (forced == family_name(Family::kSm80) || forced == family_name(Family::kSm90)) {
    throw std::runtime_error("RESQ_CUDA_ARCH: " + forced + " was asked for, but this device is " +
                             name() + ", which runs " + family_name(best) + " or portable");
  }
  throw std::runtime_error("RESQ_CUDA_ARCH: expected sm80, sm90 or portable, got " + forced);
}

Family current_family(const Device& device) {
  static const std::string forced = [] {
    const char* text = std::getenv("RESQ_CUDA_ARCH");
    return std::string(text ? text : "");
  }();
  return select_family(forced, device.major, device.minor);
}

}  // namespace resq::cuda
