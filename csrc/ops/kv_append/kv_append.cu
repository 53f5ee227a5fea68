// One launch: RoPE and rotation of k and q, quantization of k and v, write into pages. A block
// takes some tokens of one head, of k and v or of q, which share the reads of the head's rotation.
//
//   thread = one dim of some rows    RoPE into shared memory, then the rotation. For k it sums over
//                                    d in the CPU's order and rounds each product and sum on its
//                                    own: the CPU's bits, which tensor cores would not give. q, of
//                                    which no bytes are stored, uses fused multiply-adds
//   warp = one row of k or of v      ranges, codes, bytes
#include <cuda_runtime.h>

#include "cuda/copy_sm80.cuh"
#include "cuda/inverse.h"
#include "cuda/kv_arithmetic.cuh"
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

// A row of which each lane holds dims lane * kHeadDim / 32 + i, quantized: the range of the lane's
// part, and its codes.
template <int kHeadDim>
struct QuantizedRow {
  static constexpr int kDims = kHeadDim / 32;
  static constexpr int kLowLanes = KvLayout<kHeadDim>::kLowDims / kDims;
  struct alignas(kDims) Codes {
    uint8_t of[kDims];
  };

  KvRange range;
  Codes codes;

  // The lanes of both parts compute their ranges at the same time.
  __device__ QuantizedRow(const float (&x)[kDims], bool uniform) {
    const bool is_low = threadIdx.x % 32 < kLowLanes;
    // Order as the floats do. A NaN lies above infinity or, if it is negative, below -infinity.
    int min = ordered_bits(__float_as_int(x[0])), max = min;
#pragma unroll
    for (int i = 1; i < kDims; ++i) {
      const int bits = ordered_bits(__float_as_int(x[i]));
      min = ::min(min, bits);
      max = ::max(max, bits);
    }
    constexpr unsigned kAll = 0xffffffff;
    constexpr int kLeast = static_cast<int>(0x80000000), kMost = 0x7fffffff;
    const bool in_low = is_low || uniform;
    const int low_min = __reduce_min_sync(kAll, in_low ? min : kMost);
    const int low_max = __reduce_max_sync(kAll, in_low ? max : kLeast);
    const int high_min = __reduce_min_sync(kAll, in_low ? kMost : min);
    const int high_max = __reduce_max_sync(kAll, in_low ? kLeast : max);
    min = in_low ? low_min : high_min;
    max = in_low ? low_max : high_max;
    const int levels = in_low ? kKvLowLevels : kKvHighLevels;
    range = kv_range<DeviceKvArithmetic>(__int_as_float(ordered_bits(min)),
                                         __int_as_float(ordered_bits(max)), levels);
    constexpr int kInfinity = 0x7f800000;
    if (max >= kInfinity || min <= ~kInfinity) {
      range = {{0x7e00}, {0x7e00}, 0.0f, 0.0f};  // kKvNanRange
    }
#pragma unroll
    for (int i = 0; i < kDims; ++i) codes.of[i] = kv_code(x[i], range, levels);
  }

  // Of the lane's part.
  __device__ uint32_t stored_range() const {
    return range.stored_scale.bits | uint32_t{range.stored_offset.bits} << 16;
  }
};

// Writes the bytes of token `token` of `tile`, whose codes are `codes`: first those of two codes,
// then those of one, which lie elsewhere.
template <int kHeadDim, bool kKey>
__device__ void write_bytes(const uint8_t* codes, int token, uint8_t* tile) {
  constexpr int kBytes = KvLayout<kHeadDim>::kRowBytes, kPairs = KvLayout<kHeadDim>::kLowDims / 2;
  const auto write = [&](int first, int end) {
    const int index = first + threadIdx.x % 32;
    if (index >= end) return;
    const ByteDims dims = byte_dims<kHeadDim, kKey>(index);
    const int nibble = dims.high < 0 ? 0 : codes[dims.high] << 4;
    tile[place<kHeadDim, kKey>(token, dims.low).byte] =
        static_cast<uint8_t>(codes[dims.low] | nibble);
  };
#pragma unroll
  for (int first = 0; first < kPairs; first += 32) write(first, kPairs);
#pragma unroll
  for (int first = kPairs; first < kBytes; first += 32) write(first, kBytes);
}

// What x cos + rotate_half(x) sin takes at one dim of a row.
struct RopeNumbers {
  NumberBits<1> here, there, cos, sin;
};

