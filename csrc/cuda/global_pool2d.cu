// global_pool2d: the mean over the sites of a stream, from sums over tiles that are never added to.
#include "cuda/ops.h"
#include "cuda/sites.cuh"

namespace deltafx::cuda {
namespace {

constexpr int kRows = 8;  // of threads, each row with a share of the tile's sites
constexpr int kTile = static_cast<int>(kPoolTile);

// One tile and up to 256 channels a block. tile_active: [n, tiles], set to 0 or 1.
__global__ void __launch_bounds__(32 * kRows)
    tile_kernel(GlobalPoolParams p, int tiles, bool aligned, int32_t* tile_active) {
  __shared__ float sums[kRows][32 * kVector];
  wait_for_inputs();
  const FeatureMap& x = p.x.map;
  const int sites = static_cast<int>(x.h * x.w);
  const int n = blockIdx.x / tiles, tile = blockIdx.x % tiles, lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32, count = min(kTile, sites - tile * kTile);
  const int64_t first = static_cast<int64_t>(n) * sites + static_cast<int64_t>(tile) * kTile;
  bool active = false;
  for (int i = threadIdx.x; i < count; i += 32 * kRows) active |= p.x.mask.data[first + i] != 0;
  active = __syncthreads_or(active);
  if (threadIdx.x == 0 && blockIdx.y == 0) tile_active[blockIdx.x] = active;
  if (!active) return;
  const int c0 = (blockIdx.y * 32 + lane) * kVector, left = static_cast<int>(x.c) - c0;
  float total[kVector] = {};
  if (left > 0) {
    // In runs of 16 sites, so that rounding errors grow with the root of the tile.
    for (int run = row * 16; run < count; run += kRows * 16) {
      float part[kVector] = {}, v[kVector];
      for (int s = run; s < min(run + 16, count); ++s) {
        load_any(x.data, x.dtype, (first + s) * x.ld + c0, left, aligned, v);
#pragma unroll
        for (int i = 0; i < kVector; ++i) part[i] += v[i];
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) total[i] += part[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) sums[row][lane * kVector + i] = total[i];
  __syncthreads();
  const int c = blockIdx.y * 32 * kVector + threadIdx.x;
  if (c >= x.c) return;
  float sum = 0.f;
#pragma unroll
  for (int r = 0; r < kRows; ++r) sum += sums[r][threadIdx.x];
  p.partial[(static_cast<int64_t>(n) * tiles + tile) * x.c + c] = sum;
}

struct StreamQuery {
  const int32_t* tile_active;
  int tiles;
  __device__ bool operator()(const Position& at) const {
    bool found = false;
    for (int t = 0; t < tiles; ++t) found |= tile_active[at.n * tiles + t] != 0;
    return found;
  }
};

struct Mean {
  const float* partial;
  int64_t channels;
  int tiles;
  float sites;
  bool aligned;

  __device__ void operator()(const Position& at, int, int c0, int count,
                             float (&y)[kVector]) const {
    const float* first = partial + static_cast<int64_t>(at.n) * tiles * channels + c0;
    for (int run = 0; run < tiles; run += 16) {
      float part[kVector] = {}, v[kVector];
      for (int t = run; t < min(run + 16, tiles); ++t) {
        load_vector(first + t * channels, count, aligned, v);
#pragma unroll
        for (int i = 0; i < kVector; ++i) part[i] += v[i];
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] += part[i];
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] = __fdiv_rn(y[i], sites);
  }
};

}  // namespace

cudaError_t global_pool2d(const GlobalPoolParams& p, int32_t* memory, cudaStream_t stream) {
  const FeatureMap& x = p.x.map;
  const int sites = static_cast<int>(x.h * x.w), tiles = (sites + kTile - 1) / kTile;
  int32_t* tile_active = memory + list_ints(p.out.acc.sites());
  const auto chunks = static_cast<int>((x.c + 32 * kVector - 1) / (32 * kVector));
  const Grid grid{static_cast<int>(x.n) * tiles, 32 * kRows, 0, 1, chunks};
  const cudaError_t error = launch(tile_kernel, grid, stream, p, tiles, is_aligned(x), tile_active);
  if (error != cudaSuccess) return error;
  const Mean f{p.partial, x.c, tiles, static_cast<float>(sites), x.c % kVector == 0};
  return update_sites(p.out, p.act, StreamQuery{tile_active, tiles}, f, memory, stream);
}

}  // namespace deltafx::cuda
