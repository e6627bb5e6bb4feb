// gemm_everywhere: tiles of 128 sites on tensor cores; a thread's sums are eight neighbouring
// channels of a site, so that they go to memory as they are.
#include "cuda/gemm_everywhere.h"

#include "cuda/conv_gemm_loader.cuh"
#include "cuda/launch.h"

namespace deltafx::cuda {
namespace {

constexpr int kThreads = 128, kBlocksPerMultiprocessor = 3, kStages = 3;
constexpr int kRows = 128, kWarpRows = kRows / (kThreads / 32);
constexpr int kDepth = 32, kPitch = 2 * kDepth;  // of a stage: elements, bytes
constexpr int kGroup = 32;                       // channels that four tiles of 8 columns share
constexpr int kMostGroups = 3;

struct Tiles {
  Divisor columns;  // tiles side by side
  Divisor h, w;     // of the accumulator
  Divisor taps_x;
  int sites, depth, steps;
};

__host__ __device__ constexpr int stage_bytes(int groups) {
  return (kRows + groups * kGroup) * kPitch;
}

// Where chunk c of 16 bytes of a row of sites lies, and of a row of weights: eight rows that are
// read at once never meet in a bank.
__device__ __forceinline__ int site_offset(int row, int chunk) {
  return row * kPitch + (chunk ^ (row >> 1 & 3)) * kChunkBytes;
}
__device__ __forceinline__ int weight_offset(int row, int chunk) {
  return row * kPitch + (chunk ^ (row >> 3 & 3)) * kChunkBytes;
}

// Eight bytes into shared memory; zeros if not `valid`.
__device__ __forceinline__ void copy_site(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(from));
}

// Fills a stage of a pointwise convolution: a thread copies one chunk of every 32nd row.
template <class T, int kGroups>
__device__ __forceinline__ void load_pointwise(const GemmEverywhereParams& p, const Tiles& tiles,
                                               int site0, int channel0, int step, uint32_t stage) {
  const int row = static_cast<int>(threadIdx.x) / 4, chunk = static_cast<int>(threadIdx.x) % 4;
  const int k = step * kDepth + chunk * kVector;
  const bool inside = k < tiles.depth;
  const auto* x = static_cast<const T*>(p.x.data);
  const auto* weight = static_cast<const T*>(p.weight);
#pragma unroll
  for (int i = 0; i < kRows; i += kThreads / 4) {
    const int site = site0 + row + i;
    const bool valid = inside && site < tiles.sites;
    copy_chunk(stage + site_offset(row + i, chunk), valid ? x + site * p.x.ld + k : x, valid);
  }
#pragma unroll
  for (int i = 0; i < kGroups * kGroup; i += kThreads / 4) {
    const int channel = channel0 + row + i;
    const bool valid = inside && channel < p.acc.c;
    copy_chunk(stage + kRows * kPitch + weight_offset(row + i, chunk),
               valid ? weight + static_cast<int64_t>(channel) * tiles.depth + k : weight, valid);
  }
}

// Of an image: a thread copies one tap of every 16th row.
template <class T, int kGroups>
__device__ __forceinline__ void load_image(const GemmEverywhereParams& p, const Tiles& tiles,
                                           int site0, int channel0, int step, uint32_t stage) {
  constexpr int kTaps = kDepth / kImageChannels;
  const int row = static_cast<int>(threadIdx.x) / kTaps,
            tap = static_cast<int>(threadIdx.x) % kTaps;
  const int k = (step * kTaps + tap) * kImageChannels, half = tap % 2 * 8;
  const bool inside = k < tiles.depth;
  const int jy = tiles.taps_x.divide(step * kTaps + tap);
  const int jx = step * kTaps + tap - jy * tiles.taps_x.value;
  const auto* x = static_cast<const T*>(p.x.data);
  const auto* weight = static_cast<const T*>(p.weight);
#pragma unroll
  for (int i = 0; i < kRows; i += kThreads / kTaps) {
    const int site = site0 + row + i;
    const Position at = position_of(site, tiles.h, tiles.w);
    const int iy = at.y * p.stride_y - p.pad_y + jy, ix = at.x * p.stride_x - p.pad_x + jx;
    const bool valid =
        inside && site < tiles.sites && iy >= 0 && iy < p.x.h && ix >= 0 && ix < p.x.w;
    const int64_t offset = ((at.n * p.x.h + iy) * p.x.w + ix) * kImageChannels;
    copy_site(stage + site_offset(row + i, tap / 2) + half, valid ? x + offset : x, valid);
  }
#pragma unroll
  for (int i = 0; i < kGroups * kGroup; i += kThreads / kTaps) {
    const int channel = channel0 + row + i;
    const bool valid = inside && channel < p.acc.c;
    copy_site(stage + kRows * kPitch + weight_offset(row + i, tap / 2) + half,
              valid ? weight + static_cast<int64_t>(channel) * tiles.depth + k : weight, valid);
  }
}

template <class Math, bool kPointwise, int kGroups>
__device__ __forceinline__ void multiply_everywhere(const GemmEverywhereParams& p,
                                                    const Tiles& tiles) {
  using T = typename Math::T;
  extern __shared__ __align__(128) char shared[];
  wait_for_inputs();
  const auto stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int tile = tiles.columns.divide(static_cast<int>(blockIdx.x));
  const int channel0 =
      (static_cast<int>(blockIdx.x) - tile * tiles.columns.value) * kGroups * kGroup;
  const int site0 = tile * kRows;
  const auto load = [&](int step) {
    if (step < tiles.steps) {
      const uint32_t stage = stages + step % kStages * stage_bytes(kGroups);
      if constexpr (kPointwise)
        load_pointwise<T, kGroups>(p, tiles, site0, channel0, step, stage);
      else
        load_image<T, kGroups>(p, tiles, site0, channel0, step, stage);
    }
    commit_copies();
  };
  float sums[kWarpRows / 16][kGroups * 4][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load(step);
#pragma unroll 1
  for (int step = 0; step < tiles.steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1);
    const uint32_t stage = stages + step % kStages * stage_bytes(kGroups);
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[kWarpRows / 16][4];
#pragma unroll
      for (int i = 0; i < kWarpRows / 16; ++i)
        load_matrices(
            a[i], stage + site_offset(warp * kWarpRows + i * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
      for (int pair = 0; pair < kGroups * 2; ++pair) {
        // Column c of tile j is channel c / 2 * 8 + j * 2 + c % 2 of its group.
        const int j = pair % 2 * 2 + lane / 16, c = lane % 8;
        uint32_t b[4];
        load_matrices(b, stage + kRows * kPitch +
                             weight_offset(pair / 2 * kGroup + c / 2 * 8 + j * 2 + c % 2,
                                           k * 2 + lane / 8 % 2));
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < kWarpRows / 16; ++i) {
          Math::mma(sums[i][pair * 2], a[i], first);
          Math::mma(sums[i][pair * 2 + 1], a[i], second);
        }
      }
    }
  }
  const FastActivation act(p.act);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int c0 = channel0 + group * kGroup + lane % 4 * kVector;
    if (c0 >= p.acc.c) break;
    float bias[kVector] = {};
    if (p.bias != nullptr) load_floats(p.bias + c0, kVector, bias);
#pragma unroll
    for (int half = 0; half < kWarpRows / 8; ++half) {
      const int site = site0 + warp * kWarpRows + half * 8 + lane / 4;
      if (site >= tiles.sites) break;
      float y[kVector], residual[kVector] = {};
      if (p.residual.data != nullptr)
        load_vector(static_cast<const T*>(p.residual.data) + site * p.residual.ld + c0, kVector,
                    true, residual);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        y[i] = sums[half / 2][group * 4 + i / 2][half % 2 * 2 + i % 2] + bias[i];
        if (!p.residual_after_act) y[i] += residual[i];
      }
      apply_in_half(act, p.act, c0, y);
      if (p.residual_after_act) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) y[i] += residual[i];
      }
      store_vector(static_cast<T*>(p.acc.data) + site * p.acc.ld + c0, kVector, true, y);
    }
  }
}

