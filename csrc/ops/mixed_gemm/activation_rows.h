// Activation rows as the CUDA kernels of mixed_gemm can read them. A part whose rows a kernel
// cannot read in place is copied into the workspace first: padded with zeros, and unpacked if the
// kernel takes int8 only. Pure functions, tested on the CPU, decide what is copied and where;
// activation_rows.cu makes the copies.
#pragma once

#include "cuda/launch.h"
#include "ops/mixed_gemm/mixed_gemm.h"

namespace resq::cuda {

// What the loads of a kernel require of the rows.
struct RowAlignment {
  int lo, hi;  // K_lo and K_hi are multiples of these
  int copy;    // the rows of a copy are padded to a multiple of this many codes
  bool int8;   // INT4 codes must be one per byte
};

// One part of the activations.
struct PartRows {
  bool copied;
  int64_t k;       // codes from row to row; those beyond the call's are 0
  int64_t offset;  // of the copy in the workspace, bytes
};

struct ActivationRows {
  PartRows lo, hi;
  bool unpacks_lo;  // the copy turns INT4 codes into int8
  int64_t end;      // of the copies in the workspace, bytes
};

inline constexpr int64_t kWorkspaceAlignment = 256;  // of every region, bytes

// The copies follow the workspace's first `begin` bytes.
constexpr ActivationRows activation_rows(int64_t m, int64_t k_lo, int64_t k_hi, bool packed,
                                         const RowAlignment& alignment, int64_t begin) {
  ActivationRows rows{};
  rows.unpacks_lo = packed && alignment.int8 && k_lo > 0;
  rows.end = begin;
  const auto place = [&](int64_t k, bool copied, int codes_per_byte) -> PartRows {
    if (!copied) return {false, k, 0};
    const PartRows part{true, align_up(k, alignment.copy), align_up(rows.end, kWorkspaceAlignment)};
    rows.end = part.offset + m * part.k / codes_per_byte;
    return part;
  };
  const bool stay_packed = packed && !alignment.int8;
  rows.lo = place(k_lo, rows.unpacks_lo || k_lo % alignment.lo != 0, stay_packed ? 2 : 1);
  rows.hi = place(k_hi, k_hi % alignment.hi != 0, 1);
  return rows;
}

// Launches the copies, and returns `p` with rows that the kernel can read: q_lo, q_hi, k_lo and
// k_hi are those of `rows`.
MixedGemmParams readable_rows(const MixedGemmParams& p, const ActivationRows& rows, void* workspace,
                              Stream stream);

}  // namespace resq::cuda
