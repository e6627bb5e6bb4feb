#include "ops/schema.h"

namespace deltafx {

Input input_of(const Tensor& x, const Tensor& x_mask, const Tensor& acc) {
  check_same_device(x, acc, "x");
  check_same_device(x_mask, acc, "x_mask");
  Input input{feature_map(x, "x"), {}};
  check_dtype_on(x, input.map.dtype);
  input.mask = mask_of(x_mask, input.map, "x_mask");
  TORCH_CHECK_VALUE(x.size(0) == acc.size(0), "deltafx: x has ", x.size(0),
                    " streams but the accumulator ", acc.size(0));
  return input;
}

Input input_like(const Tensor& x, const Tensor& x_mask, const Tensor& acc, bool same_size) {
  const Input input = input_of(x, x_mask, acc);
  const bool fits = x.size(1) == acc.size(1) &&
                    (!same_size || (x.size(2) == acc.size(2) && x.size(3) == acc.size(3)));
  TORCH_CHECK_VALUE(fits, "deltafx: x is ", x.sizes(), " but the accumulator is ", acc.sizes());
  return input;
}

}  // namespace deltafx
