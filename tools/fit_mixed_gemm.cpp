// The choice of mixed_gemm for tools/fit_mixed_gemm.py and tools/predict_mixed_gemm.py, which load
// this file as a library: the functions of csrc themselves, and which constants there are to fit. A
// tuning travels as the values of kFields in their order.
#include <cmath>
#include <cstring>
#include <iterator>

#include "ops/mixed_gemm/mixed_gemm_choice.h"

using namespace resq::cuda;

namespace {

// The values to try: least, then each times `factor` plus `step`, up to `most`.
struct Field {
  const char* name;
  double MixedGemmTuning::* member;
  double least, most, factor, step;
};
using Tuning = MixedGemmTuning;
const double kFine = std::exp2(0.125);  // eight steps an octave

const Field kFields[] = {
    {"memory_bytes", &Tuning::memory_bytes, 1, 64, kFine, 0},
    {"l2_bytes", &Tuning::l2_bytes, 8, 128, kFine, 0},
    {"shared_bytes", &Tuning::shared_bytes, 32, 512, kFine, 0},
    {"mma_products", &Tuning::mma_products, 256, 8192, kFine, 0},
    {"wgmma_products", &Tuning::wgmma_products, 1024, 8192, kFine, 0},
    {"mma_share", &Tuning::mma_share, 0.25, 1, kFine, 0},
    {"start", &Tuning::start, 100, 20000, kFine, 0},
    {"small_m_start", &Tuning::small_m_start, 100, 20000, kFine, 0},
    {"second_launch", &Tuning::second_launch, 100, 20000, kFine, 0},
    {"epilogue_of_row", &Tuning::epilogue_of_row, 1, 100, kFine, 0},
    {"least_k_tiles", &Tuning::least_k_tiles, 1, 64, 1, 1},
    {"sm90_exchange", &Tuning::sm90_exchange, 100, 20000, kFine, 0},
    {"sm90_exchange_bytes", &Tuning::sm90_exchange_bytes, 4, 128, kFine, 0},
};
static_assert(sizeof(MixedGemmTuning) == std::size(kFields) * sizeof(double));

void to_values(const MixedGemmTuning& tuning, double* values) {
  for (const Field& field : kFields) *values++ = tuning.*field.member;
}

MixedGemmTuning from_values(const double* values) {
  MixedGemmTuning tuning;
  for (const Field& field : kFields) tuning.*field.member = *values++;
  return tuning;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int field_count() { return std::size(kFields); }
const char* field_name(int index) { return kFields[index].name; }

// The next value of a field to try after `value`, to three digits; the first after NaN; NaN after
// the last.
double field_next(int index, double value) {
  const Field& field = kFields[index];
  const double next = std::isnan(value) ? field.least : value * field.factor + field.step;
  if (next > field.most) return NAN;
  const double unit = std::pow(10.0, std::floor(std::log10(next)) - 2);
  return std::round(next / unit) * unit;
}

// The name of the device's own row, "" if it has none.
const char* chip_name(int major, int minor, int sms, int memory_bits) {
  const MixedGemmChip* chip = mixed_gemm_chip({major, minor, sms, 0, memory_bits, 0});
  return chip ? chip->name : "";
}

// What the device runs with, and what stands where a row says nothing.
void device_tuning(int major, int minor, int sms, int memory_bits, double* values) {
  to_values(mixed_gemm_tuning({major, minor, sms, 0, memory_bits}), values);
}
void default_tuning(double* values) { to_values({}, values); }

// Names of the choices: `width` characters each. Where `clocks` is given, also how long each should
// take, and the name of what limits it behind its own, after a comma.
void choose(const double* values, const char* family, int sms, const MixedGemmShape* shapes,
            int count, char* names, int width, double* clocks) {
  const MixedGemmTuning tuning = from_values(values);
  for (const Family known : {Family::kPortable, Family::kSm80, Family::kSm90}) {
    if (std::strcmp(family, family_name(known)) != 0) continue;
    for (int i = 0; i < count; ++i) {
      const MixedGemmChoice choice = mixed_gemm_choice(shapes[i], known, sms, tuning);
      std::string name = describe(choice);
      if (clocks != nullptr) {
        const MixedGemmTime time = mixed_gemm_time(shapes[i], choice.kernel, choice.tile,
                                                   choice.split_k.splits, sms, tuning);
        clocks[i] = time.clocks;
        name = name + "," + limit_name(time.limit);
      }
      std::strncpy(names + i * width, name.c_str(), width);
    }
  }
}

}  // extern "C"
#pragma GCC visibility pop
