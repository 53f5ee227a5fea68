// The CPU as the Device of an operator (ops/<op>/<op>_torch.h).
#pragma once

#include <string>

#include "core/packed_weight.h"
#include "cpu/isa.h"
#include "torch/log_kernel.h"
#include "torch/parallel.h"
#include "torch/registration.h"
#include "torch/tensor.h"

namespace resq {

class Cpu {
 public:
  Cpu(const char* op, const Tensor&) : op_(op) {}

  bool packs_activations() const { return false; }
  int64_t packed_weight_bytes(int64_t n, int64_t k_lo, int64_t k_hi) const {
    return resq::packed_weight_bytes(n, k_lo, k_hi);
  }

  // For arguments that the CPU kernels read as float32 only.
  Tensor as_float32(const Tensor& tensor) const {
    if (tensor.scalar_type() == ScalarType::Float) return tensor;
    return torch::stable::to(tensor, ScalarType::Float);
  }

  // Calls body(), whose operators share one team of threads.
  template <class Body>
  void with_team(const Body& body) const {
    resq::with_team(body);
  }

  // Checks that only the CUDA kernels need.
  void check_aligned(const Argument&, const Tensor&) const {}
  void check_aligned_tokens(const Argument&, const Tensor&) const {}
  Tensor aligned(const Tensor& tensor) const { return tensor; }

  // Logs which kernel runs; pass `isa` where it is not the vector kernel of this process.
  void log(cpu::Isa isa = cpu::vector_isa()) const {
    if (logs_kernels()) log_kernel(op_, std::string("cpu ") + cpu::isa_name(isa));
  }

  // Runs kernel(params, begin, end) over all rows of `columns` numbers, on as many threads as pay
  // off.
  template <class Params>
  void for_rows(int64_t rows, int64_t columns, void (*kernel)(const Params&, int64_t, int64_t),
                const Params& params) const {
    log();
    parallel_for(rows, rows_per_thread(columns),
                 [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  }

 private:
  const char* op_;
};

}  // namespace resq
