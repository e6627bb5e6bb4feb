// deltafx::gather_channels: y[c] = act(x[index[c]]). A channel shuffle, or, without an index, a
// copy into a slice of a concatenation.
#include "ops/dispatch.h"
#include "ops/schema.h"

namespace deltafx {
namespace {

void gather_channels(const Tensor& acc, const Tensor& mask, const Tensor& counts, const Tensor& x,
                     const Tensor& x_mask, at::OptionalIntArrayRef index, c10::string_view act,
                     c10::ArrayRef<double> act_params, const OptionalTensor& act_weight,
                     const OptionalTensor& inv_scale, const OptionalTensor& threshold,
                     c10::string_view policy, const OptionalTensor& memory) {
  GatherParams p{};
  p.out = output_of(acc, mask, counts, inv_scale, threshold, policy);
  check_dtype_on(acc, p.out.acc.dtype);
  p.act = activation_of(act, act_params, act_weight, p.out.acc.c);
  p.x = input_of(x, x_mask, acc);
  const int64_t c = p.x.map.c;
  TORCH_CHECK_VALUE(x.size(2) == acc.size(2) && x.size(3) == acc.size(3), "deltafx: x is ",
                    x.sizes(), " but the accumulator is ", acc.sizes());
  const int64_t given = index.has_value() ? static_cast<int64_t>(index->size()) : c;
  TORCH_CHECK_VALUE(given == p.out.acc.c, "deltafx: ", given,
                    " channels are gathered but the accumulator has ", p.out.acc.c);
  if (index.has_value()) {
    for (const int64_t i : *index)
      TORCH_CHECK_INDEX(i >= 0 && i < c, "deltafx: index ", i, " is not a channel of ", c);
    p.index = index->data();
  }
  DELTAFX_RUN(gather_channels, p, acc, memory);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def("gather_channels(" DELTAFX_HEAD "Tensor x, Tensor x_mask, int[]? index, " DELTAFX_TAIL,
        {at::Tag::pt2_compliant_tag});
}
DELTAFX_IMPL(m.impl("gather_channels", gather_channels))

}  // namespace deltafx
