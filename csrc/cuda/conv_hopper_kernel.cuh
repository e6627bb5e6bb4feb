// Convolution in half precision on Hopper GPUs, as an implicit matrix product over the candidates.
//
// A tile is 64 or 128 sites by 64 or 128 output channels; a warp group takes 64 sites of it. The
// sites' windows are gathered by cp.async; the weights, which are packed as they will lie in shared
// memory, come by bulk copies. The weights' rows are ordered such that a thread ends up with the
// sums of 16 channels of a site, and four neighbouring threads with a truncation group. The depth
// of a tile may be split among the blocks of a cluster. A small map's candidates are found by each
// block for itself, without a list in global memory. Code is kept short: a kernel that runs for a
// few microseconds pays for every instruction it has to fetch.
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
  static constexpr bool kLarge = kLargeTile;
  static constexpr bool kImage = kImageInput;                  // up to four channels, four apart
  static constexpr bool kLists = !kLargeTile && !kImageInput;  // may find the candidates itself
  static constexpr int kGroups = kLargeTile ? 2 : 1;           // of 64 sites, and of 64 channels
  static constexpr int kRows = 64 * kGroups, kColumns = 64 * kGroups, kThreads = 128 * kGroups;
  static constexpr int kStages = kLargeTile ? 3 : 4;
  static constexpr int kBlocksPerMultiprocessor = kLargeTile ? 2 : 3;
  static constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kSums = kColumns / 2;  // of a thread
  static constexpr int kUnits = kSums / 16;   // of a thread, see SiteUnit
  static constexpr int kBlockBytes = kWeightRows * kRowBytes;
  static constexpr int kStageBytes = (kRows + kColumns) * kRowBytes;
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes;
  static_assert(kRows * kColumns * 4 <= kStages * kStageBytes, "sums reuse the stages");
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

// A row of a tile, as GemmRow, in few instructions: all numbers but the address have 32 bits.
template <class T>
struct HopperRow {
  const T* from;
  uint32_t taps;
  int site;

  __device__ HopperRow() {}
  __device__ HopperRow(const GemmParams& p, int site_or_none) : taps(0), site(site_or_none) {
    const int h = static_cast<int>(p.x.h), w = static_cast<int>(p.x.w);
    const Position at = position_of(max(site, 0), p.h, p.w);
    int y = p.y.base(at.y), x = p.x_axis.base(at.x);
    from = static_cast<const T*>(p.x.data) +
           static_cast<int64_t>((at.n * h + y) * w + x) * static_cast<int>(p.x.ld);
    if (site < 0) return;
    const int most = max(p.y.phase.taps, p.x_axis.phase.taps);
#pragma unroll 1
    for (uint32_t bit = 1; bit < 1u << most; bit *= 2) {
      if (static_cast<unsigned>(y) < static_cast<unsigned>(h)) taps |= bit;
      if (static_cast<unsigned>(x) < static_cast<unsigned>(w)) taps |= bit << kMostTaps;
      y += p.y.phase.step, x += p.x_axis.phase.step;
    }
  }
};

// Gathers the sites' windows: a thread copies one chunk column of four rows, step after step.
template <class Traits>
class HopperGather {
  using T = typename Traits::T;
  static constexpr int kCopyRows = Traits::kThreads / 8, kOwnRows = Traits::kRows / kCopyRows;

