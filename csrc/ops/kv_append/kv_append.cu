// One launch: RoPE and rotation of k and q, quantization of k and v, write into pages. A block
// takes some tokens of one head, of k and v or of q, which share the reads of the head's rotation.
//
//   thread = one dim of some rows    RoPE into shared memory, then the rotation. For k it sums over
//                                    d in the CPU's order and rounds each product and sum on its
//                                    own: the CPU's bits, which tensor cores would not give. q, of
//                                    which no bytes are stored, uses fused multiply-adds
//   warp = one row                   ranges, codes, bytes
#include <cuda_runtime.h>

#include "cuda/numbers.cuh"
#include "cuda/pdl.cuh"
#include "ops/kv_append/kv_append.h"

namespace resq::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

// Rows of a block if each thread rotates kRows of them.
template <int kHeadDim, int kRows>
constexpr int kBlockRows = kThreads / kHeadDim * kRows;

// The dims of the codes in byte `index` of the bytes that a token owns in a tile; high is negative
// where the byte is one 8-bit code. Their places follow from kv_k_place and kv_v_place.
struct ByteDims {
  int low, high;
};
template <int kHeadDim, bool kKey>
__host__ __device__ constexpr ByteDims byte_dims(int index) {
  constexpr int kLow = KvLayout<kHeadDim>::kLowDims, kPaired = kLow / 16 * 8;
  if (index < kPaired) {
    const int dim = index / 8 * 16 + index % 8;
    return {dim, dim + 8};
  }
  const int rest = index - kPaired;
  if (rest >= kLow / 2 - kPaired) return {kLow + rest - (kLow / 2 - kPaired), -1};
  return kKey ? ByteDims{kLow - 8 + 2 * rest, kLow - 7 + 2 * rest}
              : ByteDims{kLow - 8 + rest, kLow - 4 + rest};
}

template <int kHeadDim, bool kKey>
__host__ __device__ constexpr KvPlace place(int token, int dim) {
  return kKey ? kv_k_place<kHeadDim>(token, dim) : kv_v_place<kHeadDim>(token, dim);
}

template <int kHeadDim, bool kKey>
constexpr bool byte_dims_agree() {
  for (int index = 0; index < KvLayout<kHeadDim>::kRowBytes; ++index) {
    const ByteDims dims = byte_dims<kHeadDim, kKey>(index);
    const KvPlace low = place<kHeadDim, kKey>(5, dims.low);
    if (low.shift != 0 || low.wide != (dims.high < 0)) return false;
    if (low.wide) continue;
    const KvPlace high = place<kHeadDim, kKey>(5, dims.high);
    if (high.shift != 4 || high.byte != low.byte) return false;
  }
  return true;
}
static_assert(byte_dims_agree<128, true>() && byte_dims_agree<128, false>());
static_assert(byte_dims_agree<64, true>() && byte_dims_agree<64, false>());

struct Extremes {
  int min, max;        // order as the floats do
  unsigned magnitude;  // bits of the largest |x|; NaN is above infinity
};

// kv_range of the extremes of the numbers in all lanes that are `inside` the part.
template <int kCount>
__device__ KvRange part_range(const float (&x)[kCount], bool inside, int levels) {
  Extremes e{0x7fffffff, static_cast<int>(0x80000000), 0};
  if (inside) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int bits = ordered_bits(__float_as_int(x[i]));
      e.min = min(e.min, bits);
      e.max = max(e.max, bits);
      e.magnitude = max(e.magnitude, __float_as_uint(x[i]) & 0x7fffffff);
    }
  }
  constexpr unsigned kAll = 0xffffffff;
  e.min = __reduce_min_sync(kAll, e.min);
  e.max = __reduce_max_sync(kAll, e.max);
  e.magnitude = __reduce_max_sync(kAll, e.magnitude);
  if (e.magnitude >= 0x7f800000) return {{0x7e00}, {0x7e00}, 0.0f, 0.0f};  // kKvNanRange
  return kv_range(__int_as_float(ordered_bits(e.min)), __int_as_float(ordered_bits(e.max)), levels);
}

__device__ uint32_t stored_pair(const KvRange& range) {
  return range.stored_scale.bits | uint32_t{range.stored_offset.bits} << 16;
}

