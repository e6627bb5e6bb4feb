// The tensor-core convolution's parameters and instances, one source file each.
#pragma once

#include "cuda/candidates.cuh"
#include "cuda/conv.h"
#include "cuda/shares.cuh"

namespace deltafx::cuda {

// Bits for taps along an axis; a convolution with as many or more is gathered element by element.
constexpr int kMostTaps = 16;

struct GemmAxis {
  int stride, pad;
  bool transposed;
  PhaseAxis phase;
  // The input coordinate that tap 0 of an output coordinate reads.
  __device__ int base(int o) const {
    return (transposed ? (o + pad) / stride : o * stride) + phase.offset;
  }
};

// How candidates are found: words of the masks are words of flags; windows of neighbours, of up to
// 3x3, where eight sites' taps lie in three words of a row, or in five of half the size, or of up
// to 8x8, in four words; others.
enum class Windows { points, small, narrow, wide, any };

struct GemmParams {
  Output out;
  Activation act;
  FeatureMap x;
  Mask x_mask;
  const void* weight;
  const float* bias;
  FeatureMap residual;
  Mask residual_mask;
  bool residual_after_act;
  const float* pre_scale;
  const float* pre_shift;
  Activation pre_act;
  GemmAxis y, x_axis;
  Windows windows = Windows::any;

  int depth;         // taps * cin
  int packed_depth;  // row length of the packed weights
  int cluster;       // parts of a depth that are summed by themselves; blocks that may share it
  bool acc_aligned, residual_aligned;
  Shares shares;       // of the accumulator's sites, where the kernel finds the candidates itself
  CandidateList list;  // where it does not
  int makers;          // blocks that make the list, perhaps still; 0: it is one of the inputs
  bool filtered;       // of the list, those sites are candidates where x, of that size, is active
  Divisor w, h;        // of the accumulator
  int sites;           // of the accumulator
};

cudaError_t conv_gemm_f16(const GemmParams& p, cudaStream_t stream);
cudaError_t conv_gemm_bf16(const GemmParams& p, cudaStream_t stream);
cudaError_t conv_gemm_tf32(const GemmParams& p, cudaStream_t stream);
cudaError_t conv_gemm_f32(const GemmParams& p, cudaStream_t stream);
// Of any dtype, on any GPU: in fp32 and without tensor cores.
cudaError_t conv_gemm_plain(const GemmParams& p, cudaStream_t stream);

}  // namespace deltafx::cuda
