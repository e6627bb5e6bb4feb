#include "cuda/launch.h"

#include "cuda/candidates.cuh"
#include "cuda/ops.h"

#include <array>
#include <mutex>

namespace deltafx::cuda {
namespace {

__global__ void empty_kernel() {}

}  // namespace

const Device& current_device() {
  constexpr int kMost = 64;
  static std::array<Device, kMost> devices{};
  static std::array<std::once_flag, kMost> known;
  int index = 0;
  cudaGetDevice(&index);
  const auto i = static_cast<size_t>(index % kMost);
  std::call_once(known[i], [&] {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&devices[i].multiprocessors, cudaDevAttrMultiProcessorCount, index);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    devices[i].capability = 10 * major + minor;
    cudaFuncAttributes attributes{};
    cudaFuncGetAttributes(&attributes, empty_kernel);
    devices[i].code = attributes.ptxVersion;
  });
  return devices[i];
}

int64_t list_ints(int64_t sites) { return kListHeader + sites; }

}  // namespace deltafx::cuda
