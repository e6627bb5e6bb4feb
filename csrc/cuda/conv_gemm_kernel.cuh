// Convolution as an implicit matrix product over a list of candidate sites: a tile is kRows sites
// by kColumns output channels. The sites' windows are gathered by cp.async into a ring of stages,
// multiplied on tensor cores, and finished (bias, residual, activation, update rule) from fp32
// results in shared memory, so that the accumulator is read and written in whole rows. For GPUs
// before Ampere there are instances that copy and multiply by ordinary instructions.
#pragma once

#include "cuda/conv_gemm_finish.cuh"

namespace deltafx::cuda {

template <class Traits>
struct GemmWarp {
  using Math = typename Traits::Math;
  float sums[Traits::kTilesM][Traits::kTilesN][4];
  int row, column, lane;  // of the warp in the tile

  __device__ GemmWarp()
      : row(static_cast<int>(threadIdx.x) / 32 / Traits::kWarpColumns * Traits::kTilesM * 16),
        column(static_cast<int>(threadIdx.x) / 32 % Traits::kWarpColumns * Traits::kTilesN * 8),
        lane(threadIdx.x % 32) {}

  __device__ void clear() {
#pragma unroll
    for (auto& a : sums)
#pragma unroll
      for (auto& b : a)
#pragma unroll
        for (float& v : b) v = 0.f;
  }

  __device__ void add(const GemmWarp& other) {
#pragma unroll
    for (int m = 0; m < Traits::kTilesM; ++m)
#pragma unroll
      for (int n = 0; n < Traits::kTilesN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] += other.sums[m][n][i];
  }

  static __device__ __forceinline__ uint32_t address(uint32_t tile, int r, int chunk) {
    return tile + r * kRowBytes + ((chunk ^ (r & 7)) * kChunkBytes);
  }

  // sums += A * B for a stage of depth.
  __device__ void multiply(uint32_t a_tile, uint32_t b_tile) {
    if constexpr (!Math::kTensorCores) {
      multiply_plainly(a_tile, b_tile);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t a[Traits::kTilesM][4], b[Traits::kTilesN][2];
#pragma unroll
        for (int m = 0; m < Traits::kTilesM; ++m)
          load_matrices(a[m], address(a_tile, row + m * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < Traits::kTilesN; n += 2) {
          uint32_t both[4];
          load_matrices(both, address(b_tile, column + n * 8 + lane % 8 + lane / 16 * 8,
                                      k * 2 + lane / 8 % 2));
          b[n][0] = both[0], b[n][1] = both[1], b[n + 1][0] = both[2], b[n + 1][1] = both[3];
        }
#pragma unroll
        for (int m = 0; m < Traits::kTilesM; ++m)
#pragma unroll
          for (int n = 0; n < Traits::kTilesN; ++n) Math::mma(sums[m][n], a[m], b[n]);
      }
    }
  }

  // The results into shared memory, [kRows][kPitch].
  __device__ void store(float* tile) const {
#pragma unroll
    for (int m = 0; m < Traits::kTilesM; ++m)
#pragma unroll
      for (int n = 0; n < Traits::kTilesN; ++n) {
        const int r = row + m * 16 + lane / 4, c = packed_channel(column + n * 8 + lane % 4 * 2);
        *reinterpret_cast<float2*>(tile + r * Traits::kPitch + c) =
            make_float2(sums[m][n][0], sums[m][n][1]);
        *reinterpret_cast<float2*>(tile + (r + 8) * Traits::kPitch + c) =
            make_float2(sums[m][n][2], sums[m][n][3]);
      }
  }

 private:
  static __device__ __forceinline__ void load_matrices(uint32_t (&v)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(address));
#pragma unroll
    for (uint32_t& word : v) word = Math::operand(word);
  }

