#include "cuda/conv_gemm_kernel.cuh"

namespace deltafx::cuda {

cudaError_t conv_gemm_plain(const GemmParams& p, cudaStream_t stream) {
  switch (p.out.acc.dtype) {
    case DType::f32:
      return launch_conv_gemm<Plain<float>>(p, stream);
    case DType::bf16:
      return launch_conv_gemm<Plain<__nv_bfloat16>>(p, stream);
    case DType::f16:
      return launch_conv_gemm<Plain<__half>>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace deltafx::cuda
