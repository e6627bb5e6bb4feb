// hand_out: copies a result of a frame out of the state, as a kernel of the frame's graph. A copy
// behind the graph would begin when all of that has ended.
#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "cuda/ops.h"

namespace deltafx::cuda {
namespace {

constexpr int kThreads = 256;

// All that the kernel takes, in one parameter, so that hand_out_to can replace it.
struct HandOut {
  const char* from;
  char* to;
  int64_t bytes;
};

__global__ void __launch_bounds__(kThreads) hand_out_kernel(const __grid_constant__ HandOut p) {
  wait_for_inputs();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads, vectors = p.bytes / 16;
  for (int64_t i = first; i < vectors; i += step)
    reinterpret_cast<uint4*>(p.to)[i] = reinterpret_cast<const uint4*>(p.from)[i];
  for (int64_t i = vectors * 16 + first; i < p.bytes; i += step) p.to[i] = p.from[i];
}

}  // namespace

cudaError_t hand_out(const void* from, void* to, int64_t bytes, cudaStream_t stream) {
  const int64_t needed = (bytes / 16 + kThreads - 1) / kThreads + 1;
  return launch(hand_out_kernel, {at_most(needed, 8), kThreads}, stream,
                HandOut{static_cast<const char*>(from), static_cast<char*>(to), bytes});
}

cudaError_t hand_out_to(cudaGraphExec_t graph, cudaGraphNode_t node, void* to) {
  return change_launch<HandOut>(graph, node, [&](HandOut& p) { p.to = static_cast<char*>(to); });
}

}  // namespace deltafx::cuda