 public:
  __device__ HopperGather(const GemmParams& p, const HopperRow<T>* rows, int first_step) : p_(p) {
    const int chunk = static_cast<int>(threadIdx.x) % 8, row = static_cast<int>(threadIdx.x) / 8;
    to_ = row * kRowBytes + ((chunk ^ (row & 7)) * kChunkBytes);
    const int channels = packed_channels(static_cast<int>(p.x.c));
    channel_ = first_step * Traits::kDepth + chunk * kVector;
    tap_y_ = tap_x_ = 0;
    if (channel_ >= channels) {
      const int tap = channel_ / channels;
      channel_ -= tap * channels;
      tap_y_ = tap / p.x_axis.phase.taps;
      tap_x_ = tap - tap_y_ * p.x_axis.phase.taps;
    }
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
  // The bits of a row that the tap needs; beyond the last there is none that has them.
  __device__ uint32_t tap_bits() const {
    return tap_y_ < p_.y.phase.taps ? 1u << tap_y_ | 1u << (kMostTaps + tap_x_) : ~0u;
  }
  // How far the tap's site lies from tap 0's, in elements.
  __device__ int64_t distance() const {
    return (tap_y_ * p_.y.phase.step * static_cast<int>(p_.x.w) + tap_x_ * p_.x_axis.phase.step) *
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
        if ((taps_[i] & bits) == bits) v[k][i] = *reinterpret_cast<const uint2*>(from_[i] + offset);
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

// What of a convolution's parameters a block reads again and again, in shared memory: of its
// columns.
template <int kColumns>
struct ColumnConstants {
  float bias[kColumns], scale[kColumns];

  __device__ void load(const GemmParams& p, int first_column) {
    const int i = static_cast<int>(threadIdx.x), c = first_column + i;
    if (i >= kColumns || c >= p.out.acc.c) return;
    bias[i] = p.bias != nullptr ? p.bias[c] : 0.f;
    scale[i] = p.out.truncation.policy != Policy::none ? p.out.truncation.inv_scale[c] : 0.f;
  }
};

// Sixteen channels of a site, [c, c + 8) and [c + 32, c + 40): what a thread finishes at a time.
template <class T>
struct SiteUnit {
  int site;  // -1: none
  uint4 old[2], residual[2];

  // Starts reading what the sums will be compared with and added to.
  __device__ __forceinline__ void fetch(const GemmParams& p, int own_site, int c) {
    site = own_site;
    const auto* acc = static_cast<const T*>(p.out.acc.data) + site * p.out.acc.ld + c;
    const auto* more = static_cast<const T*>(p.residual.data) + site * p.residual.ld + c;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      if (site < 0 || c + 32 * q >= static_cast<int>(p.out.acc.c)) continue;
      if (p.out.truncation.policy != Policy::none)
        old[q] = *reinterpret_cast<const uint4*>(acc + 32 * q);
      if (p.residual.data != nullptr) residual[q] = *reinterpret_cast<const uint4*>(more + 32 * q);
    }
  }

  // Bias, residual, activation, update rule. Called by whole warps; true if the group was written.
  // bias, scale: from channel c on.
  __device__ __forceinline__ bool finish(const GemmParams& p, const FastActivation& act,
                                         float threshold, int c, const float* bias,
                                         const float* scale, float (&y)[2 * kVector]) {
    const int channels = static_cast<int>(p.out.acc.c);
    const Policy policy = p.out.truncation.policy;
    float total = 0.f;
    bool beyond = false;
    uint4 packed[2];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      if (site < 0 || c + 32 * q >= channels) continue;
      float v[kVector], w[kVector];
      load_vector(bias + 32 * q, kVector, true, w);
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] = y[q * kVector + i] + w[i];
      const bool adds = p.residual.data != nullptr;
      if (adds) unpack(residual[q], w);
      if (adds && !p.residual_after_act) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[i] += w[i];
      }
      act.apply(p.act, c + 32 * q, kVector, v);
      if (adds && p.residual_after_act) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[i] += w[i];
      }
      packed[q] = {pack_two<T>(v[0], v[1]), pack_two<T>(v[2], v[3]), pack_two<T>(v[4], v[5]),
                   pack_two<T>(v[6], v[7])};
      if (policy == Policy::none) continue;
      unpack(packed[q], v);
      unpack(old[q], w);
      if (threshold == 0.f) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) beyond |= !(v[i] == w[i]);
        continue;
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] -= w[i];
      load_vector(scale + 32 * q, kVector, true, w);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        v[i] *= w[i];
        if (policy == Policy::rms)
          total += v[i] * v[i];
        else
          beyond |= !(fabsf(v[i]) <= threshold);
      }
    }
    const int group = c / static_cast<int>(kTruncationGroup) * static_cast<int>(kTruncationGroup);
    bool changed = true;
    if (policy == Policy::rms && threshold != 0.f) {
      total = sum_over_group<4>(total);
      const int size = min(channels - group, static_cast<int>(kTruncationGroup));
      changed = !(total <= threshold * threshold * static_cast<float>(size));
    } else if (policy != Policy::none) {
      changed = any_in_group<4>(beyond);
    }
    if (!changed || site < 0 || group >= channels) return false;
    auto* acc = static_cast<T*>(p.out.acc.data) + site * p.out.acc.ld + c;
