// deltafx::affine: y = act(x * scale[c] + shift[c]). A batch norm that could not be folded, or,
// with neither scale nor shift, an activation by itself.
#include "ops/dispatch.h"
#include "ops/schema.h"

namespace deltafx {
namespace {

void affine(const Tensor& acc, const Tensor& mask, const Tensor& counts, const Tensor& x,
            const Tensor& x_mask, const OptionalTensor& scale, const OptionalTensor& shift,
            c10::string_view act, c10::ArrayRef<double> act_params,
            const OptionalTensor& act_weight, const OptionalTensor& inv_scale,
            const OptionalTensor& threshold, c10::string_view policy,
            const OptionalTensor& memory) {
  AffineParams p{};
  p.out = output_of(acc, mask, counts, inv_scale, threshold, policy);
  check_dtype_on(acc, p.out.acc.dtype);
  p.act = activation_of(act, act_params, act_weight, p.out.acc.c);
  p.x = input_like(x, x_mask, acc, true);
  p.scale = floats_of(scale, p.out.acc.c, acc, "scale");
  p.shift = floats_of(shift, p.out.acc.c, acc, "shift");
  DELTAFX_RUN(affine, p, acc, memory);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def("affine(" DELTAFX_HEAD
        "Tensor x, Tensor x_mask, Tensor? scale, Tensor? shift, " DELTAFX_TAIL,
        {at::Tag::pt2_compliant_tag});
}
DELTAFX_IMPL(m.impl("affine", affine))

}  // namespace deltafx