// Of dim `dim` of the row at `row`.
template <int kHeadDim>
__device__ RopeNumbers load_rope(const KvAppendParams& p, FloatArray x, int64_t row, int64_t angles,
                                 int dim) {
  RopeNumbers numbers = {};
  numbers.here = load_bits<1>(x, row + dim);
  if (p.cos.data) {
    numbers.there = load_bits<1>(x, row + (dim ^ kHeadDim / 2));
    numbers.cos = load_bits<1>(p.cos, angles + dim);
    numbers.sin = load_bits<1>(p.sin, angles + dim);
  }
  return numbers;
}

// Each operation rounds on its own.
template <int kHeadDim>
__device__ float rope(const KvAppendParams& p, const RopeNumbers& numbers, int dim) {
  if (!p.cos.data) return numbers.here[0];
  const float across = __fmul_rn(numbers.there[0], numbers.sin[0]);
  const float along = __fmul_rn(numbers.here[0], numbers.cos[0]);
  return dim < kHeadDim / 2 ? __fsub_rn(along, across) : __fadd_rn(along, across);
}

// Column `dim` of matrix `matrix` of the rotation, kAhead numbers at a time. If that is all of
// them, the caller loads them, long before it rotates.
template <int kHeadDim, class Rotation, int kAhead>
struct RotationColumn {
  const Rotation* u;  // its first number; null without a rotation
  int dim;
  Rotation ahead[kAhead];

  __device__ RotationColumn(const FloatArray& rotation, int matrix, int dim)
      : u(static_cast<const Rotation*>(rotation.data)), dim(dim) {
    if (u) u += matrix * kHeadDim * kHeadDim + dim;
  }

  // Thread `thread` prefetches its part of the matrix into the second-level cache. Not into
  // registers: before pdl_wait a load could return bytes that the previous kernel has yet to write.
  __device__ void prefetch(int thread) const {
    if (!u) return;
    constexpr int kLine = 128 / sizeof(Rotation);
#pragma unroll
    for (int i = 0; i < kHeadDim * kHeadDim; i += kThreads * kLine) {
      const int first = i + thread * kLine;
      if (first < kHeadDim * kHeadDim) prefetch_line(u - dim + first);
    }
  }

  __device__ void load(int first) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = u[(first + i) * kHeadDim];
  }

  // sums[r] = sum over d of loaded[d][first_row + r] * U[d][dim], in the order of d; the row itself
  // without a rotation. add_product(a, b, sum) returns a b + sum, rounded as the caller needs it.
  template <int kBlockRows, int kRows, class AddProduct>
  __device__ void rotate_rows(const float (&loaded)[kHeadDim][kBlockRows], int first_row,
                              AddProduct add_product, float (&sums)[kRows]) {
    if (!u) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r] = loaded[dim][first_row + r];
      return;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] = 0.0f;
#pragma unroll 1
    for (int first = 0; first < kHeadDim; first += kAhead) {
      if constexpr (kAhead < kHeadDim) load(first);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const float weight = number(ahead[i]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          sums[r] = add_product(weight, loaded[first + i][first_row + r], sums[r]);
        }
      }
    }
  }
};

