// From tensors to the plain descriptions of types.h, with every argument checked. For csrc/ops
// only.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <optional>
#include <string_view>

#include "common/types.h"

namespace deltafx {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& t, const char* name);
// The CPU kernels compute in fp32 and store fp32 or bf16.
void check_dtype_on(const Tensor& t, DType dtype);
// t: [N, C, H, W], channels_last or a channel slice of a channels_last tensor, fp32 / bf16 / fp16.
FeatureMap feature_map(const Tensor& t, const char* name);
// The same for what must have the sizes, type and device of an accumulator.
FeatureMap map_like(const Tensor& t, const Tensor& acc, const char* name);
// Whether the channels of a map in half precision lie in whole vectors of eight.
bool in_vectors(const FeatureMap& map);
// t: bool [n, h, w], contiguous, where `like` has n streams of h x w sites.
Mask mask_of(const Tensor& t, const FeatureMap& like, const char* name);
// acc, mask, counts (int64 [2]) and the truncation arguments. inv_scale: fp32 [C]; threshold: fp32,
// one element; both or neither. policy: "rms" or "max".
Output output_of(const Tensor& acc, const Tensor& mask, const Tensor& counts,
                 const OptionalTensor& inv_scale, const OptionalTensor& threshold,
                 std::string_view policy);
// act: a name of Act; params: its numbers; weight: fp32 [channels] for prelu.
Activation activation_of(std::string_view act, c10::ArrayRef<double> params,
                         const OptionalTensor& weight, int64_t channels);
// Null, or the data of a contiguous fp32 tensor of `count` elements.
const float* floats_of(const OptionalTensor& t, int64_t count, const Tensor& same_device,
                       const char* name);
// The data of a contiguous int32 tensor of `count` elements or more.
int32_t* ints_of(const Tensor& t, int64_t count, const Tensor& same_device, const char* name);
// The data of an op's counts: contiguous int64 [2].
int64_t* counts_of(const Tensor& t, const Tensor& same_device, const char* name);
void check_same_device(const Tensor& t, const Tensor& as, const char* name);
Window window_of(c10::ArrayRef<int64_t> kernel, c10::ArrayRef<int64_t> stride,
                 c10::ArrayRef<int64_t> padding, c10::ArrayRef<int64_t> dilation, int axis);

}  // namespace deltafx
