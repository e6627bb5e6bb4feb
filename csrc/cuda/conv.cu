// The host's part of a convolution: phases, candidates, and which kernel takes them.
#include "cuda/conv.h"

#include <numeric>

#include "cuda/conv_depthwise.h"
#include "cuda/conv_direct.h"
#include "cuda/conv_gemm.h"
#include "cuda/conv_hopper.h"
#include "cuda/conv_query.cuh"
#include "cuda/ops.h"

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
bool lacks_taps(const ConvGeometry& g, const Window& w, int64_t in, int64_t out) {
  const auto stride = static_cast<int>(w.stride);
  for (int64_t o = 0; o < out; ++o) {
    const int remainder = g.transposed ? static_cast<int>((o + w.pad) % stride) : 0;
    const PhaseAxis phase = phase_axis(w, g.transposed, remainder);
    const int64_t first = g.transposed ? (o + w.pad) / stride : o * stride;
    if (!has_tap(phase, static_cast<int>(first) + phase.offset, static_cast<int>(in))) return true;
  }
  return false;
}

// Whether there are sites that no input reaches, in a result of h x w.
bool has_constant_sites(const ConvGeometry& g, const Mask& x, int64_t h, int64_t w) {
  return lacks_taps(g, g.y, x.h, h) || lacks_taps(g, g.x, x.w, w);
}

// Whether each stream has an active site.
cudaError_t find_streams(const Mask& x, int32_t* streams, cudaStream_t stream) {
  return launch(stream_kernel, {static_cast<int>(x.n), 256}, stream, x, streams);
}

// How many blocks may share a tile's depth: so many that each still has some steps to pipeline.
int cluster_for(int64_t steps) { return steps >= 32 ? 8 : steps >= 12 ? 4 : 1; }

int64_t packed_cin(const ConvGeometry& g) { return packed_channels(static_cast<int>(g.cin)); }

int64_t row_elements(DType dtype) { return dtype == DType::f32 ? 32 : 64; }

// Whether matrix products go to the kernel that every GPU can run.
bool is_plain(const ConvLaunch& launch) { return launch.plain || current_device().code < 80; }

// Whether a phase goes to the kernels for Hopper.
bool on_hopper(const GemmParams& p, const ConvLaunch& launch) {
  return is_matrix_product(launch.p.geometry) && p.out.acc.dtype != DType::f32 &&
         !is_plain(launch) && conv_hopper_takes(p);
}

bool takes_depthwise(const GemmParams& p, const ConvGeometry& g) {
  return g.groups == g.cin && g.groups == g.cout && conv_depthwise_takes(p);
}

// The shares in which the kernel's blocks find the candidates by themselves; none if they go by a
// list. So in a slice, whose mask may be the input's: no block may mark what another reads.
Shares shares_of(const GemmParams& p, const ConvLaunch& launch) {
  if (p.out.acc.ld != p.out.acc.c) return {};
  if (takes_depthwise(p, launch.p.geometry)) return conv_depthwise_shares(p);
  return on_hopper(p, launch) ? conv_hopper_shares(p) : Shares{};
}

cudaError_t run_phase(const GemmParams& p, const ConvLaunch& launch, cudaStream_t stream) {
  const ConvGeometry& g = launch.p.geometry;
  const DType dtype = p.out.acc.dtype;
  if (takes_depthwise(p, g)) return conv_depthwise(p, stream);
  if (!is_matrix_product(g))
    return conv_direct(p, static_cast<int>(g.cin / g.groups), static_cast<int>(g.cout / g.groups),
                       stream);
  if (is_plain(launch)) return conv_gemm_plain(p, stream);
  if (on_hopper(p, launch))
    return dtype == DType::f16 ? conv_hopper_f16(p, stream) : conv_hopper_bf16(p, stream);
  switch (dtype) {
    case DType::f32:
      return launch.allow_tf32 ? conv_gemm_tf32(p, stream) : conv_gemm_f32(p, stream);
    case DType::bf16:
      return conv_gemm_bf16(p, stream);
    case DType::f16:
      return conv_gemm_f16(p, stream);
  }
  return cudaErrorInvalidValue;
}

// All that is the same for each phase.
GemmParams params_of(const ConvParams& c) {
  GemmParams p{};
  p.out = c.out;
  p.act = c.act;
  p.x = c.x;
  p.x_mask = c.x_mask;
  p.bias = c.bias;
  p.residual = c.residual;
  p.residual_mask = c.residual_mask;
  p.residual_after_act = c.residual_after_act;
  p.pre_scale = c.pre_scale;
  p.pre_shift = c.pre_shift;
  p.pre_act = c.pre_act;
  p.acc_aligned = is_aligned(c.out.acc);
  p.residual_aligned = is_aligned(c.residual);
  p.w = Divisor(static_cast<int>(c.out.acc.w));
  p.h = Divisor(static_cast<int>(c.out.acc.h));
  p.sites = static_cast<int>(c.out.acc.sites());
  return p;
}

