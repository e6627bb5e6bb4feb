// depthwise_everywhere: bound by bytes. A thread has eight channels of a few columns and goes down
// the rows, so that it reads each input row once. Sums are those of the kernel for candidates, in
// the same order.
#include "cuda/depthwise_everywhere.h"

#include "cuda/activation.cuh"
#include "cuda/launch.h"

namespace deltafx::cuda {
namespace {

constexpr int kThreads = 128, kBlocksPerMultiprocessor = 3, kTaps = 3, kMostRows = 16;

// How the map is divided among threads: innermost the channels, then columns, rows and streams.
struct Division {
  Divisor vectors, strips, chunks;
  int rows;  // of a chunk
  int total;
};

constexpr int outputs_of(int stride) { return stride == 1 ? 4 : 2; }

template <class T, int kStride>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    depthwise_everywhere_kernel(const __grid_constant__ DepthwiseParams p,
                                const __grid_constant__ Division division) {
  constexpr int kOutputs = outputs_of(kStride), kInputs = (kOutputs - 1) * kStride + kTaps;
  using Row = Packet<T>[kInputs];
  wait_for_inputs();
  const int unit = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (unit >= division.total) return;
  const int across = division.vectors.divide(unit), down = division.strips.divide(across);
  const int n = division.chunks.divide(down);
  const int c0 = (unit - across * division.vectors.value) * kVector;
  const int x0 = (across - down * division.strips.value) * kOutputs;
  const int y0 = (down - n * division.chunks.value) * division.rows;
  const int h = static_cast<int>(p.acc.h), w = static_cast<int>(p.acc.w);
  const int rows = min(division.rows, h - y0), columns = min(kOutputs, w - x0);
  const int in_h = static_cast<int>(p.x.h), in_w = static_cast<int>(p.x.w);
  const int left = x0 * kStride - p.pad_x;
  const T* const stream = static_cast<const T*>(p.x.data) + n * p.x.h * p.x.w * p.x.ld + c0;
  const auto fetch = [&](Row& row, int iy) {
    const bool inside = iy >= 0 && iy < in_h;
    const T* from = stream + (static_cast<int64_t>(iy) * in_w + left) * p.x.ld;
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
#pragma unroll
      for (uint4& word : row[i].words) word = make_uint4(0, 0, 0, 0);
      if (inside && left + i >= 0 && left + i < in_w) row[i].load(from + i * p.x.ld);
    }
  };
  Packet<T> weights[kTaps * kTaps];
  const int channels = static_cast<int>(p.acc.c);
#pragma unroll
  for (int tap = 0; tap < kTaps * kTaps; ++tap)
    weights[tap].load(static_cast<const T*>(p.weight) + tap * channels + c0);
  float bias[kVector] = {};
  if (p.bias != nullptr) load_floats(p.bias + c0, kVector, bias);
  const FastActivation act(p.act);
  T* to =
      static_cast<T*>(p.acc.data) + ((static_cast<int64_t>(n) * h + y0) * w + x0) * p.acc.ld + c0;
  Row window[kTaps], next[kStride];  // asked for while the row before is computed
  int iy = y0 * kStride - p.pad_y;
#pragma unroll
  for (int j = kStride; j < kTaps; ++j) fetch(window[j], iy + j - kStride);
  iy += kTaps - kStride;
#pragma unroll
  for (int j = 0; j < kStride; ++j) fetch(next[j], iy++);
#pragma unroll 1
  for (int row = 0; row < rows; ++row, to += w * p.acc.ld) {
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
#pragma unroll
      for (int i = 0; i < kInputs; ++i)
        window[j][i] = j < kTaps - kStride ? window[j + kStride][i] : next[j - kTaps + kStride][i];
    }
    if (row + 1 < rows) {
#pragma unroll
      for (int j = 0; j < kStride; ++j) fetch(next[j], iy++);
    }
#pragma unroll
    for (int column = 0; column < kOutputs; ++column) {
      float y[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] = bias[i];
#pragma unroll
      for (int tap = 0; tap < kTaps * kTaps; ++tap) {
        const Packet<T>& x = window[tap / kTaps][column * kStride + tap % kTaps];
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          y[i] = fmaf(to_float(x.elements[i]), to_float(weights[tap].elements[i]), y[i]);
      }
      if (column >= columns) break;
      apply_in_half(act, p.act, c0, y);
      store_vector(to + column * p.acc.ld, kVector, true, y);
    }
  }
}

template <class T, int kStride>
cudaError_t launch_stride(const DepthwiseParams& p, cudaStream_t stream) {
  const FeatureMap& acc = p.acc;
  const auto up = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  const int vectors = static_cast<int>(acc.c / kVector), strips = up(acc.w, outputs_of(kStride));
  const int64_t enough =
      int64_t{2} * current_device().multiprocessors * kBlocksPerMultiprocessor * kThreads;
  const int64_t columns = acc.n * strips * vectors;
  int rows = kMostRows;
  while (rows > 1 && columns * up(acc.h, rows) < enough) rows /= 2;
  const int chunks = up(acc.h, rows);
  const Division division{Divisor(vectors), Divisor(strips), Divisor(chunks), rows,
                          static_cast<int>(columns * chunks)};
  return launch(depthwise_everywhere_kernel<T, kStride>, {up(division.total, kThreads), kThreads},
                stream, p, division);
}

template <class T>
cudaError_t launch_type(const DepthwiseParams& p, cudaStream_t stream) {
  return p.stride == 1 ? launch_stride<T, 1>(p, stream) : launch_stride<T, 2>(p, stream);
}

}  // namespace

cudaError_t depthwise_everywhere(const DepthwiseParams& p, cudaStream_t stream) {
  return p.acc.dtype == DType::f16 ? launch_type<__half>(p, stream)
                                   : launch_type<__nv_bfloat16>(p, stream);
}

}  // namespace deltafx::cuda