#pragma unroll
    for (int q = 0; q < 2; ++q)
      if (c + 32 * q < channels) *reinterpret_cast<uint4*>(acc + 32 * q) = packed[q];
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
  constexpr int kStages = Traits::kStages, kUnits = Traits::kUnits;
  extern __shared__ char dynamic[];
  __shared__ uint64_t barriers[kStages + 1];  // of the stages; of the sums from other blocks
  __shared__ HopperRow<T> rows[kRows];
  __shared__ __align__(16) ColumnConstants<kColumns> constants;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  const int first_column = static_cast<int>(blockIdx.y) * kColumns;
  const int steps = p.packed_depth / Traits::kDepth, parts = p.cluster;
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const uint32_t unaligned = shared_address(dynamic), stages = (unaligned + 1023u) & ~1023u;
  char* stage_memory = dynamic + (stages - unaligned);
  // Nothing here depends on the kernel before this one.
  const char* weight =
      static_cast<const char*>(p.weight) +
      static_cast<int64_t>(first_column / kWeightRows) * steps * Traits::kBlockBytes;
  if (tid == 0) {
    for (uint64_t& barrier : barriers) init_barrier(shared_address(&barrier));
    const int all = steps * Traits::kGroups * Traits::kBlockBytes;  // each block asks for a share
    const int share = (all / blocks + 15) / 16 * 16, bytes = min(share, all - block * share);
    if (bytes > 0) prefetch_bulk(weight + block * share, bytes);
  }
  constants.load(p, first_column);
  const FastActivation act(p.act);
  const float threshold =
      p.out.truncation.policy == Policy::none ? 0.f : *p.out.truncation.threshold;
  MARK(0);
  wait_for_inputs();

  int size, first_entry = 0;
  const bool lists_itself = Traits::kLists && p.lists_itself;
  const auto* own_list =
      reinterpret_cast<const uint16_t*>(stage_memory + kStages * Traits::kStageBytes);
  // In a list, a guess at the first tile's sites is read along with their number.
  const int guess = block / parts * kRows + tid;
  int entry = 0;
  if (lists_itself) {
    const ConvQuery query{p.x_mask, p.residual_mask, p.y, p.x_axis, nullptr};
    size = list_own<kThreads>(query, p.runs, p.out, stage_memory, const_cast<uint16_t*>(own_list));
  } else {
    first_entry = p.list.first();
    if (tid < kRows && first_entry + guess < p.sites) entry = p.list.entries[first_entry + guess];
    size = p.list.last() - first_entry;
  }
  if (size == 0) return;

  const int clusters = blocks / parts, rank = block % parts;
  const int tiles = (size + kRows - 1) / kRows;
  // Large tiles are always split. Small ones are where the time, in steps of the slowest block, is
  // shorter; 6 stands for the exchange.
  const bool split =
      parts > 1 && (Traits::kLarge || (tiles + clusters - 1) / clusters * (steps / parts + 6) <
                                          (tiles + blocks - 1) / blocks * steps);
  const int first_step = split ? steps * rank / parts : 0;
  const int last_step = split ? steps * (rank + 1) / parts : steps;
  const int c = first_column + lane % 4 * kVector;
  const int own_units = split ? kUnits * kThreads / parts : kUnits * kThreads;
  const int first_unit = split ? rank * own_units : 0;
  int stage = 0, exchanges = 0;
  uint32_t parity = 0;
  SiteMarks marks;

