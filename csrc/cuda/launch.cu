#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/launch.h"
#include "cuda/once.h"

namespace resq::cuda {
namespace {

using KernelOfDevice = std::pair<int, const void*>;

// `error` is what a call returned. CUDA also keeps it as the thread's last error, where whoever
// asks next would take it for its own: it is reported here, and taken away there. After a success
// the last error, if there is one, is somebody else's.
void check(const char* op, const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
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

cudaFuncAttributes attributes_of(const char* op, const void* kernel) {
  cudaFuncAttributes attributes;
  check(op, "cudaFuncGetAttributes", cudaFuncGetAttributes(&attributes, kernel));
  return attributes;
}

// Compiled for the same architectures as every kernel outside *_sm90.cu.
__global__ void generic_kernel() {}

// The limit of dynamic shared memory is the largest that there is and not what a launch needs:
// two threads that launch the same kernel with different sizes share it.
void prepare(const char* op, const void* kernel, int index, bool has_dynamic_shared) {
  const int carveout = current_carveout();
  if (!has_dynamic_shared && carveout == kDriversCarveout) return;
  static OncePer<KernelOfDevice, bool> prepared;
  prepared.get({index, kernel}, [&] {
    if (has_dynamic_shared) {
      const int own = static_cast<int>(attributes_of(op, kernel).sharedSizeBytes);
      check(op, "shared memory",
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device(index).shared_bytes - own));
    }
    if (carveout != kDriversCarveout) {
      check(op, "carveout",
            cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carveout));
    }
    return true;
  });
}

// `attributes` holds what the returned configuration points to.
cudaLaunchConfig_t configuration(const Grid& grid, Stream stream,
                                 cudaLaunchAttribute (&attributes)[2]) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {grid.cluster, 1, 1};
  }
  if (stream.pdl) {
    cudaLaunchAttribute& pdl = attributes[config.numAttrs++];
    pdl.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    pdl.val.programmaticStreamSerializationAllowed = 1;
  }
  return config;
}

}  // namespace

const Device& device(int index) {
  static OncePer<int, Device> devices;
  return devices.get(index, [&] {
    check_driver();
    return Device{attribute(index, cudaDevAttrComputeCapabilityMajor),
                  attribute(index, cudaDevAttrComputeCapabilityMinor),
                  attribute(index, cudaDevAttrMultiProcessorCount),
                  attribute(index, cudaDevAttrMaxSharedMemoryPerBlockOptin),
                  attribute(index, cudaDevAttrGlobalMemoryBusWidth),
                  attribute(index, cudaDevAttrL2CacheSize)};
  });
}

void bind_context(int index) {
  thread_local bool bound = false;
  if (bound) return;
  check("device", "cudaSetDevice", cudaSetDevice(index));
  bound = true;
}

bool kernels_wait(int index) {
  static OncePer<int, bool> waits;
  return waits.get(index, [] {
    const auto* kernel = reinterpret_cast<const void*>(generic_kernel);
    return attributes_of("device", kernel).ptxVersion >= 90;
  });
}

void enqueue(const char* op, const void* kernel, const Grid& grid, Stream stream,
             void** arguments) {
  prepare(op, kernel, stream.device, grid.shared_bytes > 0);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configuration(grid, stream, attributes);
  check(op, "launch", cudaLaunchKernelExC(&config, kernel, arguments));
}

int resident_clusters(const char* op, const void* kernel, const Grid& grid, int index) {
  static OncePer<std::pair<KernelOfDevice, unsigned>, int> known;
  return known.get({{index, kernel}, grid.cluster}, [&] {
    prepare(op, kernel, index, grid.shared_bytes > 0);
    cudaLaunchAttribute attributes[2];
    const cudaLaunchConfig_t config = configuration(grid, {nullptr, index}, attributes);
    int clusters = 0;
    check(op, "clusters", cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    return clusters;
  });
}

}  // namespace resq::cuda
