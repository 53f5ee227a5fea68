// mixed_gemm for many rows on sm_90a: D = W X^T by wgmma, weights from registers, activations from
// shared memory.
//
// Persistent blocks of three warpgroups walk over output tiles of kTileM x 128 (N): one is the
// producer, of which one thread copies; two are consumers, which multiply 64 rows of the weight
// each. Both parts' sums stay exact in registers until the epilogue, as the numerics contract asks.
// During the epilogue the producer runs ahead into the next tile. The blocks of a cluster share
// activations, and weights if tiles are small; or they share K, where there are fewer tiles than
// multiprocessors.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "cuda/pdl.cuh"
#include "cuda/tensor_map.h"
#include "ops/mixed_gemm/mixed_gemm_cuda.h"
#include "ops/mixed_gemm/mixed_gemm_time.h"
#include "ops/mixed_gemm/sm90/epilogue.cuh"
#include "ops/mixed_gemm/sm90/mainloop.cuh"
#include "ops/mixed_gemm/weight_prefetch.h"

namespace resq::cuda::sm90 {
namespace {

constexpr const char* kOp = "mixed_gemm";
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kMaxSharedBytes = 227 * 1024;

// Registers of a thread after the split: 128 x 24 + 256 x 240 = 128 x 40 + 256 x 232 = 384 x 168,
// the registers that the block starts with. The sums of 192 rows leave the producer no more
// than 24.
constexpr uint32_t producer_registers(int tile_m) { return tile_m > 128 ? 24 : 40; }
constexpr uint32_t consumer_registers(int tile_m) { return tile_m > 128 ? 240 : 232; }

struct NoExchange {};

template <class Place, class Out>
struct SharedPlan {
  static constexpr int kTileM = Place::kTileM;
  using Epilogues = EpilogueShared<kTileM, Out>[kConsumers];
  using Sums = std::conditional_t<Place::kSplitK, Exchange<kTileM>, NoExchange>;
  static constexpr int kLeft =
      kMaxSharedBytes - static_cast<int>(sizeof(Epilogues) + (Place::kSplitK ? sizeof(Sums) : 0));
  static constexpr int kStages = kLeft / static_cast<int>(sizeof(Stage<kTileM>) + 32);
  static_assert(sizeof(Stage<kTileM>) % 1024 == 0);