#pragma unroll 1
  for (int tile = split ? block / parts : block; tile < tiles; tile += split ? clusters : blocks) {
    const int first_row = tile * kRows;
    fence_async();  // what was written to the stages' memory comes before the copies into it
    __syncthreads();
    if (tid < kRows) {
      const int i = first_row + tid;
      if (!lists_itself && i != guess && i < size) entry = p.list.entries[first_entry + i];
      const int site = i >= size      ? -1
                       : lists_itself ? static_cast<int>(own_list[i])
                                      : site_in(entry);
      rows[tid] = HopperRow<T>(p, site);
    }
    __syncthreads();

    HopperGather<Traits> gather(p, rows, first_step);
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
                      weight + (g * steps + next) * Traits::kBlockBytes, Traits::kBlockBytes,
                      barrier);
        }
        gather.load(at);
      }
      ++next;
      commit_copies();
    };
#pragma unroll 1
    for (int i = 0, to = stage; i < kStages - 1; ++i) {
      load(to);
      to = to + 1 == kStages ? 0 : to + 1;
    }

    // Unit u of a tile: 16 channels of a row, sums of thread u % kThreads.
    const auto row_of = [&](int u) {
      return u % kThreads / 32 * 16 + lane / 4 + u / kThreads % 2 * 8;
    };
    const auto column_of = [&](int u) { return u / kThreads / 2 * 64; };
    SiteUnit<T> unit, next_unit;
    const auto fetch = [&](SiteUnit<T>& into, int u) {
      if (u < first_unit + own_units) into.fetch(p, rows[row_of(u)].site, c + column_of(u));
    };
    if constexpr (!Traits::kLarge) {
      fetch(unit, first_unit + tid);
      fetch(next_unit, first_unit + tid + kThreads);
    }

    float sums[Traits::kSums], total[Traits::kLarge ? 1 : Traits::kSums];
    if constexpr (!Traits::kLarge) {
#pragma unroll
      for (float& v : total) v = 0.f;
    }
    int part = 1, part_end = split ? last_step : steps / parts;
    bool fresh = true;
