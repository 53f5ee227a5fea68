// Argument checks of the operators: "op: argument: expected ..., got ..." before anything is read.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

namespace resq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

inline std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << dtype_name(tensor.scalar_type()) << " [";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  if (!tensor.is_contiguous()) text << " (not contiguous)";
  return text.str();
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return sizes;
}

[[noreturn]] inline void fail(const char* op, const char* argument, const std::string& expected,
                              const std::string& got) {
  std::ostringstream text;
  text << op << ": " << argument << ": expected " << expected << ", got " << got;
  throw std::runtime_error(text.str());
}

// A dtype that an argument asks an output to have.
inline void check_float_dtype(const char* op, const char* argument, ScalarType dtype) {
  if (dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16) {
    return;
  }
  fail(op, argument, "float32, float16 or bfloat16", dtype_name(dtype));
}

inline constexpr int64_t kAnySize = -1;

// A tensor of one of `dtypes` and of exactly `sizes` (kAnySize matches any) that lies in memory as
// `layout` says, which `laid_out` has found out.
inline void check_tensor(const char* op, const char* argument, const Tensor& tensor,
                         std::initializer_list<ScalarType> dtypes,
                         const std::vector<int64_t>& sizes, bool laid_out, const char* layout) {
  bool good = tensor.dim() == static_cast<int64_t>(sizes.size()) && laid_out;
  int64_t i = 0;
  for (int64_t size : sizes) {
    if (good && size != kAnySize && tensor.size(i) != size) good = false;
    ++i;
  }
  bool dtype_good = false;
  for (ScalarType dtype : dtypes) dtype_good |= tensor.scalar_type() == dtype;
  if (good && dtype_good) return;
  std::ostringstream expected;
  const char* separator = "";
  for (ScalarType dtype : dtypes) {
    expected << separator << dtype_name(dtype);
    separator = " or ";
  }
  expected << " [";
  separator = "";
  for (int64_t size : sizes) {
    expected << separator;
    if (size == kAnySize)
      expected << "*";
    else
      expected << size;
    separator = ", ";
  }
  expected << "] " << layout;
  fail(op, argument, expected.str(), describe(tensor));
}

inline void check_tensor(const char* op, const char* argument, const Tensor& tensor,
                         std::initializer_list<ScalarType> dtypes,
                         const std::vector<int64_t>& sizes) {
  check_tensor(op, argument, tensor, dtypes, sizes, tensor.is_contiguous(), "contiguous");
}

inline void check_device(const char* op, const char* argument, const Tensor& tensor,
                         const Tensor& like) {
  if (tensor.device() != like.device())
    fail(op, argument, "the device of the first argument", "another device");
}

}  // namespace resq
