// The numbers from which mixed_gemm_time.h predicts times, and a row of them for each chip.
// tools/fit_mixed_gemm.py fits them to the times of every choice (`resq bench gemm --choices all`)
// and writes the chip's row (docs/notes/0027-choices-from-a-sweep.md).
#pragma once

#include "cuda/launch.h"

namespace resq::cuda {

// The values given here hold for a chip without a row, and where a row does not say otherwise [not
// measured].
struct MixedGemmTuning {
  // A multiprocessor a clock: bytes from memory (its share of the chip's), from the second level,
  // in and out of shared memory; products of 8-bit codes by mma.sync and by wgmma.
  double memory_bytes = 12, l2_bytes = 28, shared_bytes = 128;
  double mma_products = 2048, wgmma_products = 4096;
  // Of mma.sync's rate, what the loops of small_m and sm80 reach.
  double mma_share = 0.65;
  // Clocks: until the first tile of K has arrived; the same for small_m, some of whose blocks wait
  // beside the kernel before (docs/notes/0042), where those of sm90 find no room; of the second
  // launch that adds the sums of splits; of the epilogue for a row of a tile (sm80, sm90).
  double start = 1500, small_m_start = 500, second_launch = 2500, epilogue_of_row = 10;
  // Fewest K tiles of a split (small_m, sm80).
  double least_k_tiles = 8;
  // sm90, between the blocks of a cluster that share K: clocks until the last sums have arrived,
  // and bytes a clock that a block sends.
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
    {"h100", 9, 0, 132, 5120, {.memory_bytes = 13.4, .mma_products = 2640}},
    {"h200", 9, 0, 132, 6144, {.memory_bytes = 19.2, .mma_products = 2640}},
    {"a100", 8, 0, 108, 5120, {.memory_bytes = 11.5}},
    {"rtx4090", 8, 9, 128, 384, {.memory_bytes = 2.9, .l2_bytes = 16, .mma_products = 1024}},
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
