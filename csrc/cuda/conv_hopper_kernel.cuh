// Convolution in half precision on Hopper GPUs, as an implicit matrix product over the candidates.
//
// A tile is 64 or 128 sites by 64 or 128 output channels; a warp group takes 64 sites of it. The
// sites' windows are gathered by cp.async, the weights, which are packed as they will lie in shared
// memory, come by bulk copies. The weights' rows are ordered such that a thread ends up with the
// sums of 16 channels of a site, and four neighbouring threads with a truncation group: bias,
// residual, activation and the update rule work on registers. A small map's candidates are found by
// each block for itself, without a list in global memory. Straight code is kept short: a kernel
// that runs for a few microseconds pays for every instruction it has to fetch.
#pragma once

#include "cuda/conv_gemm_finish.cuh"
#include "cuda/conv_hopper.h"
#include "cuda/conv_query.cuh"
#include "cuda/hopper.cuh"
#include "cuda/own_list.cuh"

namespace deltafx::cuda {

template <class Element, bool kLargeTile, bool kImageInput>
struct HopperTraits {
  using T = Element;
  static constexpr bool kImage = kImageInput;  // up to four channels, four apart
  static constexpr bool kParts = !kLargeTile;  // see GemmTraits
  static constexpr int kGroups = kLargeTile ? 2 : 1;  // of 64 sites, and of 64 channels
  static constexpr int kRows = 64 * kGroups, kColumns = 64 * kGroups, kThreads = 128 * kGroups;
  static constexpr int kStages = kLargeTile ? 3 : 4;
  static constexpr int kBlocksPerMultiprocessor = kLargeTile ? 2 : 3;
  static constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kSums = kColumns / 2;  // of a thread
  static constexpr int kBlockBytes = kWeightRows * kRowBytes;
  static constexpr int kStageBytes = (kRows + kColumns) * kRowBytes;
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <class T>
__device__ __forceinline__ uint32_t pack_two(float a, float b) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 v = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}
template <class T>
__device__ __forceinline__ float2 unpack_two(uint32_t v) {
  if constexpr (std::is_same_v<T, __half>)
    return __half22float2(*reinterpret_cast<const __half2*>(&v));
  else
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v));
}

// Gathers the sites' windows: a thread copies one chunk column of four rows, step after step.
template <class Traits>
class HopperGather {
  using T = typename Traits::T;
  static constexpr int kCopyRows = Traits::kThreads / 8, kOwnRows = Traits::kRows / kCopyRows;

