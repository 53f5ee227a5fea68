// gptq_block between torch and the kernels: checks, outputs, the operator of any device.
#pragma once

#include <tuple>

#include "ops/gptq_block/gptq_block.h"
#include "torch/tensor.h"

namespace resq {

template <class Device>
std::tuple<Tensor, Tensor, Tensor> gptq_block(const Tensor& targets, const Tensor& weight,
                                              const Tensor& feedback, const Tensor& scale,
                                              int64_t bits) {
  const char* op = "gptq_block";
  const Device device(op, targets);
  const auto check = [&](const char* name, const Tensor& tensor,
                         const std::vector<int64_t>& sizes) {
    check_tensor(op, name, tensor, {ScalarType::Float}, sizes, true, "of any strides");
    check_device(op, name, tensor, targets);
  };
  check("targets", targets, {kAnySize, kAnySize});
  const int64_t columns = targets.size(0), rows = targets.size(1);
  if (columns > kGptqColumns) {
    fail(op, "targets", "at most " + std::to_string(kGptqColumns) + " columns of the weight",
         describe(targets));
  }
  check_count(op, "targets", "rows", rows);
  check("weight", weight, {columns, rows});
  check("feedback", feedback, {columns, columns});
  check("scale", scale, {rows});
  check_bits(op, "bits", bits);
  const Tensor codes = allocate(targets, {columns, rows}, ScalarType::Char);
  const Tensor errors = allocate(targets, {columns, rows}, ScalarType::Float);
  const Tensor exact = allocate(targets, {columns, rows}, ScalarType::Float);
  const Tensor in[] = {contiguous_rows(targets), contiguous_rows(weight), contiguous_rows(feedback),
                       contiguous_rows(scale)};
  const auto read = [](const Tensor& tensor) { return tensor.const_data_ptr<float>(); };
  run(device, GptqBlockParams{.rows = rows,
                              .columns = columns,
                              .targets = read(in[0]),
                              .weight = read(in[1]),
                              .feedback = read(in[2]),
                              .scale = read(in[3]),
                              .codes = codes.mutable_data_ptr<int8_t>(),
                              .errors = errors.mutable_data_ptr<float>(),
                              .exact = exact.mutable_data_ptr<float>(),
                              .half = static_cast<float>(1 << (bits - 1))});
  return {codes, errors, exact};
}

}  // namespace resq
