// The steps of a convolution that no instruction set changes: candidates, phases, counts.
#include "cpu/conv.h"

#include <cstring>

#include "cpu/candidates.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace deltafx {
namespace {

// Whether output coordinate o has a kernel element inside the input.
bool has_tap(const ConvGeometry& g, const Window& w, int64_t in, int64_t o) {
  for (int64_t k = 0; k < w.kernel; ++k) {
    int64_t i = g.transposed ? o + w.pad - k * w.dilation : o * w.stride - w.pad + k * w.dilation;
    if (g.transposed) {
      if (i % w.stride != 0) continue;
      i /= w.stride;
    }
    if (i >= 0 && i < in) return true;
  }
  return false;
}

// Sites whose window lies wholly in the padding hold a constant that no input site can ever make
// them compute. They follow their stream instead, so that a lost state (I3) is refilled.
void add_constant_sites(const ConvParams& p, Candidates& candidates) {
  const FeatureMap& acc = p.out.acc;
  const int64_t per_stream = p.x_mask.h * p.x_mask.w;
  const auto for_active_streams = [&](int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
    for (int64_t n = 0; n < acc.n; ++n)
      if (any(p.x_mask.data + n * per_stream, per_stream))
        candidates.add_rectangle(n, y0, y1, x0, x1);
  };
  for (int64_t y = 0; y < acc.h; ++y)
    if (!has_tap(p.geometry, p.geometry.y, p.x.h, y)) for_active_streams(y, y + 1, 0, acc.w);
  for (int64_t x = 0; x < acc.w; ++x)
    if (!has_tap(p.geometry, p.geometry.x, p.x.w, x)) for_active_streams(0, acc.h, x, x + 1);
}

// Runs the phases of a transposed convolution. The candidates are first sorted by phase.
void conv_phases(const ConvParams& p, const ConvLayout& layout, const int32_t* candidates,
                 int64_t count) {
  const FeatureMap& acc = p.out.acc;
  const ConvGeometry& g = p.geometry;
  const int64_t phases = static_cast<int64_t>(layout.phases.size());
  int32_t* sites = scratch_of<int32_t>(Scratch::work, count);
  uint8_t* active = scratch_of<uint8_t>(Scratch::flags, count);
  std::memset(active, 0, static_cast<size_t>(count));
  std::vector<int64_t> end(static_cast<size_t>(phases) + 1, 0);
  const auto phase_of = [&](int32_t site) {
    const int64_t y = site / acc.w % acc.h, x = site % acc.w;
    return static_cast<size_t>((y + g.y.pad) % g.y.stride * g.x.stride +
                               (x + g.x.pad) % g.x.stride);
  };
  for (int64_t i = 0; i < count; ++i) ++end[phase_of(candidates[i]) + 1];
  for (size_t k = 0; k < static_cast<size_t>(phases); ++k) end[k + 1] += end[k];
  std::vector<int64_t> next(end.begin(), end.end() - 1);
  for (int64_t i = 0; i < count; ++i) sites[next[phase_of(candidates[i])]++] = candidates[i];
  for (size_t k = 0; k < static_cast<size_t>(phases); ++k) {
    const int64_t first = end[k], size = end[k + 1] - first;
    if (size > 0)
      kernels().conv(p, {layout, layout.phases[k], sites + first, size, active + first});
  }
  commit(p.out, sites, count, active);
}

}  // namespace

void conv(const ConvParams& p) {
  Candidates candidates(p.out.acc.n, p.out.acc.h, p.out.acc.w);
  const ConvGeometry& g = p.geometry;
  if (g.transposed)
    candidates.add_transposed_windows(p.x_mask, g.y, g.x);
  else
    candidates.add_windows(p.x_mask, g.y, g.x);
  if (p.residual_mask.data != nullptr) candidates.add_sites(p.residual_mask);
  add_constant_sites(p, candidates);
  const int32_t* sites = candidates.list();
  const int64_t count = candidates.size();
  if (count == 0) {
    p.out.counts[0] = p.out.counts[1] = 0;
    return;
  }
  const ConvLayout layout = conv_layout(product_geometry(p));
  if (layout.phases.size() > 1) return conv_phases(p, layout, sites, count);
  uint8_t* active = scratch_of<uint8_t>(Scratch::flags, count);
  std::memset(active, 0, static_cast<size_t>(count));
  kernels().conv(p, {layout, layout.phases[0], sites, count, active});
  commit(p.out, sites, count, active);
}

}  // namespace deltafx
