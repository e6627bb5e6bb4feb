// finish_conv2d: bias, residual and activation of a convolution computed everywhere.
#include "cuda/finish_conv2d.h"

#include <cfloat>

#include "cuda/activation.cuh"
#include "cuda/launch.h"

namespace deltafx::cuda {
namespace {

constexpr int kThreads = 256;

// A thread keeps its eight channels and goes from site to site; `lanes` threads hold the channels
// of a row of blocks.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ FinishParams p, int lanes, bool aligned) {
  wait_for_inputs();
  const FeatureMap& acc = p.acc;
  const int sites = static_cast<int>(acc.n * acc.h * acc.w);
  const int per_block = kThreads / lanes, row = static_cast<int>(threadIdx.x) / lanes;
  const int c0 =
      (static_cast<int>(blockIdx.y) * lanes + static_cast<int>(threadIdx.x) % lanes) * kVector;
  const int count = min(kVector, static_cast<int>(acc.c) - c0);
  if (row >= per_block || count <= 0) return;
  float bias[kVector] = {};
  if (p.bias != nullptr) load_vector(p.bias + c0, count, false, bias);
  const FastActivation activation(p.act);
  bool finite = true;
  for (int site = static_cast<int>(blockIdx.x) * per_block + row; site < sites;
       site += static_cast<int>(gridDim.x) * per_block) {
    float v[kVector], residual[kVector] = {};
    load_vector(static_cast<const T*>(p.y.data) + site * p.y.ld + c0, count, aligned, v);
    if (p.residual.data != nullptr)
      load_vector(static_cast<const T*>(p.residual.data) + site * p.residual.ld + c0, count,
                  aligned, residual);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      finite &= fabsf(v[i]) <= FLT_MAX;
      v[i] += bias[i];
      if (!p.residual_after_act) v[i] += residual[i];
    }
    if (sizeof(T) == 2 && count == kVector)
      apply_in_half(activation, p.act, c0, v);
    else
      activation.apply(p.act, c0, count, v);
    if (p.residual_after_act) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] += residual[i];
    }
    store_vector(static_cast<T*>(acc.data) + site * acc.ld + c0, count, aligned, v);
  }
  if (!finite) *p.not_finite = 1;
}

template <class T>
cudaError_t finish_as(const FinishParams& p, cudaStream_t stream) {
  const FeatureMap& acc = p.acc;
  const int vectors = static_cast<int>((acc.c + kVector - 1) / kVector);
  const int lanes = vectors < kThreads ? vectors : kThreads;
  const int rows = (vectors + lanes - 1) / lanes, per_block = kThreads / lanes;
  const int64_t needed = (acc.sites() + per_block - 1) / per_block;
  const bool aligned =
      is_aligned(acc) && is_aligned(p.y) && (p.residual.data == nullptr || is_aligned(p.residual));
  Grid grid{at_most(needed, 16), kThreads};
  grid.rows = rows;
  return launch(finish_kernel<T>, grid, stream, p, lanes, aligned);
}

}  // namespace

cudaError_t finish_conv2d(const FinishParams& p, cudaStream_t stream) {
  return with_type(p.acc.dtype,
                   [&](auto type) { return finish_as<typename decltype(type)::T>(p, stream); });
}

}  // namespace deltafx::cuda
