// How a block transforms a row in shared memory: a HadamardPlan as the parameters of a kernel. Host
// code without CUDA headers; the functions are tested on the CPU.
#pragma once

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/hadamard.h"
#include "cuda/inverse.h"

namespace resq::cuda {

inline constexpr int kHadamardThreads = 256;
inline constexpr int kHadamardWarps = kHadamardThreads / 32;
inline constexpr int kMostPaleyFactors = 4;  // 12^5 floats do not fit any block

// A split row keeps half of its floats in registers: up to this many runs of four per thread.
inline constexpr int kMostHalfRuns = 16;
inline constexpr int64_t kMostSplitColumns = 2 * 4 * kMostHalfRuns * kHadamardThreads;

// Shorter rows leave room for two blocks per multiprocessor without a split.
inline constexpr int64_t kLeastSplitColumns = 20000;

// Orders for which one thread holds a whole column, and adds and subtracts in the CPU's order. The
// others run on the tensor cores.
constexpr bool paley_in_thread(int64_t order) {
  return order == 12 || order == 20 || order == 28 || order == 44;
}

// A Paley factor on the tensor cores: tiles of 16 rows of S, and where its tables are.
struct TensorFactor {
  PaleySigns signs;
  int tiles;        // of 16 rows
  int bits_at;      // bytes from the end of the row: [tiles, tiles, 32 lanes] signs of a fragment
  int position_at;  // uint16 [q] PaleySigns::position
};

struct HadamardLayout {
  int n;       // floats in shared memory: the row, or half of it
  bool split;  // stage 1 in registers makes two rows of n: of sums, then of differences of pairs
  int power;   // of two, without the split
  // Float e is at e + e / block * pad: threads that walk along an axis hit different banks.
  int block, pad;
  uint32_t block_inverse;
  int factors, tensor_factors;
  int order[kMostPaleyFactors];   // inside first
  int stride[kMostPaleyFactors];  // of the factor's axis
  uint32_t stride_inverse[kMostPaleyFactors];
  TensorFactor tensor[kMostPaleyFactors];  // of the orders that are not in_thread
  int row_bytes, shared_bytes;

  RESQ_HOST_DEVICE int place(int e) const { return e + quotient_by(e, block_inverse) * pad; }
  // Where column `q` of an axis starts: `order` floats that are `stride` apart, and in memory
  // place(stride), because a stride is inside a block or a multiple of blocks.
  RESQ_HOST_DEVICE int column(int q, int order, int stride, uint32_t stride_inverse) const {
    const int before = stride == 1 ? q : quotient_by(q, stride_inverse);
    return place(q + before * ((order - 1) * stride));
  }
};

// How many stages the next pass does when `left` remain after those inside a thread's runs. Up to 2
// remaining stages are done by shuffles; a pass does 3 to 5, and 5 take 32 registers.
constexpr int pass_bits(int left) {
  return left <= 2 ? 0 : left <= 5 ? left : left <= 10 ? (left + 1) / 2 : (left + 2) / 3;
}

inline HadamardLayout hadamard_layout(const HadamardPlan& plan, bool split) {
  HadamardLayout h{};
  h.split = split;
  h.n = static_cast<int>(split ? plan.n / 2 : plan.n);
  h.power = static_cast<int>(split ? plan.power / 2 : plan.power);
  int bits = 0;
  while (1 << bits < h.power) ++bits;
  const int run_bits = split ? 2 : 3, first = pass_bits(bits - run_bits);
  h.factors = static_cast<int>(plan.paley.size());
  const int innermost = h.factors ? static_cast<int>(plan.paley.back()->order) : 1;
  if (first > 0) {
    // Neighbouring lanes access runs of 8 (or 4) floats that are 2^first runs apart.
    h.block = 1 << (run_bits + first);
    h.pad = 1 << run_bits;
  } else if (h.factors && h.power > 1) {
    // Columns of the innermost factor: runs of `power` floats, a block apart. A pad of 4 keeps
    // 16-byte accesses aligned; without a pad, runs of 8 have four-way bank conflicts.
    h.block = innermost * h.power;
    h.pad = h.power >= 32 ? 0 : h.power >= 4 ? h.power : 4;
  } else {
    h.block = 1 << 30;
  }
  h.block_inverse = inverse(h.block);
  const int padded = static_cast<int>(align_up(h.n, 8));
  h.row_bytes = static_cast<int>(align_up(4 * int64_t{h.place(padded) + 8}, 16));
  h.shared_bytes = h.row_bytes;
  for (int i = 0; i < h.factors; ++i) {
    const auto& factor = plan.paley[h.factors - 1 - i];
    h.order[i] = static_cast<int>(factor->order);
    h.stride[i] = i == 0 ? h.power : h.stride[i - 1] * h.order[i - 1];
    h.stride_inverse[i] = inverse(h.stride[i]);
    if (paley_in_thread(factor->order)) continue;
    ++h.tensor_factors;
    TensorFactor& tensor = h.tensor[i];
    tensor.signs = paley_signs(factor->order);
    tensor.tiles = static_cast<int>(ceil_div(tensor.signs.rows, 16));
    tensor.bits_at = h.shared_bytes - h.row_bytes;
    tensor.position_at = tensor.bits_at + tensor.tiles * tensor.tiles * 32;
    h.shared_bytes = static_cast<int>(
        align_up(h.row_bytes + tensor.position_at + 2 * int64_t{tensor.signs.q}, 16));
  }
  return h;
}

// The layout for a device whose blocks may have `shared_bytes`: split if that is needed. Built at
// its first use and cached. Throws "op: argument: expected ..., got ..." for rows that do not fit.
inline const HadamardLayout& checked_hadamard_layout(const char* op, const char* argument,
                                                     const HadamardPlan& plan,
                                                     int64_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int64_t, int64_t>, HadamardLayout> layouts;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = layouts.find({plan.n, shared_bytes});
  if (found != layouts.end()) return found->second;

  const int64_t largest = int64_t{1} << 20;
  const int64_t room = shared_bytes - 1024;  // 1 KB is for the block's own reductions
  if (plan.n <= largest && plan.paley.size() <= kMostPaleyFactors) {
    HadamardLayout layout = hadamard_layout(plan, false);
    if (2 * layout.shared_bytes > room && plan.power % 2 == 0 && plan.n % 8 == 0 &&
        plan.n > kLeastSplitColumns && plan.n <= kMostSplitColumns) {
      layout = hadamard_layout(plan, true);
    }
    if (layout.shared_bytes <= room) {
      return layouts.emplace(std::pair{plan.n, shared_bytes}, layout).first->second;
    }
  }
  throw std::runtime_error(std::string(op) + ": " + argument +
                           ": expected rows that fit the shared memory of a block (" +
                           std::to_string(shared_bytes) + " bytes here, up to " +
                           std::to_string(kMostSplitColumns) + " columns), got " +
                           std::to_string(plan.n));
}

}  // namespace resq::cuda
