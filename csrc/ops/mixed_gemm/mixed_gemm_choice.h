// Which CUDA kernel a mixed_gemm runs, with which tile and split of K: the one that should take the
// least time. Pure host functions, tested on the CPU.
#pragma once

#include <algorithm>
#include <iterator>

#include "ops/mixed_gemm/mixed_gemm_time.h"

namespace resq::cuda {

// The fastest split of each tile that is added, and of all of them.
class FastestChoice {
 public:
  FastestChoice(const MixedGemmShape& s, int sms, const MixedGemmTuning& tuning)
      : s_(s), sms_(sms), tuning_(tuning) {}

  // A split of small_m and sm80 has at least `least_k_tiles` K tiles.
  void add(MixedGemmKernel kernel, const MixedGemmTile& tile) {
    const SplitK whole = split_k(s_, kernel, 1);
    const int k_tiles = whole.lo_tiles + whole.hi_tiles;
    const double least = kernel == MixedGemmKernel::kSm90 ? 1 : tuning_.least_k_tiles;
    const int most = std::clamp(static_cast<int>(k_tiles / least), 1, tile.most_splits);
    for (int splits = 1; splits <= most; ++splits) {
      const double clocks = mixed_gemm_time(s_, kernel, tile, splits, sms_, tuning_).clocks;
      if (tile_ != nullptr && clocks >= clocks_) continue;
      kernel_ = kernel;
      tile_ = &tile;
      splits_ = splits;
      clocks_ = clocks;
    }
  }

  MixedGemmChoice choice() const { return make_choice(s_, kernel_, *tile_, splits_); }

 private:
  const MixedGemmShape& s_;
  int sms_;
  const MixedGemmTuning& tuning_;
  MixedGemmKernel kernel_ = MixedGemmKernel::kSmallM;
  const MixedGemmTile* tile_ = nullptr;
  int splits_ = 1;
  double clocks_ = 0;
};

// small_m with the smallest tile that holds the rows, or the largest; all tiles of the family's own
// kernel.
inline MixedGemmChoice mixed_gemm_choice(const MixedGemmShape& s, Family family, int sms,
                                         const MixedGemmTuning& tuning) {
  FastestChoice fastest(s, sms, tuning);
  const MixedGemmTile* tile =
      std::find_if(std::begin(kSmallMTiles), std::end(kSmallMTiles) - 1,
                   [&](const MixedGemmTile& candidate) { return candidate.m >= s.m; });
  fastest.add(MixedGemmKernel::kSmallM, *tile);
  if (family == Family::kSm80) {
    for (const MixedGemmTile& own : kSm80Tiles) fastest.add(MixedGemmKernel::kSm80, own);
  }
  if (family == Family::kSm90) {
    for (const MixedGemmTile& own : kSm90Tiles) fastest.add(MixedGemmKernel::kSm90, own);
  }
  return fastest.choice();
}

}  // namespace resq::cuda
