// How the CPU cuts a mixed_gemm into tasks, and which body runs them. Pure functions of sizes and
// instruction set, so that tests can ask what another machine would run.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/packed_weight.h"
#include "cpu/isa.h"
#include "ops/mixed_gemm/mixed_gemm.h"

namespace resq {

// M counts rows of activations, N rows of weights (columns of the result), K what is summed over.
//
// A panel is a run of M that one thread unpacks into its own scratch; a tile is the part of a panel
// that shares one pass over a weight block (32 of N). A task is one (panel, weight block) pair,
// numbered panel by panel: a thread that takes a run of tasks unpacks each panel once and walks
// through the packed weight in memory order.
struct MixedGemmPlan {
  int64_t panels, blocks, panel_m, tile_m;
  int64_t grain;  // tasks below which a second thread costs more than it saves
  bool amx;       // the body over AMX tiles, else the vector body

  int64_t tasks() const { return panels * blocks; }
  int64_t first_m(int64_t panel) const { return panel * panel_m; }
};

// A panel stays in a second-level cache of 1 MB next to the weight block that streams through it,
// and is as tall as that allows, because each panel reads every weight block from memory once.
// Measured with K = 14336 (36 MB of weights) on one core: 256 KB 176, 512 KB 200, 768 KB 207 G
// products/s. Processors with AMX have second-level caches of 2 MB.
inline constexpr int64_t kMixedGemmPanelBytes = 768 * 1024;
inline constexpr int64_t kMixedGemmAmxPanelBytes = 1280 * 1024;

// Products that a thread should have: 0.5 M take 3 to 10 us, about what waking a thread takes.
inline constexpr int64_t kMixedGemmGrainProducts = 1 << 19;

// M of an AMX tile, and the steps of 64 of K that one block of weights is unpacked for at once:
// 16 KB of words. A first-level cache of 48 KB also holds the activations of one strip of M and
// those of the next.
inline constexpr int64_t kMixedGemmAmxTileM = 16;
inline constexpr int64_t kMixedGemmChunkSteps = 8;

// Processor cycles for one weight block and 64 of K, by the rates of Sapphire Rapids: two
// 64-byte loads, one 64-byte store and two 512-bit operations a cycle; one tile product in 16.
// Operations that could overlap are added up nevertheless, on both sides.
//
// Vectors: two vpdpbusd for each row and word, and for each pass of 12 rows 6 operations to unpack
// each of the 8 groups.
constexpr int64_t mixed_gemm_vector_cycles(int64_t m) { return 16 * m + 24 * ceil_div(m, 12); }
// Tiles: 32 stores of unpacked words; for each strip of 32 rows two loads of B (8 cycles each); for
// each 16 rows one load of A, two products, and an eighth of two loads and two stores of sums.
constexpr int64_t mixed_gemm_tile_cycles(int64_t m) {
  return 32 + 16 * ceil_div(m, 2 * kMixedGemmAmxTileM) +
         (8 + 32 + (16 + 32) / kMixedGemmChunkSteps) * ceil_div(m, kMixedGemmAmxTileM);
}

// Small batches keep the vector body: up to 4 rows it takes fewer cycles, and it has no tile state
// to set up and no sums to store.
constexpr bool mixed_gemm_uses_tiles(cpu::Isa isa, int64_t m) {
  return isa == cpu::Isa::kAmx && mixed_gemm_tile_cycles(m) < mixed_gemm_vector_cycles(m);
}

// M of the largest tile of the vector bodies: as many as keep their sums in registers.
constexpr int mixed_gemm_tile_m(cpu::Isa isa) {
  return isa >= cpu::Isa::kAvx512Vnni ? 12 : isa == cpu::Isa::kAvx2 ? 6 : 2;
}

constexpr MixedGemmPlan mixed_gemm_plan(int64_t m, int64_t n, int64_t k_lo, int64_t k_hi,
                                        cpu::Isa isa) {
  const bool amx = mixed_gemm_uses_tiles(isa, m);
  const int64_t tile_m = amx ? kMixedGemmAmxTileM : mixed_gemm_tile_m(isa);
  const int64_t panel_bytes = amx ? kMixedGemmAmxPanelBytes : kMixedGemmPanelBytes;
  const int64_t row_bytes = std::max<int64_t>(packed_k(k_lo) + packed_k(k_hi), 1);
  const int64_t tiles = std::max<int64_t>(panel_bytes / (tile_m * row_bytes), 1);
  // As few panels as that allows, of about the same M; with AMX, of whole tiles.
  const int64_t least = std::max<int64_t>(ceil_div(m, tiles * tile_m), 1);
  const int64_t panel_m = align_up(ceil_div(m, least), amx ? tile_m : 1);
  const int64_t panels = panel_m ? ceil_div(m, panel_m) : 0;
  const int64_t products = std::max<int64_t>(panel_m * row_bytes * kPackedBlockN, 1);
  return {.panels = panels,
          .blocks = packed_blocks(n),
          .panel_m = panel_m,
          .tile_m = tile_m,
          .grain = ceil_div(kMixedGemmGrainProducts, products),
          .amx = amx};
}

struct MixedGemmTasks {
  MixedGemmParams gemm;
  MixedGemmPlan plan;
};

#if defined(__x86_64__)
namespace cpu::amx {
// Tasks [begin, end) of a plan for AMX.
void mixed_gemm_tasks(const MixedGemmTasks& tasks, int64_t begin, int64_t end);
}  // namespace cpu::amx
#endif

}  // namespace resq
