// Packs the weight of a convolution for the CUDA kernels, by ATen's own operators: it happens once.
#ifdef DELTAFX_CUDA

#include <ATen/ATen.h>

#include "cuda/conv.h"
#include "ops/conv_args.h"

namespace deltafx {
namespace {

// [cout, cin / groups, kh, kw], whichever kind it is.
Tensor plain_weight(const ConvGeometry& g, const Tensor& weight) {
  if (!g.transposed) return weight;
  const int64_t kh = g.y.kernel, kw = g.x.kernel;
  return weight.reshape({g.groups, g.cin / g.groups, g.cout / g.groups, kh, kw})
      .transpose(1, 2)
      .reshape({g.cout, g.cin / g.groups, kh, kw});
}

Tensor taps_of(const Tensor& weight, const cuda::PhaseAxis& axis, int64_t dim) {
  if (axis.taps == 0) return weight.narrow(dim, 0, 0);
  const int64_t last = axis.first_k + int64_t{axis.taps - 1} * axis.step_k;
  return weight.slice(dim, axis.first_k, last + 1, axis.step_k);
}

// [columns, depth], both in whole blocks, as conv.h tells.
Tensor in_blocks(const Tensor& matrix, DType dtype) {
  constexpr int64_t kRows = cuda::kWeightRows, kChunks = 8;
  if (matrix.numel() == 0) return matrix.reshape({-1});
  const int64_t chunk = 16 / (dtype == DType::f32 ? 4 : 2);
  std::vector<int64_t> channels, chunks;
  for (int row = 0; row < kRows; ++row) {
    channels.push_back(cuda::packed_channel(row));
    for (int64_t at = 0; at < kChunks; ++at) chunks.push_back(row * kChunks + (at ^ (row % 8)));
  }
  const auto index = [&](const std::vector<int64_t>& v) {
    return at::tensor(v, at::dtype(at::kLong)).to(matrix.device());
  };
  return matrix.reshape({-1, kRows, matrix.size(1) / (kChunks * chunk), kChunks * chunk})
      .index_select(1, index(channels))
      .transpose(1, 2)
      .reshape({-1, kRows * kChunks, chunk})
      .index_select(1, index(chunks))
      .reshape({-1});
}

}  // namespace

Tensor pack_conv_weight_on_cuda(const ConvGeometry& g, const Tensor& weight) {
  const DType dtype = dtype_of(weight, "weight");
  const Tensor plain = plain_weight(g, weight);
  std::vector<Tensor> parts;
  for (const cuda::Phase& phase : cuda::conv_phases(g, dtype)) {
    const Tensor taps = taps_of(taps_of(plain, phase.y, 2), phase.x, 3);
    if (!cuda::is_matrix_product(g)) {
      parts.push_back(taps.permute({2, 3, 1, 0}).reshape({-1}));
      continue;
    }
    const int64_t channels = cuda::packed_channels(static_cast<int>(g.cin));
    const int64_t depth = int64_t{phase.y.taps} * phase.x.taps * channels;
    const Tensor filled = at::constant_pad_nd(taps.permute({0, 2, 3, 1}), {0, channels - g.cin});
    const Tensor rows = filled.reshape({g.cout, depth});
    const int64_t more_columns = cuda::packed_columns(g.cout) - g.cout;
    const int64_t more_depth = cuda::packed_depth(depth, dtype) - depth;
    const Tensor whole = at::constant_pad_nd(rows, {0, more_depth, 0, more_columns});
    parts.push_back(in_blocks(whole, dtype));
  }
  return at::cat(parts).contiguous();
}

}  // namespace deltafx

#endif
