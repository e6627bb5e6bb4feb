// How a kernel that knows how much of the input changed decides on the frame's branch.
#pragma once

#include "cuda/branch.h"

namespace deltafx::cuda {

#if CUDART_VERSION >= 13000

// Of a map.
struct Squares {
  int rows, columns;
  __host__ __device__ explicit Squares(const Mask& mask)
      : rows(static_cast<int>((mask.h + kSquare - 1) / kSquare)),
        columns(static_cast<int>((mask.w + kSquare - 1) / kSquare)) {}
  __host__ __device__ int count(const Mask& mask) const {
    return static_cast<int>(mask.n) * rows * columns;
  }
};

struct Decision {
  bool may_skip, has_everywhere;
  float dense_above;
  int squares;  // of all inputs
  BranchState* state;
  cudaGraphConditionalHandle handle;

  Decision() = default;
  explicit Decision(const BranchParams& p)
      : may_skip(p.may_skip),
        has_everywhere(p.has_everywhere),
        dense_above(p.dense_above),
        squares(0),
        state(p.state),
        handle(0) {}

  // Called by a thread of each block, with the squares that the block found changed; true for the
  // last one of the grid, which leaves the counters as it found them.
  __device__ bool is_last(int changed, int* all) const {
    const unsigned long long own = BranchState::kBlock | static_cast<unsigned>(changed);
    const unsigned long long before = atomicAdd(&state->progress, own);
    if (before / BranchState::kBlock != gridDim.x - 1) return false;
    state->progress = 0;
    *all = static_cast<int>((before + own) % BranchState::kBlock);
    return true;
  }

  // Instead of is_last, in two steps, so that no block but one waits for an answer. First, the
  // block's number among those that have begun; then, with `ticket` that and what the block marked
  // there if it found a change, true for the block that began last, when all are done.
  __device__ int begin() const { return atomicAdd(&state->begun, 1); }
  __device__ bool end(int ticket, int changed, int* all) const {
    if (changed > 0) __threadfence();  // what it marked is there before the block counts as done
    const int others = static_cast<int>(gridDim.x) - 1;
    if (ticket != others) {
      atomicAdd(&state->progress, BranchState::kBlock | static_cast<unsigned>(changed));
      return false;
    }
    unsigned long long found;
    do {
      found = *const_cast<volatile unsigned long long*>(&state->progress);
    } while (found / BranchState::kBlock != static_cast<unsigned>(others));
    __threadfence();
    state->progress = 0;
    state->begun = 0;
    *all = static_cast<int>(found % BranchState::kBlock) + changed;
    return true;
  }

  // Called by the thread that is last; tells whoever asks the device.
  __device__ Branch decide(int all) const {
    const bool most = static_cast<float>(all) > dense_above * static_cast<float>(squares);
    // A library may spread a NaN farther than the windows that hold it; then only computing
    // everywhere once more gets rid of it.
    const Branch choice = all == 0 && may_skip                                 ? kNothing
                          : has_everywhere && (most || state->not_finite != 0) ? kEverywhere
                                                                               : kDelta;
    if (choice == kEverywhere) state->not_finite = 0;
    state->choice = choice;
    return choice;
  }
};

// In the graph that the stream is captured into.
inline cudaError_t make_conditional(cudaGraphConditionalHandle* handle, cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  cudaGraph_t graph = nullptr;
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph);
  if (error != cudaSuccess) return error;
  if (status != cudaStreamCaptureStatusActive) return cudaErrorStreamCaptureUnsupported;
  return cudaGraphConditionalHandleCreate(handle, graph, 0, cudaGraphCondAssignDefault);
}

#endif

}  // namespace deltafx::cuda
