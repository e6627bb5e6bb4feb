// encode: a dense tensor (the frame, or a dense op's result) against its accumulator. Every site is
// a candidate, so there is no list.
#include <type_traits>

#include "cuda/branch.cuh"
#include "cuda/ops.h"
#include "cuda/sites.cuh"

namespace deltafx::cuda {
namespace {

constexpr int kThreads = 256;

// The begin of a frame in the same kernel: what begin_frame adds to a comparison. The vectors of
// the arena of masks but the input's own, which the kernel writes whole.
struct Begin {
#if CUDART_VERSION >= 13000
  Decision decision;
#endif
  uint4* masks;
  int vectors, own, own_first;
  int64_t* counts;
  int count;
};

// All that a kernel here takes, in one parameter, so that read_frame can replace it.
struct EncodeLaunch {
  EncodeParams p;
  Divisor rows, columns;  // of squares in an image; image_kernel: of warps in a row of squares
  bool aligned;           // the accumulator, for whole vectors
  Begin begin;            // of a kernel that begins a frame
};

__device__ __forceinline__ int64_t sites_of(const FeatureMap& map) { return map.n * map.h * map.w; }

// Counts all sites as candidates.
__device__ __forceinline__ void count_candidates(const Output& out) {
  if (blockIdx.x == 0 && threadIdx.x == 0) out.counts[0] = sites_of(out.acc);
}

template <class S>
__device__ __forceinline__ const S* frame_at(const EncodeParams& p, const Position& at) {
  return static_cast<const S*>(p.x) + at.n * p.stride_n + at.y * p.stride_h + at.x * p.stride_w;
}

__device__ __forceinline__ Position position_in(const FeatureMap& acc, int site) {
  return position_of(site, static_cast<int>(acc.h), static_cast<int>(acc.w));
}

// Few channels: a thread a site.
template <class S, class T>
__global__ void __launch_bounds__(kThreads)
    narrow_kernel(const __grid_constant__ EncodeLaunch launched) {
  const EncodeParams& p = launched.p;
  wait_for_inputs();
  count_candidates(p.out);
  const FeatureMap& acc = p.out.acc;
  const Truncation& truncation = p.out.truncation;
  const int64_t site = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int c = static_cast<int>(acc.c);
  if (site < sites_of(acc)) {
    const S* x = frame_at<S>(p, position_in(acc, static_cast<int>(site)));
    T* row = static_cast<T*>(acc.data) + site * acc.ld;
    const bool compare = truncation.policy != Policy::none;
    const float t = compare ? *truncation.threshold : 0.f;
    T y[kVector];
    float total = 0.f;
    bool beyond = false, differs = false;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i >= c) break;
      y[i] = from_float<T>(to_float(x[i * p.stride_c]));
      if (!compare) continue;
      const float change = to_float(y[i]) - to_float(row[i]);
      const float scaled = change * truncation.inv_scale[i];
      differs |= !(to_float(y[i]) == to_float(row[i]));
      beyond |= !(fabsf(scaled) <= t);
      total += scaled * scaled;
    }
    const bool changed = !compare   ? true
                         : t == 0.f ? differs
                         : truncation.policy == Policy::rms
                             ? !(total <= t * t * static_cast<float>(c))
                             : beyond;
    if (changed) {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (i < c) row[i] = y[i];
      p.out.mask.data[site] = 1;
    }
  }
}

// Many channels: a warp a site.
template <class S, class T>
__global__ void __launch_bounds__(kThreads)
    wide_kernel(const __grid_constant__ EncodeLaunch launched) {
  const EncodeParams& p = launched.p;
  wait_for_inputs();
  count_candidates(p.out);
  const FeatureMap& acc = p.out.acc;
  const int64_t site = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int c = static_cast<int>(acc.c), lane = threadIdx.x % 32;
  if (site < sites_of(acc)) {
    const S* x = frame_at<S>(p, position_in(acc, static_cast<int>(site)));
    bool active = false;
    for (int base = 0; base < c; base += 32 * kVector) {
      const int c0 = base + lane * kVector, count = min(kVector, c - c0);
      float y[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] = i < count ? to_float(x[(c0 + i) * p.stride_c]) : 0.f;
      active |= update_group<T>(p.out, launched.aligned, static_cast<int>(site), c0, count, y);
    }
    if (active) p.out.mask.data[site] = 1;
  }
}