 public:
  __device__ HopperGather(const GemmParams& p, const GemmRow<T>* rows, int first_step) : p_(p) {
    const int chunk = static_cast<int>(threadIdx.x) % 8, row = static_cast<int>(threadIdx.x) / 8;
    to_ = row * kRowBytes + ((chunk ^ (row & 7)) * kChunkBytes);
    const int channels = packed_channels(static_cast<int>(p.x.c));
    channel_ = first_step * Traits::kDepth + chunk * kVector;
    const int tap = channel_ / channels;
    channel_ -= tap * channels;
    tap_y_ = tap / p.x_axis.phase.taps;
    tap_x_ = tap - tap_y_ * p.x_axis.phase.taps;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      from_[i] = rows[row + i * kCopyRows].from;
      taps_[i] = rows[row + i * kCopyRows].taps;
    }
  }

  // The next step of depth into a stage.
  __device__ void load(uint32_t stage) {
    if constexpr (Traits::kImage) {
      load_image(stage + to_);
    } else {
      const uint32_t bits = tap_bits();
      const int64_t offset = distance() + channel_;
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i)
        copy_chunk(stage + to_ + i * kCopyRows * kRowBytes, from_[i] + offset,
                   (taps_[i] & bits) == bits);
      channel_ += Traits::kDepth;
      const int channels = static_cast<int>(p_.x.c);
      while (channel_ >= channels) {
        channel_ -= channels;
        next_tap();
      }
    }
  }

 private:
  // The bits of GemmRow::taps that the tap needs; beyond the last there is none that has them.
  __device__ uint32_t tap_bits() const {
    return tap_y_ < p_.y.phase.taps ? 1u << tap_y_ | 1u << (kMostTaps + tap_x_) : ~0u;
  }
  // How far the tap's site lies from tap 0's, in elements.
  __device__ int64_t distance() const {
    return (tap_y_ * p_.y.phase.step * static_cast<int>(p_.x.w) +
            tap_x_ * p_.x_axis.phase.step) *
           p_.x.ld;
  }
  __device__ void next_tap() {
    if (++tap_x_ == p_.x_axis.phase.taps) {
      tap_x_ = 0;
      ++tap_y_;
    }
  }

  // A chunk is two taps of four channels, of which those beyond the image's are nothing.
  __device__ void load_image(uint32_t to) {
    uint2 v[2][kOwnRows];
    const int channels = static_cast<int>(p_.x.c);
    const uint32_t low = channels > 1 ? ~0u : 0xffffu;
    const uint32_t high = channels > 3 ? ~0u : channels > 2 ? 0xffffu : 0u;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t bits = tap_bits();
      const int64_t offset = distance();
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        v[k][i] = make_uint2(0, 0);
        if ((taps_[i] & bits) == bits)
          v[k][i] = *reinterpret_cast<const uint2*>(from_[i] + offset);
      }
      next_tap();
    }
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i)
      asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to + i * kCopyRows * kRowBytes),
                   "r"(v[0][i].x & low), "r"(v[0][i].y & high), "r"(v[1][i].x & low),
                   "r"(v[1][i].y & high)
                   : "memory");
    // A step is 16 taps, of which this thread had two.
    for (int k = 0; k < Traits::kDepth / 4 - 2; ++k) next_tap();
  }

  const GemmParams& p_;
  uint32_t to_;
  int channel_, tap_y_, tap_x_;
  const T* from_[kOwnRows];
  uint32_t taps_[kOwnRows];
};

// Sixteen channels of a site, [c, c + 8) and [c + 32, c + 40): what a thread finishes.
template <class T>
struct SiteUnit {
  int site, row;  // site -1: none
  uint4 old[2], residual[2];

  // Starts reading what the sums will be compared with and added to.
  __device__ void fetch(const GemmParams& p, const GemmRow<T>* rows, int tile_row, int c) {
    row = tile_row;
    site = rows[tile_row].site;
    if (site < 0) return;
    const int channels = static_cast<int>(p.out.acc.c);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      if (c + 32 * q >= channels) continue;
      if (p.out.truncation.policy != Policy::none)
        old[q] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.out.acc.data) +
                                                 site * p.out.acc.ld + c + 32 * q);
      if (p.residual.data != nullptr)
        residual[q] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.residual.data) +
                                                      site * p.residual.ld + c + 32 * q);
    }
  }

  // Bias, residual, activation, update rule. Called by whole warps; true if the group was written.
  __device__ bool finish(const GemmParams& p, const FastActivation& act, float threshold, int c,
                         const float (&sums)[2 * kVector]) {
    const int channels = static_cast<int>(p.out.acc.c);
    const Policy policy = p.out.truncation.policy;
    float total = 0.f;
    bool beyond = false;
    uint4 packed[2];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int c0 = c + 32 * q;
      if (c0 >= channels || site < 0) continue;
      float y[kVector], v[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] = sums[q * kVector + i];
      if (p.bias != nullptr) {
        load_floats(p.bias + c0, kVector, v);
#pragma unroll
        for (int i = 0; i < kVector; ++i) y[i] += v[i];
      }
      const bool adds = p.residual.data != nullptr;
      if (!adds || p.residual_after_act) act.apply(p.act, c0, kVector, y);
      if (adds) {
        unpack(residual[q], v);
#pragma unroll
        for (int i = 0; i < kVector; ++i) y[i] += v[i];
        if (!p.residual_after_act) act.apply(p.act, c0, kVector, y);
      }
      packed[q] = {pack_two<T>(y[0], y[1]), pack_two<T>(y[2], y[3]), pack_two<T>(y[4], y[5]),
                   pack_two<T>(y[6], y[7])};
      if (policy == Policy::none) continue;
      float scale[kVector];
      unpack(packed[q], y);
      unpack(old[q], v);
      load_floats(p.out.truncation.inv_scale + c0, kVector, scale);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float d = (y[i] - v[i]) * scale[i];
        total += d * d;
        beyond |= threshold == 0.f ? !(y[i] == v[i]) : !(fabsf(d) <= threshold);
      }
    }
    // The four threads of a group.
    total += __shfl_xor_sync(kAllLanes, total, 1);
    total += __shfl_xor_sync(kAllLanes, total, 2);
    const unsigned lane = threadIdx.x % 32;
    const bool any = __ballot_sync(kAllLanes, beyond) >> (lane & ~3u) & 0xfu;
    const int group = c / static_cast<int>(kTruncationGroup) * static_cast<int>(kTruncationGroup);
    const auto size = static_cast<float>(min(channels - group, static_cast<int>(kTruncationGroup)));
    const bool changed = policy == Policy::none                        ? true
                         : threshold == 0.f || policy == Policy::maximum ? any
                                                                       : !(total <= threshold * threshold * size);
    if (!changed || site < 0 || group >= channels) return false;
