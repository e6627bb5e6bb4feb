// Convolution in half precision on Hopper GPUs, for many candidates or a deep sum: tiles of 128
// sites by 64 output channels, each of two warp groups with half of the sites.
//
// The steps of all of a block's tiles are one pipeline: the sites' windows and the weights of the
// next tile are on their way while this tile's sums are compared and written, which happens in the
// registers where the sums are. Steps go through the taps of 64 input channels before the next 64,
// so that neighbouring windows find each other's sites in L1.
//
// With kSplit the depth of every tile is split among the blocks of a cluster; how many those are
// is known before the frame, so that a sum's order never depends on what is active.
#pragma once

#include "cuda/conv_hopper.h"
#include "cuda/conv_hopper_finish.cuh"
#include "cuda/conv_hopper_gather.cuh"
#include "cuda/conv_hopper_launch.cuh"
#include "cuda/hopper.cuh"

namespace deltafx::cuda {

template <class Element, bool kSplitDepth>
struct TallTraits {
  using T = Element;
  static constexpr bool kSplit = kSplitDepth;
  static constexpr int kRows = 128, kColumns = 64, kThreads = 256, kStages = 3;
  static constexpr int kBlocksPerMultiprocessor = 2;
  static constexpr int kTiles = 4;  // whose rows are known at a time
  static constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kSums = kRows * kColumns / kThreads;  // of a thread
  static constexpr int kUnits = kSums / 16;                  // of a thread, see SiteUnit
  static constexpr int kBlockBytes = kColumns * kRowBytes;
  static constexpr int kStageBytes = (kRows + kColumns) * kRowBytes;
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes;
  static_assert(kRows * kColumns * 4 <= kStages * kStageBytes, "sums reuse the stages");
};

// copy_chunk by way of L1.
__device__ __forceinline__ void copy_chunk_by_l1(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? kChunkBytes : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

// Gathers steps of 64 channels of a tap each: a thread copies one chunk of four rows.
template <class Traits>
class TallGather {
  using T = typename Traits::T;
  static constexpr int kCopyRows = Traits::kThreads / 8, kOwnRows = Traits::kRows / kCopyRows;

 public:
  // first_step: at which a tile begins. Nothing here depends on the kernel before this one.
  __device__ TallGather(const GemmParams& p, int first_step)
      : p_(p), chunk_(static_cast<int>(threadIdx.x) % 8 * kVector) {
    const int row = static_cast<int>(threadIdx.x) / 8;
    to_ = row * kRowBytes + ((static_cast<int>(threadIdx.x) % 8 ^ (row & 7)) * kChunkBytes);
    first_y_ = first_x_ = first_channel_ = 0;
    if constexpr (Traits::kSplit) {
      const auto step = static_cast<unsigned>(first_step),
                 taps_x = static_cast<unsigned>(p.x_axis.phase.taps),
                 taps = static_cast<unsigned>(p.y.phase.taps) * taps_x, block = step / taps;
      const unsigned tap = step - block * taps;
      first_y_ = static_cast<int>(tap / taps_x);
      first_x_ = static_cast<int>(tap) - first_y_ * static_cast<int>(taps_x);
      first_channel_ = static_cast<int>(block) * Traits::kDepth;
      work_out(first_y_, first_x_, first_channel_);
    }
  }

  // Turns to a tile.
  __device__ void begin(const HopperRow* rows) {
    tap_y_ = first_y_, tap_x_ = first_x_, channel_ = first_channel_;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i)
      rows_[i] = rows[static_cast<int>(threadIdx.x) / 8 + i * kCopyRows];
  }
  // The block of packed weights that goes with the step: they are packed tap by tap.
  __device__ int weights() const {
    const int blocks = (static_cast<int>(p_.x.c) + Traits::kDepth - 1) / Traits::kDepth;
    return (tap_y_ * p_.x_axis.phase.taps + tap_x_) * blocks + channel_ / Traits::kDepth;
  }
  // The step into a stage; turns to the next.
  __device__ void load(uint32_t stage) {
    const uint32_t bits = 1u << tap_y_ | 1u << (kMostTaps + tap_x_);
    const int channel = channel_ + chunk_;
    const int offset =
        (tap_y_ * p_.y.phase.step * static_cast<int>(p_.x.w) + tap_x_ * p_.x_axis.phase.step) *
            static_cast<int>(p_.x.ld) +
        channel;
    const bool inside = channel < static_cast<int>(p_.x.c);
    const T* data = static_cast<const T*>(p_.x.data);
    // Windows find each other's sites in L1; where there is one tap, there is nothing to find.
    const bool by_l1 = p_.y.phase.taps > 1 || p_.x_axis.phase.taps > 1;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const uint32_t to = stage + to_ + i * kCopyRows * kRowBytes;
      const T* from = data + (rows_[i].from + offset);
      const bool valid = inside && (rows_[i].taps & bits) == bits;
      if (by_l1)
        copy_chunk_by_l1(to, from, valid);
      else
        copy_chunk(to, from, valid);
    }
    if (++tap_x_ < p_.x_axis.phase.taps) return;
    tap_x_ = 0;
    if (++tap_y_ < p_.y.phase.taps) return;
    tap_y_ = 0;
    channel_ += Traits::kDepth;
  }