// Quantizes a row of which each lane holds dims lane * kHeadDim / 32 + i, and writes the bytes of
// token `token` of `tile`. Returns the two stored ranges.
template <int kHeadDim, bool kKey>
__device__ uint2 store_row(const float (&x)[kHeadDim / 32], bool uniform, int token, uint8_t* codes,
                           uint8_t* tile) {
  using Layout = KvLayout<kHeadDim>;
  constexpr int kDims = kHeadDim / 32;
  const int lane = threadIdx.x % 32;
  const bool is_low = lane < Layout::kLowDims / kDims;
  const KvRange low = part_range(x, is_low || uniform, kKvLowLevels);
  const KvRange high = uniform ? low : part_range(x, !is_low, kKvHighLevels);
  // kv_code needs these two; a reference to one of the ranges would put both into memory.
  KvRange mine = {};
  mine.offset = is_low ? low.offset : high.offset;
  mine.inv_scale = is_low ? low.inv_scale : high.inv_scale;
  const int levels = is_low || uniform ? kKvLowLevels : kKvHighLevels;
#pragma unroll
  for (int i = 0; i < kDims; ++i) codes[lane * kDims + i] = kv_code(x[i], mine, levels);
  __syncwarp();
  for (int index = lane; index < Layout::kRowBytes; index += 32) {
    const ByteDims dims = byte_dims<kHeadDim, kKey>(index);
    const int nibble = dims.high < 0 ? 0 : codes[dims.high] << 4;
    tile[place<kHeadDim, kKey>(token, dims.low).byte] =
        static_cast<uint8_t>(codes[dims.low] | nibble);
  }
  __syncwarp();
  return {stored_pair(low), stored_pair(high)};
}

// x cos + rotate_half(x) sin at dim `dim` of the row at `row`; each operation rounds on its own.
template <int kHeadDim>
__device__ float load_rope(FloatArray x, int64_t row, FloatArray cos, FloatArray sin,
                           int64_t angles, int dim) {
  const float here = load_number(x, row + dim);
  if (!cos.data) return here;
  const float there = load_number(x, row + (dim ^ kHeadDim / 2));
  const float across = __fmul_rn(there, load_number(sin, angles + dim));
  const float along = __fmul_rn(here, load_number(cos, angles + dim));
  return dim < kHeadDim / 2 ? __fsub_rn(along, across) : __fadd_rn(along, across);
}

// sums[r] = sum over d of loaded[d][first_row + r] * U[d][dim], in the order of d; the row itself
// without a rotation. U is matrix `matrix` of `rotation`, whose numbers are of type Rotation;
// add_product(a, b, sum) returns a b + sum, rounded as the caller needs it.
template <class Rotation, int kHeadDim, int kBlockRows, int kRows, class AddProduct>
__device__ void rotate_rows(FloatArray rotation, int matrix,
                            const float (&loaded)[kHeadDim][kBlockRows], int first_row, int dim,
                            AddProduct add_product, float (&sums)[kRows]) {
  if (!rotation.data) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] = loaded[dim][first_row + r];
    return;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = 0.0f;
  const auto* u = static_cast<const Rotation*>(rotation.data) + dim + matrix * kHeadDim * kHeadDim;
#pragma unroll 16
  for (int d = 0; d < kHeadDim; ++d) {
    const float weight = number(u[d * kHeadDim]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sums[r] = add_product(weight, loaded[d][first_row + r], sums[r]);
    }
  }
}

