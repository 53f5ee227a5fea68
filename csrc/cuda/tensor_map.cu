#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/tensor_map.h"

namespace resq::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode(const char* op) {
  void* pointer = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer,
                                                             12000, cudaEnableDefault, &found);
  if (error == cudaSuccess && found == cudaDriverEntryPointSuccess) {
    return reinterpret_cast<Encode>(pointer);
  }
  cudaGetLastError();
  throw std::runtime_error(std::string(op) +
                           ": driver: expected cuTensorMapEncodeTiled (CUDA 12.0 or newer), "
                           "got a driver without it");
}

}  // namespace

CUtensorMap byte_rows_map(const char* op, const void* data, int64_t rows, int64_t columns,
                          int64_t row_bytes, int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[] = {128, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t element_strides[] = {1, 1};
  static const Encode encode = find_encode(op);
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(data), sizes, strides, box,
             element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(op) + ": tensor map of " + std::to_string(rows) + " x " +
                             std::to_string(columns) + " bytes, " + std::to_string(row_bytes) +
                             " a row: expected success, got CUresult " + std::to_string(result));
  }
  return map;
}

}  // namespace resq::cuda
