// Convolution on the CPU: what it is given, and how its weights are laid out.
//
// Every convolution, transposed or not, is a set of phases; a phase has taps (input offsets from a
// site's base coordinate, and the kernel element that goes with each). An ordinary convolution has
// one phase. A transposed one has stride_y * stride_x: output sites whose (y + pad, x + pad) leave
// the same remainders meet the same kernel elements, and no site ever multiplies by a stuffed zero.
//
// Packed weights, the same for every instruction set (fp32):
//   direct      (depthwise, and groups of 2, 4 or 8 channels in and out) per phase
//               [tap][input channel of the group][output channel]
//   otherwise   per phase, per group, panels of 32 output channels [tap][channel of the
//               group][32]; a last panel with at most 16 channels is 16 wide.
#pragma once

#include <cstdint>
#include <vector>

#include "common/types.h"

namespace deltafx {

struct ConvGeometry {
  Window y, x;
  int64_t cin, cout, groups;
  bool transposed;
};

struct ConvTap {
  int32_t dy, dx;  // input coordinate relative to the site's base
  int32_t ky, kx;  // kernel element
};

// Taps (dy, dx), (dy, dx + 1), ... that follow each other in the packed order: where the input's
// channels are contiguous too, one copy gathers them.
struct ConvRun {
  int32_t dy, dx, taps;
};

struct ConvPhase {
  std::vector<ConvTap> taps;
  std::vector<ConvRun> runs;
  int64_t weights;  // offset into the packed weights
};

struct ConvLayout {
  bool direct;
  int64_t groups, cin, cout;      // groups; channels of each
  std::vector<ConvPhase> phases;  // [remainder y][remainder x]

  // Output channels of a group as the panels pad them.
  int64_t columns() const {
    return cout / 32 * 32 + (cout % 32 == 0 ? 0 : cout % 32 <= 16 ? 16 : 32);
  }
  // Packed floats for one tap, all channels.
  int64_t per_tap() const { return groups * cin * (direct ? cout : columns()); }
};

ConvLayout conv_layout(const ConvGeometry& geometry);
// Packed floats in all: every kernel element is a tap of exactly one phase.
int64_t conv_weight_size(const ConvGeometry& geometry);
// weight: [cout, cin / groups, kh, kw], transposed [cin, cout / groups, kh, kw]; contiguous.
// packed: conv_weight_size(geometry) floats.
void pack_conv_weight(const ConvGeometry& geometry, const float* weight, float* packed);

// The first half of a separable convolution, computed on the way to the product and never stored.
struct Depthwise {
  const float* weight;  // packed [tap][channel]; null: there is none
  const float* bias;    // null: none
  Activation act;
};

// With a depthwise half, `geometry` is its window, from cin channels to cout channels, and the
// product is over the channels alone.
struct ConvParams {
  Output out;
  FeatureMap x;
  Mask x_mask;
  ConvGeometry geometry;
  Depthwise depthwise;
  const float* weight;  // packed
  const float* bias;    // null: none
  FeatureMap residual;  // data null: none
  Mask residual_mask;   // data null: the residual never changes by itself
  bool residual_after_act;
  const float* pre_scale;  // null: no prologue
  const float* pre_shift;
  Activation pre_act;
  Activation act;
};

// The input coordinate from which taps are counted.
inline int64_t conv_base(const ConvGeometry& g, const Window& w, int64_t o) {
  return g.transposed ? (o + w.pad) / w.stride : o * w.stride - w.pad;
}

// What the packed weight of the product is laid out for.
inline ConvGeometry product_geometry(const ConvParams& p) {
  constexpr Window point{1, 1, 0, 1};
  if (p.depthwise.weight == nullptr) return p.geometry;
  return {point, point, p.geometry.cin, p.geometry.cout, 1, false};
}
inline ConvGeometry depthwise_geometry(const ConvParams& p) {
  return {p.geometry.y, p.geometry.x, p.geometry.cin, p.geometry.cin, p.geometry.cin, false};
}

// Between neighbouring sites of a phase: their distance, and that of their bases.
inline int64_t conv_out_step(const ConvGeometry& g) { return g.transposed ? g.x.stride : 1; }
inline int64_t conv_in_step(const ConvGeometry& g) { return g.transposed ? 1 : g.x.stride; }

// The work of one phase: active[i] is set to 1 where sites[i] was written.
struct ConvSites {
  const ConvLayout& layout;
  const ConvPhase& phase;
  const int32_t* sites;
  int64_t count;
  uint8_t* active;
};

void conv(const ConvParams& p);

}  // namespace deltafx
