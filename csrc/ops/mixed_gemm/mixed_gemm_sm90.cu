#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/pdl.cuh"
#include "cuda/tensor_map.h"
#include "ops/mixed_gemm/mixed_gemm_cuda.h"
#include "ops/mixed_gemm/mixed_gemm_pad_rows.h"
#include "ops/mixed_gemm/mixed_gemm_rows_sm90.cuh"
#include "ops/mixed_gemm/mixed_gemm_sm90.cuh"

namespace resq::cuda {
namespace {

constexpr const char* kOp = "mixed_gemm";

void launch_unpack(const uint8_t* nibbles, int64_t rows, int64_t row_bytes, uint8_t* out,
                   int64_t stride, Stream stream) {
  const int64_t blocks_per_row = ceil_div(stride, kSm90RowBytes * kRowsThreads);
  const auto grid = static_cast<unsigned>(blocks_per_row * rows);
  launch_pdl(mixed_gemm_unpack_rows_kernel, grid, kRowsThreads, 0, stream, nibbles, row_bytes, out,
             stride, static_cast<unsigned>(blocks_per_row));
  check_launch(kOp);
}

// Clusters of this launch that run at once on the current device, of `sms` multiprocessors. The
// driver is asked once a kernel; where none fits, the launch says so.
int clusters_at_once(const void* kernel, const cudaLaunchConfig_t& config, int blocks, int sms) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> known;
  int index = 0;
  cudaGetDevice(&index);
  const int expected = sm90_clusters(blocks, sms);
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find({index, kernel});
  if (found == known.end()) {
    int fit = 0;
    if (cudaOccupancyMaxActiveClusters(&fit, kernel, &config) != cudaSuccess) fit = 0;
    found = known.emplace(std::pair(index, kernel), std::max(fit, 1)).first;
  }
  return std::min(expected, found->second);
}

template <int kTokens, class Out>
void launch_kernel(Sm90Launch launch, const uint8_t* q_lo, const uint8_t* q_hi,
                   const Sm90Rows& rows, int sms, Stream stream) {
  const MixedGemmParams& p = launch.p;
  constexpr Sm90Cluster kCluster = sm90_cluster(kTokens);
  constexpr int kBox = kTokens / kCluster.weights;  // tokens of one copy
  if (p.k_lo > 0) launch.lo = byte_rows_map(kOp, q_lo, p.rows, p.k_lo, rows.lo_stride, kBox);
  if (p.k_hi > 0) launch.hi = byte_rows_map(kOp, q_hi, p.rows, p.k_hi, rows.hi_stride, kBox);
  launch.token_tiles = static_cast<int>(ceil_div(p.rows, kTokens * kCluster.tokens));
  launch.weight_tiles = static_cast<int>(ceil_div(p.n, kTileWeights * kCluster.weights));
  launch.tiles = launch.token_tiles * launch.weight_tiles;

  const auto kernel = mixed_gemm_sm90_kernel<kTokens, Out>;
  constexpr int kShared = sizeof(SharedPlan<kTokens, Out>);
  static_assert(kShared <= kSm90SharedBytes);
  const void* address = reinterpret_cast<const void*>(kernel);
  allow_shared_bytes(kOp, address, kShared);

  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kCluster.blocks(), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kSm90Threads);
  config.dynamicSmemBytes = kShared;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = attributes;
  config.numAttrs = 1;
  config.gridDim = dim3(kCluster.blocks());
  config.gridDim.x *=
      std::min(launch.tiles, clusters_at_once(address, config, kCluster.blocks(), sms));
  config.numAttrs = stream.dependent_launches ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, launch);
  check_launch(kOp);
}

template <int kTokens>
void launch_of_type(const Sm90Launch& launch, const uint8_t* q_lo, const uint8_t* q_hi,
                    const Sm90Rows& rows, int sms, Stream stream) {
  switch (launch.p.out_type) {
    case FloatType::kFloat16:
      return launch_kernel<kTokens, __half>(launch, q_lo, q_hi, rows, sms, stream);
    case FloatType::kBFloat16:
      return launch_kernel<kTokens, __nv_bfloat16>(launch, q_lo, q_hi, rows, sms, stream);
    case FloatType::kFloat32:
      return launch_kernel<kTokens, float>(launch, q_lo, q_hi, rows, sms, stream);
  }
}

}  // namespace

void mixed_gemm_sm90(const MixedGemmParams& p, const MixedGemmChoice& choice, void* workspace,
                     const Device& device, Stream stream) {
  const Sm90Rows rows = sm90_rows(p.rows, p.k_lo, p.q_lo_packed, p.k_hi);
  auto* space = static_cast<uint8_t*>(workspace);
  const auto* q_lo = static_cast<const uint8_t*>(p.q_lo);
  const auto* q_hi = reinterpret_cast<const uint8_t*>(p.q_hi);
  if (rows.expand_lo && p.q_lo_packed) {
    launch_unpack(q_lo, p.rows, p.k_lo / 2, space, rows.lo_stride, stream);
  } else if (rows.expand_lo) {
    pad_byte_rows(q_lo, space, p.rows, p.k_lo, rows.lo_stride, stream);
  }
  if (rows.expand_lo) q_lo = space;
  if (rows.expand_hi) {
    pad_byte_rows(q_hi, space + rows.hi_offset, p.rows, p.k_hi, rows.hi_stride, stream);
    q_hi = space + rows.hi_offset;
  }

  Sm90Launch launch{};
  launch.p = p;
  launch.lo_stages = part_stages(p.k_lo);
  launch.hi_stages = part_stages(p.k_hi);
  launch.block_bytes = cuda_block_bytes(p.k_lo, p.k_hi);
  launch.block_lo_bytes = cuda_block_lo_bytes(p.k_lo);
  launch.last_block = static_cast<int>(cuda_packed_blocks(p.n)) - 1;
  switch (choice.tile_rows) {
    case 32: return launch_of_type<32>(launch, q_lo, q_hi, rows, device.sms, stream);
    case 64: return launch_of_type<64>(launch, q_lo, q_hi, rows, device.sms, stream);
    case 128: return launch_of_type<128>(launch, q_lo, q_hi, rows, device.sms, stream);
    case 192: return launch_of_type<192>(launch, q_lo, q_hi, rows, device.sms, stream);
    default: break;
  }
  throw std::runtime_error("mixed_gemm: tile_rows: expected 32, 64, 128 or 192, got " +
                           std::to_string(choice.tile_rows));
}

}  // namespace resq::cuda
