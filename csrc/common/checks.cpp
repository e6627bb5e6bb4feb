#include "common/checks.h"

#include <array>
#include <utility>

namespace deltafx {

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK_TYPE(false, "deltafx: ", name, " must be float32, bfloat16 or float16, not ",
                       t.scalar_type());
  }
}

void check_dtype_on(const Tensor& t, DType dtype) {
  TORCH_CHECK_TYPE(!t.is_cpu() || dtype != DType::f16,
                   "deltafx: the CPU operators take float32 and bfloat16, not float16");
}

FeatureMap feature_map(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 4, "deltafx: ", name, " must be [N, C, H, W], not of ", t.dim(),
                    " dimensions");
  FeatureMap map{nullptr, dtype_of(t, name), t.size(0), t.size(1), t.size(2), t.size(3), 0};
  // Sizes of 1 leave their strides free, so take the site stride from the axes that tell it.
  map.ld = map.w > 1 ? t.stride(3) : map.h > 1 ? t.stride(2) : map.n > 1 ? t.stride(0) : map.c;
  const bool fits = (map.c == 1 || t.stride(1) == 1) && (map.w == 1 || t.stride(3) == map.ld) &&
                    (map.h == 1 || t.stride(2) == map.w * map.ld) &&
                    (map.n == 1 || t.stride(0) == map.h * map.w * map.ld) && map.ld >= map.c;
  TORCH_CHECK_VALUE(fits, "deltafx: ", name,
                    " must be channels_last or a slice of the channels of a channels_last tensor; "
                    "it has sizes ",
                    t.sizes(), " and strides ", t.strides());
  TORCH_CHECK_VALUE(map.sites() < (int64_t{1} << 31), "deltafx: ", name, " has 2^31 sites or more");
  map.data = t.data_ptr();
  return map;
}

FeatureMap map_like(const Tensor& t, const Tensor& acc, const char* name) {
  check_same_device(t, acc, name);
  TORCH_CHECK_VALUE(t.sizes() == acc.sizes(), "deltafx: ", name, " is ", t.sizes(),
                    " but the accumulator is ", acc.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == acc.scalar_type(), "deltafx: ", name, " is ", t.scalar_type(),
                   " but the accumulator is ", acc.scalar_type());
  return feature_map(t, name);
}

bool in_vectors(const FeatureMap& map) {
  return reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && map.ld % 8 == 0 && map.c % 8 == 0;
}

Mask mask_of(const Tensor& t, const FeatureMap& like, const char* name) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kBool, "deltafx: ", name, " must be bool, not ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 3 && t.size(0) == like.n && t.size(1) == like.h &&
                        t.size(2) == like.w && t.is_contiguous(),
                    "deltafx: ", name, " must be contiguous of [", like.n, ", ", like.h, ", ",
                    like.w, "], not ", t.sizes());
  return {static_cast<uint8_t*>(t.data_ptr()), like.n, like.h, like.w};
}

void check_same_device(const Tensor& t, const Tensor& as, const char* name) {
  TORCH_CHECK_VALUE(t.device() == as.device(), "deltafx: ", name, " is on ", t.device(),
                    " but the accumulator on ", as.device());
}

int32_t* ints_of(const Tensor& t, int64_t count, const Tensor& same_device, const char* name) {
  check_same_device(t, same_device, name);
  TORCH_CHECK_TYPE(t.scalar_type() == at::kInt, "deltafx: ", name, " must be int32, not ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.numel() >= count && t.is_contiguous(), "deltafx: ", name,
                    " must be contiguous with ", count, " elements or more, not ", t.sizes());
  return static_cast<int32_t*>(t.data_ptr());
}

const float* floats_of(const OptionalTensor& t, int64_t count, const Tensor& same_device,
                       const char* name) {
  if (!t.has_value()) return nullptr;
  check_same_device(*t, same_device, name);
  TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat, "deltafx: ", name, " must be float32, not ",
                   t->scalar_type());
  TORCH_CHECK_VALUE(t->numel() == count && t->is_contiguous(), "deltafx: ", name,
                    " must be contiguous with ", count, " elements, not ", t->sizes());
  return static_cast<const float*>(t->data_ptr());
}