template <int kHeadDim, int kRows, class Rotation>
__global__ void __launch_bounds__(kThreads)
    kv_append_kernel(const __grid_constant__ KvAppendParams p, uint64_t page_inverse) {
  using Layout = KvLayout<kHeadDim>;
  using Row = QuantizedRow<kHeadDim>;
  constexpr int kTokens = kBlockRows<kHeadDim, kRows>, kDims = Row::kDims;
  // Where each thread has one row, latency decides: all loads are in flight at once.
  constexpr bool kEarly = kRows == 1;
  __shared__ alignas(16) float loaded[kHeadDim][kTokens];
  __shared__ alignas(16) float rotated[kTokens][kHeadDim];
  __shared__ alignas(16) uint8_t codes[kWarps][kHeadDim];

  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int dim = thread % kHeadDim, first_row = thread / kHeadDim * kRows;
  const int heads_kv = static_cast<int>(p.n_kv), heads_q = static_cast<int>(p.n_q);
  const bool is_query = blockIdx.y >= heads_kv;
  const int head = is_query ? blockIdx.y - heads_kv : blockIdx.y;
  const int kv_head = is_query ? head / (heads_q / heads_kv) : head;
  const FloatArray rows = {is_query ? p.q : p.k, p.type};
  const int64_t stride = is_query ? p.q_stride : p.k_stride;
  const int matrix = p.shared_rotation ? 0 : kv_head;
  RotationColumn<kHeadDim, Rotation, kEarly ? kHeadDim : 16> column(p.rotation, matrix, dim);

  // Rows beyond the last token are computed as the last one is, and not stored.
  const auto last_or = [&](int row) { return min(first_token + row, p.tokens - 1); };

  // Item i of a block is row i / 2 of k, or of v if i is odd; each one is quantized by one warp.
  struct Item {
    int64_t slot;
    NumberBits<kDims> v;
  };
  const auto load_item = [&](int item) {
    const int64_t token = last_or(item / 2), from = token * p.v_stride + head * kHeadDim;
    return Item{p.slot_mapping[token], load_bits<kDims>({p.v, p.type}, from + lane * kDims)};
  };

  // cos and sin too: the weights of a layer have passed through the second-level cache since they
  // were read last.
  if constexpr (kEarly) {
    column.prefetch(thread);
    if (lane == 0 && p.cos.data) {
      const int64_t angle = last_or(first_row) * kHeadDim + dim;
      prefetch_early(number_address(p.cos, angle));
      prefetch_early(number_address(p.sin, angle));
    }
  }
  pdl_wait();
  pdl_trigger();
  Item item_ahead;
#pragma unroll 4  // eight rows of addresses at once spill registers
  for (int r = 0; r < kRows; ++r) {
    const int64_t token = last_or(first_row + r);
    const RopeNumbers numbers =
        load_rope<kHeadDim>(p, rows, token * stride + head * kHeadDim, token * kHeadDim, dim);
    if constexpr (kEarly) {
      if (!is_query) item_ahead = load_item(warp);
      if (column.u) column.load(0);
    }
    loaded[dim][first_row + r] = rope<kHeadDim>(p, numbers, dim);
  }
  __syncthreads();

  float sums[kRows];
  if (is_query) {
    const auto fused = [](float a, float b, float sum) { return fmaf(a, b, sum); };
    column.rotate_rows(loaded, first_row, fused, sums);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t token = first_token + first_row + r;
      if (token < p.tokens) p.rotated_q[(token * heads_q + head) * kHeadDim + dim] = sums[r];
    }
    return;
  }
  const auto apart = [](float a, float b, float sum) { return __fadd_rn(sum, __fmul_rn(a, b)); };
  column.rotate_rows(loaded, first_row, apart, sums);
#pragma unroll
  for (int r = 0; r < kRows; ++r) rotated[first_row + r][dim] = sums[r];
  __syncthreads();

  const auto append = [&](int index, const Item& item) {
    if (first_token + index / 2 >= p.tokens || item.slot < 0) return;
    if (item.slot >= p.slots) __trap();
    const auto page = static_cast<int64_t>(__umul64hi(item.slot, page_inverse));
    const auto position = static_cast<uint32_t>(item.slot - page * p.page_size);
    uint8_t* chunk = p.cache + (page * p.n_kv + head) * p.page_size * Layout::kTokenBytes;
    const bool is_value = index % 2 != 0;
    float x[kDims];
    if (is_value) {
#pragma unroll
      for (int i = 0; i < kDims; ++i) x[i] = item.v[i];
    } else {
#pragma unroll
      for (int i = 0; i < kDims; ++i) x[i] = rotated[index / 2][lane * kDims + i];
    }
    const Row row(x, p.uniform);
    reinterpret_cast<typename Row::Codes*>(codes[warp])[lane] = row.codes;
    __syncwarp();
    const auto in_tile = static_cast<int>(position % Layout::kTileTokens);
    if (is_value) {
      write_bytes<kHeadDim, false>(codes[warp], in_tile,
                                   chunk + kv_v_tile_byte<kHeadDim>(p.page_size, position));
    } else {
      write_bytes<kHeadDim, true>(codes[warp], in_tile, chunk + kv_k_tile_byte<kHeadDim>(position));
    }
    if (lane == 0 || lane == 31) {  // one of the low part, one of the high
      uint8_t* metadata = chunk + kv_metadata_byte<kHeadDim>(p.page_size, position);
      reinterpret_cast<uint32_t*>(metadata)[2 * is_value + (lane != 0)] = row.stored_range();
    }
  };
  if constexpr (kEarly) {
    static_assert(2 * kTokens <= kWarps);
    if (warp < 2 * kTokens) append(warp, item_ahead);
  } else {
    for (int index = warp; index < 2 * kTokens; index += kWarps) {
      append(index, load_item(index));
      __syncwarp();
    }
  }
}

template <int kHeadDim, int kRows, class Rotation>
void launch(const KvAppendParams& p, Stream stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(p.tokens, kBlockRows<kHeadDim, kRows>));
  const Grid grid{.x = blocks, .y = static_cast<unsigned>(p.n_kv + p.n_q), .threads = kThreads};
  // A cache of 2^32 slots, from which on the inverse would be too coarse, would be 378 GB.
  launch_pdl("kv_append", kv_append_kernel<kHeadDim, kRows, Rotation>, grid, stream, p,
             inverse64(static_cast<uint32_t>(p.page_size)));
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
