// deltafx::binary: add, sub, mul, div or max of two feature maps, or of a feature map and a gate
// that is broadcast over space, over channels, or over both. An active gate makes its stream a
// candidate.
#include "ops/dispatch.h"
#include "ops/schema.h"

namespace deltafx {
namespace {

BinaryOp op_of(c10::string_view op) {
  if (op == "add") return BinaryOp::add;
  if (op == "sub") return BinaryOp::sub;
  if (op == "mul") return BinaryOp::mul;
  if (op == "div") return BinaryOp::div;
  TORCH_CHECK_VALUE(op == "max", "deltafx: op must be 'add', 'sub', 'mul', 'div' or 'max', not '",
                    op, "'");
  return BinaryOp::max;
}

// t: of at most 4 axes, each of the accumulator's size or 1, height and width alike.
Operand operand_of(const Tensor& t, const OptionalTensor& mask, const Tensor& acc,
                   const char* name) {
  check_same_device(t, acc, name);
  Operand operand{t.data_ptr(), dtype_of(t, name), 0, 0, 0, {nullptr, 0, 0, 0}};
  check_dtype_on(t, operand.dtype);
  TORCH_CHECK_VALUE(t.dim() <= 4, "deltafx: ", name, " has more than 4 dimensions");
  int64_t size[4], stride[4];
  for (int64_t axis = 0; axis < 4; ++axis) {
    const int64_t own = axis - (4 - t.dim());
    size[axis] = own < 0 ? 1 : t.size(own);
    stride[axis] = own < 0 || size[axis] == 1 ? 0 : t.stride(own);
    TORCH_CHECK_VALUE(size[axis] == acc.size(axis) || size[axis] == 1, "deltafx: ", name, " is ",
                      t.sizes(), ", which does not broadcast to ", acc.sizes());
  }
  const bool gate = size[2] == 1 && size[3] == 1;
  TORCH_CHECK_VALUE(gate || (size[2] == acc.size(2) && size[3] == acc.size(3)), "deltafx: ", name,
                    " must have both height and width, or neither, but is ", t.sizes());
  const int64_t site = size[3] > 1 ? stride[3] : stride[2];
  TORCH_CHECK_VALUE(
      (size[1] == 1 || stride[1] == 1) && (size[2] == 1 || stride[2] == size[3] * site),
      "deltafx: ", name, " must be channels_last; it has sizes ", t.sizes(), " and strides ",
      t.strides());
  operand.stride_n = stride[0];
  operand.stride_site = site;
  operand.stride_c = stride[1];
  if (mask.has_value()) {
    const FeatureMap like{nullptr, operand.dtype, size[0], size[1], size[2], size[3], 0};
    check_same_device(*mask, acc, "a mask");
    operand.mask = mask_of(*mask, like, "a mask");
  }
  return operand;
}

void binary(const Tensor& acc, const Tensor& mask, const Tensor& counts, const Tensor& a,
            const OptionalTensor& a_mask, const Tensor& b, const OptionalTensor& b_mask,
            c10::string_view op, c10::string_view act, c10::ArrayRef<double> act_params,
            const OptionalTensor& act_weight, const OptionalTensor& inv_scale,
            const OptionalTensor& threshold, c10::string_view policy,
            const OptionalTensor& memory) {
  BinaryParams p{};
  p.out = output_of(acc, mask, counts, inv_scale, threshold, policy);
  check_dtype_on(acc, p.out.acc.dtype);
  p.act = activation_of(act, act_params, act_weight, p.out.acc.c);
  p.a = operand_of(a, a_mask, acc, "a");
  p.b = operand_of(b, b_mask, acc, "b");
  p.op = op_of(op);
  DELTAFX_RUN(binary, p, acc, memory);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def("binary(" DELTAFX_HEAD
        "Tensor a, Tensor? a_mask, Tensor b, Tensor? b_mask, str op, " DELTAFX_TAIL,
        {at::Tag::pt2_compliant_tag});
}
DELTAFX_IMPL(m.impl("binary", binary))

}  // namespace deltafx