  Ring<kTileM, kStages> ring;
  Epilogues epilogues;
  [[no_unique_address]] Sums exchange;
};

// The kernel's argument. The host computes what it can, because the producer thread has 24
// registers.
struct Arguments {
  MixedGemmParams p;
  CUtensorMap lo, hi;  // of the activation rows
  ClusterSplits k;
  KTiles lo_tiles[kMostClusterSplits], hi_tiles[kMostClusterSplits];  // of each split
  int64_t block_bytes, block_lo_bytes;                                // of 64 packed weight rows
  uint32_t prefetched_bytes;  // of them, at most, before pdl_wait
  int last_block;
  int m_tiles, n_tiles, tiles;  // of a cluster
};

// Order of the tiles: groups along M that stay in L2. Inside a group m changes fastest, so that
// blocks that run together read few weights from memory, and each of them once.
constexpr int kRasterM = 16;

struct TilePlace {
  int m, n_block;  // first m, first block of 64 weight rows
};
template <class Cluster>
__device__ inline TilePlace tile_at(const Arguments& arguments, int index, Cluster place) {
  const int group_tiles = kRasterM * arguments.n_tiles;
  const int first = index / group_tiles * kRasterM;
  const int height = min(kRasterM, arguments.m_tiles - first);
  const int inside = index % group_tiles;
  const int m = first + inside % height, n = inside / height;
  return {(m * Cluster::kM + place.m()) * Cluster::kTileM,
          (n * Cluster::kN + place.n()) * kConsumers};
}

template <class Place>
__device__ inline TileSource<Place> source_of(const Arguments& arguments, const TilePlace& tile,
                                              Place place) {
  using Source = TileSource<Place>;
  Source source{{}, tile.m + place.n() * Source::kPartM};
  for (int c = 0; c < Source::kWeightBlocks; ++c) {  // past the end: the last block again
    const int block = tile.n_block + (Source::kWeightBlocks == 1 ? place.m() : c);
    source.weights[c] =
        arguments.p.packed_weight + min(block, arguments.last_block) * arguments.block_bytes;
    keep_opaque(source.weights[c]);
  }
  return source;
}

// Asks for the first weights of a tile in the second-level cache, before pdl_wait.
template <class Place>
__device__ inline void prefetch_weights(const Arguments& arguments, const TileSource<Place>& source,
                                        KTiles lo, KTiles hi) {
  const bool has_lo = lo.whole + lo.tail > 0;
  const int64_t first = has_lo ? int64_t{lo.first} * kLoStageBytes
                               : arguments.block_lo_bytes + int64_t{hi.first} * kHiStageBytes;
  const uint32_t bytes = min(part_bytes(lo, kLoStageBytes) + part_bytes(hi, kHiStageBytes),
                             arguments.prefetched_bytes);
  if (bytes == 0) return;
  for (const uint8_t* weights : source.weights) prefetch_early(weights + first, bytes);
}

template <int kTileM, int kClusterM, int kClusterN, bool kSplitK, class Out>
__global__ void __launch_bounds__(kThreads, kTile<kTileM>.min_blocks)
    mixed_gemm_sm90_kernel(const __grid_constant__ Arguments arguments) {
  using Place = ClusterPlace<kTileM, kClusterM, kClusterN, kSplitK>;
  using Plan = SharedPlan<Place, Out>;
  constexpr int kStages = Plan::kStages;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Plan& shared = *reinterpret_cast<Plan*>(shared_bytes);
  const MixedGemmParams& p = arguments.p;
  // Through a shuffle, so that the compiler knows that they are warp-uniform.
  const uint32_t warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warpgroup = warp / 4;
  const int blocks = Place::kBlocks * (kSplitK ? arguments.k.splits : 1);  // of the cluster
  const Place place{static_cast<int>(kSplitK ? cluster_rank() : blockIdx.x % Place::kBlocks)};
  const int first_tile = static_cast<int>(blockIdx.x) / blocks;
  const int clusters = static_cast<int>(gridDim.x) / blocks;
  KTiles lo = arguments.lo_tiles[place.split()], hi = arguments.hi_tiles[place.split()];
  if constexpr (!kSplitK) lo.first = hi.first = 0;  // known to the compiler

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&shared.ring.full[i], 1);
      mbarrier_init(&shared.ring.empty[i], Place::kPeers * kConsumerWarps);
    }
    if constexpr (kSplitK) {
      for (int warp = 0; warp < kConsumerWarps; ++warp) {
        mbarrier_init(&shared.exchange.full[warp], arguments.k.splits);
        mbarrier_init(&shared.exchange.empty[warp], arguments.k.splits);
      }
    }
    mbarrier_init_fence();
  }
  if (warp == 0 && elected()) {
    prefetch_weights(arguments, source_of(arguments, tile_at(arguments, first_tile, place), place),
                     lo, hi);
  }
  cluster_sync();
  pdl_wait();
  pdl_trigger();

  if (warpgroup == 0) {
    warpgroup_registers_decrease<producer_registers(kTileM)>();
    if (warp == 0 && elected()) {
      if (p.k_lo > 0) prefetch_tensor_map(&arguments.lo);
      if (p.k_hi > 0) prefetch_tensor_map(&arguments.hi);
      Producer<Place, kStages> producer{shared.ring, place, {}};
      for (int t = first_tile; t < arguments.tiles; t += clusters) {
        const auto source = source_of(arguments, tile_at(arguments, t, place), place);
        producer.load_part(source, &arguments.lo, lo, 0, kLoStageBytes);
        producer.load_part(source, &arguments.hi, hi, arguments.block_lo_bytes, kHiStageBytes);
      }
    }
    __syncwarp();
  } else {
    warpgroup_registers_increase<consumer_registers(kTileM)>();
    Consumer<Place, kStages> consumer{shared.ring, place, threadIdx.x - 128, {}};
    [[maybe_unused]] uint32_t parity = 0;  // of the exchange
    for (int t = first_tile; t < arguments.tiles; t += clusters) {
      const TilePlace tile = tile_at(arguments, t, place);
      keep_opaque(consumer.thread);
      Epilogue<kTileM, Out> epilogue{p, shared.epilogues, consumer.thread};
      uint32_t sums_lo[kTileM / 2], sums_hi[kTileM / 2];
      epilogue.fetch(tile.m, (tile.n_block + consumer.thread / 128) * kWarpgroupN);
      consumer.multiply_tile(lo, hi, sums_lo, sums_hi);
      if constexpr (kSplitK) {
        const SplitSums<Place> split_sums{shared.exchange, place, arguments.k, consumer.thread,
                                          parity};
        split_sums.send(sums_lo, sums_hi);
        epilogue.write_share(split_sums);
        parity ^= 1;
      } else {
        epilogue.write(sums_lo, sums_hi);
      }
    }
  }
  // A block's shared memory must outlive what its cluster still writes and signals there.
  cluster_sync();
}