#pragma unroll
    for (int q = 0; q < 2; ++q)
      if (c + 32 * q < channels)
        *reinterpret_cast<uint4*>(static_cast<T*>(p.out.acc.data) + site * p.out.acc.ld + c +
                                  32 * q) = packed[q];
    return true;
  }

 private:
  static __device__ void unpack(const uint4& from, float (&v)[kVector]) {
    const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = unpack_two<T>(words[i]);
      v[2 * i] = two.x, v[2 * i + 1] = two.y;
    }
  }
};

#endif

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerMultiprocessor)
    conv_hopper_kernel(const __grid_constant__ GemmParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using namespace hopper;
  using T = typename Traits::T;
  constexpr int kRows = Traits::kRows, kColumns = Traits::kColumns, kThreads = Traits::kThreads;
  constexpr int kStages = Traits::kStages;
  extern __shared__ char dynamic[];
  __shared__ uint64_t barriers[kStages];
  __shared__ GemmRow<T> rows[kRows];
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  const uint32_t unaligned = shared_address(dynamic), stages = (unaligned + 1023u) & ~1023u;
  char* stage_memory = dynamic + (stages - unaligned);
  const auto* weight = static_cast<const char*>(p.weight);
  const int channels = static_cast<int>(p.out.acc.c);
  const int column_tiles = (channels + kColumns - 1) / kColumns;
  const int steps = p.packed_depth / Traits::kDepth;
  const int blocks = static_cast<int>(gridDim.x);
  if (tid == 0) {
    for (uint64_t& barrier : barriers) init_barrier(shared_address(&barrier));
    // Weights do not depend on the kernel before this one: each block asks for a share of them.
    const int all = (channels + kWeightRows - 1) / kWeightRows * steps * Traits::kBlockBytes;
    const int share = (all / blocks + 15) / 16 * 16;
    const int first = static_cast<int>(blockIdx.x) * share, bytes = min(share, all - first);
    if (bytes > 0) prefetch_bulk(weight + first, bytes);
  }
  wait_for_inputs();

  int size, first_entry = 0;
  const uint16_t* own_list = nullptr;
  if (p.lists_itself) {
    const ConvQuery query{p.x_mask, p.residual_mask, p.y, p.x_axis, nullptr};
    auto* to = reinterpret_cast<uint16_t*>(stage_memory + kStages * Traits::kStageBytes);
    size = list_own<kThreads>(query, p.out, stage_memory, to);
    own_list = to;
    fence_async();
  } else {
    first_entry = p.list.first();
    size = p.list.last() - first_entry;
  }
  if (size == 0) return;

  const int clusters = blocks / p.cluster, rank = static_cast<int>(blockIdx.x) % p.cluster;
  const int tiles = (size + kRows - 1) / kRows * column_tiles, parts = p.cluster;
  // Split where the time, in steps of the slowest block, is shorter; 6 stands for the exchange.
  const bool split = parts > 1 && (tiles + clusters - 1) / clusters * (steps / parts + 6) <
                                      (tiles + blocks - 1) / blocks * steps;
  const int stride = split ? clusters : blocks;
  const int first_step = split ? steps * rank / parts : 0;
  const int last_step = split ? steps * (rank + 1) / parts : steps;
  const FastActivation act(p.act);
  const float threshold =
      p.out.truncation.policy == Policy::none ? 0.f : *p.out.truncation.threshold;
  int found = 0, stage = 0;
  uint32_t parity = 0;

  for (int tile = static_cast<int>(blockIdx.x) / (split ? parts : 1); tile < tiles;
       tile += stride) {
    const int first_row = tile / column_tiles * kRows;
    const int first_column = tile % column_tiles * kColumns;
    __syncthreads();
    if (tid < kRows) {
      const int i = first_row + tid;
      const int site = i >= size          ? -1
                       : p.lists_itself ? static_cast<int>(own_list[i])
                                        : site_in(p.list.entries[first_entry + i]);
      rows[tid] = GemmRow<T>(p, site);
    }
    __syncthreads();

    HopperGather<Traits> gather(p, rows, first_step);
    const char* columns =
        weight + static_cast<int64_t>(first_column / kWeightRows) * steps * Traits::kBlockBytes;
    int next = first_step;
    // The next step of depth into stage `to`.
    const auto load = [&](int to) {
      if (next < last_step) {
        const uint32_t at = stages + to * Traits::kStageBytes;
        if (tid == 0) {
          const uint32_t barrier = shared_address(barriers + to);
          expect_bytes(barrier, kColumns * kRowBytes);
#pragma unroll
          for (int g = 0; g < Traits::kGroups; ++g)
            copy_bulk(at + kRows * kRowBytes + g * Traits::kBlockBytes,
                      columns + (g * steps + next) * Traits::kBlockBytes, Traits::kBlockBytes,
                      barrier);
        }
        gather.load(at);
      }
      ++next;
      commit_copies();
    };
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) load((stage + i) % kStages);

    // A thread's units: rows 8 apart of its warp's 16; of a split tile, at most one of this block's.
    const int c = first_column + lane % 4 * kVector;
    const int own_units = 2 * kThreads / parts;  // if split
    const int unit = rank * own_units + tid, unit_thread = unit % kThreads;
    const int warp_row = (split ? unit_thread : tid) / 32 * 16 + lane / 4;
    SiteUnit<T> units[2];
    if constexpr (!Traits::kParts) {
    } else if (!split) {
#pragma unroll
      for (int h = 0; h < 2; ++h) units[h].fetch(p, rows, warp_row + 8 * h, c);
    } else if (tid < own_units) {
      units[0].fetch(p, rows, warp_row + 8 * (unit / kThreads), c);
    }

    float sums[Traits::kSums], total[Traits::kParts ? Traits::kSums : 1];
    if constexpr (Traits::kParts) {
#pragma unroll
      for (float& v : total) v = 0.f;
    }
    int part = 1, part_end = split ? last_step : steps / parts;
    bool fresh = true;
    const int warp_group = tid / 128;
#pragma unroll 1
    for (int step = first_step; step < last_step; ++step) {
      wait_for_copies<kStages - 2>();
      fence_async();
      wait_for_products(sums);
      wait_for_barrier(shared_address(barriers + stage), parity);
      __syncthreads();
      if constexpr (Traits::kParts) {
        if (step == part_end) {
#pragma unroll
          for (int i = 0; i < Traits::kSums; ++i) total[i] += sums[i];
          part_end = steps * ++part / parts;
          fresh = true;
        }
      }
      const uint32_t at = stages + stage * Traits::kStageBytes;
      const uint64_t a = matrix_at(at + warp_group * 64 * kRowBytes);
      const uint64_t b = matrix_at(at + kRows * kRowBytes);
      begin_products();
#pragma unroll
      for (int k = 0; k < 4; ++k)  // 32 bytes of depth each
        multiply<T>(sums, a + 2 * k, b + 2 * k, !(fresh && k == 0));
      commit_products();
      fresh = false;
      load((stage + kStages - 1) % kStages);
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    wait_for_products(sums);

    if constexpr (Traits::kParts) {
#pragma unroll
      for (int i = 0; i < Traits::kSums; ++i) total[i] += sums[i];
      float y[2 * kVector];
      if (split) {
        // [row half][four sums of 16][thread], and then this block's units added up over the blocks.
        auto* results = reinterpret_cast<float4*>(stage_memory);
        float4* added = results + 8 * kThreads;
        __syncthreads();
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const int at = k % 4 * 8 + k / 4 * 2;
          results[k * kThreads + tid] =
              make_float4(total[at], total[at + 1], total[at + 4], total[at + 5]);
        }
        cluster_sync();
        for (int i = tid; i < 4 * own_units; i += kThreads) {
          const int u = rank * own_units + i % own_units;
          const uint32_t address =
              stages + ((u / kThreads * 4 + i / own_units) * kThreads + u % kThreads) * 16;
          float4 sum = make_float4(0.f, 0.f, 0.f, 0.f), parts_of[4];
          for (int from = 0; from < parts; from += 4) {
#pragma unroll
            for (int k = 0; k < 4; ++k) parts_of[k] = load_from_block(address, from + k);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              sum.x += parts_of[k].x, sum.y += parts_of[k].y;
              sum.z += parts_of[k].z, sum.w += parts_of[k].w;
            }
          }
          added[i] = sum;
        }
        __syncthreads();
        if (tid < own_units) {
#pragma unroll
          for (int k = 0; k < 4; ++k)
            *reinterpret_cast<float4*>(y + 4 * k) = added[k * own_units + tid];
          if (units[0].finish(p, act, threshold, c, y) && lane % 4 == 0)
            found += mark_site(p, units[0].site, first_entry + first_row + units[0].row);
        }
        fence_async();
        cluster_sync();
      } else {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int i = 0; i < 2 * kVector; ++i) y[i] = total[i / 2 * 4 + 2 * h + i % 2];
          if (units[h].finish(p, act, threshold, c, y) && lane % 4 == 0)
            found += mark_site(p, units[h].site, first_entry + first_row + units[h].row);
        }
      }
    } else {
#pragma unroll
      for (int g = 0; g < Traits::kGroups; ++g) {
#pragma unroll
        for (int h = 0; h < 2; ++h) units[h].fetch(p, rows, warp_row + 8 * h, c + 64 * g);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float y[2 * kVector];
#pragma unroll
          for (int i = 0; i < 2 * kVector; ++i) y[i] = sums[g * 32 + i / 2 * 4 + 2 * h + i % 2];
          if (units[h].finish(p, act, threshold, c + 64 * g, y) && lane % 4 == 0)
            found += mark_site(p, units[h].site, first_entry + first_row + units[h].row);
        }
      }
    }
  }
  found = __reduce_add_sync(kAllLanes, found);
  if (lane == 0 && found > 0) add_to(p.out.counts + 1, found);
