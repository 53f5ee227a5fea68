// Tensors <-> MixedRows: the checks and the outputs that every quantizing op shares.
#pragma once

#include <optional>
#include <vector>

#include "core/float16.h"
#include "core/quantize.h"
#include "torch/allocate.h"

namespace resq {

inline FloatType float_type(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return FloatType::kFloat32;
    case ScalarType::Half: return FloatType::kFloat16;
    case ScalarType::BFloat16: return FloatType::kBFloat16;
    default: fail(op, argument, "float32, float16 or bfloat16", describe(tensor));
  }
}

// Columns of the last dimension; `tensor` must have one.
inline int64_t last_dimension(const char* op, const char* argument, const Tensor& tensor) {
  if (tensor.dim() == 0) fail(op, argument, "at least one dimension", describe(tensor));
  return tensor.size(tensor.dim() - 1);
}

// Product of all dimensions but the last.
inline int64_t row_count(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) rows *= tensor.size(i);
  return rows;
}

// Fewest rows worth a thread of their own: 16384 elements are about 5 us of work.
inline int64_t rows_per_thread(int64_t columns) {
  return columns >= 16384 ? 1 : 16384 / (columns > 0 ? columns : 1);
}

inline std::vector<int64_t> with_last(const Tensor& tensor, int64_t columns) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  sizes.push_back(columns);
  return sizes;
}

// How an op's arguments ask for quantized rows.
struct MixedOptions {
  int64_t n_hi;
  int64_t lo_bits;
  std::optional<bool> packed;
  bool symmetric;
  double clip;
};

struct MixedOutput {
  Tensor q_lo, q_hi, params;
  MixedRows rows;
};

// Checks the options against rows of `columns`; the message names the op and the option.
inline void check_mixed_options(const char* op, int64_t columns, const MixedOptions& options) {
  const int64_t k_lo = columns - options.n_hi;
  if (options.n_hi < 0 || k_lo < 0) {
    fail(op, "n_hi", "0 to " + std::to_string(columns) + " (the columns of a row)",
         std::to_string(options.n_hi));
  }
  if (options.lo_bits != 4 && options.lo_bits != 8) {
    fail(op, "lo_bits", "4 or 8", std::to_string(options.lo_bits));
  }
  if (!(options.clip > 0.0 && options.clip <= 1.0)) {
    fail(op, "clip", "a factor in (0, 1]", std::to_string(options.clip));
  }
  if (options.packed.value_or(false)) {
    if (options.lo_bits == 8) {
      fail(op, "packed", "False with lo_bits = 8 (8-bit codes need a byte each)", "True");
    }
    if (k_lo % 2 != 0) {
      fail(op, "packed", "an even number of low columns (two codes share a byte)",
           std::to_string(k_lo));
    }
  }
}

// Allocates the outputs for rows shaped like `like` with `columns` columns. `packed_default` is
// what the device's mixed_gemm is fastest with. Call check_mixed_options first.
inline MixedOutput make_mixed_output(const Tensor& like, int64_t columns,
                                     const MixedOptions& options, bool packed_default) {
  const int64_t k_lo = columns - options.n_hi;
  const bool packed =
      options.packed.value_or(packed_default && options.lo_bits == 4 && k_lo % 2 == 0);
  MixedOutput out{allocate(like, with_last(like, packed ? k_lo / 2 : k_lo),
                           packed ? ScalarType::Byte : ScalarType::Char),
                  allocate(like, with_last(like, options.n_hi), ScalarType::Char),
                  allocate(like, with_last(like, 4), ScalarType::Float),
                  {}};
  out.rows = {.q_lo = out.q_lo.mutable_data_ptr(),
              .q_hi = static_cast<int8_t*>(out.q_hi.mutable_data_ptr()),
              .params = static_cast<float*>(out.params.mutable_data_ptr()),
              .k_lo = k_lo,
              .k_hi = options.n_hi,
              .lo_bits = static_cast<int>(options.lo_bits),
              .packed = packed,
              .symmetric = options.symmetric,
              .clip = static_cast<float>(options.clip)};
  return out;
}

}  // namespace resq