  static constexpr int kElements = Traits::kChunkElements;
  static __device__ __forceinline__ void load_chunk(uint32_t address, float (&v)[kElements]) {
    union {
      uint4 words;
      typename Traits::T elements[kElements];
    } chunk;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(chunk.words.x), "=r"(chunk.words.y), "=r"(chunk.words.z),
                   "=r"(chunk.words.w)
                 : "r"(address));
#pragma unroll
    for (int i = 0; i < kElements; ++i) v[i] = to_float(chunk.elements[i]);
  }

  __device__ void multiply_plainly(uint32_t a_tile, uint32_t b_tile) {
#pragma unroll 1
    for (int chunk = 0; chunk < kRowBytes / kChunkBytes; ++chunk) {
      float a[Traits::kTilesM][2][kElements];
#pragma unroll
      for (int m = 0; m < Traits::kTilesM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          load_chunk(address(a_tile, row + m * 16 + half * 8 + lane / 4, chunk), a[m][half]);
#pragma unroll
      for (int n = 0; n < Traits::kTilesN; ++n)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          float b[kElements];
          load_chunk(address(b_tile, column + n * 8 + lane % 4 * 2 + side, chunk), b);
#pragma unroll
          for (int m = 0; m < Traits::kTilesM; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              // A chunk by itself: one long chain of sums would round more.
              float sum = a[m][half][0] * b[0];
#pragma unroll
              for (int i = 1; i < kElements; ++i) sum = fmaf(a[m][half][i], b[i], sum);
              sums[m][n][half * 2 + side] += sum;
            }
        }
    }
  }
};