int64_t* counts_of(const Tensor& t, const Tensor& same_device, const char* name) {
  check_same_device(t, same_device, name);
  TORCH_CHECK_TYPE(t.scalar_type() == at::kLong, "deltafx: ", name, " must be int64");
  TORCH_CHECK_VALUE(t.numel() == 2 && t.is_contiguous(), "deltafx: ", name,
                    " must have 2 contiguous elements, not ", t.sizes());
  return static_cast<int64_t*>(t.data_ptr());
}

Output output_of(const Tensor& acc, const Tensor& mask, const Tensor& counts,
                 const OptionalTensor& inv_scale, const OptionalTensor& threshold,
                 std::string_view policy) {
  Output out{};
  out.acc = feature_map(acc, "acc");
  check_same_device(mask, acc, "mask");
  out.mask = mask_of(mask, out.acc, "mask");
  out.counts = counts_of(counts, acc, "counts");
  TORCH_CHECK_VALUE(inv_scale.has_value() == threshold.has_value(),
                    "deltafx: inv_scale and threshold go together");
  if (inv_scale.has_value()) {
    TORCH_CHECK_VALUE(policy == "rms" || policy == "max",
                      "deltafx: policy must be 'rms' or 'max', not '", policy, "'");
    out.truncation = {policy == "rms" ? Policy::rms : Policy::maximum,
                      floats_of(inv_scale, out.acc.c, acc, "inv_scale"),
                      floats_of(threshold, 1, acc, "threshold")};
  } else {
    out.truncation = {Policy::none, nullptr, nullptr};
  }
  return out;
}

Activation activation_of(std::string_view act, c10::ArrayRef<double> params,
                         const OptionalTensor& weight, int64_t channels) {
  struct Entry {
    std::string_view name;
    Act kind;
    size_t params;
  };
  static constexpr std::array<Entry, 16> table{{{"identity", Act::identity, 0},
                                                {"relu", Act::relu, 0},
                                                {"relu6", Act::relu6, 0},
                                                {"hardtanh", Act::hardtanh, 2},
                                                {"leaky_relu", Act::leaky_relu, 1},
                                                {"prelu", Act::prelu, 0},
                                                {"silu", Act::silu, 0},
                                                {"hardswish", Act::hardswish, 0},
                                                {"hardsigmoid", Act::hardsigmoid, 0},
                                                {"sigmoid", Act::sigmoid, 0},
                                                {"tanh", Act::tanh, 0},
                                                {"gelu", Act::gelu, 0},
                                                {"gelu_tanh", Act::gelu_tanh, 0},
                                                {"elu", Act::elu, 3},
                                                {"mish", Act::mish, 0},
                                                {"softplus", Act::softplus, 2}}};
  for (const Entry& entry : table) {
    if (entry.name != act) continue;
    TORCH_CHECK_VALUE(params.size() == entry.params, "deltafx: activation '", act, "' takes ",
                      entry.params, " params, not ", params.size());
    Activation activation{entry.kind, {0.f, 0.f, 0.f}, nullptr};
    for (size_t i = 0; i < params.size(); ++i) activation.p[i] = static_cast<float>(params[i]);
    TORCH_CHECK_VALUE(weight.has_value() == (entry.kind == Act::prelu),
                      "deltafx: act_weight goes with 'prelu' and only with it");
    if (weight.has_value()) activation.weight = floats_of(weight, channels, *weight, "act_weight");
    return activation;
  }
  TORCH_CHECK_VALUE(false, "deltafx: unknown activation '", act, "'");
}

Window window_of(c10::ArrayRef<int64_t> kernel, c10::ArrayRef<int64_t> stride,
                 c10::ArrayRef<int64_t> padding, c10::ArrayRef<int64_t> dilation, int axis) {
  TORCH_CHECK_VALUE(
      kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
      "deltafx: kernel, stride, padding and dilation must have 2 elements");
  const Window w{kernel[axis], stride[axis], padding[axis], dilation[axis]};
  TORCH_CHECK_VALUE(w.kernel > 0 && w.stride > 0 && w.pad >= 0 && w.dilation > 0,
                    "deltafx: kernel, stride and dilation must be positive, padding not negative");
  return w;
}

}  // namespace deltafx
