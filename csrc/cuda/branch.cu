// branch: counts the squares of the input in which anything changed, and chooses.
#include "cuda/branch.cuh"
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace deltafx::cuda {
namespace {

#if CUDART_VERSION >= 13000

constexpr int kThreads = 256;

// Whether a square has an active site; called by whole warps, a lane for half a row of it.
__device__ bool is_changed(const Mask& mask, const Squares& squares, int index) {
  static_assert(kSquare == 16, "32 lanes for 16 rows of two halves");
  const Position at = position_of(index, squares.rows, squares.columns);
  const int h = static_cast<int>(mask.h), w = static_cast<int>(mask.w);
  const int lane = threadIdx.x % 32, y = at.y * kSquare + lane / 2;
  const int x0 = at.x * kSquare + lane % 2 * 8, count = y < h ? min(8, w - x0) : 0;
  const uint8_t* sites = mask.data + (static_cast<int64_t>(at.n) * h + y) * w + x0;
  bool found = false;
  if (count == 8 && reinterpret_cast<uintptr_t>(sites) % 8 == 0)
    found = *reinterpret_cast<const unsigned long long*>(sites) != 0;
  else
    for (int i = 0; i < count; ++i) found |= sites[i] != 0;
  return __any_sync(kAllLanes, found);
}

__global__ void __launch_bounds__(kThreads)
    branch_kernel(const __grid_constant__ BranchParams p,
                  const __grid_constant__ Decision decision) {
  wait_for_inputs();
  __shared__ int changed_here;
  if (threadIdx.x == 0) changed_here = 0;
  __syncthreads();
  const int lane = threadIdx.x % 32, warps = static_cast<int>(gridDim.x) * (kThreads / 32);
  const int warp = (static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x)) / 32;
  int changed = 0;
  for (int input = 0; input < p.inputs; ++input) {
    const Squares squares(p.masks[input]);
    const int count = squares.count(p.masks[input]);
    for (int i = warp; i < count; i += warps) changed += is_changed(p.masks[input], squares, i);
  }
  if (lane == 0 && changed > 0) atomicAdd(&changed_here, changed);
  __syncthreads();
  int all;
  if (threadIdx.x == 0 && decision.is_last(changed_here, &all))
    cudaGraphSetConditional(decision.handle, static_cast<unsigned>(decision.decide(all)));
}

__global__ void tell_kernel(const BranchState* state, int32_t* told) {
  wait_for_inputs();
  *told = state->choice;
}

__global__ void idle_kernel() { wait_for_inputs(); }

// A conditional node behind all that the stream has captured; what follows waits for it.
cudaError_t add_conditional(cudaGraphConditionalHandle handle, cudaGraphConditionalNodeType type,
                            const cudaGraph_t* bodies, int count, cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  cudaGraph_t graph = nullptr;
  const cudaGraphNode_t* before = nullptr;
  const cudaGraphEdgeData* edges = nullptr;
  size_t edge_count = 0;
  cudaError_t error =
      cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, &before, &edges, &edge_count);
  if (error != cudaSuccess) return error;
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = handle;
  params.conditional.type = type;
  params.conditional.size = static_cast<unsigned>(count);
  cudaGraphNode_t node = nullptr;
  error = cudaGraphAddNode(&node, graph, before, edges, edge_count, &params);
  for (int i = 0; i < count && error == cudaSuccess; ++i) {
    cudaGraphNode_t child = nullptr;
    error = cudaGraphAddChildGraphNode(&child, params.conditional.phGraph_out[i], nullptr, 0,
                                       bodies[i]);
  }
  if (error != cudaSuccess) return error;
  return cudaStreamUpdateCaptureDependencies(stream, &node, nullptr, 1,
                                             cudaStreamSetCaptureDependencies);
}

#endif

}  // namespace

#if CUDART_VERSION >= 13000

cudaError_t branch(const BranchParams& p, const cudaGraph_t* bodies, int count,
                   cudaStream_t stream) {
  Decision decision(p);
  cudaError_t error = make_conditional(&decision.handle, stream);
  if (error != cudaSuccess) return error;
  for (int i = 0; i < p.inputs; ++i) decision.squares += Squares(p.masks[i]).count(p.masks[i]);
  const int warps = kThreads / 32, needed = (decision.squares + warps - 1) / warps;
  error = launch(branch_kernel, {at_most(needed, 4), kThreads}, stream, p, decision);
  if (error != cudaSuccess) return error;
  static_assert(kDelta == 0 && kEverywhere == 1, "the bodies in their order");
  return add_conditional(decision.handle, cudaGraphCondTypeSwitch, bodies, count, stream);
}

cudaError_t otherwise(unsigned long long handle, cudaGraph_t everywhere, cudaStream_t stream) {
  const cudaError_t error = add_conditional(handle, cudaGraphCondTypeIf, &everywhere, 1, stream);
  return error != cudaSuccess ? error : launch(idle_kernel, {1, 32}, stream);
}

cudaError_t tell(const BranchState* state, int32_t* told, cudaStream_t stream) {
  return launch(tell_kernel, {1, 1}, stream, state, told);
}

#else

cudaError_t branch(const BranchParams&, const cudaGraph_t*, int, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t otherwise(unsigned long long, cudaGraph_t, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t tell(const BranchState*, int32_t*, cudaStream_t) { return cudaErrorNotSupported; }

#endif

}  // namespace deltafx::cuda
