#include "cuda/conv_hopper_kernel.cuh"

namespace deltafx::cuda {

cudaError_t conv_hopper_f16(const GemmParams& p, cudaStream_t stream) {
  return launch_conv_hopper<__half>(p, stream);
}

}  // namespace deltafx::cuda
