// branch: counts the squares of the input in which anything changed, and chooses.
#include "cuda/branch.h"

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace deltafx::cuda {
namespace {

#if CUDART_VERSION >= 13000

constexpr int kThreads = 256;

struct Squares {
  int rows, columns;
  __host__ __device__ explicit Squares(const Mask& mask)
      : rows(static_cast<int>((mask.h + kSquare - 1) / kSquare)),
        columns(static_cast<int>((mask.w + kSquare - 1) / kSquare)) {}
  __host__ __device__ int count(const Mask& mask) const {
    return static_cast<int>(mask.n) * rows * columns;
  }
};

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

// How the graph goes on: by a switch between the branches, or with the delta branch in any case.
enum class Then { switches, straight };

// Called by a thread of each block, with the squares that it found changed. True where the masks
// are to be cleared: of one block.
__device__ bool decides(const BranchParams& p, cudaGraphConditionalHandle handle, Then then,
                        int total, int changed) {
  BranchState& state = *p.state;
  // The block that is done last decides, and leaves the counters as it found them.
  const unsigned long long own = BranchState::kBlock | static_cast<unsigned>(changed);
  const unsigned long long before = atomicAdd(&state.progress, own);
  if (before / BranchState::kBlock != gridDim.x - 1) return false;
  const auto all = static_cast<int>((before + own) % BranchState::kBlock);
  state.progress = 0;
  const bool most = static_cast<float>(all) > p.dense_above * static_cast<float>(total);
  // A library may spread a NaN farther than the windows that hold it; then only computing
  // everywhere once more gets rid of it.
  const Branch choice = all == 0 && p.may_skip                                ? kNothing
                        : p.has_everywhere && (most || state.not_finite != 0) ? kEverywhere
                                                                              : kDelta;
  if (choice == kEverywhere) state.not_finite = 0;
  state.choice = choice;
  if (p.told != nullptr) *static_cast<volatile int32_t*>(p.told) = choice;
  const bool everywhere = choice == kEverywhere;
  cudaGraphSetConditional(handle, then == Then::switches ? static_cast<unsigned>(choice)
                                  : everywhere           ? 1u
                                                         : 0u);
  return then == Then::straight && everywhere;
}

__global__ void __launch_bounds__(kThreads)
    branch_kernel(const __grid_constant__ BranchParams p, cudaGraphConditionalHandle handle,
                  Then then, int total) {
  wait_for_inputs();
  __shared__ int changed_here;
  __shared__ bool clears;
  if (threadIdx.x == 0) changed_here = 0, clears = false;
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
  if (threadIdx.x == 0) clears = decides(p, handle, then, total, changed_here);
  __syncthreads();
  if (!clears) return;
  for (int input = 0; input < p.inputs; ++input) {
    const Mask& mask = p.masks[input];
    const int64_t bytes = mask.n * mask.h * mask.w;
    for (int64_t i = threadIdx.x * 16; i < bytes; i += kThreads * 16) {
      if (i + 16 <= bytes && reinterpret_cast<uintptr_t>(mask.data) % 16 == 0)
        *reinterpret_cast<uint4*>(mask.data + i) = make_uint4(0, 0, 0, 0);
      else
        for (int64_t j = i; j < min(i + 16, bytes); ++j) mask.data[j] = 0;
    }
  }
}

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

cudaError_t enqueue(const BranchParams& p, Then then, cudaGraphConditionalHandle* handle,
                    cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  cudaGraph_t graph = nullptr;
  cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph);
  if (error != cudaSuccess) return error;
  if (status != cudaStreamCaptureStatusActive) return cudaErrorStreamCaptureUnsupported;
  error = cudaGraphConditionalHandleCreate(handle, graph, 0, cudaGraphCondAssignDefault);
  if (error != cudaSuccess) return error;
  int total = 0;
  for (int i = 0; i < p.inputs; ++i) total += Squares(p.masks[i]).count(p.masks[i]);
  const int warps = kThreads / 32, needed = (total + warps - 1) / warps;
  const int most = 4 * current_device().multiprocessors;
  return launch(branch_kernel, {needed < most ? needed : most, kThreads}, stream, p, *handle, then,
                total);
}

#endif

}  // namespace

#if CUDART_VERSION >= 13000

cudaError_t branch(const BranchParams& p, const cudaGraph_t* bodies, int count,
                   cudaStream_t stream) {
  cudaGraphConditionalHandle handle;
  static_assert(kDelta == 0 && kEverywhere == 1, "the bodies in their order");
  const cudaError_t error = enqueue(p, Then::switches, &handle, stream);
  return error != cudaSuccess
             ? error
             : add_conditional(handle, cudaGraphCondTypeSwitch, bodies, count, stream);
}

cudaError_t decide(const BranchParams& p, unsigned long long* handle, cudaStream_t stream) {
  return enqueue(p, Then::straight, handle, stream);
}

cudaError_t otherwise(unsigned long long handle, cudaGraph_t everywhere, cudaStream_t stream) {
  return add_conditional(handle, cudaGraphCondTypeIf, &everywhere, 1, stream);
}

#else

cudaError_t branch(const BranchParams&, const cudaGraph_t*, int, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t decide(const BranchParams&, unsigned long long*, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t otherwise(unsigned long long, cudaGraph_t, cudaStream_t) {
  return cudaErrorNotSupported;
}

#endif

}  // namespace deltafx::cuda
