#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/launch.h"

namespace resq::cuda {
namespace {

void check(const char* op, const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + what + ": expected success, got " +
                           cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

int attribute(int index, cudaDeviceAttr name) {
  int value = 0;
  check("device", "cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, name, index));
  return value;
}

void check_driver() {
  int driver = 0;
  check("device", "cudaDriverGetVersion", cudaDriverGetVersion(&driver));
  constexpr int kOldest = CUDART_VERSION / 1000 * 1000;  // minor versions are compatible
  if (driver < kOldest) {
    const std::string got =
        "CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
    throw std::runtime_error("resq: driver: expected one for CUDA " +
                             std::to_string(kOldest / 1000) + " or newer, got " +
                             (driver == 0 ? "no driver" : "one for " + got));
  }
}

}  // namespace

Device device(int index) {
  // Once per process: the driver does not change, and every operator call runs this.
  [[maybe_unused]] static const bool checked = (check_driver(), true);
  return {attribute(index, cudaDevAttrComputeCapabilityMajor),
          attribute(index, cudaDevAttrComputeCapabilityMinor),
          attribute(index, cudaDevAttrMultiProcessorCount),
          attribute(index, cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(index, cudaDevAttrGlobalMemoryBusWidth)};
}

void check_launch(const char* op) { check(op, "launch", cudaGetLastError()); }

void allow_shared_bytes(const char* op, const void* kernel, int64_t bytes) {
  check(op, "shared memory",
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)));
}

}  // namespace resq::cuda