// How far four channels of a site, as they would be stored, are from its accumulator.
template <class S, class T>
struct FourChannels {
  static constexpr int kMost = 4;
  float change[kMost];
  bool differs;

  // whole: four channels of the row may be read, at a multiple of their size.
  __device__ FourChannels(const S* x, int64_t stride, const T* row, int count, bool whole)
      : differs(false) {
    union Four {
      uint2 word;
      T elements[kMost];
      __device__ Four() {}
    } old;
    if (sizeof(T) == 2 && whole) old.word = *reinterpret_cast<const uint2*>(row);
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      if (k >= count) break;
      const float a = to_float(from_float<T>(to_float(x[k * stride])));
      const float b = to_float(sizeof(T) == 2 && whole ? old.elements[k] : row[k]);
      change[k] = a - b;
      differs |= !(a == b);
    }
  }
};

// Squares of sites gated by their RMS, a warp a square: the whole square is written, or none of it.
// At threshold 0, which only the device knows, each site is gated by itself.
template <class S, class T>
__global__ void __launch_bounds__(kThreads)
    square_kernel(const __grid_constant__ EncodeLaunch launched) {
  const EncodeParams& p = launched.p;
  const int rows = launched.rows.value, columns = launched.columns.value;
  wait_for_inputs();
  count_candidates(p.out);
  using Four = FourChannels<S, T>;
  const FeatureMap& acc = p.out.acc;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int c = static_cast<int>(acc.c), lane = threadIdx.x % 32;
  const int block = static_cast<int>(p.block), pitch = static_cast<int>(acc.ld);
  const bool whole = pitch == 4 && reinterpret_cast<uintptr_t>(acc.data) % 8 == 0;
  if (index < acc.n * rows * columns) {
    const Position square = position_of(static_cast<int>(index), rows, columns);
    const int y0 = square.y * block, x0 = square.x * block;
    const int height = min(block, static_cast<int>(acc.h) - y0);
    const int width = min(block, static_cast<int>(acc.w) - x0), size = height * width;
    const float t = *p.out.truncation.threshold;
    const int64_t first = (square.n * acc.h + y0) * acc.w + x0;
    const S* frame = frame_at<S>(p, {square.n, y0, x0});
    T* data = static_cast<T*>(acc.data) + first * acc.ld;
    // Calls f(offset of the site, its frame) for this lane's sites.
    const auto for_sites = [&](const auto& f) {
      const int down = 32 / width, right = 32 - down * width;
      int y = lane / width, x = lane - y * width;
#pragma unroll 4
      for (int i = lane; i < size; i += 32) {
        f(y * static_cast<int>(acc.w) + x, frame + (y * p.stride_h + x * p.stride_w));
        y += down, x += right;
        if (x >= width) x -= width, ++y;
      }
    };
    const auto write = [&](int site, const S* x) {
      T* row = data + static_cast<int64_t>(site) * pitch;
      for (int k = 0; k < c; ++k) row[k] = from_float<T>(to_float(x[k * p.stride_c]));
      p.out.mask.data[first + site] = 1;
    };
    if (t == 0.f) {
      for_sites([&](int site, const S* x) {
        const T* row = data + static_cast<int64_t>(site) * pitch;
        bool differs = false;
        for (int k = 0; k < c; k += Four::kMost)
          differs |= Four(x + k * p.stride_c, p.stride_c, row + k, c - k, whole).differs;
        if (differs) write(site, x);
      });
    } else {
      float total = 0.f;
      for_sites([&](int site, const S* x) {
        const T* row = data + static_cast<int64_t>(site) * pitch;
        for (int k0 = 0; k0 < c; k0 += Four::kMost) {
          const Four four(x + k0 * p.stride_c, p.stride_c, row + k0, c - k0, whole);
#pragma unroll
          for (int k = 0; k < Four::kMost; ++k) {
            if (k0 + k >= c) break;
            const float d = four.change[k] * p.out.truncation.inv_scale[k0 + k];
            total += d * d;
          }
        }
      });
#pragma unroll
      for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
      if (!(total <= t * t * static_cast<float>(size * c))) for_sites(write);
    }
  }
}

