#include "cuda/conv_gemm_kernel.cuh"

namespace deltafx::cuda {

cudaError_t conv_gemm_f16(const GemmParams& p, cudaStream_t stream) {
  return launch_conv_gemm<Half>(p, stream);
}

}  // namespace deltafx::cuda
