// deltafx::pool2d and deltafx::adaptive_pool2d: maximum or average over windows of sites. The
// output size is the accumulator's, so ceil_mode needs no flag.
#include <algorithm>

#include "cpu/parallel.h"
#include "ops/dispatch.h"
#include "ops/schema.h"

namespace deltafx {
namespace {

bool is_maximum(c10::string_view kind) {
  TORCH_CHECK_VALUE(kind == "max" || kind == "avg", "deltafx: kind must be 'max' or 'avg', not '",
                    kind, "'");
  return kind == "max";
}

// torch's rules, those of avg_pool2d's divisor included: padding counts, an overrun does not.
PoolAxis window_axis(const Window& w, int64_t in, int64_t out, bool count_include_pad,
                     int32_t* table) {
  int32_t *begin = table, *end = table + out, *divisor = table + 2 * out;
  for (int64_t o = 0; o < out; ++o) {
    const int64_t start = o * w.stride - w.pad;
    const int64_t stop = std::min(start + (w.kernel - 1) * w.dilation + 1, in + w.pad);
    const int64_t first =
        start >= 0 ? start : start + (-start + w.dilation - 1) / w.dilation * w.dilation;
    const int64_t last = std::max(std::min(stop, in), int64_t{0});
    begin[o] = static_cast<int32_t>(std::min(first, last));
    end[o] = static_cast<int32_t>(last);
    divisor[o] = static_cast<int32_t>(count_include_pad ? stop - start : last - first);
  }
  return {begin, end, divisor, static_cast<int32_t>(w.dilation)};
}

PoolAxis adaptive_axis(int64_t in, int64_t out, int32_t* table) {
  int32_t *begin = table, *end = table + out, *divisor = table + 2 * out;
  for (int64_t o = 0; o < out; ++o) {
    begin[o] = static_cast<int32_t>(o * in / out);
    end[o] = static_cast<int32_t>(((o + 1) * in + out - 1) / out);
    divisor[o] = end[o] - begin[o];
  }
  return {begin, end, divisor, 1};
}

#ifdef DELTAFX_CUDA
cuda::PoolRule window_rule(const Window& w, int64_t in, int64_t out, bool count_include_pad,
                           int64_t divisor) {
  return {static_cast<int>(in),       static_cast<int>(out),    static_cast<int>(w.kernel),
          static_cast<int>(w.stride), static_cast<int>(w.pad),  static_cast<int>(w.dilation),
          count_include_pad,          static_cast<int>(divisor)};
}

cuda::PoolRule adaptive_rule(int64_t in, int64_t out) {
  return window_rule({0, 1, 0, 1}, in, out, false, 0);
}

void pool_on_cuda(const PoolParams& p, const Tensor& acc, const OptionalTensor& memory,
                  const cuda::PoolRule& y, const cuda::PoolRule& x, bool listed) {
  run_on_cuda(acc, memory, cuda::list_ints(p.out.acc.sites()),
              [&](int32_t* list, cudaStream_t stream) {
                return cuda::pool2d(p, y, x, list, listed, stream);
              });
}
#endif

PoolParams params_of(const Tensor& acc, const Tensor& mask, const Tensor& counts, const Tensor& x,
                     const Tensor& x_mask, c10::string_view kind, c10::string_view act,
                     c10::ArrayRef<double> act_params, const OptionalTensor& act_weight,
                     const OptionalTensor& inv_scale, const OptionalTensor& threshold,
                     c10::string_view policy) {
  PoolParams p{};
  p.out = output_of(acc, mask, counts, inv_scale, threshold, policy);
  check_dtype_on(acc, p.out.acc.dtype);
  p.act = activation_of(act, act_params, act_weight, p.out.acc.c);
  p.x = input_like(x, x_mask, acc, false);
  p.maximum = is_maximum(kind);
  return p;
}

void pool2d(const Tensor& acc, const Tensor& mask, const Tensor& counts, const Tensor& x,
            const Tensor& x_mask, c10::string_view kind, at::IntArrayRef kernel,
            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
            bool count_include_pad, std::optional<int64_t> divisor_override, c10::string_view act,
            c10::ArrayRef<double> act_params, const OptionalTensor& act_weight,
            const OptionalTensor& inv_scale, const OptionalTensor& threshold,
            c10::string_view policy, const OptionalTensor& memory, bool listed) {
  PoolParams p = params_of(acc, mask, counts, x, x_mask, kind, act, act_params, act_weight,
                           inv_scale, threshold, policy);
  TORCH_CHECK_VALUE(!listed || (memory.has_value() && acc.is_cuda()),
                    "deltafx: a list of candidates is in memory on a CUDA device");
  p.window_y = window_of(kernel, stride, padding, dilation, 0);
  p.window_x = window_of(kernel, stride, padding, dilation, 1);
  TORCH_CHECK_VALUE(p.maximum || (p.window_y.dilation == 1 && p.window_x.dilation == 1),
                    "deltafx: an average pool has no dilation");
  TORCH_CHECK_VALUE(!divisor_override.has_value() ||
                        (*divisor_override > 0 && *divisor_override < (int64_t{1} << 31)),
                    "deltafx: divisor_override must be positive and below 2^31");
  const int64_t h = p.out.acc.h, w = p.out.acc.w;
#ifdef DELTAFX_CUDA
  // As below, an override is the divisor of the rows, and the columns' is 1.
  const int64_t divisor = divisor_override.value_or(0);
  if (acc.is_cuda())
    return pool_on_cuda(
        p, acc, memory, window_rule(p.window_y, p.x.map.h, h, count_include_pad, divisor),
        window_rule(p.window_x, p.x.map.w, w, count_include_pad, divisor == 0 ? 0 : 1), listed);
#endif
  int32_t* table = scratch_of<int32_t>(Scratch::tile, 3 * (h + w));
  p.y = window_axis(p.window_y, p.x.map.h, h, count_include_pad, table);
  p.x_axis = window_axis(p.window_x, p.x.map.w, w, count_include_pad, table + 3 * h);
  if (divisor_override.has_value()) {
    std::fill_n(table + 2 * h, h, static_cast<int32_t>(*divisor_override));
    std::fill_n(table + 3 * h + 2 * w, w, 1);
  }
  kernels().pool2d(p);
}

void adaptive_pool2d(const Tensor& acc, const Tensor& mask, const Tensor& counts, const Tensor& x,
                     const Tensor& x_mask, c10::string_view kind, c10::string_view act,
                     c10::ArrayRef<double> act_params, const OptionalTensor& act_weight,
                     const OptionalTensor& inv_scale, const OptionalTensor& threshold,
                     c10::string_view policy, const OptionalTensor& memory) {
  PoolParams p = params_of(acc, mask, counts, x, x_mask, kind, act, act_params, act_weight,
                           inv_scale, threshold, policy);
  const int64_t h = p.out.acc.h, w = p.out.acc.w;
#ifdef DELTAFX_CUDA
  if (acc.is_cuda())
    return pool_on_cuda(p, acc, memory, adaptive_rule(p.x.map.h, h), adaptive_rule(p.x.map.w, w),
                        false);
#endif
  int32_t* table = scratch_of<int32_t>(Scratch::tile, 3 * (h + w));
  p.y = adaptive_axis(p.x.map.h, h, table);
  p.x_axis = adaptive_axis(p.x.map.w, w, table + 3 * h);
  kernels().pool2d(p);
}

}  // namespace

// listed: `memory` holds the candidates and counts[0] their number, as find_candidates left them.
TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def("pool2d(" DELTAFX_HEAD
        "Tensor x, Tensor x_mask, str kind, int[2] kernel, int[2] stride, int[2] padding, "
        "int[2] dilation, bool count_include_pad, int? "
        "divisor_override, " DELTAFX_ACTIVATION DELTAFX_RULE ", bool listed=False) -> ()",
        {at::Tag::pt2_compliant_tag});
  m.def("adaptive_pool2d(" DELTAFX_HEAD "Tensor x, Tensor x_mask, str kind, " DELTAFX_TAIL,
        {at::Tag::pt2_compliant_tag});
}
DELTAFX_IMPL(m.impl("pool2d", pool2d); m.impl("adaptive_pool2d", adaptive_pool2d))

}  // namespace deltafx
