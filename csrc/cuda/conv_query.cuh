// Which output sites of a convolution are candidates, and how those that changed are marked.
#pragma once

#include "cuda/conv_gemm.h"

namespace deltafx::cuda {

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
  __device__ bool is_candidate(const Position& at) const {
    if (!in_phase(y_axis, at.y) || !in_phase(x_axis, at.x)) return false;
    const int top = y_axis.base(at.y), left = x_axis.base(at.x);
    const int h = static_cast<int>(x.h), w = static_cast<int>(x.w);
    const uint8_t* stream = x.data + static_cast<int64_t>(at.n) * h * w;
    bool found = false;
    for (int jy = 0; jy < y_axis.phase.taps; ++jy) {
      const int iy = top + jy * y_axis.phase.step;
      if (iy < 0 || iy >= h) continue;
      for (int jx = 0; jx < x_axis.phase.taps; ++jx) {
        const int ix = left + jx * x_axis.phase.step;
        found |= ix >= 0 && ix < w && stream[static_cast<int64_t>(iy) * w + ix] != 0;
      }
    }
    if (residual.data != nullptr)
      found |= residual.data[(at.n * residual.h + at.y) * residual.w + at.x] != 0;
    if (streams != nullptr && !found && streams[at.n] != 0)
      found = !has_tap(y_axis.phase, top, h) || !has_tap(x_axis.phase, left, w);
    return found;
  }

  __device__ uint32_t flags(Position at, int count) const {
    uint32_t found = 0;
    if (y_axis.transposed || streams != nullptr || x_axis.stride > 2) {
#pragma unroll 1
      for (int i = 0; i < count; ++i, ++at.x) found |= (is_candidate(at) ? 1u : 0u) << i;
      return found;
    }
    const int taps = x_axis.phase.taps, step = x_axis.phase.step, left = x_axis.base(at.x);
    uint64_t bytes = 0;
    const int last = (kFlags - 1) * x_axis.stride + (taps - 1) * step;
    if (step < 8 && last < 24) {
      // All tap rows into one, 24 bytes wide, and that tap by tap to the left.
      uint64_t a = 0, b = 0, c = 0;
      for (int jy = 0; jy < y_axis.phase.taps; ++jy) {
        const int iy = y_axis.base(at.y) + jy * y_axis.phase.step;
        if (iy < 0 || iy >= x.h) continue;
        const int row = at.n * static_cast<int>(x.h) + iy;
        a |= eight_bytes(x, row, left);
        if (last >= 8) b |= eight_bytes(x, row, left + 8);
        if (last >= 16) c |= eight_bytes(x, row, left + 16);
      }
      for (int jx = 0; jx < taps; ++jx) {
        bytes |= x_axis.stride == 1 ? a : even_bytes(a, b);
        const int bits = 8 * step;
        a = a >> bits | b << (64 - bits);
        b = b >> bits | c << (64 - bits);
        c >>= bits;
      }
    } else {
      for (int jy = 0; jy < y_axis.phase.taps; ++jy) {
        const int iy = y_axis.base(at.y) + jy * y_axis.phase.step;
        if (iy < 0 || iy >= x.h) continue;
        const int row = at.n * static_cast<int>(x.h) + iy;
        for (int jx = 0; jx < taps; ++jx) {
          const int ix = left + jx * step;
          const uint64_t low = eight_bytes(x, row, ix);
          bytes |= x_axis.stride == 1 ? low : even_bytes(low, eight_bytes(x, row, ix + 8));
        }
      }
    }
    if (residual.data != nullptr)
      bytes |= eight_bytes(residual, at.n * static_cast<int>(residual.h) + at.y, at.x);
    return bits_of(bytes) & ((1u << count) - 1);
  }

 private:
  static __device__ uint64_t even_bytes(uint64_t low, uint64_t high) {
    const uint32_t a = __byte_perm(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), 0x6420);
    const uint32_t b = __byte_perm(static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32), 0x6420);
    return a | static_cast<uint64_t>(b) << 32;
  }
};

// Marks a site of which a group was written. A site of several groups counts once, for whoever
// marks it first: in the list, or in the mask, if no other operator marks that.
__device__ __forceinline__ int mark_site(const GemmParams& p, int site, int entry) {
  uint8_t* mask = p.out.mask.data + site;
  if (p.out.acc.c <= kTruncationGroup) {
    *mask = 1;
    return 1;
  }
  if (!p.lists_itself) {
    *mask = 1;
    auto* entries = reinterpret_cast<unsigned*>(p.list.entries);
    return (atomicOr(entries + entry, kActiveBit) & kActiveBit) == 0;
  }
  const auto address = reinterpret_cast<uintptr_t>(mask);
  const unsigned bit = 1u << (address % 4 * 8);
  return (atomicOr(reinterpret_cast<unsigned*>(address & ~uintptr_t{3}), bit) & bit) == 0;
}

}  // namespace deltafx::cuda