 private:
  const GemmParams& p_;
  uint32_t to_;
  int chunk_, channel_, tap_y_, tap_x_;
  int first_y_, first_x_, first_channel_;  // of a tile
  HopperRow rows_[kOwnRows];
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerMultiprocessor)
    conv_hopper_tall_kernel(const __grid_constant__ GemmParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using namespace hopper;
  using T = typename Traits::T;
  constexpr int kRows = Traits::kRows, kColumns = Traits::kColumns, kThreads = Traits::kThreads;
  constexpr int kStages = Traits::kStages, kTiles = Traits::kTiles, kUnits = Traits::kUnits;
  extern __shared__ char dynamic[];
  __shared__ uint64_t barriers[kStages + 1];  // of the stages; of the sums from other blocks
  __shared__ HopperRow rows[kTiles][kRows];
  __shared__ int sites[kTiles][kRows];
  __shared__ __align__(16) ColumnConstants<kColumns> constants;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  const int first_column = static_cast<int>(blockIdx.y) * kColumns;
  const int steps = p.packed_depth / Traits::kDepth, parts = Traits::kSplit ? p.cluster : 1;
  const int part_bits = Traits::kSplit ? 31 - __clz(parts) : 0;
  const int blocks = static_cast<int>(gridDim.x) >> part_bits;  // that take tiles of their own
  const int block = static_cast<int>(blockIdx.x) >> part_bits;
  const int rank = static_cast<int>(blockIdx.x) & (parts - 1);
  const uint32_t unaligned = shared_address(dynamic), stages = (unaligned + 1023u) & ~1023u;
  // Nothing here depends on the kernel before this one.
  const char* weight = static_cast<const char*>(p.weight) +
                       static_cast<int64_t>(blockIdx.y) * steps * Traits::kBlockBytes;
  if (tid == 0) {
    for (uint64_t& barrier : barriers) init_barrier(shared_address(&barrier));
    publish_barriers();
    const int all = steps * Traits::kBlockBytes, shares = static_cast<int>(gridDim.x);
    const int share = (all / shares + 15) / 16 * 16;  // that this block asks for
    const int from = static_cast<int>(blockIdx.x) * share, bytes = min(share, all - from);
    if (bytes > 0) prefetch_bulk(weight + from, bytes);
  }
  constants.load(p, first_column);
  const FastActivation act(p.act);
  const float threshold =
      p.out.truncation.policy == Policy::none ? 0.f : *p.out.truncation.threshold;
  const int first_step = steps * rank >> part_bits, last_step = steps * (rank + 1) >> part_bits;
  TallGather<Traits> gather(p, first_step);
  const bool ahead = p.makers > 0;
  if (ahead)
    p.list.wait_until_done(p.makers);
  else
    wait_for_inputs();

  // The entry of this thread's row in the next tile whose rows it works out. The warp groups take
  // turns; the first two tiles' entries are read along with the number of all.
  const int first_entry = p.list.first(), own_row = tid % kRows;
  int own_tile = block + tid / kRows * blocks, entry = 0;
  if (first_entry + own_tile * kRows + own_row < p.sites)
    entry = p.list.entry(first_entry + own_tile * kRows + own_row);
  const int size = p.list.last() - first_entry, tiles = (size + kRows - 1) / kRows;
  if (block >= tiles) {
    if (ahead) wait_for_inputs();
    return;
  }

  // Works out rows of `own_tile` for slot `slot`, and reads the entries for this thread's next.
  const auto make_rows = [&](int slot) {
    const bool valid = own_tile * kRows + own_row < size;
    sites[slot][own_row] = valid ? entry : -1;
    rows[slot][own_row] = HopperRow(p, sites[slot][own_row]);
    own_tile += 2 * blocks;
    const int next = own_tile * kRows + own_row;
    if (next < size) entry = p.list.entry(first_entry + next);
  };
  make_rows(tid / kRows);
  __syncthreads();

  int load_tile = block, load_slot = 0, load_step = first_step;
  gather.begin(rows[0]);
  if (ahead) wait_for_inputs();
  const auto load = [&](int to) {
    if (!Traits::kSplit && load_step == last_step) {
      load_tile += blocks;
      load_slot = (load_slot + 1) % kTiles;
      load_step = first_step;
      if (load_tile < tiles) gather.begin(rows[load_slot]);
    }
    if (load_tile < tiles && load_step < last_step) {
      const uint32_t at = stages + to * Traits::kStageBytes;
      if (tid == 0) {
        const uint32_t barrier = shared_address(barriers + to);
        expect_bytes(barrier, Traits::kBlockBytes);
        copy_bulk(at + kRows * kRowBytes, weight + gather.weights() * Traits::kBlockBytes,
                  Traits::kBlockBytes, barrier);
      }
      gather.load(at);
      ++load_step;
    }
    commit_copies();
  };
  int stage = 0, exchanges = 0;
  uint32_t parity = 0;
  const auto load_first = [&] {
#pragma unroll 1
    for (int i = 0, to = stage; i < kStages - 1; ++i) {
      load(to);
      to = to + 1 == kStages ? 0 : to + 1;
    }
  };
  load_first();

  const int c = first_column + lane % 4 * kVector, local = lane % 4 * kVector;
  const int unit_row = tid / 128 * 64 + tid % 128 / 32 * 16 + lane / 4;  // and 8 rows below
  const int unit_bits = 31 - __clz(kUnits * kThreads) - part_bits, own_units = 1 << unit_bits;
  const uint32_t matrices = matrix_low(stages);
  const uint32_t own_rows = tid / 128 * 64 * kRowBytes / 16;
  int slot = 0;
#pragma unroll 1
  for (int tile = block; tile < tiles; tile += blocks, slot = (slot + 1) % kTiles) {
    // The rows of the tile after the next: of the warp groups, the one whose turn it is.
    if (tile + 2 * blocks < tiles && tid / kRows == slot % 2) make_rows((slot + 2) % kTiles);
    constexpr int kFetched = Traits::kSplit ? 1 : kUnits;
    SiteUnit<T, true> units[kFetched];
    const int split_unit = rank * own_units + tid;  // which unit of the tile this thread finishes
    const int split_row =
        split_unit % 256 / 128 * 64 + split_unit % 128 / 32 * 16 + lane / 4 + split_unit / 256 * 8;
    if constexpr (Traits::kSplit) {
      if (tid < own_units) units[0].fetch(p, sites[slot][split_row], c);
    } else {
#pragma unroll
      for (int k = 0; k < kUnits; ++k) units[k].fetch(p, sites[slot][unit_row + 8 * k], c);
      if (lane % 4 == 0 && tile + blocks < tiles) {
#pragma unroll
        for (int k = 0; k < kUnits; ++k)
          SiteUnit<T, true>::prefetch(p, sites[(slot + 1) % kTiles][unit_row + 8 * k], c);
      }
    }

    float sums[Traits::kSums];
    bool fresh = true;
#pragma unroll 1
    for (int step = first_step; step < last_step; ++step) {
      wait_for_copies<kStages - 2>();
      wait_for_products(sums);
      wait_for_barrier(shared_address(barriers + stage), parity);
      __syncthreads();
      const uint32_t at = matrices + stage * (Traits::kStageBytes / 16);
      begin_products();
#pragma unroll
      for (int k = 0; k < 4; ++k)  // 32 bytes of depth each
        multiply<T>(sums, matrix_at(at + own_rows + 2 * k),
                    matrix_at(at + kRows * kRowBytes / 16 + 2 * k), !(fresh && k == 0));
      commit_products();
      fresh = false;
      load(stage == 0 ? kStages - 1 : stage - 1);
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    wait_for_products(sums);

    const auto sum = [&](int k, int i) { return sums[i / 2 * 4 + 2 * k + i % 2]; };  // of unit k
    if constexpr (!Traits::kSplit) {
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        float y[2 * kVector];
#pragma unroll
        for (int i = 0; i < 2 * kVector; ++i) y[i] = sum(k, i);
        const bool written = units[k].template finish<1>(
            p, act, threshold, c, constants.bias + local, constants.scale + local, y);
        if (written) p.out.mask.data[units[k].site] = 1;
      }
    } else {
      // Each sum goes to the block that finishes its unit, which adds the blocks' up in their
      // order.
      const auto* results = reinterpret_cast<const float4*>(dynamic + (stages - unaligned));
      const uint32_t received = shared_address(barriers + kStages);
      if (tid == 0) expect_bytes(received, kRows * kColumns * 4);
      arrive_in_cluster();
      wait_for_cluster();  // all stages are free
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        const int u = k * kThreads + tid, to = u >> unit_bits;
#pragma unroll
        for (int four = 0; four < 4; ++four) {
          const int at = ((rank * 4 + four) << unit_bits) + u - (to << unit_bits);
          store_to_block(stages + at * 16, received, to,
                         make_float4(sum(k, 4 * four), sum(k, 4 * four + 1), sum(k, 4 * four + 2),
                                     sum(k, 4 * four + 3)));
        }
      }
      wait_for_barrier(received, exchanges & 1);
      ++exchanges;
      if (tid < own_units) {
        float y[2 * kVector] = {};
#pragma unroll 1
        for (int from = 0; from < parts; ++from) {
#pragma unroll
          for (int four = 0; four < 4; ++four) {
            const float4 v = results[((from * 4 + four) << unit_bits) + tid];
            y[4 * four] += v.x, y[4 * four + 1] += v.y;
            y[4 * four + 2] += v.z, y[4 * four + 3] += v.w;
          }
        }
        const bool written = units[0].template finish<2>(
            p, act, threshold, c, constants.bias + local, constants.scale + local, y);
        if (written) p.out.mask.data[units[0].site] = 1;
      }
      load_tile += blocks;
      if (load_tile >= tiles) break;
      fence_async();  // what was read of the stages' memory comes before the copies into it
      __syncthreads();
      load_slot = (load_slot + 1) % kTiles;
      load_step = first_step;
      gather.begin(rows[load_slot]);
      load_first();
    }
  }
#endif
}

template <class T>
cudaError_t launch_conv_hopper_tall(const GemmParams& p, cudaStream_t stream) {
  using Split = TallTraits<T, true>;
  using Whole = TallTraits<T, false>;
  return HopperTiling(p).cluster > 1
             ? launch_tiles<Split>(conv_hopper_tall_kernel<Split>, p, stream)
             : launch_tiles<Whole>(conv_hopper_tall_kernel<Whole>, p, stream);
}

}  // namespace deltafx::cuda
