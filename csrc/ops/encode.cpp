// deltafx::encode: how a dense tensor enters the delta world. Every site is a candidate.
#include "ops/frame_args.h"

namespace deltafx {

EncodeParams encode_params(const Tensor& acc, const Tensor& mask, const Tensor& counts,
                           const Tensor& x, int64_t block, const OptionalTensor& inv_scale,
                           const OptionalTensor& threshold, c10::string_view policy) {
  EncodeParams p{};
  p.out = output_of(acc, mask, counts, inv_scale, threshold, policy);
  check_same_device(x, acc, "x");
  TORCH_CHECK_VALUE(x.sizes() == acc.sizes(), "deltafx: x is ", x.sizes(),
                    " but the accumulator is ", acc.sizes());
  TORCH_CHECK_VALUE(block >= 1, "deltafx: block must be at least 1, not ", block);
  p.x = x.data_ptr();
  p.dtype = dtype_of(x, "x");
  p.stride_n = x.stride(0);
  p.stride_c = x.stride(1);
  p.stride_h = x.stride(2);
  p.stride_w = x.stride(3);
  p.block = block;
  check_dtype_on(x, p.dtype);
  check_dtype_on(acc, p.out.acc.dtype);
  return p;
}

namespace {

void encode(const Tensor& acc, const Tensor& mask, const Tensor& counts, const Tensor& x,
            int64_t block, const OptionalTensor& inv_scale, const OptionalTensor& threshold,
            c10::string_view policy) {
  const EncodeParams p = encode_params(acc, mask, counts, x, block, inv_scale, threshold, policy);
#ifdef DELTAFX_CUDA
  if (acc.is_cuda())
    return run_on_cuda(acc, [&](cudaStream_t stream) { return cuda::encode(p, stream); });
#endif
  kernels().encode(p);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def(
      "encode(Tensor(a!) acc, Tensor(b!) mask, Tensor(c!) counts, Tensor x, int block, "
      "Tensor? inv_scale, Tensor? threshold, str policy) -> ()",
      {at::Tag::pt2_compliant_tag});
}
DELTAFX_IMPL(m.impl("encode", encode))

}  // namespace deltafx