void set_phase(GemmParams& p, const ConvGeometry& g, const Phase& phase) {
  const DType dtype = p.out.acc.dtype;
  p.y = gemm_axis(g.y, g.transposed, phase.y);
  p.x_axis = gemm_axis(g.x, g.transposed, phase.x);
  p.depth = static_cast<int>(phase.y.taps * phase.x.taps * packed_cin(g));
  p.packed_depth = static_cast<int>(packed_depth(p.depth, dtype));
  p.cluster = cluster_for(p.packed_depth / row_elements(dtype));
}

}  // namespace

bool is_matrix_product(const ConvGeometry& g) { return g.groups == 1; }
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
      weights += is_matrix_product(g)
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
  return last.weights + (is_matrix_product(g)
                             ? packed_columns(g.cout) * packed_depth(taps * packed_cin(g), dtype)
                             : taps * (g.cin / g.groups) * g.cout);
}

int64_t conv_ints(int64_t sites, int64_t streams) { return list_ints(sites) + streams; }

cudaError_t conv(const ConvLaunch& launched, cudaStream_t stream) {
  const ConvParams& c = launched.p;
  const ConvGeometry& g = c.geometry;
  const DType dtype = c.out.acc.dtype;
  const int64_t sites = c.out.acc.sites(), size = dtype == DType::f32 ? 4 : 2;
  int32_t* streams = nullptr;
  if (!launched.listed && has_constant_sites(g, c.x_mask, c.out.acc.h, c.out.acc.w)) {
    streams = launched.memory + list_ints(sites);
    const cudaError_t error = find_streams(c.x_mask, streams, stream);
    if (error != cudaSuccess) return error;
  }
  GemmParams p = params_of(c);
  const std::vector<Phase> phases = conv_phases(g, dtype);
  const int parts = static_cast<int>(phases.size());
  for (int i = 0; i < parts; ++i) {
    const Phase& phase = phases[i];
    set_phase(p, g, phase);
    p.weight = static_cast<const char*>(launched.weight) + phase.weights * size;
    p.list = list_in(launched.memory, c.out.counts, i, parts);
    const ConvQuery query(p.x_mask, p.residual_mask, p.y, p.x_axis, streams);
    p.windows = query.windows_of_shares();
    const bool may_list = !launched.listed && parts == 1 && streams == nullptr;
    p.shares = may_list ? shares_of(p, launched) : Shares{};
    p.filtered = launched.filtered;
    p.makers = launched.listed ? list_blocks(SiteRuns(c.out.acc)) : 0;
    cudaError_t error = cudaSuccess;
    if (!p.shares.any() && !launched.listed)
      error = list_candidates(query, c.out.acc, p.list, stream);
    if (error == cudaSuccess) error = run_phase(p, launched, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t list_conv(const ConvListLaunch& l, cudaStream_t stream) {
  const ConvGeometry& g = l.geometry;
  FeatureMap map{};
  map.n = l.x_mask.n, map.h = l.h, map.w = l.w;
  int32_t* streams = nullptr;
  if (has_constant_sites(g, l.x_mask, l.h, l.w)) {
    streams = l.memory + list_ints(map.sites());
    const cudaError_t error = find_streams(l.x_mask, streams, stream);
    if (error != cudaSuccess) return error;
  }
  const ConvQuery query(l.x_mask, l.residual_mask, gemm_axis(g.y, false, phase_axis(g.y, false, 0)),
                        gemm_axis(g.x, false, phase_axis(g.x, false, 0)), streams);
  FurtherList lists[kFurtherLists];
  ListReaders readers{true, {}};
  int further = 0, same = 0;
  for (int i = 0; i < l.further; ++i) {
    const FurtherCandidates& other = l.others[i];
    if (other.memory == l.memory)
      readers.counts[same++] = other.counts;
    else
      lists[further++] = {other.mask, other.stride, list_in(other.memory, other.counts)};
  }
  const CandidateList own = list_in(l.memory, l.counts);
  static_assert(kFurtherLists == 2 && ListReaders::kMost == 2);
  switch (further) {
    case 0:
      return WideQuery::takes(query)
                 ? list_candidates(WideQuery(query), map, own, stream, {}, readers)
                 : list_candidates(query, map, own, stream, {}, readers);
    case 1:
      return list_candidates(query, map, own, stream, FurtherLists<1>{{lists[0]}}, readers);
    default:
      return list_candidates(query, map, own, stream, FurtherLists<2>{{lists[0], lists[1]}},
                             readers);
  }
}

bool conv_bears_list(const ConvParams& c, double wider, bool ahead) {
  const ConvLaunch launch{c, nullptr, true, false, nullptr, false, false};
  GemmParams p = params_of(c);
  set_phase(p, c.geometry, conv_phases(c.geometry, c.out.acc.dtype)[0]);
  // As timed on an H100: a depthwise one takes about the same time for some sites more.
  if (ahead && takes_depthwise(p, c.geometry))
    return current_device().capability == 90 && c.out.acc.dtype != DType::f32;
  return on_hopper(p, launch) && (ahead || !shares_of(p, launch).any()) &&
         conv_hopper_bears(p, wider);
}

}  // namespace deltafx::cuda
