// A frame's branch: computed at the candidates, computed everywhere, or not computed at all. The
// device decides, by how much of the input changed; the host is not asked.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ops.h"

namespace deltafx::cuda {

constexpr int kMostInputs = 32;
constexpr int kSquare = 16;  // sites a side

// What the decision leaves on the device: `choice` for whoever asks what was done.
struct BranchState {
  int32_t choice;      // one of the below
  int32_t not_finite;  // whether the last frame that was computed everywhere met an infinity or NaN
  // Squares that changed so far, and blocks that are done, each as kBlock; 0 between frames.
  unsigned long long progress;
  int32_t begun;  // blocks that have begun, of a kernel that counts them; 0 between frames
  int32_t unused;
  static constexpr unsigned long long kBlock = 1ull << 32;
};
enum Branch : int32_t { kDelta = 0, kEverywhere = 1, kNothing = 2 };

struct BranchParams {
  Mask masks[kMostInputs];  // update masks of the frame's inputs
  int inputs;
  bool may_skip;        // whether nothing needs to be done where nothing changed
  bool has_everywhere;  // whether there is a branch that computes everywhere
  float dense_above;    // share of changed squares above which a frame is computed everywhere
  BranchState* state;
};

// For a stream that is being captured. cudaErrorNotSupported where the runtime or the driver has no
// conditional nodes.
//
// Enqueues the decision, and a conditional node behind it with one of the bodies. `bodies`: the
// graph of the delta branch; then, if there is one, that of the branch that computes everywhere.
// They are copied.
cudaError_t branch(const BranchParams& p, const cudaGraph_t* bodies, int count,
                   cudaStream_t stream);

// Whether a comparison of a frame can be a graph's first kernel, and clear the arenas and decide as
// well: that of an image, with its mask and its counts in the arenas.
bool begins_frame(const EncodeParams& p, const Arenas& arenas);
// Enqueues it, for a graph in which the delta branch's own kernels follow in any case: where
// everywhere is to be computed, the input's mask is left empty, so that they find no candidate.
// `handle`: for otherwise().
cudaError_t begin_frame(const EncodeParams& p, const Arenas& arenas, const BranchParams& branch,
                        unsigned long long* handle, cudaStream_t stream);
// Enqueues the graph of the branch that computes everywhere, for frames that were decided so; then
// a kernel that does nothing, since only behind kernels can the next one begin early.
cudaError_t otherwise(unsigned long long handle, cudaGraph_t everywhere, cudaStream_t stream);
// Has the host told the choice, some time later, in its own memory. A kernel of its own, beside
// others: one that writes to the host is done only when that has arrived.
cudaError_t tell(const BranchState* state, int32_t* told, cudaStream_t stream);

}  // namespace deltafx::cuda