// The same for images in half precision whose rows are whole vectors, and squares of 8 or 16 sites
// a side: a warp has a square, or four side by side, and reads both the frame and the accumulator
// in vectors that lie next to each other. A vector of the accumulator is two sites; so that each
// thread has the same of the frame, this goes through shared memory.
constexpr int kImageChannels = 3, kImagePitch = 4, kSites = 2;

// A vector into shared memory, zeros if not `valid`; it is there after arrive().
__device__ __forceinline__ void copy_vector(uint4* to, const uint4* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
               : "memory");
#else
  *to = valid ? *from : make_uint4(0, 0, 0, 0);
#endif
}
// All that the warp has copied.
__device__ __forceinline__ void arrive() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  __syncwarp();
}

template <class T>
union TwoFrameSites {
  uint32_t words[kImageChannels];
  T elements[kSites][kImageChannels];
  __device__ TwoFrameSites() {}
};

template <class T>
union TwoSites {
  uint4 word;
  T elements[kSites][kImagePitch];
  uint2 sites[kSites];
  __device__ TwoSites() {}

  __device__ bool differs(const TwoFrameSites<T>& frame, int site) const {
    bool found = false;
#pragma unroll
    for (int k = 0; k < kImageChannels; ++k)
      found |= !(to_float(frame.elements[site][k]) == to_float(elements[site][k]));
    return found;
  }
  __device__ void take(const TwoFrameSites<T>& frame, int site) {
#pragma unroll
    for (int k = 0; k < kImageChannels; ++k) elements[site][k] = frame.elements[site][k];
  }
};

// Clears what is there for the frame, and counts the input's sites as candidates.
__device__ __forceinline__ void clear_arenas(const Begin& begin, const Output& out) {
  const int first = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int step = static_cast<int>(gridDim.x) * kThreads;
  for (int i = first; i < begin.count; i += step)
    begin.counts[i] = begin.counts + i == out.counts ? sites_of(out.acc) : 0;
  for (int i = first; i < begin.vectors - begin.own; i += step)
    begin.masks[i < begin.own_first ? i : i + begin.own] = make_uint4(0, 0, 0, 0);
}

#if CUDART_VERSION >= 13000
// Decides on the frame, in the block that began last. `changed`: of each warp's square.
__device__ __forceinline__ void decide_frame(const Begin& begin, int ticket, bool changed) {
  __shared__ bool clears;
  const int here = __syncthreads_count(changed && threadIdx.x % 32 == 0);
  if (threadIdx.x == 0) {
    clears = false;
    int all;
    if (begin.decision.end(ticket, here, &all)) {
      clears = begin.decision.decide(all) == kEverywhere;
      if (begin.decision.has_everywhere)
        cudaGraphSetConditional(begin.decision.handle, clears ? 1 : 0);
    }
  }
  __syncthreads();
  if (!clears) return;
  for (int i = static_cast<int>(threadIdx.x); i < begin.own; i += kThreads)
    begin.masks[begin.own_first + i] = make_uint4(0, 0, 0, 0);
}
#endif

