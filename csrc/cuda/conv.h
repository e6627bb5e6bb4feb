// Convolution on CUDA: how it is cut into phases, and how its weights are laid out.
//
// A phase is a set of output sites that meet the same kernel elements: one for an ordinary
// convolution, stride_y * stride_x for a transposed one. Its taps form a grid: tap (jy, jx) of a
// site reads the input at base + offset + j * step in each axis.
//
// Packed weights, in the dtype of the feature maps, phase after phase:
//   groups == 1   a matrix [cout, rounded up to 64][taps * packed_channels(cin), rounded up to 128
//                 bytes] in blocks of 64 rows and 128 bytes, [row block][depth block], each as it
//                 will lie in shared memory: row r of a block holds channel packed_channel(r), and
//                 chunk c of 16 bytes stands at c ^ (r % 8). So for tensor cores and without them.
//   otherwise     [tap][channel of the group][cout]
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cpu/conv.h"

namespace deltafx::cuda {

struct PhaseAxis {
  int taps;
  int offset, step;     // input coordinates
  int remainder;        // of (output coordinate + pad) modulo the stride, if transposed
  int first_k, step_k;  // kernel elements
};

struct Phase {
  PhaseAxis y, x;
  int64_t weights;  // offset into the packed weights, in elements
};

// Up to four channels are filled up to four, so that a frame's taps do not straddle chunks.
#ifdef __CUDACC__
__host__ __device__
#endif
    inline int packed_channels(int cin) {
  return cin <= 4 ? 4 : cin;
}

constexpr int kWeightRows = 64;  // of a block of packed weights

// The output channel in a row of the packed weights: a thread's sums in two 16 x 8 tiles, 32
// columns apart from its others, are then eight neighbouring channels.
#ifdef __CUDACC__
__host__ __device__
#endif
    inline int packed_channel(int row) {
  return row / 32 * 32 + row % 8 / 2 * 8 + row % 32 / 8 * 2 + row % 2;
}

bool is_matrix_product(const ConvGeometry& geometry);
int64_t packed_columns(int64_t cout);
int64_t packed_depth(int64_t k, DType dtype);
std::vector<Phase> conv_phases(const ConvGeometry& geometry, DType dtype);
int64_t packed_size(const ConvGeometry& geometry, DType dtype);

struct ConvLaunch {
  ConvParams p;        // `p.weight` is not used
  const void* weight;  // packed
  bool allow_tf32;     // fp32 on tensor cores, with operands rounded to tf32
  bool plain;          // matrix products without what is new in Ampere, as on older GPUs
  int32_t* memory;     // conv_ints
  bool listed;         // list_conv leaves the candidates there
  bool filtered;       // with others: of the list, those where x is active; of 1x1 alone
};
cudaError_t conv(const ConvLaunch& launch, cudaStream_t stream);
// Of the memory of a convolution with so many output sites.
int64_t conv_ints(int64_t sites, int64_t streams);

// Candidates of another convolution over the same sites, listed along with one's own: those, and
// the sites where `mask` is set, at a multiple of `stride`.
struct FurtherCandidates {
  Mask mask;  // no data: none
  int stride;
  int32_t* memory;  // conv_ints; the first one's: it reads the same list
  int64_t* counts;
};
constexpr int kFurtherLists = 2;  // at most

// The candidates of a convolution that is not transposed, and of others, in one launch.
struct ConvListLaunch {
  ConvGeometry geometry;  // its channels are not used
  Mask x_mask, residual_mask;
  int64_t h, w;     // of the result
  int32_t* memory;  // conv_ints
  int64_t* counts;
  int further;
  FurtherCandidates others[kFurtherLists];
};
cudaError_t list_conv(const ConvListLaunch& launch, cudaStream_t stream);

// Whether a convolution that goes by a list, or any (`ahead`) by one that is there before it may
// start, should rather compute `wider` sites more on each side of what changed than have candidates
// of its own. Of p: out.acc, x, residual, geometry; no memory is touched.
bool conv_bears_list(const ConvParams& p, double wider, bool ahead);

}  // namespace deltafx::cuda
