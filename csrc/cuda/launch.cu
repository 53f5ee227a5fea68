#include "cuda/launch.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

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

}  // namespace

const Device& device(int index) {
  static std::mutex mutex;
  static std::map<int, Device> devices;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = devices.find(index);
  if (found != devices.end()) return found->second;
  const Device device{attribute(index, cudaDevAttrComputeCapabilityMajor),
                      attribute(index, cudaDevAttrComputeCapabilityMinor),
                      attribute(index, cudaDevAttrMultiProcessorCount),
                      attribute(index, cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  return devices.emplace(index, device).first->second;
}

void check_launch(const char* op) { check(op, "launch", cudaGetLastError()); }

void allow_shared_bytes(const char* op, const void* kernel, int64_t bytes) {
  check(op, "shared memory",
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)));
}

}  // namespace resq::cuda
