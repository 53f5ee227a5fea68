#include <torch/csrc/stable/library.h>

#include <cmath>

#include "ops/hadamard/hadamard.h"
#include "torch/hadamard_plan.h"
#include "torch/mixed_rows.h"

namespace resq {
namespace {

Tensor hadamard(const Tensor& x, double scale) {
  const char* op = "hadamard";
  const FloatType type = float_type(op, "x", x);
  const int64_t n = last_dimension(op, "x", x);
  const HadamardPlan* plan = checked_hadamard_plan(op, "x", n);
  const Tensor rows = torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(x, with_last(x, n));
  const HadamardParams params{rows.const_data_ptr(), y.mutable_data_ptr(), type, plan,
                              static_cast<float>(scale / std::sqrt(static_cast<double>(n)))};
  const auto kernel = RESQ_ROWS_KERNEL(hadamard);
  torch::stable::parallel_for(0, row_count(x), rows_per_thread(n),
                              [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return y;
}

}  // namespace
}  // namespace resq

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) { m.impl("hadamard", TORCH_BOX(&resq::hadamard)); }
