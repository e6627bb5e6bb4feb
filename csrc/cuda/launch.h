// Launches a kernel with programmatic dependent launch (where the device has it) and clusters: the
// kernel may start while the one before it still runs, and waits in wait_for_inputs(). Returns the
// launch's error; csrc/ops throws it. No ATen here, nor in any .cu or .cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace deltafx::cuda {

struct Device {
  int multiprocessors;
  int capability;  // 10 * major + minor
  int code;  // the capability that the code which runs on it was compiled for; 0: there is none
};

// Of the current device; asked once.
const Device& current_device();

struct Grid {
  int blocks;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;
  int rows = 1;  // blocks along y
};

// How much of a multiprocessor's memory is shared memory: all that can be, but on Hopper 164 of 228
// KiB, twice a block of the convolution. The rest is L1, where neighbouring windows meet.
inline int shared_percent() {
  return current_device().capability == 90 ? 72 : cudaSharedmemCarveoutMaxShared;
}

// As many blocks as there is work for, but not more than so many for each multiprocessor.
inline int at_most(int64_t needed, int a_multiprocessor) {
  const int64_t most = int64_t{a_multiprocessor} * current_device().multiprocessors;
  return static_cast<int>(needed < most ? needed : most);
}

// Has so many blocks along x be a cluster.
inline cudaLaunchAttribute in_clusters(int blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), const Grid& grid, cudaStream_t stream,
                   Args&&... args) {
  // One division of L1 for all kernels: a multiprocessor has to run empty before it can change it.
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                           shared_percent());
  if (error == cudaSuccess && grid.shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 grid.shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.rows));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (current_device().code >= 90) {
    cudaLaunchAttribute& serialization = attributes[config.numAttrs++];
    serialization.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    serialization.val.programmaticStreamSerializationAllowed = 1;
    if (grid.cluster > 1) attributes[config.numAttrs++] = in_clusters(grid.cluster);
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...);
}

// Changes the only parameter, a Launch, of a kernel that was captured, from the next launch of its
// graph on. Launches that are already enqueued are left alone.
template <class Launch, class Change>
cudaError_t change_launch(cudaGraphExec_t graph, cudaGraphNode_t kernel, const Change& change) {
  cudaKernelNodeParams params;
  const cudaError_t error = cudaGraphKernelNodeGetParams(kernel, &params);
  if (error != cudaSuccess) return error;
  if (params.kernelParams == nullptr) return cudaErrorInvalidValue;
  Launch launched = *static_cast<const Launch*>(params.kernelParams[0]);
  change(launched);
  void* arguments[] = {&launched};
  params.kernelParams = arguments;
  return cudaGraphExecKernelNodeSetParams(graph, kernel, &params);
}

}  // namespace deltafx::cuda
