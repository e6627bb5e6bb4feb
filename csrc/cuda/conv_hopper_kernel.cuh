// Convolution in half precision on Hopper GPUs, as an implicit matrix product over the candidates.
//
// For few candidates: a tile is 64 sites by 64 output channels, each of two warp groups with half
// of the channels. The sites' windows are gathered by cp.async; the weights, which are packed
// as they will lie in shared memory, come by bulk copies. The weights' rows are ordered such that a
// thread ends up with the sums of 16 channels of a site, and four neighbouring threads with a
// truncation group. The depth of a tile may be split among the blocks of a cluster. A cluster finds
// the candidates of its share of the map for itself (shares.cuh), if it may. Code is kept
// short: a kernel that runs for a few microseconds pays for every instruction it has to fetch.
// conv_hopper_tall.cuh has the kernel for many candidates.
#pragma once

#include "cuda/conv_hopper.h"
#include "cuda/conv_hopper_finish.cuh"
#include "cuda/conv_hopper_gather.cuh"
#include "cuda/conv_hopper_launch.cuh"
#include "cuda/conv_hopper_tall.cuh"
#include "cuda/conv_query.cuh"
#include "cuda/hopper.cuh"

namespace deltafx::cuda {

// What a kernel is for: images, of up to four channels, four apart; Windows::points; or all else.
enum class Inputs { image, points, windows };

template <class Element, Inputs kInputs>
struct HopperTraits {
  using T = Element;
  static constexpr bool kImage = kInputs == Inputs::image, kPoints = kInputs == Inputs::points;
  static constexpr int kRows = 64, kColumns = 64, kThreads = 256, kStages = 4;
  static constexpr int kBlocksPerMultiprocessor = 2;
  static constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kSums = kRows * kColumns / kThreads;  // of a thread
  static constexpr int kBlockBytes = kWeightRows * kRowBytes;
  static constexpr int kStageBytes = (kRows + kColumns) * kRowBytes;
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes;
  // The last step of a split tile is in stage 0, so that the sums of other blocks may come
  // into the next one while its products are made.
  static constexpr int kSumStage = 1;
  static_assert(kRows * kColumns * 4 <= kStageBytes, "sums fit a stage");
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerMultiprocessor)
    conv_hopper_kernel(const __grid_constant__ GemmParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using namespace hopper;
  using T = typename Traits::T;
  constexpr int kRows = Traits::kRows, kColumns = Traits::kColumns, kThreads = Traits::kThreads;
  constexpr int kStages = Traits::kStages, kRowBits = 6;
  static_assert(kRows == 1 << kRowBits);
  extern __shared__ char dynamic[];
  __shared__ uint64_t barriers[kStages + 1];  // of the stages; of the sums from other blocks
  __shared__ int sites[kRows];                // of the tile; -1: none
  __shared__ HopperRow rows[Traits::kPoints ? 1 : kRows];
  __shared__ __align__(16) ColumnConstants<kColumns> constants;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  const int first_column = static_cast<int>(blockIdx.y) * kColumns;
  const int steps = p.packed_depth / Traits::kDepth, parts = p.cluster;
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const uint32_t unaligned = shared_address(dynamic), stages = (unaligned + 1023u) & ~1023u;
  // By a shuffle, since a plain address is worked out again, slowly, wherever it is used.
  const uint32_t first_barrier = __shfl_sync(kAllLanes, shared_address(barriers), 0);
  const auto barrier_of = [&](int stage) { return first_barrier + stage * sizeof(uint64_t); };
  char* stage_memory = dynamic + (stages - unaligned);
  // Nothing here depends on the kernel before this one.
  const char* weight =
      static_cast<const char*>(p.weight) +
      static_cast<int64_t>(first_column / kWeightRows) * steps * Traits::kBlockBytes;
  const int part_bits = 31 - __clz(parts), share = block >> part_bits, rank = block & (parts - 1);
  const bool lists_itself = p.shares.any(), ahead = p.makers > 0;
  // A step's weights into its stage.
  const auto load_weights = [&](int step, int to) {
    const uint32_t barrier = barrier_of(to);
    expect_bytes(barrier, Traits::kBlockBytes);
    copy_bulk(stages + to * Traits::kStageBytes + kRows * kRowBytes,
              weight + step * Traits::kBlockBytes, Traits::kBlockBytes, barrier);
  };
  static_assert((kStages & (kStages - 1)) == 0);
  const auto wrap = [](int stage) { return stage & (kStages - 1); };
  // The stage of a tile's first step, for so many of them.
  const auto first_stage = [&](int count) { return wrap(1 - count); };
  // The first steps' weights can be on their way as soon as it is known which those are: a share's
  // tiles are always split. `early`: the tile's first step for which they are not.
  const int own_step = steps * rank >> part_bits, own_end = steps * (rank + 1) >> part_bits;
  int early = lists_itself ? min(own_step + kStages - 1, own_end) : 0;
  const auto early_stage = [&](int step) {
    return wrap(first_stage(own_end - own_step) + step - own_step);
  };
  if (tid == 0) {
    for (int stage = 0; stage <= kStages; ++stage) init_barrier(barrier_of(stage));
    publish_barriers();
    for (int step = own_step; step < early; ++step) load_weights(step, early_stage(step));
    const int all = steps * Traits::kBlockBytes;
    // What a block asks for: about as much as each.
    const int each =
        (static_cast<int>(__fdividef(static_cast<float>(all), static_cast<float>(blocks))) + 16) &
        ~15;
    const int bytes = min(each, all - block * each);
    if (bytes > 0) prefetch_bulk(weight + block * each, bytes);
  }
  constants.load(p, first_column);
  const FastActivation act(p.act);
  const float threshold =
      p.out.truncation.policy == Policy::none ? 0.f : *p.out.truncation.threshold;
  HopperGather<Traits> gather(p);
  gather.begin(lists_itself ? own_step : 0);
  using Query = std::conditional_t<Traits::kPoints, PointQuery, ConvQuery>;
  const Query query(p);
  OwnCandidates<kThreads, Query> own(query, p.shares, share);
  if (lists_itself) own.prepare();
  if (ahead)
    p.list.wait_until_done(p.makers);
  else
    wait_for_inputs();

  // The cluster's tiles are those of its share, or every so many of the list. In a list, a guess at
  // the first tile's sites is read along with their number.
  const int guess = share * kRows + tid;
  int size, first_entry = 0, entry = 0;
  if (lists_itself) {
    own.find();
    size = own.size();
    if (size > 0 && tid == 0 && rank == 0 && blockIdx.y == 0) add_to(p.out.counts, size);
  } else {
    first_entry = p.list.first();
    if (tid < kRows && first_entry + guess < p.sites) entry = p.list.entry(first_entry + guess);
    size = p.list.last() - first_entry;
  }
  const int workers = lists_itself ? parts : blocks, clusters = workers >> part_bits;
  const int worker = lists_itself ? rank : block;
  const int tiles = (size + kRows - 1) / kRows;
  // The tiles of a list are split where the time, in steps of the slowest block, is shorter; 6
  // stands for the exchange.
  const auto rounds = [&](int among) {
    return ceilf(__fdividef(static_cast<float>(tiles), static_cast<float>(among)));
  };
  const bool split = parts > 1 && (lists_itself ||
                                   rounds(clusters) * static_cast<float>((steps >> part_bits) + 6) <
                                       rounds(workers) * static_cast<float>(steps));
  const int first_tile = split ? worker >> part_bits : worker;
  if (first_tile >= tiles) {
    if (ahead) wait_for_inputs();
    // What was asked for must have come before the block's memory is another's.
    if (tid == 0)
      for (int step = own_step; step < early; ++step)
        wait_for_barrier(barrier_of(early_stage(step)), 0);
    return;
  }
  const int first_step = split ? own_step : 0, last_step = split ? own_end : steps;
  // A unit is a quarter of a row's channels. Of a split tile a block finishes every so many of the
  // rows.
  const int local = tid % 4 * kVector, c = first_column + local;
  const int row_bits = split ? part_bits : 0, first_own_row = split ? rank : 0;
  const int unit_bits = kRowBits + 2 - row_bits, own_units = 1 << unit_bits;
  const int own_row = (tid / 4 << row_bits) + first_own_row;
  const int at_first = first_stage(last_step - first_step);
  if (!lists_itself) {
    early = min(first_step + kStages - 1, last_step);
    if (tid == 0)
      for (int step = first_step; step < early; ++step)
        load_weights(step, wrap(at_first + step - first_step));
  }
  int exchanges = 0;
  uint32_t phases = 0;  // of the stages' barriers, a bit each
  bool first = true;

#pragma unroll 1
  for (int tile = first_tile; tile < tiles; tile += split ? clusters : workers, first = false) {
    const int first_row = tile * kRows, count = min(kRows, size - first_row);
    // What was written to the stages' memory comes before the copies into it.
    if (!first) fence_async();
    if (lists_itself) {
      own.list(first_row, sites);
    } else {
      if (!first) __syncthreads();
      const int i = first_row + tid;
      if (i != guess && tid < count) entry = p.list.entry(first_entry + i);
      if (tid < count) sites[tid] = entry;
    }
    if (tid >= count && tid < kRows) sites[tid] = -1;
    if constexpr (!Traits::kPoints) {
      if (lists_itself) __syncthreads();
      if (tid < kRows) rows[tid] = HopperRow(p, sites[tid]);
    }
    __syncthreads();

    if (!first || !lists_itself) gather.begin(first_step);
    if constexpr (Traits::kPoints)
      gather.take(sites);
    else
      gather.take(rows);
    if (first && ahead) wait_for_inputs();
    int next = first_step;
    // The next step of depth into stage `to`.
    const auto load = [&](int to) {
      if (next < last_step) {
        if (tid == 0 && next >= early) load_weights(next, to);
        gather.load(stages + to * Traits::kStageBytes);
      }
      ++next;
      commit_copies();
    };
    int stage = at_first;
#pragma unroll(Traits::kPoints ? kStages - 1 : 1)
    for (int i = 0; i < kStages - 1; ++i) load(wrap(stage + i));

    SiteUnit<T, !Traits::kImage> unit;
    // By whole warps.
    const bool finishes = tid < own_units && own_row - (lane / 4 << row_bits) < count;
    if (finishes) unit.fetch(p, sites[own_row], c);

    float sums[Traits::kSums], total[Traits::kSums];
#pragma unroll
    for (float& v : total) v = 0.f;
    int part = 1, part_end = split ? last_step : steps >> part_bits;
    bool fresh = true;
    const uint32_t matrices = matrix_low(stages);
    const uint32_t own_columns = (kRows + tid / 128 * 32) * kRowBytes / 16;
#pragma unroll 1
    for (int step = first_step; step < last_step; ++step) {
      wait_for_copies<kStages - 2>();
      // cp.async writes as the threads do, and was seen to need no fence before the products.
      wait_for_products(sums);
      wait_for_barrier(barrier_of(stage), phases >> stage & 1);
      phases ^= 1u << stage;
      __syncthreads();
      if (split && step == last_step - 1) arrive_in_cluster();  // kSumStage is free
      if (step == part_end) {
#pragma unroll
        for (int i = 0; i < Traits::kSums; ++i) total[i] += sums[i];
        part_end = steps * ++part >> part_bits;
        fresh = true;
      }
      const uint32_t at = matrices + stage * (Traits::kStageBytes / 16);
      begin_products();
#pragma unroll
      for (int k = 0; k < 4; ++k)  // 32 bytes of depth each
        multiply<T>(sums, matrix_at(at + 2 * k), matrix_at(at + own_columns + 2 * k),
                    !(fresh && k == 0));
      commit_products();
      fresh = false;
      load(wrap(stage - 1));
      stage = wrap(stage + 1);
    }
    wait_for_products(sums);
    early = 0;

    // The sums: of a whole tile to its own threads, of a split one to the block that finishes the
    // row, which adds the blocks' sums up in their order. [from block][four of 16][unit]
    constexpr int kSumsAt = Traits::kSumStage * Traits::kStageBytes;
    auto* results = reinterpret_cast<float4*>(stage_memory + kSumsAt);
    const uint32_t received = barrier_of(kStages);
    if (split) {
      // Of as many of the rows as there are.
      const int own_rows = (count - rank + parts - 1) >> part_bits;
      if (tid == 0) expect_bytes(received, own_rows * parts * kColumns * 4);
      wait_for_cluster();
    }
    const int thread = here(tid);
#pragma unroll
    for (int k = 0; k < 2; ++k) {  // this group's eight channels of two rows
      const int row = thread % 128 / 32 * 16 + thread % 32 / 4 + k * 8;
      if (row >= count) continue;
      const int place = (row >> row_bits) * 4 + thread % 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int four = thread / 128 * 2 + half;
        const auto value = [&](int j) {
          const int i = half * 8 + k * 2 + j;
          return total[i] + sums[i];
        };
        const float4 v = make_float4(value(0), value(1), value(4), value(5));
        if (split) {
          const int at = ((rank * 4 + four) << unit_bits) + place;
          store_to_block(stages + kSumsAt + at * 16, received, row & (parts - 1), v);
        } else {
          results[(four << unit_bits) + place] = v;
        }
      }
    }
    if (split) {
      wait_for_barrier(received, exchanges & 1);
      ++exchanges;
    } else {
      __syncthreads();
    }
    if (!finishes) continue;
    float y[2 * kVector] = {};
    const float4* sum = results + tid;
#pragma unroll 2
    for (int from = 0; from < (split ? parts : 1); ++from) {
#pragma unroll
      for (int four = 0; four < 4; ++four, sum += own_units) {
        const float4 v = *sum;
        y[4 * four] += v.x, y[4 * four + 1] += v.y;
        y[4 * four + 2] += v.z, y[4 * four + 3] += v.w;
      }
    }
    const bool written = unit.template finish<2>(p, act, threshold, c, constants.bias + local,
                                                 constants.scale + local, y);
    if (written) p.out.mask.data[unit.site] = 1;
  }
#endif
}

template <class T>
cudaError_t launch_conv_hopper(const GemmParams& p, cudaStream_t stream) {
  using Image = HopperTraits<T, Inputs::image>;
  using Points = HopperTraits<T, Inputs::points>;
  using Others = HopperTraits<T, Inputs::windows>;
  if (p.x.c <= 4) return launch_tiles<Image>(conv_hopper_kernel<Image>, p, stream);
  if (HopperTiling(p).tall) return launch_conv_hopper_tall<T>(p, stream);
  if (p.windows == Windows::points)
    return launch_tiles<Points>(conv_hopper_kernel<Points>, p, stream);
  return launch_tiles<Others>(conv_hopper_kernel<Others>, p, stream);
}

}  // namespace deltafx::cuda
