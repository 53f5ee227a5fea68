#include <torch/csrc/stable/library.h>

#include "ops/mixed_quantize/mixed_quantize.h"
#include "torch/mixed_rows.h"

namespace resq {
namespace {

std::tuple<Tensor, Tensor, Tensor> mixed_quantize(const Tensor& x, int64_t n_hi, int64_t lo_bits,
                                                  std::optional<bool> packed, bool symmetric,
                                                  double clip) {
  const char* op = "mixed_quantize";
  const MixedOptions options{n_hi, lo_bits, packed, symmetric, clip};
  const FloatType x_type = float_type(op, "x", x);
  const int64_t columns = last_dimension(op, "x", x);
  check_mixed_options(op, columns, options);
  const Tensor rows = torch::stable::contiguous(x);
  const MixedOutput out = make_mixed_output(x, columns, options, /*packed_default=*/false);
  const MixedQuantizeParams params{rows.const_data_ptr(), x_type, out.rows};
  const auto kernel = RESQ_ROWS_KERNEL(mixed_quantize);
  torch::stable::parallel_for(0, row_count(x), rows_per_thread(columns),
                              [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return {out.q_lo, out.q_hi, out.params};
}

}  // namespace
}  // namespace resq

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) {
  m.impl("mixed_quantize", TORCH_BOX(&resq::mixed_quantize));
}
