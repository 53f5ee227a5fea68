// The numbers from which mixed_gemm_choice.h predicts times, and a row of them for each chip.
// tools/fit_mixed_gemm.py fits them to the times of every choice (`resq bench gemm --choices all`)
// and writes the chip's row (docs/notes/0027-choices-from-a-sweep.md).
#pragma once

#include "cuda/launch.h"

namespace resq::cuda {

// The values given here hold for a chip without a row, and where a row does not say otherwise [not
// measured].
struct MixedGemmTuning {
  // Up to this M, reading the weight decides the time, and small_m reads it straight into
  // registers.
  double small_m_up_to = 64;
  double small_m_largest_tile = 64;  // M of its tiles

  // How K is split, in K tiles of the kernel: time to fill the pipeline, time of the second launch
  // that adds the partial sums, fewest K tiles of a split.
  double small_m_fill = 4, small_m_second_launch = 8, small_m_least_k_tiles = 8;
  double sm80_fill = 4, sm80_second_launch = 8, sm80_least_k_tiles = 8;

  // sm80 takes its large tile from this many of them a multiprocessor on.
  double sm80_large_tiles = 1;

  // sm90, a multiprocessor a clock: rows of a tile times a column of K that the tensor cores
  // multiply, bytes from the second-level cache, bytes in and out of shared memory.
  double sm90_rows = 32, sm90_l2_bytes = 28, sm90_shared_bytes = 128;
  // Clocks: until a block's first stage has arrived, and of the epilogue for a row of a tile.
  double sm90_start = 1500, sm90_epilogue_of_row = 10;
  // Between the blocks of a cluster that share K: clocks until the last sums have arrived, and
  // bytes a clock that a block sends.
  double sm90_exchange = 1800, sm90_exchange_bytes = 32;
};

struct MixedGemmChip {
  const char* name;
  int major, minor, sms, memory_bits;  // as in Device
  MixedGemmTuning tuning;
};

// The script finds a row by its name.
// clang-format off
inline constexpr MixedGemmChip kMixedGemmChips[] = {
    {"h100", 9, 0, 132, 5120, {.small_m_up_to = 16}},
    {"h200", 9, 0, 132, 6144, {.small_m_up_to = 16}},
    {"a100", 8, 0, 108, 5120, {}},
    {"rtx4090", 8, 9, 128, 384, {}},
};
// clang-format on

// The device's own row, or nullptr.
constexpr const MixedGemmChip* mixed_gemm_chip(const Device& device) {
  for (const MixedGemmChip& chip : kMixedGemmChips) {
    if (chip.major == device.major && chip.minor == device.minor && chip.sms == device.sms &&
        chip.memory_bits == device.memory_bits) {
      return &chip;
    }
  }
  return nullptr;
}

// The device's own row; else the first of its compute capability, since most rates are those of a
// multiprocessor; else the values above.
constexpr MixedGemmTuning mixed_gemm_tuning(const Device& device) {
  if (const MixedGemmChip* chip = mixed_gemm_chip(device)) return chip->tuning;
  for (const MixedGemmChip& chip : kMixedGemmChips) {
    if (chip.major == device.major && chip.minor == device.minor) return chip.tuning;
  }
  return {};
}

}  // namespace resq::cuda
