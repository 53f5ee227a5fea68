// What the host knows of the sm_90a kernel, as pure functions: its tiles and what they cost, and
// the activation rows that it reads.
#pragma once

#include <algorithm>

#include "core/host_device.h"

namespace resq::cuda {

inline constexpr int kSm90TileWeights = 128;  // weight rows of a thread block's tile
// Thread blocks of a cluster: `weights` neighbours multiply different weights with the same tokens,
// `tokens` neighbours the same weights with different tokens; each reads its part of what they
// share for all.
struct Sm90Cluster {
  int tokens, weights;
  constexpr int blocks() const { return tokens * weights; }
};
constexpr Sm90Cluster sm90_cluster(int tile_tokens) { return {tile_tokens < 128 ? 2 : 1, 2}; }

struct Sm90Tile {
  int tokens;
  int tenths;  // of a clock per column of K
};
// The largest of three times of a column of K, in clocks [not measured]: tokens / 32 of the tensor
// cores; bytes from L2, half-bytes of weights and tokens, each divided by those who share it: 48,
// 64, 128, 160 at 28 a clock; bytes of shared memory, written, read by two warpgroups: 224, 320,
// 512, 704 at 128 a clock.
inline constexpr Sm90Tile kSm90Tiles[] = {{32, 18}, {64, 25}, {128, 46}, {192, 60}};
inline constexpr int64_t kSm90EpilogueTenths = 100;  // of a clock per token of a tile
inline constexpr int64_t kSm90StartTenths = 15000;   // of a clock: the first stage of a block

// Clusters that run at once. A part of the chip may have a number of multiprocessors that is no
// multiple of four.
constexpr int sm90_clusters(int blocks, int sms) {
  return std::max(blocks == 2 ? sms / 2 : sms / blocks - sms / 128, 1);
}

// Tenths of a clock. Clusters take equal tiles in turns, so the last turn counts whole.
constexpr int64_t sm90_time(const Sm90Tile& tile, int64_t rows, int64_t n, int64_t k, int sms) {
  const Sm90Cluster cluster = sm90_cluster(tile.tokens);
  const int64_t tokens = ceil_div(rows, tile.tokens * cluster.tokens);
  const int64_t weights = ceil_div(n, kSm90TileWeights * cluster.weights);
  const int64_t turns = ceil_div(tokens * weights, sm90_clusters(cluster.blocks(), sms));
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