template <int kHeadDim, int kRows, class Rotation>
__global__ void __launch_bounds__(kThreads)
    kv_append_kernel(const __grid_constant__ KvAppendParams p) {
  using Layout = KvLayout<kHeadDim>;
  constexpr int kTokens = kBlockRows<kHeadDim, kRows>, kDims = kHeadDim / 32;
  __shared__ alignas(16) float loaded[kHeadDim][kTokens];
  __shared__ alignas(16) float rotated[kTokens][kHeadDim];
  __shared__ uint8_t codes[kWarps][kHeadDim];

  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int thread = threadIdx.x;
  const int dim = thread % kHeadDim, first_row = thread / kHeadDim * kRows;
  const int heads_kv = static_cast<int>(p.n_kv), heads_q = static_cast<int>(p.n_q);
  const bool is_query = blockIdx.y >= heads_kv;
  const int head = is_query ? blockIdx.y - heads_kv : blockIdx.y;
  const int kv_head = is_query ? head / (heads_q / heads_kv) : head;
  const FloatArray rows = {is_query ? p.q : p.k, p.type};
  const int64_t stride = is_query ? p.q_stride : p.k_stride;
  const auto row_start = [&](int64_t token) { return token * stride + head * kHeadDim; };

  pdl_wait();
  pdl_trigger();
#pragma unroll 4  // eight rows of addresses at once spill registers
  for (int r = 0; r < kRows; ++r) {
    const int64_t token = first_token + first_row + r;
    const bool there = token < p.tokens;
    loaded[dim][first_row + r] =
        there ? load_rope<kHeadDim>(rows, row_start(token), p.cos, p.sin, token * kHeadDim, dim)
              : 0.0f;
  }
  __syncthreads();

  float sums[kRows];
  const int matrix = p.shared_rotation ? 0 : kv_head;
  if (is_query) {
    const auto fused = [](float a, float b, float sum) { return fmaf(a, b, sum); };
    rotate_rows<Rotation>(p.rotation, matrix, loaded, first_row, dim, fused, sums);
  } else {
    const auto apart = [](float a, float b, float sum) { return __fadd_rn(sum, __fmul_rn(a, b)); };
    rotate_rows<Rotation>(p.rotation, matrix, loaded, first_row, dim, apart, sums);
  }
  if (is_query) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t token = first_token + first_row + r;
      if (token < p.tokens) p.rotated_q[(token * heads_q + head) * kHeadDim + dim] = sums[r];
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) rotated[first_row + r][dim] = sums[r];
  __syncthreads();

  const int warp = thread / 32, lane = thread % 32;
  for (int row = warp; row < kTokens; row += kWarps) {
    const int64_t token = first_token + row;
    if (token >= p.tokens) return;
    const int64_t slot = p.slot_mapping[token];
    if (slot < 0) continue;
    if (slot >= p.slots) __trap();
    const int64_t page = slot / p.page_size, position = slot - page * p.page_size;
    const int in_tile = static_cast<int>(position % Layout::kTileTokens);
    uint8_t* chunk = p.cache + (page * p.n_kv + head) * p.page_size * Layout::kTokenBytes;

    float k[kDims], v[kDims];
    load_numbers({p.v, p.type}, token * p.v_stride + head * kHeadDim + lane * kDims, v);
#pragma unroll
    for (int i = 0; i < kDims; ++i) k[i] = rotated[row][lane * kDims + i];
    const uint2 k_ranges = store_row<kHeadDim, true>(k, p.uniform, in_tile, codes[warp],
                                                     chunk + kv_k_tile_byte<kHeadDim>(position));
    const uint2 v_ranges =
        store_row<kHeadDim, false>(v, p.uniform, in_tile, codes[warp],
                                   chunk + kv_v_tile_byte<kHeadDim>(p.page_size, position));
    if (lane == 0) {
      *reinterpret_cast<uint4*>(chunk + kv_metadata_byte<kHeadDim>(p.page_size, position)) =
          make_uint4(k_ranges.x, k_ranges.y, v_ranges.x, v_ranges.y);
    }
  }
}

template <int kHeadDim, int kRows, class Rotation>
void launch(const KvAppendParams& p, Stream stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(p.tokens, kBlockRows<kHeadDim, kRows>));
  const Grid grid{.x = blocks, .y = static_cast<unsigned>(p.n_kv + p.n_q), .threads = kThreads};
  launch_pdl("kv_append", kv_append_kernel<kHeadDim, kRows, Rotation>, grid, stream, p);
}

template <int kHeadDim, int kRows>
void launch_rotation(const KvAppendParams& p, Stream stream) {
  switch (p.rotation.type) {
    case FloatType::kFloat32: return launch<kHeadDim, kRows, float>(p, stream);
    case FloatType::kFloat16: return launch<kHeadDim, kRows, Half>(p, stream);
    case FloatType::kBFloat16: return launch<kHeadDim, kRows, BFloat16>(p, stream);
  }
}

}  // namespace

void kv_append(const KvAppendParams& p, const Device& device, Stream stream) {
  if (p.tokens == 0 || p.n_kv == 0) return;
  // With eight rows per thread, the rows share each load of the rotation. Used once that leaves two
  // blocks for every multiprocessor; the bits do not depend on it.
  constexpr int kMany = 8;
  const int64_t blocks = p.tokens * (p.n_kv + p.n_q) * p.head_dim / (kMany * kThreads);
  const bool many = blocks >= 2 * device.sms;
  if (p.head_dim == 128) {
    many ? launch_rotation<128, kMany>(p, stream) : launch_rotation<128, 1>(p, stream);
  } else {
    many ? launch_rotation<64, kMany>(p, stream) : launch_rotation<64, 1>(p, stream);
  }
}

}  // namespace resq::cuda
