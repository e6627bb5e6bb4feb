// binary: two feature maps, or a feature map and a gate.
#include "cuda/ops.h"
#include "cuda/sites.cuh"

namespace deltafx::cuda {
namespace {

// A site, its stream, or everything, whatever each operand's mask says.
struct OperandQuery {
  Mask a, b;

  static __device__ uint32_t flags(const Mask& mask, const Position& at) {
    if (mask.data == nullptr) return 0;
    const int n = mask.n > 1 ? at.n : 0, y = mask.h > 1 ? at.y : 0;
    const int row = n * static_cast<int>(mask.h) + y;
    if (mask.w > 1) return bits_of(eight_bytes(mask, row, at.x));
    return mask.data[row] != 0 ? (1u << kFlags) - 1 : 0;
  }
  __device__ uint32_t flags(const Position& at, int count) const {
    return (flags(a, at) | flags(b, at)) & ((1u << count) - 1);
  }
};

__device__ __forceinline__ void load_operand(const Operand& operand, bool aligned, int n,
                                             int64_t site, int c0, int count, float (&v)[kVector]) {
  const int64_t offset = n * operand.stride_n + site * operand.stride_site;
  if (operand.stride_c != 0)
    return load_any(operand.data, operand.dtype, offset + c0, count, aligned, v);
  load_any(operand.data, operand.dtype, offset, 1, false, v);
#pragma unroll
  for (int i = 1; i < kVector; ++i) v[i] = v[0];
}

struct Binary {
  Operand a, b;
  bool a_aligned, b_aligned;
  BinaryOp op;
  int sites;  // of a stream

  __device__ void operator()(const Position& at, int site, int c0, int count,
                             float (&y)[kVector]) const {
    float v[kVector];
    const int64_t own = site - static_cast<int64_t>(at.n) * sites;
    load_operand(a, a_aligned, at.n, own, c0, count, y);
    load_operand(b, b_aligned, at.n, own, c0, count, v);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      y[i] = op == BinaryOp::add   ? y[i] + v[i]
             : op == BinaryOp::sub ? y[i] - v[i]
             : op == BinaryOp::mul ? y[i] * v[i]
             : op == BinaryOp::div ? __fdiv_rn(y[i], v[i])
                                   : max_of(y[i], v[i]);
  }
};

bool operand_is_aligned(const Operand& o, int64_t channels) {
  const int64_t size = o.dtype == DType::f32 ? 4 : 2;
  return is_aligned(o.data, o.dtype, o.stride_site, channels) && o.stride_n * size % 16 == 0;
}

}  // namespace

cudaError_t binary(const BinaryParams& p, int32_t* memory, cudaStream_t stream) {
  const int64_t c = p.out.acc.c;
  const Binary f{p.a,
                 p.b,
                 operand_is_aligned(p.a, c),
                 operand_is_aligned(p.b, c),
                 p.op,
                 static_cast<int>(p.out.acc.h * p.out.acc.w)};
  return update_sites(p.out, p.act, OperandQuery{p.a.mask, p.b.mask}, f, memory, stream);
}

}  // namespace deltafx::cuda
