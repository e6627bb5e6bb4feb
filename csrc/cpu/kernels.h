// The CPU kernels, one table an instruction set; kernels() is the best one this CPU runs.
#pragma once

#include "common/types.h"
#include "cpu/conv.h"
#include "cpu/site_params.h"

namespace deltafx {

// The new frame, with any strides (in elements).
struct EncodeParams {
  Output out;
  const void* x;
  DType dtype;
  int64_t stride_n, stride_c, stride_h, stride_w;
  int64_t block;  // sites are gated in block x block squares; 1 gates each by itself
};

struct Kernels {
  const char* isa;
  void (*encode)(const EncodeParams&);
  void (*affine)(const AffineParams&);
  void (*gather_channels)(const GatherParams&);
  void (*layer_norm)(const LayerNormParams&);
  void (*binary)(const BinaryParams&);
  void (*pool2d)(const PoolParams&);
  void (*global_pool2d)(const GlobalPoolParams&);
  void (*resize2d)(const ResizeParams&);
  void (*pad2d)(const PadParams&);
  void (*conv)(const ConvParams&, const ConvSites&);  // one phase
};

const Kernels& kernels();

}  // namespace deltafx