#endif
}

template <class Traits>
cudaError_t launch_hopper(GemmParams p, cudaStream_t stream) {
  if (!Traits::kParts) p.cluster = 1;
  const int64_t row_tiles = (p.out.acc.sites() + Traits::kRows - 1) / Traits::kRows;
  const int64_t tiles = row_tiles * ((p.out.acc.c + Traits::kColumns - 1) / Traits::kColumns);
  const int shared_bytes = Traits::kSharedBytes + (p.lists_itself ? kOwnListBytes : 0);
  const int64_t resident = p.lists_itself ? 2 : Traits::kBlocksPerMultiprocessor;
  const int64_t most = resident * current_device().multiprocessors;
  int64_t blocks = tiles * p.cluster < most ? tiles * p.cluster : most;
  blocks -= blocks % p.cluster;
  return launch(conv_hopper_kernel<Traits>,
                {static_cast<int>(blocks), Traits::kThreads, shared_bytes, p.cluster}, stream, p);
}

template <class T>
cudaError_t launch_conv_hopper(const GemmParams& p, cudaStream_t stream) {
  if (p.x.c <= 4) return launch_hopper<HopperTraits<T, false, true>>(p, stream);
  // Large tiles pay once a twentieth of the sites fills the device with them.
  const int64_t tiles = p.out.acc.sites() / 128 * (p.out.acc.c / 128);
  if (p.out.acc.c % 128 == 0 && tiles >= 20 * current_device().multiprocessors && !p.lists_itself)
    return launch_hopper<HopperTraits<T, true, false>>(p, stream);
  return launch_hopper<HopperTraits<T, false, false>>(p, stream);
}

}  // namespace deltafx::cuda
