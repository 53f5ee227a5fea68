// mixed_gemm for many rows on sm_90a: D = W X^T by wgmma, weights from registers, activations from
// shared memory.
//
// Persistent blocks of three warpgroups walk over output tiles of kTileM x 128 (N): one is the
// producer, of which one thread copies; two are consumers, which multiply 64 rows of the weight
// each. Both parts' sums stay exact in registers until the epilogue, as the numerics contract asks.
// During the epilogue the producer runs ahead into the next tile. The blocks of a cluster share
// activations, and weights if tiles are small.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/pdl.cuh"
#include "cuda/tensor_map.h"
#include "ops/mixed_gemm/mixed_gemm_cuda.h"
#include "ops/mixed_gemm/sm90/epilogue.cuh"
#include "ops/mixed_gemm/sm90/mainloop.cuh"

namespace resq::cuda::sm90 {
namespace {

constexpr const char* kOp = "mixed_gemm";
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kMaxSharedBytes = 227 * 1024;

// Registers of a thread after the split: 128 x 24 + 256 x 240 = 384 x 168, the registers that the
// block starts with.
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;

template <int kTileM, class Out>
struct SharedPlan {
  using Epilogues = EpilogueShared<kTileM, Out>[kConsumers];
  static constexpr int kLeft = kMaxSharedBytes - static_cast<int>(sizeof(Epilogues));
  static constexpr int kStages = kLeft / static_cast<int>(sizeof(Stage<kTileM>) + 32);
  static_assert(sizeof(Stage<kTileM>) % 1024 == 0);

  Ring<kTileM, kStages> ring;
  Epilogues epilogues;
};

// The kernel's argument. The host computes what it can, because the producer thread has 24
// registers.
struct Arguments {
  MixedGemmParams p;
  CUtensorMap lo, hi;  // of the activation rows
  KTiles lo_tiles, hi_tiles;
  int64_t block_bytes, block_lo_bytes;  // of 64 packed weight rows
  int last_block;
  int m_tiles, n_tiles, tiles;  // of a cluster
};

// Order of the tiles: groups along M that stay in L2. Inside a group m changes fastest, so that
// blocks that run together read few weights from memory, and each of them once.
constexpr int kRasterM = 16;

struct TilePlace {
  int m, n_block;  // first m, first block of 64 weight rows
};
template <int kTileM>
__device__ inline TilePlace tile_at(const Arguments& arguments, int index,
                                    ClusterPlace<kTileM> place) {
  using Cluster = ClusterPlace<kTileM>;
  const int group_tiles = kRasterM * arguments.n_tiles;
  const int first = index / group_tiles * kRasterM;
  const int height = min(kRasterM, arguments.m_tiles - first);
  const int inside = index % group_tiles;
  const int m = first + inside % height, n = inside / height;
  return {(m * Cluster::kM + place.m()) * kTileM, (n * Cluster::kN + place.n()) * kConsumers};
}

template <int kTileM, class Out>
__global__ void __launch_bounds__(kThreads, kTile<kTileM>.min_blocks)
    mixed_gemm_sm90_kernel(const __grid_constant__ Arguments arguments) {
  using Plan = SharedPlan<kTileM, Out>;
  constexpr int kStages = Plan::kStages;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Plan& shared = *reinterpret_cast<Plan*>(shared_bytes);
  const MixedGemmParams& p = arguments.p;
  // Through a shuffle, so that the compiler knows that it is warp-uniform.
  const uint32_t warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  using Place = ClusterPlace<kTileM>;
  const Place place{static_cast<int>(blockIdx.x) % Place::kBlocks};
  const int first_tile = static_cast<int>(blockIdx.x) / Place::kBlocks;
  const int clusters = static_cast<int>(gridDim.x) / Place::kBlocks;
  const KTiles lo = arguments.lo_tiles, hi = arguments.hi_tiles;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&shared.ring.full[i], 1);
      mbarrier_init(&shared.ring.empty[i], Place::kPeers * kConsumerWarps);
    }
    mbarrier_init_fence();
  }
  cluster_sync();
  pdl_wait();
  pdl_trigger();

  if (warpgroup == 0) {
    warpgroup_registers_decrease<kProducerRegisters>();
    if (threadIdx.x == 0) {
      if (p.k_lo > 0) prefetch_tensor_map(&arguments.lo);
      if (p.k_hi > 0) prefetch_tensor_map(&arguments.hi);
      Producer<kTileM, kStages> producer{shared.ring, place, {}};
      for (int t = first_tile; t < arguments.tiles; t += clusters) {
        const TilePlace tile = tile_at(arguments, t, place);
        using Source = TileSource<kTileM>;
        Source source{{}, tile.m + place.n() * producer.kHalfM};
        for (int c = 0; c < Source::kWeightBlocks; ++c) {  // past the end: the last block again
          const int block = tile.n_block + (Source::kWeightBlocks == 1 ? place.m() : c);
          source.weights[c] =
              p.packed_weight + min(block, arguments.last_block) * arguments.block_bytes;
        }
        producer.load_part(source, &arguments.lo, lo, 0, kLoStageBytes);
        producer.load_part(source, &arguments.hi, hi, arguments.block_lo_bytes, kHiStageBytes);
      }
    }
    __syncwarp();
  } else {
    warpgroup_registers_increase<kConsumerRegisters>();
    Consumer<kTileM, kStages> consumer{shared.ring, place, threadIdx.x - 128, {}};
    for (int t = first_tile; t < arguments.tiles; t += clusters) {
      const TilePlace tile = tile_at(arguments, t, place);
      keep_opaque(consumer.thread);
      Epilogue<kTileM, Out> epilogue{p, shared.epilogues, consumer.thread};
      uint32_t sums_lo[kTileM / 2], sums_hi[kTileM / 2];
      epilogue.fetch(tile.m, (tile.n_block + consumer.thread / 128) * kWarpgroupN);
      consumer.multiply_tile(lo, hi, sums_lo, sums_hi);
      epilogue.write(sums_lo, sums_hi);
    }
  }
  // A block's shared memory must outlive what its cluster still writes and signals there.
  cluster_sync();
}

