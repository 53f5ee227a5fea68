#include <charconv>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"

namespace resq::cuda {

int select_carveout(const std::string& text) {
  if (text.empty()) return kDriversCarveout;
  int percent = -1;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, percent);
  if (error == std::errc() && stop == end && percent >= 0 && percent <= 100) return percent;
  throw std::runtime_error("RESQ_CUDA_CARVEOUT: expected an integer from 0 to 100, got " + text);
}

int current_carveout() {
  static const int percent = [] {
    const char* text = std::getenv("RESQ_CUDA_CARVEOUT");
    return select_carveout(text ? text : "");
  }();
  return percent;
}

}  // namespace resq::cuda
