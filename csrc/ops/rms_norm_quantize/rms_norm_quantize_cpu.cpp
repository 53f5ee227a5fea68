#include <torch/csrc/stable/library.h>

#include "ops/rms_norm_quantize/rms_norm_quantize.h"
#include "torch/mixed_rows.h"

namespace resq {
namespace {

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_quantize(
    const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    double eps, int64_t n_hi, int64_t lo_bits, std::optional<bool> packed, bool symmetric,
    double clip) {
  const char* op = "rms_norm_quantize";
  const MixedOptions options{n_hi, lo_bits, packed, symmetric, clip};
  const FloatType x_type = float_type(op, "x", x);
  const int64_t columns = last_dimension(op, "x", x);
  if (residual && (!same_shape(*residual, x) || residual->scalar_type() != x.scalar_type())) {
    fail(op, "residual", "x's dtype and shape, " + describe(x), describe(*residual));
  }
  if (residual) check_device(op, "residual", *residual, x);
  FloatType weight_type = FloatType::kFloat32;
  if (weight) {
    weight_type = float_type(op, "weight", *weight);
    if (weight->dim() != 1 || weight->size(0) != columns) {
      fail(op, "weight", "[" + std::to_string(columns) + "]", describe(*weight));
    }
    check_device(op, "weight", *weight, x);
  }
  if (!(eps >= 0.0)) fail(op, "eps", "0 or more", std::to_string(eps));
  check_mixed_options(op, columns, options);

  const Tensor x_rows = torch::stable::contiguous(x);
  const Tensor residual_rows = residual ? torch::stable::contiguous(*residual) : x_rows;
  const Tensor weight_row = weight ? torch::stable::contiguous(*weight) : x_rows;
  const MixedOutput out = make_mixed_output(x, columns, options, /*packed_default=*/false);
  // An operator may not return its input: without a residual the caller takes x itself.
  const std::vector<int64_t> sum_sizes = residual ? with_last(x, columns) : std::vector<int64_t>{0};
  Tensor new_residual = torch::stable::new_empty(x, sum_sizes);
  const RmsNormQuantizeParams params{
      .x = x_rows.const_data_ptr(),
      .residual = residual ? residual_rows.const_data_ptr() : nullptr,
      .new_residual = new_residual.mutable_data_ptr(),
      .x_type = x_type,
      .weight = weight ? weight_row.const_data_ptr() : nullptr,
      .weight_type = weight_type,
      .eps = static_cast<float>(eps),
      .out = out.rows};
  const auto kernel = RESQ_ROWS_KERNEL(rms_norm_quantize);
  torch::stable::parallel_for(0, row_count(x), rows_per_thread(columns),
                              [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return {out.q_lo, out.q_hi, out.params, new_residual};
}

}  // namespace
}  // namespace resq

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) {
  m.impl("rms_norm_quantize", TORCH_BOX(&resq::rms_norm_quantize));
}
