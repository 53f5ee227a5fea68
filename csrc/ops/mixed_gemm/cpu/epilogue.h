// What the vector and the AMX body of mixed_gemm share: the codes of a row of activations, and the
// epilogue of a row of sums. Included inside the namespace of an instruction set.

constexpr int64_t kBlockN = kPackedBlockN;

// What the epilogue needs of one activation row and part.
struct RowPart {
  float scale;
  uint32_t zero;        // two's complement; all integer arithmetic is modulo 2^32, d fits in int32
  uint32_t correction;  // storage offset of the weight codes x sum of the row's codes
};

struct RowScales {
  RowPart lo, hi;
};

// What the epilogue needs of the N of one weight block; zeros past the end.
struct BlockScales {
  int64_t first, count;
  float scale_lo[kBlockN], scale_hi[kBlockN], bias[kBlockN];
  uint32_t sum_lo[kBlockN], sum_hi[kBlockN];
};

// The low codes of one row, one a byte.
void unpack_row(const MixedGemmParams& p, int64_t m, int8_t* codes) {
  if (!p.q_lo_packed) {
    std::copy_n(static_cast<const int8_t*>(p.q_lo) + m * p.k_lo, p.k_lo, codes);
    return;
  }
  const auto* bytes = static_cast<const uint8_t*>(p.q_lo) + m * (p.k_lo / 2);
  for (int64_t k = 0; k < p.k_lo / 2; ++k) {
    codes[2 * k] = unpack_int4_even(bytes[k]);
    codes[2 * k + 1] = unpack_int4_odd(bytes[k]);
  }
}

// Pads `codes` with zeros to `padded` and returns their sum.
int32_t pad_and_sum(int8_t* codes, int64_t k, int64_t padded) {
  for (int64_t i = k; i < padded; ++i) codes[i] = 0;
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += codes[i];
  return sum;
}

// The scales of a row of activations, from the sums of its codes.
RowScales make_row_scales(const float* params, int32_t sum_lo, int32_t sum_hi) {
  return {{params[0], exact_integer(params[1]), static_cast<uint32_t>(sum_lo) * kPackedOffsetLo},
          {params[2], exact_integer(params[3]), static_cast<uint32_t>(sum_hi) * kPackedOffsetHi}};
}

// Codes of row m in their natural order: the low part, padded with zeros to `padded_k_lo`, then the
// high part, padded to `padded_k_hi`.
RowScales read_row(const MixedGemmParams& p, int64_t m, int64_t padded_k_lo, int64_t padded_k_hi,
                   int8_t* codes) {
  unpack_row(p, m, codes);
  const int32_t sum_lo = pad_and_sum(codes, p.k_lo, padded_k_lo);
  codes += padded_k_lo;
  std::copy_n(p.q_hi + m * p.k_hi, p.k_hi, codes);
  const int32_t sum_hi = pad_and_sum(codes, p.k_hi, padded_k_hi);
  return make_row_scales(p.params + 4 * m, sum_lo, sum_hi);
}

float load_float(const void* data, FloatType type, int64_t i) {
  if (type == FloatType::kFloat16) return to_float(static_cast<const Half*>(data)[i]);
  if (type == FloatType::kBFloat16) return to_float(static_cast<const BFloat16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

void load_block_scales(const MixedGemmParams& p, int64_t block, BlockScales& c) {
  const int64_t first = block * kBlockN, count = std::min(kBlockN, p.n - first);
  if (count < kBlockN) c = {};
  c.first = first;
  c.count = count;
  const float* scale = p.weight_scale + 2 * first;
  const int32_t* sum = p.weight_sum + 2 * first;
  for (int64_t j = 0; j < count; ++j) {
    c.scale_lo[j] = scale[2 * j];
    c.scale_hi[j] = scale[2 * j + 1];
    c.sum_lo[j] = static_cast<uint32_t>(sum[2 * j]);
    c.sum_hi[j] = static_cast<uint32_t>(sum[2 * j + 1]);
  }
  if (!p.bias) return;
  for (int64_t j = 0; j < count; ++j) c.bias[j] = load_float(p.bias, p.bias_type, first + j);
}

// One part of the epilogue for kLanes of N, without the sum of the two parts.
inline Vec scale_sums(const uint32_t* sums, const RowPart& row, const uint32_t* weight_sum,
                      const float* weight_scale) {
  typedef uint32_t UVec __attribute__((vector_size(sizeof(IVec))));
  const UVec offsets = row.correction + row.zero * load_bits<UVec>(weight_sum);
  const UVec d = load_bits<UVec>(sums) - offsets;
  return (__builtin_convertvector((IVec)d, Vec) * row.scale) * load(weight_scale);
}

template <class T>
inline void finish_row(const MixedGemmParams& p, const RowScales& row, const uint32_t* sums_lo,
                       const uint32_t* sums_hi, const BlockScales& c, T* out) {
  for (int64_t j = 0; j < c.count; j += kLanes) {
    Vec y{};
    if (p.k_lo) y = scale_sums(sums_lo + j, row.lo, c.sum_lo + j, c.scale_lo + j);
    if (p.k_hi) {
      const Vec hi = scale_sums(sums_hi + j, row.hi, c.sum_hi + j, c.scale_hi + j);
      y = p.k_lo ? y + hi : hi;
    }
    if (p.bias) y = y + load(c.bias + j);
    store_up_to(out + j, y, c.count - j);
  }
}

// The epilogue of row m: sums of both parts [kBlockN] -> out.
void finish_row(const MixedGemmParams& p, int64_t m, const RowScales& row, const uint32_t* sums_lo,
                const uint32_t* sums_hi, const BlockScales& c) {
  const int64_t first = m * p.n + c.first;
  switch (p.out_type) {
    case FloatType::kFloat32:
      return finish_row(p, row, sums_lo, sums_hi, c, static_cast<float*>(p.out) + first);
    case FloatType::kFloat16:
      return finish_row(p, row, sums_lo, sums_hi, c, static_cast<Half*>(p.out) + first);
    case FloatType::kBFloat16:
      return finish_row(p, row, sums_lo, sums_hi, c, static_cast<BFloat16*>(p.out) + first);
  }
}
