// Every choice that a shape may run, whatever it costs: what `resq bench gemm --choices` measures,
// and what RESQ_MIXED_GEMM and force_kernel may name. All of them have the same bits.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ops/mixed_gemm/mixed_gemm_tiles.h"

namespace resq::cuda {

// A compiled tile, and the most blocks that may share K.
struct MixedGemmTileSplits {
  MixedGemmKernel kernel;
  MixedGemmTile tile;
  int most_splits;
};

inline std::vector<MixedGemmTileSplits> legal_tiles(const MixedGemmShape& s, Family family) {
  std::vector<MixedGemmTileSplits> legal;
  const auto add = [&](MixedGemmKernel kernel, const auto& tiles) {
    const SplitK whole = split_k(s, kernel, 1);
    const int k_tiles = whole.lo_tiles + whole.hi_tiles;
    for (const MixedGemmTile& tile : tiles) {
      legal.push_back({kernel, tile, std::clamp(k_tiles, 1, tile.most_splits)});
    }
  };
  add(MixedGemmKernel::kSmallM, kSmallMTiles);
  if (family == Family::kSm80) add(MixedGemmKernel::kSm80, kSm80Tiles);
  if (family == Family::kSm90) add(MixedGemmKernel::kSm90, kSm90Tiles);
  return legal;
}

inline std::vector<MixedGemmChoice> legal_choices(const MixedGemmShape& s, Family family) {
  std::vector<MixedGemmChoice> choices;
  for (const auto& [kernel, tile, most_splits] : legal_tiles(s, family)) {
    for (int splits = 1; splits <= most_splits; ++splits) {
      choices.push_back(make_choice(s, kernel, tile, splits));
    }
  }
  return choices;
}

// The legal choice that describe() calls `name`.
inline std::optional<MixedGemmChoice> legal_choice(const std::string& name, const MixedGemmShape& s,
                                                   Family family) {
  for (const MixedGemmChoice& choice : legal_choices(s, family)) {
    if (describe(choice) == name) return choice;
  }
  return std::nullopt;
}

// "small_m 8x64 splits=1..16, small_m 16x64 splits=1..16, ...", for a refusal.
inline std::string describe_legal(const MixedGemmShape& s, Family family) {
  std::string text;
  for (const auto& [kernel, tile, most_splits] : legal_tiles(s, family)) {
    text += text.empty() ? "" : ", ";
    text += describe(make_choice(s, kernel, tile, 1));
    if (most_splits > 1) text += ".." + std::to_string(most_splits);
  }
  return text;
}

}  // namespace resq::cuda
