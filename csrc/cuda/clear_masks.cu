#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "cuda/ops.h"

namespace deltafx::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) clear_kernel(const __grid_constant__ Arenas arenas) {
  const auto [masks, bytes, counts, rows] = arenas;
  wait_for_inputs();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = first; i < 2 * rows; i += step) counts[i] = 0;
  const bool aligned = reinterpret_cast<uintptr_t>(masks) % 16 == 0;
  const int64_t vectors = aligned ? bytes / 16 : 0;
  for (int64_t i = first; i < vectors; i += step)
    reinterpret_cast<uint4*>(masks)[i] = make_uint4(0, 0, 0, 0);
  for (int64_t i = vectors * 16 + first; i < bytes; i += step) masks[i] = 0;
}

}  // namespace

cudaError_t clear_masks(const Arenas& arenas, cudaStream_t stream) {
  const int64_t needed = (arenas.bytes / 16 + kThreads - 1) / kThreads + 1;
  return launch(clear_kernel, {at_most(needed, 8), kThreads}, stream, arenas);
}

}  // namespace deltafx::cuda