#pragma unroll 1
    for (int step = first_step; step < last_step; ++step) {
      wait_for_copies<kStages - 2>();
      if constexpr (Traits::kImage) fence_async();  // cp.async's writes need none
      wait_for_products(sums);
      wait_for_barrier(shared_address(barriers + stage), parity);
      __syncthreads();
      if constexpr (!Traits::kLarge) {
        if (step == part_end) {
#pragma unroll
          for (int i = 0; i < Traits::kSums; ++i) total[i] += sums[i];
          part_end = steps * ++part / parts;
          fresh = true;
        }
      }
      const uint32_t at = stages + stage * Traits::kStageBytes;
      const uint64_t a = matrix_at(at + tid / 128 * 64 * kRowBytes);
      const uint64_t b = matrix_at(at + kRows * kRowBytes);
      begin_products();
#pragma unroll
      for (int k = 0; k < 4; ++k)  // 32 bytes of depth each
        multiply<T>(sums, a + 2 * k, b + 2 * k, !(fresh && k == 0));
      commit_products();
      fresh = false;
      load(stage == 0 ? kStages - 1 : stage - 1);
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    wait_for_products(sums);
    __syncthreads();

    // The sums: of a whole tile to this thread, of a split one to the block that finishes the unit,
    // which adds the blocks' sums up in their order.
    auto* results = reinterpret_cast<float4*>(stage_memory);  // [from block][four of 16][unit]
    const uint32_t received = shared_address(barriers + kStages);
    if (split) {
      if (tid == 0) expect_bytes(received, kRows * kColumns * 4);
      meet_in_cluster();  // all stages are free
    }
#pragma unroll
    for (int k = 0; k < 4 * kUnits; ++k) {
      const int i = k / 8 * 32 + k % 4 * 8 + k / 4 % 2 * 2;
      const auto value = [&](int j) {
        if constexpr (Traits::kLarge)
          return sums[j];
        else
          return total[j] + sums[j];
      };
      const float4 four = make_float4(value(i), value(i + 1), value(i + 4), value(i + 5));
      const int u = k / 4 * kThreads + tid;
      if (split) {
        const int to = u / own_units, at = (rank * 4 + k % 4) * own_units + u - to * own_units;
        store_to_block(stages + at * 16, received, to, four);
      } else {
        results[k % 4 * own_units + u] = four;
      }
    }
    if constexpr (Traits::kLarge) {
      fetch(unit, first_unit + tid);
      fetch(next_unit, first_unit + tid + kThreads);
    }
    if (split) {
      wait_for_barrier(received, exchanges & 1);
      ++exchanges;
    }
#pragma unroll 1
    for (int i = tid; i < own_units; i += kThreads) {
      const int u = first_unit + i, column = column_of(u);
      float y[2 * kVector] = {};
#pragma unroll 1
      for (int from = 0; from < (split ? parts : 1); ++from) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float4 v = results[(from * 4 + k) * own_units + i];
          y[4 * k] += v.x, y[4 * k + 1] += v.y, y[4 * k + 2] += v.z, y[4 * k + 3] += v.w;
        }
      }
      const int local = column + lane % 4 * kVector;
      const bool written = unit.finish(p, act, threshold, c + column, constants.bias + local,
                                       constants.scale + local, y);
      if (written && lane % 4 == 0) marks.set(p, unit.site, first_entry + first_row + row_of(u));
      unit = next_unit;
      fetch(next_unit, u + 2 * kThreads);
    }
  }
  const int found = __reduce_add_sync(kAllLanes, marks.count());
  if (lane == 0 && found > 0) add_to(p.out.counts + 1, found);
#endif
}

template <class Traits>
cudaError_t launch_hopper(GemmParams p, cudaStream_t stream) {
  const int steps = p.packed_depth / Traits::kDepth;
  if (Traits::kLarge) p.cluster = steps >= 48 ? 4 : steps >= 16 ? 2 : 1;
  const int64_t row_tiles = (p.out.acc.sites() + Traits::kRows - 1) / Traits::kRows;
  const auto columns = static_cast<int>((p.out.acc.c + Traits::kColumns - 1) / Traits::kColumns);
  const int shared_bytes = Traits::kSharedBytes + (p.lists_itself ? kOwnListBytes : 0);
  const int resident = p.lists_itself ? 2 : Traits::kBlocksPerMultiprocessor;
  const int most = resident * current_device().multiprocessors / columns;
  int blocks = static_cast<int>(row_tiles * p.cluster < most ? row_tiles * p.cluster : most);
  blocks = blocks < p.cluster ? p.cluster : blocks / p.cluster * p.cluster;
  return launch(conv_hopper_kernel<Traits>,
                {blocks, Traits::kThreads, shared_bytes, p.cluster, columns}, stream, p);
}

template <class T>
cudaError_t launch_conv_hopper(const GemmParams& p, cudaStream_t stream) {
  if (p.x.c <= 4) return launch_hopper<HopperTraits<T, false, true>>(p, stream);
  if (conv_hopper_is_large(p)) return launch_hopper<HopperTraits<T, true, false>>(p, stream);
  return launch_hopper<HopperTraits<T, false, false>>(p, stream);
}

}  // namespace deltafx::cuda
