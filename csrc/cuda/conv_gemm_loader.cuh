// Fills the stages of the convolution kernel: the sites' windows (A) and the weights (B).
#pragma once

#include "cuda/activation.cuh"
#include "cuda/conv_gemm.h"
#include "cuda/conv_gemm_traits.cuh"

namespace deltafx::cuda {

// 16 bytes into shared memory; zeros if not `valid`, and then `from` may be anywhere.
__device__ __forceinline__ void copy_chunk(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? kChunkBytes : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void store_chunk(uint32_t to, const uint4& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// A row of a tile, worked out by one thread for all that copy it.
template <class T>
struct GemmRow {
  const T* from;  // the input at tap 0; outside of it for a window that begins in the padding
  uint32_t taps;  // bit jy: tap row jy lies in the input; bit 16 + jx: tap column jx does
  int site;       // -1: none
  int y, x;       // input coordinates of tap 0

  __device__ GemmRow() {}
  __device__ GemmRow(const GemmParams& p, int site_or_none) : taps(0), site(site_or_none) {
    const Position at = position_of(site < 0 ? 0 : site, p.h, p.w);
    y = site < 0 ? -(1 << 30) : p.y.base(at.y);
    x = p.x_axis.base(at.x);
    from = static_cast<const T*>(p.x.data) + ((at.n * p.x.h + p.y.base(at.y)) * p.x.w + x) * p.x.ld;
    for (int j = 0; j < min(p.y.phase.taps, kMostTaps); ++j)
      taps |= (in(y + j * p.y.phase.step, p.x.h) ? 1u : 0u) << j;
    for (int j = 0; j < min(p.x_axis.phase.taps, kMostTaps); ++j)
      taps |= (in(x + j * p.x_axis.phase.step, p.x.w) ? 1u : 0u) << (kMostTaps + j);
  }
  static __device__ bool in(int i, int64_t size) {
    return static_cast<unsigned>(i) < static_cast<unsigned>(size);
  }
};

// A thread copies one chunk column of every kCopyRows-th row, step after step of depth.
template <class Traits>
class GemmLoader {
  using T = typename Traits::T;
  static constexpr int kElements = Traits::kChunkElements;
  static constexpr int kOwnRows = Traits::kRows / Traits::kCopyRows;
  static constexpr int kOwnColumns = Traits::kColumns / Traits::kCopyRows;
  static constexpr int kCopyPitch = Traits::kCopyRows * kRowBytes;

 public:
  __device__ GemmLoader(const GemmParams& p, const GemmRow<T>* rows, int first_column,
                        int first_step, uint32_t stages)
      : p_(p),
        rows_(rows + threadIdx.x / 8),
        taps_x_(p.x_axis.phase.taps),
        channels_(packed_channels(static_cast<int>(p.x.c))) {
    const int chunk = static_cast<int>(threadIdx.x) % 8, row = static_cast<int>(threadIdx.x) / 8;
    to_ = stages + row * kRowBytes + ((chunk ^ (row & 7)) * kChunkBytes);
    depth_ = first_step * Traits::kDepth + chunk * kElements;
    channel_ = depth_;
    tap_y_ = tap_x_ = 0;
    if (depth_ >= channels_) {
      const int tap = depth_ / channels_;
      channel_ = depth_ - tap * channels_;
      tap_y_ = tap / max(taps_x_, 1);
      tap_x_ = tap - tap_y_ * taps_x_;
    }
    weight_ = static_cast<const T*>(p.weight) +
              static_cast<int64_t>(first_column) * p.packed_depth +
              (first_step * kWeightRows + row) * Traits::kDepth + (chunk ^ (row & 7)) * kElements;
    if constexpr (Traits::kGather == Gather::chunks) {
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        from_[i] = rows_[i * Traits::kCopyRows].from;
        taps_[i] = rows_[i * Traits::kCopyRows].taps;
      }
      offset_ = distance(tap_y_, tap_x_) + channel_;
    }
  }

  // The next step of depth into a stage.
  __device__ void load(int stage) {
    const uint32_t to = to_ + stage * Traits::kStageBytes;
    if constexpr (Traits::kGather == Gather::chunks)
      gather_chunks(to);
    else
      gather_elements(to);
    copy<kOwnColumns>(
        to + Traits::kRows * kRowBytes,
        [&](int i) {
          constexpr int kBlocks = kWeightRows / Traits::kCopyRows;  // copies a block of columns
          return weight_ + static_cast<int64_t>(i / kBlocks) * kWeightRows * p_.packed_depth +
                 i % kBlocks * Traits::kCopyRows * Traits::kDepth;
        },
        [](int) { return true; });
    weight_ += kWeightRows * Traits::kDepth;
    depth_ += Traits::kDepth;
  }

 private:
  // The thread's chunks of kCount rows from `to` on: those at from(i), or zeros if not valid(i).
  template <int kCount, class From, class Valid>
  __device__ __forceinline__ void copy(uint32_t to, const From& from, const Valid& valid) const {
    if constexpr (Traits::Math::kAmpere) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) copy_chunk(to + i * kCopyPitch, from(i), valid(i));
    } else {
      uint4 chunks[kCount];  // all of them read before the first is written
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        chunks[i] = valid(i) ? *reinterpret_cast<const uint4*>(from(i)) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < kCount; ++i) store_chunk(to + i * kCopyPitch, chunks[i]);
    }
  }

  // How far a tap's site lies from tap 0's, in elements.
  __device__ int64_t distance(int tap_y, int tap_x) const {
    return (static_cast<int64_t>(tap_y * p_.y.phase.step) * p_.x.w + tap_x * p_.x_axis.phase.step) *
           p_.x.ld;
  }

  // To the next step's channel, and tap.
  __device__ void advance() {
    channel_ += Traits::kDepth;
    offset_ += Traits::kDepth;
    if (channel_ < channels_) return;
    do {
      channel_ -= channels_;
      next_tap(tap_y_, tap_x_);
    } while (channel_ >= channels_);
    offset_ = distance(tap_y_, tap_x_) + channel_;
  }
  __device__ void next_tap(int& tap_y, int& tap_x) const {
    if (++tap_x == taps_x_) {
      tap_x = 0;
      ++tap_y;
    }
  }

  __device__ void gather_chunks(uint32_t to) {
    // Beyond the last tap there is none, so the bits are clear.
    const uint32_t tap = tap_y_ < p_.y.phase.taps ? 1u << tap_y_ | 1u << (kMostTaps + tap_x_) : ~0u;
    copy<kOwnRows>(
        to, [&](int i) { return from_[i] + offset_; },
        [&](int i) { return (taps_[i] & tap) == tap; });
    advance();
  }

  // Chunks that span taps, in the packed order of channels; the channels that only fill up are 0.
  __device__ void gather_elements(uint32_t to) {
    const int cin = static_cast<int>(p_.x.c);
    float v[kOwnRows][kVector] = {};
    unsigned read[kOwnRows] = {};
    int tap_y = tap_y_, tap_x = tap_x_, channel = channel_;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (depth_ + e < p_.depth && channel < cin) {
        const int64_t offset = distance(tap_y, tap_x) + channel;
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
          const GemmRow<T>& row = rows_[i * Traits::kCopyRows];
          if (!GemmRow<T>::in(row.y + tap_y * p_.y.phase.step, p_.x.h) ||
              !GemmRow<T>::in(row.x + tap_x * p_.x_axis.phase.step, p_.x.w))
            continue;
          v[i][e] = to_float(row.from[offset]);
          if (p_.pre_scale == nullptr) continue;
          v[i][e] = v[i][e] * p_.pre_scale[channel] + p_.pre_shift[channel];
          read[i] |= 1u << e;
        }
      }
      if (++channel == channels_) {
        channel = 0;
        next_tap(tap_y, tap_x);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      if (p_.pre_scale != nullptr) {
        // The padding is zero after the prologue.
        activate_any(p_.pre_act, 0, kVector, v[i]);
#pragma unroll
        for (int e = 0; e < kElements; ++e) v[i][e] = read[i] >> e & 1 ? v[i][e] : 0.f;
      }
      union {
        T elements[kElements];
        uint4 chunk;
      } packed;
#pragma unroll
      for (int e = 0; e < kElements; ++e) packed.elements[e] = from_float<T>(v[i][e]);
      store_chunk(to + i * kCopyPitch, packed.chunk);
    }
    advance();
  }

  const GemmParams& p_;
  const GemmRow<T>* rows_;
  int taps_x_, channels_;
  uint32_t to_;
  int depth_, channel_, tap_y_, tap_x_;
  const T* weight_;
  int64_t offset_ = 0;
  const T* from_[kOwnRows];
  uint32_t taps_[kOwnRows];
};

}  // namespace deltafx::cuda