template <int kTileM, class Out>
void launch(const MixedGemmParams& p, int sms, Stream stream) {
  using Cluster = ClusterPlace<kTileM>;
  constexpr int kBoxM = kTileM / Cluster::kN;  // rows of one copy
  Arguments arguments{};
  arguments.p = p;
  if (p.k_lo > 0) arguments.lo = byte_rows_map(kOp, p.q_lo, p.m, p.k_lo, p.k_lo, kBoxM);
  if (p.k_hi > 0) arguments.hi = byte_rows_map(kOp, p.q_hi, p.m, p.k_hi, p.k_hi, kBoxM);
  arguments.lo_tiles = k_tiles(p.k_lo);
  arguments.hi_tiles = k_tiles(p.k_hi);
  arguments.block_bytes = cuda_block_bytes(p.k_lo, p.k_hi);
  arguments.block_lo_bytes = cuda_block_lo_bytes(p.k_lo);
  arguments.last_block = static_cast<int>(cuda_packed_blocks(p.n)) - 1;
  arguments.m_tiles = static_cast<int>(ceil_div(p.m, kTileM * Cluster::kM));
  arguments.n_tiles = static_cast<int>(ceil_div(p.n, kTileN * Cluster::kN));
  arguments.tiles = arguments.m_tiles * arguments.n_tiles;

  const auto kernel = mixed_gemm_sm90_kernel<kTileM, Out>;
  constexpr int kShared = sizeof(SharedPlan<kTileM, Out>);
  static_assert(kShared <= kMaxSharedBytes);
  Grid grid{.x = Cluster::kBlocks,
            .threads = kThreads,
            .shared_bytes = kShared,
            .cluster = Cluster::kBlocks};
  // If no cluster fits, the launch reports it.
  const int resident = std::max(
      resident_clusters(kOp, reinterpret_cast<const void*>(kernel), grid, stream.device), 1);
  grid.x *= std::min({arguments.tiles, sm90_clusters(Cluster::kBlocks, sms), resident});
  launch_pdl(kOp, kernel, grid, stream, arguments);
}

}  // namespace
}  // namespace resq::cuda::sm90

namespace resq::cuda {

void mixed_gemm_sm90(const MixedGemmParams& params, const MixedGemmChoice& choice, void* workspace,
                     const Device& device, Stream stream) {
  const MixedGemmParams p = readable_rows(params, choice.rows, workspace, stream);
  with_tile<kSm90Tiles>(choice.tile, [&]<int kTileM>() {
    switch (p.out_type) {
      case FloatType::kFloat16: return sm90::launch<kTileM, __half>(p, device.sms, stream);
      case FloatType::kBFloat16: return sm90::launch<kTileM, __nv_bfloat16>(p, device.sms, stream);
      case FloatType::kFloat32: return sm90::launch<kTileM, float>(p, device.sms, stream);
    }
  });
}

}  // namespace resq::cuda
