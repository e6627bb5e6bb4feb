// deltafx::global_pool2d: the mean over all sites of a stream. `partial` keeps exact sums over
// tiles of kPoolTile consecutive sites; a tile with an active site is summed anew, never added to.
#include "ops/dispatch.h"
#include "ops/schema.h"

namespace deltafx {
namespace {

void global_pool2d(const Tensor& acc, const Tensor& mask, const Tensor& counts,
                   const Tensor& partial, const Tensor& x, const Tensor& x_mask,
                   c10::string_view act, c10::ArrayRef<double> act_params,
                   const OptionalTensor& act_weight, const OptionalTensor& inv_scale,
                   const OptionalTensor& threshold, c10::string_view policy,
                   const OptionalTensor& memory) {
  GlobalPoolParams p{};
  p.out = output_of(acc, mask, counts, inv_scale, threshold, policy);
  check_dtype_on(acc, p.out.acc.dtype);
  TORCH_CHECK_VALUE(acc.size(2) == 1 && acc.size(3) == 1, "deltafx: the accumulator must be ",
                    "[N, C, 1, 1], not ", acc.sizes());
  p.act = activation_of(act, act_params, act_weight, p.out.acc.c);
  p.x = input_like(x, x_mask, acc, false);
  const int64_t tiles = (p.x.map.h * p.x.map.w + kPoolTile - 1) / kPoolTile;
  check_same_device(partial, acc, "partial");
  TORCH_CHECK_TYPE(partial.scalar_type() == at::kFloat, "deltafx: partial must be float32");
  TORCH_CHECK_VALUE(partial.is_contiguous() && partial.dim() == 3 && partial.size(0) == p.x.map.n &&
                        partial.size(1) == tiles && partial.size(2) == p.x.map.c,
                    "deltafx: partial must be contiguous of [", p.x.map.n, ", ", tiles, ", ",
                    p.x.map.c, "], not ", partial.sizes());
  p.partial = static_cast<float*>(partial.data_ptr());
#ifdef DELTAFX_CUDA
  if (acc.is_cuda())
    return run_on_cuda(
        acc, memory, cuda::list_ints(p.out.acc.sites()) + p.x.map.n * tiles,
        [&](int32_t* ints, cudaStream_t stream) { return cuda::global_pool2d(p, ints, stream); });
#endif
  kernels().global_pool2d(p);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def("global_pool2d(" DELTAFX_HEAD "Tensor(d!) partial, Tensor x, Tensor x_mask, " DELTAFX_TAIL,
        {at::Tag::pt2_compliant_tag});
}
DELTAFX_IMPL(m.impl("global_pool2d", global_pool2d))

}  // namespace deltafx