template <class Math, bool kPointwise, int kGroups>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    gemm_everywhere_kernel(const __grid_constant__ GemmEverywhereParams p,
                           const __grid_constant__ Tiles tiles) {
  if constexpr (kHasAmpere)
    multiply_everywhere<Math, kPointwise, kGroups>(p, tiles);
  else
    __trap();  // cuDNN has these convolutions there
}

template <class Math, bool kPointwise, int kGroups>
cudaError_t launch_groups(const GemmEverywhereParams& p, cudaStream_t stream) {
  const auto up = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  const int columns = up(p.acc.c, kGroups * kGroup),
            depth = p.taps_y * p.taps_x * static_cast<int>(p.x.c);
  const Tiles tiles{
      Divisor(columns),  Divisor(static_cast<int>(p.acc.h)), Divisor(static_cast<int>(p.acc.w)),
      Divisor(p.taps_x), static_cast<int>(p.acc.sites()),    depth,
      up(depth, kDepth)};
  const Grid grid{columns * up(p.acc.sites(), kRows), kThreads, kStages * stage_bytes(kGroups)};
  return launch(gemm_everywhere_kernel<Math, kPointwise, kGroups>, grid, stream, p, tiles);
}

// Groups of channels in a tile: so many that all tiles together copy the fewest rows of sites and
// weights, but one where there would be fewer tiles than multiprocessors.
int groups_for(const FeatureMap& acc) {
  const int64_t tiles = (acc.sites() + kRows - 1) / kRows, needed = (acc.c + kGroup - 1) / kGroup;
  const auto columns = [&](int groups) { return (needed + groups - 1) / groups; };
  const auto rows = [&](int groups) { return columns(groups) * (kRows / kGroup + groups); };
  int best = 1;
  for (int groups = 2; groups <= kMostGroups; ++groups)
    if (rows(groups) < rows(best) && tiles * columns(groups) >= current_device().multiprocessors)
      best = groups;
  return best;
}

template <class Math, bool kPointwise>
cudaError_t launch_as(const GemmEverywhereParams& p, cudaStream_t stream) {
  switch (groups_for(p.acc)) {
    case 1:
      return launch_groups<Math, kPointwise, 1>(p, stream);
    case 2:
      return launch_groups<Math, kPointwise, 2>(p, stream);
    default:
      return launch_groups<Math, kPointwise, 3>(p, stream);
  }
}

template <class Math>
cudaError_t launch_math(const GemmEverywhereParams& p, cudaStream_t stream) {
  return p.is_pointwise ? launch_as<Math, true>(p, stream) : launch_as<Math, false>(p, stream);
}

}  // namespace

cudaError_t gemm_everywhere(const GemmEverywhereParams& p, cudaStream_t stream) {
  if (current_device().code < 80) return cudaErrorNotSupported;
  return p.acc.dtype == DType::f16 ? launch_math<Half>(p, stream)
                                   : launch_math<BFloat16>(p, stream);
}

}  // namespace deltafx::cuda
