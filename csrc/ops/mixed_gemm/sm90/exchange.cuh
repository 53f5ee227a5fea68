// Split K of mixed_gemm on sm_90a: the blocks of a cluster that share K add their exact sums in
// shared memory, so that there is no workspace and no second launch. Each finishes its share of the
// rows: the groups of eight rows of the tile are dealt to the splits in turn.
#pragma once

#include "cuda/cluster.cuh"
#include "ops/mixed_gemm/sm90/mainloop.cuh"

namespace resq::cuda::sm90 {

// What of the host's split a kernel needs.
struct ClusterSplits {
  int splits;
  // Splits 0 .. with_lo - 1 have low columns, the last with_hi ones high columns.
  int with_lo, with_hi;
};

// Groups of eight rows that a split finishes at most.
constexpr int most_groups(int groups, int splits) { return (groups + splits - 1) / splits; }

// Sums that a split receives, as planes of one group of rows of one split and part: of the splits'
// low sums, then of their high ones. At most one split has both, so that splits + 1 are enough. A
// thread of a warp sends to the same thread of the other blocks: four sums of a group, one access.
template <int kTileM>
struct Exchange {
  static constexpr int kGroups = kTileM / 8;
  static constexpr int kPlanes = [] {
    int most = 0;
    for (int s = 2; s <= kTile<kTileM>.most_splits; ++s) {
      most = std::max(most, most_groups(kGroups, s) * (s + 1));
    }
    return most;
  }();

  int4 sums[kPlanes][128 * kConsumers];
  // Of a warp: the sums of all splits have arrived; all splits have read what it sent.
  uint64_t full[kConsumerWarps], empty[kConsumerWarps];
};

// The sums of one group that a thread holds: two n and two neighbouring m.
struct GroupSums {
  uint32_t lo[4], hi[4];
};

// A consumer thread's side.
template <class Place>
struct SplitSums {
  static constexpr int kTileM = Place::kTileM;
  static constexpr int kGroups = Exchange<kTileM>::kGroups;

  Exchange<kTileM>& exchange;
  Place place;
  ClusterSplits k;
  uint32_t thread;  // among the consumers
  uint32_t parity;  // of the tile

  __device__ uint32_t rank_of(uint32_t split) const { return split * Place::kN + place.n(); }

  // Sends the sums of every group to the split that finishes it, this one included.
  __device__ void send(const uint32_t (&sums_lo)[kTileM / 2],
                       const uint32_t (&sums_hi)[kTileM / 2]) const {
    const int split = place.split();
    const bool lo = split < k.with_lo, hi = split >= k.splits - k.with_hi;
    mbarrier_wait(&exchange.empty[thread / 32], parity ^ 1);
    int owner = 0;
    int4* plane = &exchange.sums[split][thread];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const auto sums = [&](const uint32_t* of_group) -> int4 {
        return {static_cast<int>(of_group[0]), static_cast<int>(of_group[1]),
                static_cast<int>(of_group[2]), static_cast<int>(of_group[3])};
      };
      if (lo) store_to_block(plane, sums(sums_lo + 4 * group), rank_of(owner));
      if (hi) store_to_block(plane + 128 * kConsumers, sums(sums_hi + 4 * group), rank_of(owner));
      if (++owner == k.splits) {
        owner = 0;
        plane += (k.splits + 1) * 128 * kConsumers;
      }
    }
    __syncwarp();
    const uint32_t lane = thread % 32;
    if (lane < k.splits) mbarrier_arrive_release(&exchange.full[thread / 32], rank_of(lane));
  }

  // Waits for the sums of this split's groups.
  __device__ void wait() const { mbarrier_wait_cluster(&exchange.full[thread / 32], parity); }

  // The sums of the `index`-th group of this split.
  __device__ GroupSums sums(int index) const {
    GroupSums sums = {};
    const int4* planes = &exchange.sums[index * (k.splits + 1)][thread];
    const auto add = [&](uint32_t (&to)[4], int plane, bool present) {
      const int4 v = load_stored(&planes[plane * 128 * kConsumers], present);
      to[0] += v.x;
      to[1] += v.y;
      to[2] += v.z;
      to[3] += v.w;
    };
#pragma unroll
    for (int i = 0; i < kTile<kTileM>.most_splits; ++i) {
      add(sums.lo, i, i < k.with_lo);
      add(sums.hi, k.splits - i, i < k.with_hi);
    }
    return sums;
  }

  // Lets the other splits send the sums of the next tile.
  __device__ void release() const {
    __syncwarp();
    const uint32_t lane = thread % 32;
    if (lane < k.splits) mbarrier_arrive_cluster(&exchange.empty[thread / 32], rank_of(lane));
  }
};

}  // namespace resq::cuda::sm90
