// Fills the A half of the Hopper convolution's stages: the sites' windows.
#pragma once

#include "cuda/conv_gemm_loader.cuh"

namespace deltafx::cuda {

// A row of a tile, as GemmRow, in few instructions: all numbers have 32 bits.
struct HopperRow {
  int from;  // in elements from the input's own beginning
  uint32_t taps;

  __device__ HopperRow() {}
  // Of a row without a site, -1, nothing is read.
  __device__ HopperRow(const GemmParams& p, int site) {
    const Position at = position_of(max(site, 0), p.h, p.w);
    const int h = static_cast<int>(p.x.h), w = static_cast<int>(p.x.w);
    const int y = p.y.base(at.y), x = p.x_axis.base(at.x);
    from = site < 0 ? 0 : ((at.n * h + y) * w + x) * static_cast<int>(p.x.ld);
    taps = site < 0 ? 0 : inside(y, p.y.phase, h) | inside(x, p.x_axis.phase, w) << kMostTaps;
  }

 private:
  // Bit j: tap j, of which the first is at `first`, lies in the input.
  static __device__ __forceinline__ uint32_t inside(int first, const PhaseAxis& phase, int size) {
    if (phase.step == 1)
      return static_cast<uint32_t>(bits_between(-first, min(phase.taps, size - first)));
    uint32_t bits = 0;
#pragma unroll 1
    for (int j = 0; j < phase.taps; ++j, first += phase.step)
      bits |= static_cast<unsigned>(first) < static_cast<unsigned>(size) ? 1u << j : 0;
    return bits;
  }
};

// Gathers the sites' windows: a thread copies one chunk column of four rows, step after step.
template <class Traits>
class HopperGather {
  using T = typename Traits::T;
  static constexpr int kCopyRows = Traits::kThreads / 8, kOwnRows = Traits::kRows / kCopyRows;

 public:
  __device__ explicit HopperGather(const GemmParams& p) : p_(p) {
    const int chunk = static_cast<int>(threadIdx.x) % 8, row = static_cast<int>(threadIdx.x) / 8;
    to_ = row * kRowBytes + ((chunk ^ (row & 7)) * kChunkBytes);
  }

  // Turns to a step of depth.
  __device__ void begin(int step) {
    const int channels = packed_channels(static_cast<int>(p_.x.c));
    channel_ = step * Traits::kDepth + static_cast<int>(threadIdx.x) % 8 * kVector;
    if constexpr (Traits::kPoints) return;
    tap_y_ = tap_x_ = 0;
    if (channel_ >= channels) {
      const int tap = channel_ / channels;
      channel_ -= tap * channels;
      tap_y_ = tap / p_.x_axis.phase.taps;
      tap_x_ = tap - tap_y_ * p_.x_axis.phase.taps;
    }
    begin_tap();
    work_out(channel_, tap_y_, tap_x_);
  }
  // Turns to a tile: its rows, or its sites, if a window is the site itself.
  __device__ void take(const HopperRow* rows) {
    const int row = static_cast<int>(threadIdx.x) / 8;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      from_[i] = static_cast<const T*>(p_.x.data) + rows[row + i * kCopyRows].from;
      taps_[i] = rows[row + i * kCopyRows].taps;
    }
  }
  __device__ void take(const int* sites) {
    const int row = static_cast<int>(threadIdx.x) / 8;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const int site = sites[row + i * kCopyRows];
      from_[i] =
          static_cast<const T*>(p_.x.data) + max(site, 0) * static_cast<int>(p_.x.ld) + channel_;
      taps_[i] = site < 0 ? 0 : 1;
    }
  }

  // The next step of depth into a stage.
  __device__ void load(uint32_t stage) {
    if constexpr (Traits::kImage) {
      load_image(stage + to_);
    } else if constexpr (Traits::kPoints) {
      const bool inside = channel_ < static_cast<int>(p_.x.c);
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        copy_chunk(stage + to_ + i * kCopyRows * kRowBytes, from_[i], inside && taps_[i] != 0);
        from_[i] += Traits::kDepth;
      }
      channel_ += Traits::kDepth;
    } else {
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i)
        copy_chunk(stage + to_ + i * kCopyRows * kRowBytes, from_[i] + offset_,
                   (taps_[i] & bits_) == bits_);
      offset_ += Traits::kDepth;
      channel_ += Traits::kDepth;
      const int channels = static_cast<int>(p_.x.c);
      if (channel_ < channels) return;
      do {
        channel_ -= channels;
        next_taps(1);
      } while (channel_ >= channels);
      begin_tap();
    }
  }

 private:
  // bits_: of a row that the tap needs; beyond the last tap there is none that has them.
  // offset_: how far its site, and the channel there, lies from tap 0's, in elements.
  __device__ void begin_tap() {
    bits_ = tap_y_ < p_.y.phase.taps ? 1u << tap_y_ | 1u << (kMostTaps + tap_x_) : ~0u;
    offset_ =
        (tap_y_ * p_.y.phase.step * static_cast<int>(p_.x.w) + tap_x_ * p_.x_axis.phase.step) *
            static_cast<int>(p_.x.ld) +
        channel_;
  }
  // A chunk is two taps of four channels, of which those beyond the image's are nothing.
  __device__ void load_image(uint32_t to) {
    const int bytes = static_cast<int>(p_.x.c * sizeof(T));
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i)
        copy_tap(to + i * kCopyRows * kRowBytes + k * kTapBytes, from_[i] + offset_,
                 (taps_[i] & bits_) == bits_ ? bytes : 0);
      next_taps(1);
      begin_tap();
    }
    next_taps(Traits::kDepth / 4 - 2);  // the other threads' of this step
    begin_tap();
  }
  __device__ void next_taps(int count) {
    tap_x_ += count;
    while (tap_x_ >= p_.x_axis.phase.taps) {
      tap_x_ -= p_.x_axis.phase.taps;
      ++tap_y_;
    }
  }
  // Eight bytes, all but the first few of which become 0.
  static constexpr int kTapBytes = 8;
  static __device__ __forceinline__ void copy_tap(uint32_t to, const T* from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  }

  const GemmParams& p_;
  uint32_t to_;
  int channel_, tap_y_, tap_x_, offset_;
  uint32_t bits_;
  const T* from_[kOwnRows];  // of points: the next chunk
  uint32_t taps_[kOwnRows];
};

}  // namespace deltafx::cuda
