// The host's part of a convolution: phases, candidates, and which kernel takes them.
#include "cuda/conv.h"

#include <numeric>

#include "cuda/conv_direct.h"
#include "cuda/conv_gemm.h"

namespace deltafx::cuda {
namespace {

// The taps along one axis of a remainder (0, if not transposed).
PhaseAxis phase_axis(const Window& w, bool transposed, int remainder) {
  const int kernel = static_cast<int>(w.kernel), stride = static_cast<int>(w.stride);
  const int dilation = static_cast<int>(w.dilation);
  if (!transposed) return {kernel, -static_cast<int>(w.pad), dilation, 0, 0, 1};
  // o + pad = i * stride + k * dilation
  const int step_k = stride / std::gcd(stride, dilation);
  int first_k = 0;
  while (first_k < kernel && (remainder - first_k * dilation) % stride != 0) ++first_k;
  const int taps = first_k < kernel ? (kernel - 1 - first_k) / step_k + 1 : 0;
  return {taps,
          (remainder - first_k * dilation) / stride,
          -step_k * dilation / stride,
          remainder,
          first_k,
          step_k};
}

// Whether an output coordinate has a kernel element inside the input.
__host__ __device__ bool has_tap(const PhaseAxis& phase, int base, int in) {
  for (int j = 0; j < phase.taps; ++j) {
    const int i = base + j * phase.step;
    if (i >= 0 && i < in) return true;
  }
  return false;
}

// The candidates of a phase: sites whose taps meet an active site, or whose residual is active.
// Sites without any tap inside the input hold a constant that no input can make them compute. They
// follow their stream instead, so that a lost state is refilled.
struct ConvQuery {
  Mask x, residual;
  GemmAxis y_axis, x_axis;
  const int32_t* streams;  // per stream, whether x has an active site; null: no site needs it

