// deltafx::pad2d: constant padding (left, right, top, bottom; negative crops). The border does not
// depend on the input: it is written when the accumulator lost it (holds NaN), and left otherwise.
#include "ops/dispatch.h"
#include "ops/schema.h"

namespace deltafx {
namespace {

void pad2d(const Tensor& acc, const Tensor& mask, const Tensor& counts, const Tensor& x,
           const Tensor& x_mask, at::IntArrayRef pad, double value, const OptionalTensor& inv_scale,
           const OptionalTensor& threshold, c10::string_view policy, const OptionalTensor& memory) {
  PadParams p{};
  p.out = output_of(acc, mask, counts, inv_scale, threshold, policy);
  check_dtype_on(acc, p.out.acc.dtype);
  p.x = input_like(x, x_mask, acc, false);
  TORCH_CHECK_VALUE(pad.size() == 4, "deltafx: pad must have 4 elements, not ", pad.size());
  TORCH_CHECK_VALUE(
      acc.size(3) == x.size(3) + pad[0] + pad[1] && acc.size(2) == x.size(2) + pad[2] + pad[3],
      "deltafx: x of ", x.sizes(), " padded by ", pad, " is not ", acc.sizes());
  p.left = pad[0];
  p.top = pad[2];
  p.value = static_cast<float>(value);
  DELTAFX_RUN(pad2d, p, acc, memory);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def("pad2d(" DELTAFX_HEAD
        "Tensor x, Tensor x_mask, int[4] pad, float value, " DELTAFX_TRUNCATION,
        {at::Tag::pt2_compliant_tag});
}
DELTAFX_IMPL(m.impl("pad2d", pad2d))

}  // namespace deltafx