template <class Cluster, class Out>
void launch_cluster(const MixedGemmParams& p, const SplitK& split_k, const Device& device,
                    Stream stream) {
  constexpr int kTileM = Cluster::kTileM;
  constexpr int kBoxM = kTileM / Cluster::kN;  // rows of one copy
  Arguments arguments{};
  arguments.p = p;
  if (p.k_lo > 0) arguments.lo = byte_rows_map(kOp, p.q_lo, p.m, p.k_lo, p.k_lo, kBoxM);
  if (p.k_hi > 0) arguments.hi = byte_rows_map(kOp, p.q_hi, p.m, p.k_hi, p.k_hi, kBoxM);
  arguments.k = {split_k.splits, 0, 0};
  for (int s = 0; s < split_k.splits; ++s) {
    arguments.k.with_lo += split_k.has_lo(s);
    arguments.k.with_hi += split_k.has_hi(s);
    const int begin = split_k.begin(s), end = split_k.begin(s + 1);
    arguments.lo_tiles[s] = k_tiles(p.k_lo, begin, end);
    arguments.hi_tiles[s] = k_tiles(p.k_hi, begin - split_k.lo_tiles, end - split_k.lo_tiles);
  }
  arguments.block_bytes = cuda_block_bytes(p.k_lo, p.k_hi);
  arguments.block_lo_bytes = cuda_block_lo_bytes(p.k_lo);
  arguments.last_block = static_cast<int>(cuda_packed_blocks(p.n)) - 1;
  arguments.m_tiles = static_cast<int>(ceil_div(p.m, kTileM * Cluster::kM));
  arguments.n_tiles = static_cast<int>(ceil_div(p.n, kTileN * Cluster::kN));
  arguments.tiles = arguments.m_tiles * arguments.n_tiles;

  const auto kernel =
      mixed_gemm_sm90_kernel<kTileM, Cluster::kM, Cluster::kN, Cluster::kSplitK, Out>;
  constexpr int kShared = sizeof(SharedPlan<Cluster, Out>);
  static_assert(kShared <= kMaxSharedBytes);
  const unsigned blocks = Cluster::kBlocks * split_k.splits;
  Grid grid{.x = blocks, .threads = kThreads, .shared_bytes = kShared, .cluster = blocks};
  // If no cluster fits, the launch reports it.
  const int resident = std::max(
      resident_clusters(kOp, reinterpret_cast<const void*>(kernel), grid, stream.device), 1);
  grid.x *=
      std::min({arguments.tiles, clusters_at_once(static_cast<int>(blocks), device.sms), resident});
  const int64_t asked = int64_t{grid.x} * TileSource<Cluster>::kWeightBlocks;
  arguments.prefetched_bytes =
      prefetched_steps(asked, asked, device.l2_bytes, current_prefetch()) * kCudaStepBytes;
  launch_pdl(kOp, kernel, grid, stream, arguments);
}

// The kernel of the choice's cluster (cluster_of).
template <int kTileM, class Out>
void launch(const MixedGemmParams& p, const MixedGemmChoice& choice, const Device& device,
            Stream stream) {
  constexpr MixedGemmTile tile = kTile<kTileM>;
  const auto run = [&]<int kM, int kN, bool kSplitK>() {
    launch_cluster<ClusterPlace<kTileM, kM, kN, kSplitK>, Out>(p, choice.split_k, device, stream);
  };
  if constexpr (tile.most_splits > 1) {
    if (choice.split_k.splits > 1) return run.template operator()<1, kSplitClusterN, true>();
  }
  if constexpr (tile.cluster_m != 1 || tile.cluster_n != tile.row_n) {
    if (p.m <= kTileM) return run.template operator()<1, tile.row_n, false>();
  }
  run.template operator()<tile.cluster_m, tile.cluster_n, false>();
}

}  // namespace
}  // namespace resq::cuda::sm90

namespace resq::cuda {

void mixed_gemm_sm90(const MixedGemmParams& params, const MixedGemmChoice& choice, void* workspace,
                     const Device& device, Stream stream) {
  const MixedGemmParams p = readable_rows(params, choice.rows, workspace, stream);
  with_tile<kSm90Tiles>(choice.tile, [&]<int kTileM>() {
    switch (p.out_type) {
      case FloatType::kFloat16: return sm90::launch<kTileM, __half>(p, choice, device, stream);
      case FloatType::kBFloat16:
        return sm90::launch<kTileM, __nv_bfloat16>(p, choice, device, stream);
      case FloatType::kFloat32: return sm90::launch<kTileM, float>(p, choice, device, stream);
    }
  });
}

}  // namespace resq::cuda
