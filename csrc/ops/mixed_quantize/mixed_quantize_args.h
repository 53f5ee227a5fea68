// Tensors of mixed_quantize -> checked MixedQuantizeParams; the outputs are allocated here.
#pragma once

#include "ops/mixed_quantize/mixed_quantize.h"
#include "torch/mixed_rows.h"

namespace resq {

struct MixedQuantizeCall {
  MixedQuantizeParams params;
  MixedOutput out;
  Tensor x;  // contiguous; params point into it
};

inline MixedQuantizeCall mixed_quantize_call(const Tensor& x, const MixedOptions& options,
                                             bool packed_default) {
  const char* op = "mixed_quantize";
  const FloatType x_type = float_type(op, "x", x);
  const int64_t columns = last_dimension(op, "x", x);
  check_mixed_options(op, columns, options);
  const Tensor rows = contiguous_rows(x);
  const MixedOutput out = make_mixed_output(x, columns, options, packed_default);
  return {{row_count(x), rows.const_data_ptr(), x_type, out.rows}, out, rows};
}

}  // namespace resq
