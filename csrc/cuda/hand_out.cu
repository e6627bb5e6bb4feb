// hand_out: copies a result of a frame out of the state, as a kernel of the frame's graph. A copy
// behind the graph would begin when all of that has ended.
#include "cuda/branch.h"
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace deltafx::cuda {
namespace {

constexpr int kThreads = 256;

// All that a kernel here takes, in one parameter, so that hand_out_to can replace it.
struct HandOut {
  const char* from;
  char* to;
  int64_t bytes;
  const uint8_t* mask;     // of changed_kernel, as all below
  int64_t sites, vectors;  // vectors of a site
  const BranchState* state;
};

__global__ void __launch_bounds__(kThreads) all_kernel(const __grid_constant__ HandOut p) {
  wait_for_inputs();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads, vectors = p.bytes / 16;
#pragma unroll 4
  for (int64_t i = first; i < vectors; i += step)
    reinterpret_cast<uint4*>(p.to)[i] = reinterpret_cast<const uint4*>(p.from)[i];
  for (int64_t i = vectors * 16 + first; i < p.bytes; i += step) p.to[i] = p.from[i];
}

// The sites that the frame made active; all, if it was computed everywhere. A warp a site.
__global__ void __launch_bounds__(kThreads) changed_kernel(const __grid_constant__ HandOut p) {
  const int64_t site = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  wait_for_inputs();
  if (site >= p.sites || (p.mask[site] == 0 && p.state->choice != kEverywhere)) return;
  const auto* from = reinterpret_cast<const uint4*>(p.from) + site * p.vectors;
  auto* to = reinterpret_cast<uint4*>(p.to) + site * p.vectors;
#pragma unroll 4
  for (int64_t i = threadIdx.x % 32; i < p.vectors; i += 32) to[i] = from[i];
}

HandOut all_of(const void* from, void* to, int64_t bytes) {
  return {static_cast<const char*>(from), static_cast<char*>(to), bytes, nullptr, 0, 0, nullptr};
}

int blocks_for(int64_t threads) { return static_cast<int>((threads + kThreads - 1) / kThreads); }

}  // namespace

cudaError_t hand_out(const void* from, void* to, int64_t bytes, bool beside, cudaStream_t stream) {
  // Few blocks where there is time, so that others have the multiprocessors to themselves.
  const int most = beside ? 32 : 8 * current_device().multiprocessors;
  const int needed = blocks_for(bytes / 16 + 1);
  return launch(all_kernel, {needed < most ? needed : most, kThreads}, stream,
                all_of(from, to, bytes));
}

cudaError_t hand_out_changed(const void* from, void* to, int64_t bytes, const Mask& mask,
                             const BranchState* state, cudaStream_t stream) {
  HandOut p = all_of(from, to, bytes);
  p.mask = mask.data;
  p.sites = mask.sites();
  p.vectors = bytes / mask.sites() / 16;
  p.state = state;
  return launch(changed_kernel, {blocks_for(mask.sites() * 32), kThreads}, stream, p);
}

cudaError_t hand_out_to(cudaGraphExec_t graph, cudaGraphNode_t node, void* to) {
  cudaKernelNodeParams params;
  const cudaError_t error = cudaGraphKernelNodeGetParams(node, &params);
  if (error != cudaSuccess) return error;
  if (params.kernelParams == nullptr) return cudaErrorInvalidValue;
  HandOut p = *static_cast<const HandOut*>(params.kernelParams[0]);
  p.to = static_cast<char*>(to);
  void* arguments[] = {&p};
  params.kernelParams = arguments;
  return cudaGraphExecKernelNodeSetParams(graph, node, &params);
}

}  // namespace deltafx::cuda