// kBegins: it is the first kernel of a frame; then it writes the whole mask, the changed and the
// others.
template <class T, int kSquare, bool kBegins>
__global__ void __launch_bounds__(kThreads)
    image_kernel(const __grid_constant__ EncodeLaunch launched) {
  const EncodeParams& p = launched.p;
  const Divisor &rows = launched.rows, &columns = launched.columns;
  // Vectors in a row of the warp's sites: of the accumulator, of the frame. So many of each a
  // thread.
  constexpr int kAcross = 128 / kSquare, kFrameAcross = kAcross * 3 / 4;
  constexpr int kPairs = kSquare * kAcross / 32, kVectors = kSquare * kFrameAcross / 32;
  __shared__ uint4 staged[kThreads / 32][kVectors * 32];
  wait_for_inputs();
  int ticket = 0;
  if constexpr (!kBegins) count_candidates(p.out);
#if CUDART_VERSION >= 13000
  if constexpr (kBegins)
    if (threadIdx.x == 0) ticket = launched.begin.decision.begin();
#endif
  const FeatureMap& acc = p.out.acc;
  const int h = static_cast<int>(acc.h), w = static_cast<int>(acc.w), lane = threadIdx.x % 32;
  const int index = static_cast<int>((blockIdx.x * kThreads + threadIdx.x) / 32);
  const int row_of_squares = columns.divide(index), n = rows.divide(row_of_squares);
  const int y0 = (row_of_squares - n * rows.value) * kSquare;
  const int x0 = (index - row_of_squares * columns.value) * kAcross * kSites;
  const int height = n < acc.n ? min(kSquare, h - y0) : 0;
  const float t = *p.out.truncation.threshold;
  auto& warp = staged[threadIdx.x / 32];
  const T* const frame = frame_at<T>(p, {n, y0, x0});
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int row = (i * 32 + lane) / kFrameAcross, across = (i * 32 + lane) % kFrameAcross;
    copy_vector(&warp[i * 32 + lane],
                reinterpret_cast<const uint4*>(frame + row * p.stride_h) + across,
                row < height && across * 8 < (w - x0) * kImageChannels);
  }
  // This thread's sites: two of every so many rows.
  const int y = y0 + lane / kAcross, x = x0 + lane % kAcross * kSites;
  const int64_t first = (static_cast<int64_t>(n) * h + y) * w + x;
  const int down = 32 / kAcross * w;
  auto* const to = reinterpret_cast<uint4*>(static_cast<T*>(acc.data) + first * kImagePitch);
  const auto inside = [&](int i) { return y + 32 / kAcross * i < y0 + height && x < w; };
  TwoSites<T> old[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i)
    if (inside(i)) old[i].word = to[i * down / kSites];
  float scale[kImageChannels];
#pragma unroll
  for (int k = 0; k < kImageChannels; ++k) scale[k] = p.out.truncation.inv_scale[k];
  if constexpr (kBegins) clear_arenas(launched.begin, p.out);  // while the vectors are on their way
  arrive();
  // Read anew each time (and so volatile), as registers are few.
  const volatile auto* own = reinterpret_cast<const uint32_t*>(warp) + lane * kImageChannels;
  const auto frame_of = [&](int i) {
    TwoFrameSites<T> sites;
#pragma unroll
    for (int k = 0; k < kImageChannels; ++k) sites.words[k] = own[i * 32 * kImageChannels + k];
    return sites;
  };
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    if (!inside(i)) continue;
    const TwoFrameSites<T> sites = frame_of(i);
#pragma unroll
    for (int s = 0; s < kSites; ++s) {
#pragma unroll
      for (int k = 0; k < kImageChannels; ++k) {
        const float d =
            (to_float(sites.elements[s][k]) - to_float(old[i].elements[s][k])) * scale[k];
        total += d * d;
      }
    }
  }
#pragma unroll
  for (int step = 1; step < kSquare / kSites; step *= 2)
    total += __shfl_xor_sync(kAllLanes, total, step);
