// Between the operators and the emulator's CUDA runtime (the linker's --wrap): writes down the
// calls that tests ask about, fails those that they name, knows many devices, and like the driver
// encodes no tensor map on a thread without a context. The emulator itself fails no call, has one
// device, and needs no context.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <mutex>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default")))
#define WRAPPED(name, ...)                           \
  extern "C" cudaError_t __real_##name(__VA_ARGS__); \
  extern "C" cudaError_t __wrap_##name(__VA_ARGS__)

namespace {

std::mutex mutex;
std::string events, failing;
int device = 0, ptx_version = 0;
thread_local bool has_context = false;
decltype(&cuTensorMapEncodeTiled) encode = nullptr;

// Writes a call down; whether it is the one that fails.
bool fails(const std::string& name, const std::string& details = "") {
  const std::lock_guard<std::mutex> lock(mutex);
  events += name + details + "\n";
  if (name != failing) return false;
  failing.clear();
  return true;
}

CUresult encode_in_context(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                           const cuuint64_t* sizes, const cuuint64_t* strides,
                           const cuuint32_t* box, const cuuint32_t* element_strides,
                           CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                           CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if (!has_context) return CUDA_ERROR_INVALID_CONTEXT;
  return encode(map, type, rank, data, sizes, strides, box, element_strides, interleave, swizzle,
                promotion, fill);
}

}  // namespace

// The calls since the last call of this, a line each.
EXPORTED const char* emulated_events() {
  static std::string taken;
  const std::lock_guard<std::mutex> lock(mutex);
  taken.swap(events);
  events.clear();
  return taken.c_str();
}
// The next call of a function fails: "invalid device function".
EXPORTED void emulated_fail(const char* name) { failing = name; }
// The device that operators run on from now on.
EXPORTED void emulated_set_device(int index) { device = index; }
EXPORTED int emulated_device() { return device; }
// The PTX version that kernels are said to have; 0: the architecture's.
EXPORTED void emulated_set_ptx_version(int version) { ptx_version = version; }

WRAPPED(cudaFuncSetAttribute, const void* kernel, cudaFuncAttribute name, int value) {
  has_context = true;
  const bool fail = fails("cudaFuncSetAttribute", " " + std::to_string(static_cast<int>(name)) +
                                                      " " + std::to_string(value));
  return __real_cudaFuncSetAttribute(fail ? nullptr : kernel, name, value);
}
WRAPPED(cudaFuncGetAttributes, cudaFuncAttributes* attributes, const void* kernel) {
  has_context = true;
  const bool fail = fails("cudaFuncGetAttributes");
  const cudaError_t error = __real_cudaFuncGetAttributes(attributes, fail ? nullptr : kernel);
  if (ptx_version != 0) attributes->ptxVersion = ptx_version;
  return error;
}
WRAPPED(cudaOccupancyMaxActiveClusters, int* clusters, const void* kernel,
        const cudaLaunchConfig_t* config) {
  has_context = true;
  const bool fail = fails("cudaOccupancyMaxActiveClusters");
  return __real_cudaOccupancyMaxActiveClusters(clusters, fail ? nullptr : kernel, config);
}
WRAPPED(cudaLaunchKernelExC, const cudaLaunchConfig_t* config, const void* kernel,
        void** arguments) {
  has_context = true;
  std::string attributes;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) attributes += " pdl";
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      attributes += " cluster " + std::to_string(attribute.val.clusterDim.x);
    }
  }
  const bool fail = fails("cudaLaunchKernelExC", attributes);
  return __real_cudaLaunchKernelExC(config, fail ? nullptr : kernel, arguments);
}
WRAPPED(cudaSetDevice, int index) {
  has_context = true;
  fails("cudaSetDevice", " " + std::to_string(index));
  return cudaSuccess;
}
WRAPPED(cudaDeviceGetAttribute, int* value, cudaDeviceAttr name, int index) {
  fails("cudaDeviceGetAttribute");
  return __real_cudaDeviceGetAttribute(value, name, index);
}
WRAPPED(cudaGetDriverEntryPointByVersion, const char* name, void** function, unsigned version,
        unsigned long long flags, cudaDriverEntryPointQueryResult* found) {
  const cudaError_t error =
      __real_cudaGetDriverEntryPointByVersion(name, function, version, flags, found);
  encode = reinterpret_cast<decltype(encode)>(*function);
  *function = reinterpret_cast<void*>(encode_in_context);
  return error;
}
