// depthwise_everywhere: bound by bytes, if each is converted once. A thread has eight channels of
// two columns and goes down the rows: a row of inputs is added to all outputs that it is part of
// while the next one is on its way. Sums are those of the kernel for candidates, in the same order.
#include "cuda/depthwise_everywhere.h"

#include "cuda/activation.cuh"
#include "cuda/launch.h"

namespace deltafx::cuda {
namespace {

constexpr int kThreads = 128, kBlocksPerMultiprocessor = 3, kTaps = 3, kMostRows = 16;
constexpr int kOutputs = 2;  // of a thread, side by side

// How the map is divided among threads: innermost the channels, then columns, rows and streams.
struct Division {
  Divisor vectors, strips, chunks;
  int rows;  // of a chunk
  int total;
};

// Sums of a thread's outputs in one row.
using Sums = float[kOutputs][kVector];

template <class T, int kStride>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    depthwise_everywhere_kernel(const __grid_constant__ DepthwiseParams p,
                                const __grid_constant__ Division division) {
  constexpr int kInputs = (kOutputs - 1) * kStride + kTaps;
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
  int iy = y0 * kStride - p.pad_y;  // of the next row of inputs
  const int end = min(in_h, (y0 + rows - 1) * kStride - p.pad_y + kTaps);
  const T* from = static_cast<const T*>(p.x.data) + c0 +
                  ((static_cast<int64_t>(n) * in_h + iy) * in_w + left) * p.x.ld;
  Packet<T> next[kInputs];
  const auto fetch = [&](int i) {
#pragma unroll
    for (uint4& word : next[i].words) word = make_uint4(0, 0, 0, 0);
    if (iy >= 0 && iy < end && left + i >= 0 && left + i < in_w) next[i].load(from + i * p.x.ld);
  };
#pragma unroll
  for (int i = 0; i < kInputs; ++i) fetch(i);
  float weights[kTaps][kTaps][kVector], bias[kVector] = {};
  const int channels = static_cast<int>(p.acc.c);
#pragma unroll
  for (int tap = 0; tap < kTaps * kTaps; ++tap)
    load_vector(static_cast<const T*>(p.weight) + tap * channels + c0, kVector, true,
                weights[tap / kTaps][tap % kTaps]);
  if (p.bias != nullptr) load_floats(p.bias + c0, kVector, bias);
  // Adds the next row of inputs to the outputs whose tap row 0, 1 or 2 it is, and fetches the row
  // below it.
  const auto add_row = [&](Sums* of_0, Sums* of_1, Sums* of_2) {
    Sums* const outputs[kTaps] = {of_0, of_1, of_2};
    ++iy;
    from += in_w * p.x.ld;
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
      float x[kVector];
#pragma unroll
      for (int e = 0; e < kVector; ++e) x[e] = to_float(next[i].elements[e]);
      fetch(i);
#pragma unroll
      for (int column = 0; column < kOutputs; ++column) {
        const int jx = i - column * kStride;
        if (jx < 0 || jx >= kTaps) continue;
#pragma unroll
        for (int jy = 0; jy < kTaps; ++jy) {
          if (outputs[jy] == nullptr) continue;
          float (&y)[kVector] = (*outputs[jy])[column];
#pragma unroll
          for (int e = 0; e < kVector; ++e) y[e] = fmaf(x[e], weights[jy][jx][e], y[e]);
        }
      }
    }
  };
  const auto begin = [&](Sums& sums) {
#pragma unroll
    for (int column = 0; column < kOutputs; ++column) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) sums[column][e] = bias[e];
    }
  };
  const FastActivation act(p.act);
  T* to =
      static_cast<T*>(p.acc.data) + ((static_cast<int64_t>(n) * h + y0) * w + x0) * p.acc.ld + c0;
  Sums sums, below, last;  // of this row of outputs, and of the two after it
  begin(sums);
  add_row(&sums, nullptr, nullptr);
  if constexpr (kStride == 1) {
    begin(below);
    add_row(&below, &sums, nullptr);
  }
#pragma unroll 1
  for (int row = 0; row < rows; ++row, to += w * p.acc.ld) {
    begin(last);
    if constexpr (kStride == 1) {
      add_row(&last, &below, &sums);
    } else {
      add_row(nullptr, &sums, nullptr);
      add_row(&last, nullptr, &sums);
    }
#pragma unroll
    for (int column = 0; column < kOutputs; ++column) {
      if (column >= columns) break;
      apply_in_half(act, p.act, c0, sums[column]);
      store_vector(to + column * p.acc.ld, kVector, true, sums[column]);
    }
#pragma unroll
    for (int column = 0; column < kOutputs; ++column) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        sums[column][e] = kStride == 1 ? below[column][e] : last[column][e];
        below[column][e] = last[column][e];
      }
    }
  }
}

template <class T, int kStride>
cudaError_t launch_stride(const DepthwiseParams& p, cudaStream_t stream) {
  const FeatureMap& acc = p.acc;
  const auto up = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  const int vectors = static_cast<int>(acc.c / kVector), strips = up(acc.w, kOutputs);
  // Of the divisions into chunks of rows the one that takes the fewest turns of a row, two of which
  // a chunk has before its first output, when the device has its fill of threads again and again.
  const int64_t fill =
      int64_t{current_device().multiprocessors} * kBlocksPerMultiprocessor * kThreads;
  const int64_t columns = acc.n * strips * vectors;
  const auto turns = [&](int rows) {
    return up(columns * up(acc.h, rows), fill) * int64_t{rows + kTaps - 1};
  };
  int rows = kMostRows;
  for (int fewer = kMostRows - 1; fewer > 0; --fewer)
    if (turns(fewer) < turns(rows)) rows = fewer;
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