#pragma unroll
  for (int step = kAcross; step < 32; step *= 2) total += __shfl_xor_sync(kAllLanes, total, step);
  // Marks two sites. What others have marked before is left, but at the begin of a frame, where
  // nobody has and nothing is cleared.
  bool marked = false;
  const auto mark = [&](int i, uint16_t marks) {
    uint8_t* const at = p.out.mask.data + first + i * down;
    if (kBegins || marks == 0x0101)
      *reinterpret_cast<uint16_t*>(at) = marks;
    else if (marks != 0)
      at[marks == 1 ? 0 : 1] = 1;
    marked |= marks != 0;
  };
  if (t == 0.f) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (!inside(i)) continue;
      const TwoFrameSites<T> sites = frame_of(i);
      uint16_t marks = 0;
#pragma unroll
      for (int s = 0; s < kSites; ++s) {
        if (!old[i].differs(sites, s)) continue;
        old[i].take(sites, s);
        reinterpret_cast<uint2*>(to)[i * down + s] = old[i].sites[s];
        marks |= static_cast<uint16_t>(1 << (8 * s));
      }
      mark(i, marks);
    }
  } else {
    const int size = height * min(kSquare, w - x / kSquare * kSquare) * kImageChannels;
    const bool changed = !(total <= t * t * static_cast<float>(size));
    if constexpr (kBegins) {  // the warp's one square: half a row of it a lane
      static_assert(kSquare == 16, "32 lanes for 16 rows of two halves");
      const int row = y0 + lane / 2, column = x0 + lane % 2 * 8;
      const uint32_t marks = changed ? 0x01010101 : 0;
      if (row < y0 + height && column < w)
        *reinterpret_cast<uint2*>(p.out.mask.data + (static_cast<int64_t>(n) * h + row) * w +
                                  column) = make_uint2(marks, marks);
      marked = changed;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (!inside(i) || !changed) continue;
      if constexpr (!kBegins) mark(i, 0x0101);
      const TwoFrameSites<T> sites = frame_of(i);
#pragma unroll
      for (int s = 0; s < kSites; ++s) old[i].take(sites, s);
      to[i * down / kSites] = old[i].word;
    }
  }
#if CUDART_VERSION >= 13000
  if constexpr (kBegins) decide_frame(launched.begin, ticket, __any_sync(kAllLanes, marked) != 0);
#endif
}

bool is_multiple(const void* at, uintptr_t of) { return reinterpret_cast<uintptr_t>(at) % of == 0; }

// Whether image_kernel takes it.
bool is_image(const EncodeParams& p) {
  const FeatureMap& acc = p.out.acc;
  return (p.block == 8 || p.block == 16) && acc.c == kImageChannels && acc.ld == kImagePitch &&
         p.stride_c == 1 && p.stride_w == kImageChannels && p.stride_h % 8 == 0 &&
         p.stride_n % 8 == 0 && acc.w % 8 == 0 && is_multiple(p.x, 16) &&
         is_multiple(acc.data, 16) && is_multiple(p.out.mask.data, 8) &&
         acc.sites() < int64_t{1} << 31;
}

int blocks_for(int64_t threads) { return static_cast<int>((threads + kThreads - 1) / kThreads); }