template <class Traits>
__device__ __forceinline__ void conv_gemm_tiles(const GemmParams& p) {
  using T = typename Traits::T;
  constexpr int kRows = Traits::kRows, kColumns = Traits::kColumns, kThreads = Traits::kThreads;
  extern __shared__ __align__(128) char stages[];
  __shared__ GemmRow<T> rows[kRows];
  const int tid = static_cast<int>(threadIdx.x);
  const int channels = static_cast<int>(p.out.acc.c);
  wait_for_inputs();
  const int first_entry = p.list.first(), size = p.list.last() - first_entry;
  if (size == 0) return;

  const int blocks = static_cast<int>(gridDim.x), clusters = blocks / p.cluster;
  const int rank = static_cast<int>(blockIdx.x) % p.cluster;
  const int column_tiles = (channels + kColumns - 1) / kColumns;
  const int tiles = (size + kRows - 1) / kRows * column_tiles;
  const int steps = p.packed_depth / Traits::kDepth;
  // Split where the time, in steps of the slowest block, is shorter; 6 stands for the exchange.
  const bool split = Traits::kSplits && kHasClusters && p.cluster > 1 &&
                     (tiles + clusters - 1) / clusters * (steps / p.cluster + 6) <
                         (tiles + blocks - 1) / blocks * steps;
  const int parts = p.cluster, stride = split ? clusters : blocks;
  const int first_step = split ? steps * rank / parts : 0;
  const int last_step = split ? steps * (rank + 1) / parts : steps;
  float* results = reinterpret_cast<float*>(stages);
  const auto stages_address = static_cast<uint32_t>(__cvta_generic_to_shared(stages));

  for (int tile = split ? static_cast<int>(blockIdx.x) / parts : static_cast<int>(blockIdx.x);
       tile < tiles; tile += stride) {
    const int first_row = tile / column_tiles * kRows,
              first_column = tile % column_tiles * kColumns;
    for (int r = tid; r < kRows; r += kThreads) {
      const int i = first_row + r;
      rows[r] = GemmRow<T>(p, i < size ? p.list.entries[first_entry + i] : -1);
    }
    __syncthreads();

    GemmLoader<Traits> loader(p, rows, first_column, first_step, stages_address);
    GemmWarp<Traits> total, warp;
    total.clear();
    warp.clear();
    constexpr bool kAhead = Traits::kStages > 1;  // of the product, by cp.async
    if constexpr (kAhead) {
#pragma unroll 1
      for (int s = 0; s < Traits::kStages - 1; ++s) {
        if (first_step + s < last_step) loader.load(s);
        commit_copies();
      }
    }
    // The blocks of a split tile finish a part of its rows each.
    const int own_rows = split ? kRows / parts : kRows, own_first = split ? rank * own_rows : 0;
    GemmFinish<Traits>::prefetch(p, rows, own_first, own_rows, first_column);
    int part_end = split ? last_step : steps / parts, part = 1;
    for (int step = first_step; step < last_step; ++step) {
      if constexpr (kAhead) wait_for_copies<Traits::kStages - 2>();
      __syncthreads();
      const int ahead = step - first_step + Traits::kStages - 1;
      if (first_step + ahead < last_step) loader.load(ahead % Traits::kStages);
      if constexpr (kAhead)
        commit_copies();
      else
        __syncthreads();
      const uint32_t stage =
          stages_address + (step - first_step) % Traits::kStages * Traits::kStageBytes;
      warp.multiply(stage, stage + kRows * kRowBytes);
      if constexpr (Traits::kParts) {
        if (step + 1 == part_end) {
          total.add(warp);
          warp.clear();
          part_end = steps * ++part / parts;
        }
      }
    }
    GemmFinish<Traits> finish(p, rows, {own_first, own_rows, split ? parts : 1}, first_column);
    if constexpr (kAhead) wait_for_copies<0>();
    __syncthreads();
    if constexpr (Traits::kParts)
      total.store(results);
    else
      warp.store(results);
    if (split)
      cluster_sync();
    else
      __syncthreads();
    finish.run(results, stages_address);
    if (split)
      cluster_sync();
    else
      __syncthreads();
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerMultiprocessor)
    conv_gemm_kernel(const __grid_constant__ GemmParams p) {
  if constexpr (Traits::Math::kAmpere && !kHasAmpere)
    __trap();  // conv.cu launches the plain instances there
  else
    conv_gemm_tiles<Traits>(p);
}

template <class Traits>
cudaError_t launch_gemm(const GemmParams& p, cudaStream_t stream) {
  const int cluster = Traits::kSplits && current_device().code >= 90 ? p.cluster : 1;
  const int64_t row_tiles = (p.out.acc.sites() + Traits::kRows - 1) / Traits::kRows;
  const int64_t tiles = row_tiles * ((p.out.acc.c + Traits::kColumns - 1) / Traits::kColumns);
  const int64_t most = int64_t{Traits::kBlocksPerMultiprocessor} * current_device().multiprocessors;
  int64_t blocks = tiles * cluster < most ? tiles * cluster : most;
  blocks -= blocks % cluster;
  return launch(conv_gemm_kernel<Traits>,
                {static_cast<int>(blocks), Traits::kThreads, Traits::kSharedBytes, cluster}, stream,
                p);
}

// Large tiles pay once a twentieth of the sites fills the device with them; chunks where a vector
// of channels is within a tap.
template <class Math>
cudaError_t launch_conv_gemm(const GemmParams& p, cudaStream_t stream) {
  using Chunks = GemmTraits<Math, Gather::chunks, false>;
  const bool chunks = p.pre_scale == nullptr && p.y.phase.taps < kMostTaps &&
                      p.x_axis.phase.taps < kMostTaps && p.x.c % Chunks::kChunkElements == 0 &&
                      p.x.ld % Chunks::kChunkElements == 0 &&
                      reinterpret_cast<uintptr_t>(p.x.data) % kChunkBytes == 0;
  if (!chunks) return launch_gemm<GemmTraits<Math, Gather::elements, false>>(p, stream);
  if constexpr (Math::kTensorCores) {
    const int64_t tiles = p.out.acc.sites() / 128 * (p.out.acc.c / 128);
    if (p.out.acc.c % 128 == 0 && tiles >= 20 * current_device().multiprocessors)
      return launch_gemm<GemmTraits<Math, Gather::chunks, true>>(p, stream);
  }
  return launch_gemm<Chunks>(p, stream);
}

}  // namespace deltafx::cuda