  __device__ static bool in_phase(const GemmAxis& axis, int o) {
    return !axis.transposed || (o + axis.pad) % axis.stride == axis.phase.remainder;
  }
  __device__ bool operator()(const Position& at) const {
    if (!in_phase(y_axis, at.y) || !in_phase(x_axis, at.x)) return false;
    const int top = y_axis.base(at.y), left = x_axis.base(at.x);
    const int h = static_cast<int>(x.h), w = static_cast<int>(x.w);
    const uint8_t *stream = x.data + static_cast<int64_t>(at.n) * h * w,
                  *end = x.data + x.n * h * w;
    // The columns inside the input: taps [first, last).
    const int step = x_axis.phase.step;
    int first = 0, last = x_axis.phase.taps;
    while (first < last && (left + first * step < 0 || left + first * step >= w)) ++first;
    while (first < last && (left + (last - 1) * step < 0 || left + (last - 1) * step >= w)) --last;
    bool found = false;
    for (int jy = 0; jy < y_axis.phase.taps && first < last; ++jy) {
      const int iy = top + jy * y_axis.phase.step;
      if (iy < 0 || iy >= h) continue;
      found |= any_set(stream + static_cast<int64_t>(iy) * w + left + first * step, last - first,
                       step, x.data, end);
    }
    if (residual.data != nullptr)
      found |= residual.data[(at.n * residual.h + at.y) * residual.w + at.x] != 0;
    if (streams != nullptr && !found && streams[at.n] != 0)
      found = !has_tap(y_axis.phase, top, h) || !has_tap(x_axis.phase, left, w);
    return found;
  }
};

__global__ void stream_kernel(Mask mask, int32_t* active) {
  wait_for_inputs();
  const int64_t sites = mask.h * mask.w;
  const uint8_t* stream = mask.data + blockIdx.x * sites;
  bool found = false;
  for (int64_t i = threadIdx.x; i < sites; i += blockDim.x) found |= stream[i] != 0;
  found = __syncthreads_or(found);
  if (threadIdx.x == 0) active[blockIdx.x] = found;
}

GemmAxis gemm_axis(const Window& w, bool transposed, const PhaseAxis& phase) {
  return {static_cast<int>(w.stride), static_cast<int>(w.pad), transposed, phase};
}

// Whether any output coordinate of an axis lacks a tap, over all phases.
bool has_constant_sites(const ConvGeometry& g, const Window& w, int64_t in, int64_t out) {
  const auto stride = static_cast<int>(w.stride);
  for (int64_t o = 0; o < out; ++o) {
    const int remainder = g.transposed ? static_cast<int>((o + w.pad) % stride) : 0;
    const PhaseAxis phase = phase_axis(w, g.transposed, remainder);
    const int64_t first = g.transposed ? (o + w.pad) / stride : o * stride;
    if (!has_tap(phase, static_cast<int>(first) + phase.offset, static_cast<int>(in))) return true;
  }
  return false;
}

// How many blocks may share a tile's depth: so many that each still has some steps to pipeline.
int cluster_for(int64_t steps) { return steps >= 32 ? 8 : steps >= 16 ? 4 : 1; }

int64_t packed_cin(const ConvGeometry& g) { return packed_channels(static_cast<int>(g.cin)); }

int64_t row_elements(DType dtype) { return dtype == DType::f32 ? 32 : 64; }

cudaError_t run_phase(const GemmParams& p, const ConvLaunch& launch, cudaStream_t stream) {
  const ConvGeometry& g = launch.p.geometry;
  if (!on_tensor_cores(g))
    return conv_direct(p, static_cast<int>(g.cin / g.groups), static_cast<int>(g.cout / g.groups),
                       stream);
  switch (p.out.acc.dtype) {
    case DType::f32:
      return launch.allow_tf32 ? conv_gemm_tf32(p, stream) : conv_gemm_f32(p, stream);
    case DType::bf16:
      return conv_gemm_bf16(p, stream);
    case DType::f16:
      return conv_gemm_f16(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool on_tensor_cores(const ConvGeometry& g) { return g.groups == 1; }
int64_t packed_columns(int64_t cout) { return (cout + 63) / 64 * 64; }
int64_t packed_depth(int64_t k, DType dtype) {
  const int64_t row = row_elements(dtype);
  return (k + row - 1) / row * row;
}

std::vector<Phase> conv_phases(const ConvGeometry& g, DType dtype) {
  std::vector<Phase> phases;
  int64_t weights = 0;
  for (int ry = 0; ry < (g.transposed ? g.y.stride : 1); ++ry)
    for (int rx = 0; rx < (g.transposed ? g.x.stride : 1); ++rx) {
      const Phase phase{phase_axis(g.y, g.transposed, ry), phase_axis(g.x, g.transposed, rx),
                        weights};
      const int64_t taps = static_cast<int64_t>(phase.y.taps) * phase.x.taps;
      weights += on_tensor_cores(g)
                     ? packed_columns(g.cout) * packed_depth(taps * packed_cin(g), dtype)
                     : taps * (g.cin / g.groups) * g.cout;
      phases.push_back(phase);
    }
  return phases;
}

int64_t packed_size(const ConvGeometry& g, DType dtype) {
  const std::vector<Phase> phases = conv_phases(g, dtype);
  const Phase& last = phases.back();
  const int64_t taps = static_cast<int64_t>(last.y.taps) * last.x.taps;
  return last.weights + (on_tensor_cores(g)
                             ? packed_columns(g.cout) * packed_depth(taps * packed_cin(g), dtype)
                             : taps * (g.cin / g.groups) * g.cout);
}

cudaError_t conv(const ConvLaunch& launched, cudaStream_t stream) {
  const ConvParams& c = launched.p;
  const ConvGeometry& g = c.geometry;
  const DType dtype = c.out.acc.dtype;
  const int64_t sites = c.out.acc.sites(), size = dtype == DType::f32 ? 4 : 2;
  int32_t* streams = nullptr;
  if (has_constant_sites(g, g.y, c.x.h, c.out.acc.h) ||
      has_constant_sites(g, g.x, c.x.w, c.out.acc.w)) {
    const int64_t segment = list_segment_size(sites);
    streams = launched.memory + kMostSegments + (sites + segment - 1) / segment * segment;
    const cudaError_t error =
        launch(stream_kernel, {static_cast<int>(c.x.n), 256}, stream, c.x_mask, streams);
    if (error != cudaSuccess) return error;
  }
  GemmParams p{};
  p.out = c.out;
  p.act = c.act;
  p.x = c.x;
  p.bias = c.bias;
  p.residual = c.residual;
  p.residual_after_act = c.residual_after_act;
  p.pre_scale = c.pre_scale;
  p.pre_shift = c.pre_shift;
  p.pre_act = c.pre_act;
  p.acc_aligned = is_aligned(c.out.acc);
  p.residual_aligned = is_aligned(c.residual);
  const auto scales =
      reinterpret_cast<uintptr_t>(c.bias) | reinterpret_cast<uintptr_t>(c.out.truncation.inv_scale);
  p.scales_aligned = scales % 16 == 0 && c.out.acc.c % kVector == 0;
  p.list = list_in(launched.memory, sites);
  int64_t* op_counts = c.out.counts;
  for (const Phase& phase : conv_phases(g, dtype)) {
    p.weight = static_cast<const char*>(launched.weight) + phase.weights * size;
    p.y = gemm_axis(g.y, g.transposed, phase.y);
    p.x_axis = gemm_axis(g.x, g.transposed, phase.x);
    p.depth = static_cast<int>(phase.y.taps * phase.x.taps * packed_cin(g));
    p.packed_depth = static_cast<int>(packed_depth(p.depth, dtype));
    p.cluster = cluster_for(p.packed_depth / row_elements(dtype));
    const ConvQuery query{c.x_mask, c.residual_mask, p.y, p.x_axis, streams};
    cudaError_t error = list_candidates(query, c.out.acc, p.list, op_counts, stream);
    if (error == cudaSuccess) error = run_phase(p, launched, stream);
    if (error != cudaSuccess) return error;
    op_counts = nullptr;
  }
  return cudaSuccess;
}

}  // namespace deltafx::cuda
