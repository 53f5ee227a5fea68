// What the host knows of the sm_90a kernel, as pure functions: its tiles and what they cost, and
// the activation rows that it reads.
#pragma once

#include <algorithm>

#include "core/host_device.h"

namespace resq::cuda {

inline constexpr int kSm90TileWeights = 128;  // weight rows of a thread block's tile
inline constexpr int kSm90ClusterBlocks = 2;

// With many tokens the blocks of a cluster multiply different weights with the same tokens, with
// few the same weights with different tokens: each reads one half of what they share for both.
constexpr bool sm90_shares_tokens(int tile_tokens) { return tile_tokens >= 128; }

struct Sm90Tile {
  int tokens;
  int tenths;  // of a clock per column of K
};
// A column of K takes tokens / 32 clocks of the tensor cores, and as many bytes from L2 as there
// are tokens and half-bytes of weights, a shared operand halved: 64, 96, 128, 160, at 28 a clock
// [not measured]. The larger of the two.
inline constexpr Sm90Tile kSm90Tiles[] = {{32, 23}, {64, 35}, {128, 46}, {192, 60}};
inline constexpr int64_t kSm90EpilogueTenths = 100;  // of a clock per token of a tile
inline constexpr int64_t kSm90StartTenths = 15000;   // of a clock: the first stage of a block

// Tenths of a clock. Clusters take equal tiles in turns, so the last turn counts whole.
constexpr int64_t sm90_time(const Sm90Tile& tile, int64_t rows, int64_t n, int64_t k, int sms) {
  const bool shares = sm90_shares_tokens(tile.tokens);
  const int64_t tokens = ceil_div(rows, tile.tokens * (shares ? 1 : kSm90ClusterBlocks));
  const int64_t weights = ceil_div(n, kSm90TileWeights * (shares ? kSm90ClusterBlocks : 1));
  const int64_t turns = ceil_div(tokens * weights, std::max(sms / kSm90ClusterBlocks, 1));
  return kSm90StartTenths + turns * (k * tile.tenths + tile.tokens * kSm90EpilogueTenths);
}

// Activations are read as int8 rows whose length in memory is a multiple of 16 bytes, the unit of a
// tensor map. Rows that are not are written so into the workspace first.
inline constexpr int64_t kSm90RowBytes = 16;
inline constexpr int64_t kSm90WorkspaceAlignment = 256;

struct Sm90Rows {
  bool expand_lo, expand_hi;     // through the workspace
  int64_t lo_stride, hi_stride;  // bytes from row to row as the kernel reads them
  int64_t hi_offset;             // of the high rows in the workspace; the low ones are at 0
  int64_t workspace_bytes;
};

constexpr Sm90Rows sm90_rows(int64_t rows, int64_t k_lo, bool lo_packed, int64_t k_hi) {
  Sm90Rows r{};
  r.expand_lo = k_lo > 0 && (lo_packed || k_lo % kSm90RowBytes != 0);
  r.expand_hi = k_hi % kSm90RowBytes != 0;
  r.lo_stride = align_up(k_lo, kSm90RowBytes);
  r.hi_stride = align_up(k_hi, kSm90RowBytes);
  const int64_t lo_bytes = r.expand_lo ? rows * r.lo_stride : 0;
  r.hi_offset = align_up(lo_bytes, kSm90WorkspaceAlignment);
  r.workspace_bytes = r.expand_hi ? r.hi_offset + rows * r.hi_stride : lo_bytes;
  return r;
}

}  // namespace resq::cuda
