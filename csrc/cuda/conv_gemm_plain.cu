#include "cuda/conv_gemm_kernel.cuh"

namespace deltafx::cuda {

cudaError_t conv_gemm_plain(const GemmParams& p, cudaStream_t stream) {
  return with_type(p.out.acc.dtype, [&](auto type) {
    return launch_conv_gemm<Plain<typename decltype(type)::T>>(p, stream);
  });
}

}  // namespace deltafx::cuda
