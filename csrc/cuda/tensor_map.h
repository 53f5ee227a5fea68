// Tensor maps (descriptors of 2-d global arrays for copies into shared memory), encoded by the
// driver. Its entry point comes from the runtime, so that nothing links to libcuda.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace resq::cuda {

// uint8 [rows, columns] with row_bytes from row to row (a multiple of 16), copied in boxes of
// box_rows x 128 bytes with the 128-byte swizzle; reads outside give zero.
CUtensorMap byte_rows_map(const char* op, const void* data, int64_t rows, int64_t columns,
                          int64_t row_bytes, int box_rows);

}  // namespace resq::cuda