template <class S, class T>
cudaError_t encode_as(const EncodeParams& p, cudaStream_t stream) {
  const FeatureMap& acc = p.out.acc;
  EncodeLaunch launched{p, Divisor(1), Divisor(1), is_aligned(acc), {}};
  if (p.block > 1 && p.out.truncation.policy == Policy::rms) {
    const int rows = static_cast<int>((acc.h + p.block - 1) / p.block);
    const int columns = static_cast<int>((acc.w + p.block - 1) / p.block);
    launched.rows = Divisor(rows);
    if constexpr (std::is_same_v<S, T> && sizeof(T) == 2) {
      if (is_image(p)) {
        const int warps = p.block == 16 ? columns : (columns + 3) / 4;
        launched.columns = Divisor(warps);
        return launch(p.block == 16 ? image_kernel<T, 16, false> : image_kernel<T, 8, false>,
                      {blocks_for(acc.n * rows * warps * 32), kThreads}, stream, launched);
      }
    }
    launched.columns = Divisor(columns);
    return launch(square_kernel<S, T>, {blocks_for(acc.n * rows * columns * 32), kThreads}, stream,
                  launched);
  }
  if (acc.c <= kVector)
    return launch(narrow_kernel<S, T>, {blocks_for(acc.sites()), kThreads}, stream, launched);
  return launch(wide_kernel<S, T>, {blocks_for(acc.sites() * 32), kThreads}, stream, launched);
}

template <class S>
cudaError_t encode_from(const EncodeParams& p, cudaStream_t stream) {
  return with_type(p.out.acc.dtype,
                   [&](auto type) { return encode_as<S, typename decltype(type)::T>(p, stream); });
}

}  // namespace

cudaError_t encode(const EncodeParams& p, cudaStream_t stream) {
  return with_type(p.dtype,
                   [&](auto type) { return encode_from<typename decltype(type)::T>(p, stream); });
}

bool begins_frame(const EncodeParams& p, const Arenas& arenas) {
#if CUDART_VERSION >= 13000
  return p.dtype == p.out.acc.dtype && p.dtype != DType::f32 && is_image(p) &&
         p.block == cuda::kSquare && p.out.truncation.policy == Policy::rms &&
         is_multiple(arenas.masks, 16) && is_multiple(p.out.mask.data, 16) &&
         arenas.bytes % 16 == 0 && arenas.bytes / 16 < int64_t{1} << 31 &&
         p.out.mask.data >= arenas.masks &&
         p.out.mask.data + (p.out.mask.sites() + 15) / 16 * 16 <= arenas.masks + arenas.bytes &&
         p.out.counts >= arenas.counts && p.out.counts < arenas.counts + 2 * arenas.rows;
#else
  return false;
#endif
}

cudaError_t begin_frame(const EncodeParams& p, const Arenas& arenas, const BranchParams& branch,
                        unsigned long long* handle, cudaStream_t stream) {
#if CUDART_VERSION >= 13000
  const Squares squares(p.out.mask);
  EncodeLaunch launched{p, Divisor(squares.rows), Divisor(squares.columns), true, {}};
  Begin& begin = launched.begin;
  begin.decision = Decision(branch);
  begin.decision.squares = squares.count(p.out.mask);
  begin.masks = reinterpret_cast<uint4*>(arenas.masks);
  begin.vectors = static_cast<int>(arenas.bytes / 16);
  begin.own_first = static_cast<int>((p.out.mask.data - arenas.masks) / 16);
  begin.own = static_cast<int>((p.out.mask.sites() + 15) / 16);
  begin.counts = arenas.counts;
  begin.count = static_cast<int>(2 * arenas.rows);
  if (branch.has_everywhere) {
    const cudaError_t error = make_conditional(&begin.decision.handle, stream);
    if (error != cudaSuccess) return error;
    *handle = begin.decision.handle;
  }
  return with_type(p.out.acc.dtype, [&](auto type) {
    using T = typename decltype(type)::T;
    if constexpr (sizeof(T) == 2)
      return launch(image_kernel<T, cuda::kSquare, true>,
                    {blocks_for(begin.decision.squares * int64_t{32}), kThreads}, stream, launched);
    return cudaErrorInvalidValue;
  });
#else
  return cudaErrorNotSupported;
#endif
}

cudaError_t read_frame(cudaGraphExec_t graph, cudaGraphNode_t encode, const void* x) {
  return change_launch<EncodeLaunch>(graph, encode,
                                     [&](EncodeLaunch& launched) { launched.p.x = x; });
}

}  // namespace deltafx::cuda
