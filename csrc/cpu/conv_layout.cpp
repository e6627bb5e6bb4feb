#include <algorithm>

#include "cpu/conv.h"

namespace deltafx {
namespace {

// The taps of remainder (ry, rx) in ascending input order, which is what makes runs long.
std::vector<ConvTap> phase_taps(const ConvGeometry& g, int64_t ry, int64_t rx) {
  std::vector<ConvTap> taps;
  for (int64_t ky = 0; ky < g.y.kernel; ++ky)
    for (int64_t kx = 0; kx < g.x.kernel; ++kx) {
      int64_t dy = ky * g.y.dilation, dx = kx * g.x.dilation;
      if (g.transposed) {
        // o + pad = i * stride + k * dilation
        if ((ry - dy) % g.y.stride != 0 || (rx - dx) % g.x.stride != 0) continue;
        dy = (ry - dy) / g.y.stride;
        dx = (rx - dx) / g.x.stride;
      }
      taps.push_back({static_cast<int32_t>(dy), static_cast<int32_t>(dx), static_cast<int32_t>(ky),
                      static_cast<int32_t>(kx)});
    }
  std::sort(taps.begin(), taps.end(), [](const ConvTap& a, const ConvTap& b) {
    return a.dy != b.dy ? a.dy < b.dy : a.dx < b.dx;
  });
  return taps;
}

std::vector<ConvRun> runs_of(const std::vector<ConvTap>& taps) {
  std::vector<ConvRun> runs;
  for (const ConvTap& tap : taps) {
    if (!runs.empty() && runs.back().dy == tap.dy && runs.back().dx + runs.back().taps == tap.dx)
      ++runs.back().taps;
    else
      runs.push_back({tap.dy, tap.dx, 1});
  }
  return runs;
}

// All of a layout but its phases.
ConvLayout groups_of(const ConvGeometry& g) {
  ConvLayout layout{};
  layout.groups = g.groups;
  layout.cin = g.cin / g.groups;
  layout.cout = g.cout / g.groups;
  const int64_t n = layout.cin;
  layout.direct = n == layout.cout && (n == 1 || (g.groups > 1 && (n == 2 || n == 4 || n == 8)));
  return layout;
}

}  // namespace

int64_t conv_weight_size(const ConvGeometry& g) {
  return g.y.kernel * g.x.kernel * groups_of(g).per_tap();
}

ConvLayout conv_layout(const ConvGeometry& g) {
  ConvLayout layout = groups_of(g);
  int64_t offset = 0;
  for (int64_t ry = 0; ry < (g.transposed ? g.y.stride : 1); ++ry)
    for (int64_t rx = 0; rx < (g.transposed ? g.x.stride : 1); ++rx) {
      ConvPhase phase;
      phase.taps = phase_taps(g, ry, rx);
      phase.runs = runs_of(phase.taps);
      phase.weights = offset;
      offset += static_cast<int64_t>(phase.taps.size()) * layout.per_tap();
      layout.phases.push_back(std::move(phase));
    }
  return layout;
}

void pack_conv_weight(const ConvGeometry& g, const float* weight, float* packed) {
  const ConvLayout layout = conv_layout(g);
  const int64_t group_in = g.cin / g.groups, group_out = g.cout / g.groups;
  // The weight from input channel c to output channel o of the same group.
  const auto at = [&](int64_t o, int64_t c, const ConvTap& tap) {
    const int64_t row = g.transposed ? c * group_out + o % group_out : o * group_in + c % group_in;
    return weight[(row * g.y.kernel + tap.ky) * g.x.kernel + tap.kx];
  };
  for (const ConvPhase& phase : layout.phases) {
    float* dst = packed + phase.weights;
    if (layout.direct) {
      for (const ConvTap& tap : phase.taps)
        for (int64_t c = 0; c < group_in; ++c)
          for (int64_t o = 0; o < g.cout; ++o) *dst++ = at(o, o / group_out * group_in + c, tap);
      continue;
    }
    for (int64_t group = 0; group < layout.groups; ++group)
      for (int64_t first = 0; first < layout.columns(); first += 32) {
        const int64_t width = std::min<int64_t>(32, layout.columns() - first);
        for (const ConvTap& tap : phase.taps)
          for (int64_t c = 0; c < layout.cin; ++c)
            for (int64_t j = first; j < first + width; ++j)
              *dst++ =
                  j < layout.cout ? at(group * layout.cout + j, group * layout.cin + c, tap) : 0.f;
      }
  }
}

}  // namespace deltafx
