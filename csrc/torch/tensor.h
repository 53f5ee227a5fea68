// Tensors at the edge of the operators: argument checks ("op: argument: expected ..., got ..."
// before anything is read), sizes, and the outputs that all quantizing operators have.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "core/float16.h"
#include "core/hadamard.h"
#include "core/quantize.h"
#include "torch/allocate.h"

namespace resq {

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
  std::vector<int64_t> sizes(tensor.dim());
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes[i] = tensor.size(i);
  return sizes;
}

// What a message calls an argument: a name, or an entry of a list. The text is put together only
// for a message: decoder_layers checks 1700 times (30 layers), which took 60 us of a decode step
// when it wrote a name for each.
class Argument {
 public:
  Argument(const char* name) : name_(name) {}
  Argument(const char* list, int64_t index) : name_(list), index_(index) {}

  std::string text() const {
    return index_ < 0 ? name_ : name_ + ("[" + std::to_string(index_) + "]");
  }

 private:
  const char* name_;
  int64_t index_ = -1;
};

// Sizes as an argument: of a list in braces or of a vector, which are not copied.
class Sizes {
 public:
  Sizes(std::initializer_list<int64_t> sizes) : begin_(sizes.begin()), count_(sizes.size()) {}
  Sizes(const std::vector<int64_t>& sizes) : begin_(sizes.data()), count_(sizes.size()) {}

  const int64_t* begin() const { return begin_; }
  const int64_t* end() const { return begin_ + count_; }
  int64_t size() const { return static_cast<int64_t>(count_); }

 private:
  const int64_t* begin_;
  size_t count_;
};

[[noreturn]] inline void fail(const char* op, const Argument& argument, const std::string& expected,
                              const std::string& got) {
  std::ostringstream text;
  text << op << ": " << argument.text() << ": expected " << expected << ", got " << got;
  throw std::runtime_error(text.str());
}

inline std::initializer_list<ScalarType> float_dtypes() {
  static constexpr std::initializer_list<ScalarType> kDtypes = {ScalarType::Float, ScalarType::Half,
                                                                ScalarType::BFloat16};
  return kDtypes;
}

// The output dtype that an argument requests.
inline void check_float_dtype(const char* op, const Argument& argument, ScalarType dtype) {
  for (ScalarType known : float_dtypes()) {
    if (dtype == known) return;
  }
  fail(op, argument, "float32, float16 or bfloat16", dtype_name(dtype));
}

// How many bits codes have.
inline void check_bits(const char* op, const Argument& argument, int64_t bits) {
  if (bits != 4 && bits != 8) fail(op, argument, "4 or 8", std::to_string(bits));
}

inline constexpr int64_t kAnySize = -1;

// A tensor of one of `dtypes` and of exactly `sizes` (kAnySize matches any). `laid_out`: whether
// its memory layout is the one that `layout` names in the message.
inline void check_tensor(const char* op, const Argument& argument, const Tensor& tensor,
                         std::initializer_list<ScalarType> dtypes, const Sizes& sizes,
                         bool laid_out, const char* layout) {
  bool good = tensor.dim() == sizes.size() && laid_out;
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

inline void check_tensor(const char* op, const Argument& argument, const Tensor& tensor,
                         std::initializer_list<ScalarType> dtypes, const Sizes& sizes) {
  check_tensor(op, argument, tensor, dtypes, sizes, tensor.is_contiguous(), "contiguous");
}

inline void check_device(const char* op, const Argument& argument, const Tensor& tensor,
                         const Tensor& like) {
  if (tensor.device() != like.device())
    fail(op, argument, "the device of the first argument", "another device");
}

// The tensor itself if it is contiguous, or a copy in allocated memory.
inline Tensor contiguous_rows(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  Tensor copy = allocate(tensor, sizes_of(tensor), tensor.scalar_type());
  torch::stable::copy_(copy, tensor);
  return copy;
}

inline FloatType float_type(const char* op, const Argument& argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return FloatType::kFloat32;
    case ScalarType::Half: return FloatType::kFloat16;
    case ScalarType::BFloat16: return FloatType::kBFloat16;
    default: fail(op, argument, "float32, float16 or bfloat16", describe(tensor));
  }
}

// Columns of the last dimension; `tensor` must have one.
inline int64_t last_dimension(const char* op, const Argument& argument, const Tensor& tensor) {
  if (tensor.dim() == 0) fail(op, argument, "at least one dimension", describe(tensor));
  return tensor.size(tensor.dim() - 1);
}

// Product of all dimensions but the last.
inline int64_t row_count(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) rows *= tensor.size(i);
  return rows;
}

// Kernels count rows, and the columns of a row, in 32 bits. `what` names what is counted.
inline void check_count(const char* op, const Argument& argument, const char* what, int64_t count) {
  if (count <= INT32_MAX) return;
  fail(op, argument, std::string("fewer than 2^31 ") + what, std::to_string(count));
}

// The rows of an op that works on rows of the last dimension.
inline void check_rows(const char* op, const Argument& argument, const Tensor& tensor) {
  check_count(op, argument, "rows", row_count(tensor));
  check_count(op, argument, "columns", last_dimension(op, argument, tensor));
}

// Fewest rows worth a thread of their own: 16384 elements are about 5 us of work.
inline int64_t rows_per_thread(int64_t columns) {
  return columns >= 16384 ? 1 : 16384 / (columns > 0 ? columns : 1);
}

inline std::vector<int64_t> with_last(const Tensor& tensor, int64_t columns) {
  std::vector<int64_t> sizes = sizes_of(tensor);
  sizes.back() = columns;
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
  check_bits(op, "lo_bits", options.lo_bits);
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

// The plan of a row size, or the sentence that says why there is none.
inline const HadamardPlan* checked_hadamard_plan(const char* op, const Argument& argument,
                                                 int64_t n) {
  const HadamardPlan* plan = hadamard_plan(n);
  if (plan == nullptr) {
    fail(op, argument, "rows of 2^a * m elements with Paley orders m (12, 20, 28, ...)",
         std::to_string(n));
  }
  return plan;
}

}  // namespace resq
