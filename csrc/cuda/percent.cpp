#include <charconv>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"

namespace resq::cuda {
namespace {

int environment_percent(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return select_percent(name, text ? text : "", otherwise);
}

}  // namespace

int select_percent(const std::string& name, const std::string& text, int otherwise) {
  if (text.empty()) return otherwise;
  int percent = -1;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, percent);
  if (error == std::errc() && stop == end && percent >= 0 && percent <= 100) return percent;
  throw std::runtime_error(name + ": expected an integer from 0 to 100, got " + text);
}

int current_carveout() {
  static const int percent = environment_percent("RESQ_CUDA_CARVEOUT", kDriversCarveout);
  return percent;
}

int current_prefetch() {
  static const int percent = environment_percent("RESQ_CUDA_PREFETCH", kPrefetchPercent);
  return percent;
}

}  // namespace resq::cuda
