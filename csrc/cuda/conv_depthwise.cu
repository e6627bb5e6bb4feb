// Depthwise convolution in vectors of eight channels, bound by instructions and latency: a thread
// keeps its channels, and so their weights, and goes from candidate to candidate; all taps of a
// row, and of a 3x3 window all nine, are asked for before the first is used.
#include "cuda/conv_depthwise.h"

#include <algorithm>
#include <cstdlib>

#include "cuda/conv_query.cuh"
#include "cuda/update.cuh"

namespace deltafx::cuda {
namespace {

constexpr int kThreads = 128, kBlocksPerMultiprocessor = 3;

constexpr int kListed = 1024;  // of its own candidates, that a block lists at a time

// How a block divides its work: `vectors` threads share a site, and `sites` such teams go through
// them; blocks along y have the other channels.
struct Teams {
  Divisor vectors;
  int sites, columns;

  // group: threads that must have the same site, because they compare it together.
  Teams(const GemmParams& p, int group) {
    const int all = static_cast<int>(p.out.acc.c + kVector * group - 1) / (kVector * group);
    const int most = std::max(1, kMostVectors / group);
    columns = (all + most - 1) / most;
    vectors = Divisor((all + columns - 1) / columns * group);
    sites = kThreads / vectors.value;
  }

 private:
  static constexpr int kMostVectors = 8;  // so that a run of sites is work for all teams
};

int group_of(const GemmParams& p) {
  return p.out.truncation.policy == Policy::none ? 1 : p.out.acc.c <= 32 ? 4 : 8;
}

// A map's bytes from a site to the next one, from a row to the next, and between taps.
struct Pitches {
  int site, row, tap_x, tap_y;
  template <class T>
  __device__ Pitches(const GemmParams& p, T)
      : site(static_cast<int>(p.x.ld) * static_cast<int>(sizeof(T))),
        row(static_cast<int>(p.x.w) * site),
        tap_x(p.x_axis.phase.step * site),
        tap_y(p.y.phase.step * row) {}
};

template <class T>
__device__ __forceinline__ const T* beyond(const T* from, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(from) + bytes);
}

// kRows x kColumns vectors of the input, those outside of it 0.
template <class T, int kRows, int kColumns>
struct Taps {
  Packet<T> x[kRows][kColumns];

  // `first`: the vector at (top, left), where it would lie if that is outside.
  __device__ void fetch(const GemmParams& p, const Pitches& pitches, const T* first, int top,
                        int left) {
    const int down = p.y.phase.step, right = p.x_axis.phase.step;
    const auto inside = [](int i, int64_t size) {
      return static_cast<unsigned>(i) < static_cast<unsigned>(size);
    };
    if (inside(top, p.x.h) && inside(top + (kRows - 1) * down, p.x.h) && inside(left, p.x.w) &&
        inside(left + (kColumns - 1) * right, p.x.w)) {
#pragma unroll
      for (int jy = 0; jy < kRows; ++jy) {
        const T* row = beyond(first, static_cast<int64_t>(jy) * pitches.tap_y);
#pragma unroll
        for (int jx = 0; jx < kColumns; ++jx)
          x[jy][jx].load(beyond(row, static_cast<int64_t>(jx) * pitches.tap_x));
      }
      return;
    }
#pragma unroll
    for (int jy = 0; jy < kRows; ++jy) {
      const T* row = beyond(first, static_cast<int64_t>(jy) * pitches.tap_y);
#pragma unroll
      for (int jx = 0; jx < kColumns; ++jx) {
#pragma unroll
        for (uint4& word : x[jy][jx].words) word = make_uint4(0, 0, 0, 0);
        if (inside(top + jy * down, p.x.h) && inside(left + jx * right, p.x.w))
          x[jy][jx].load(beyond(row, static_cast<int64_t>(jx) * pitches.tap_x));
      }
    }
  }
};

template <class T>
__device__ __forceinline__ void add_tap(float (&y)[kVector], const Packet<T>& x,
                                        const float (&weight)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) y[i] = fmaf(to_float(x.elements[i]), weight[i], y[i]);
}

// A thread's weights. Those of a 3x3 window in half precision stay in registers; the others are too
// many, and come from the cache each time.
template <class T, int kTaps>
class Weights {
  static constexpr bool kKept = kTaps == 3 && sizeof(T) == 2;
  static constexpr int kNumber = kKept ? kTaps * kTaps : 1;

 public:
  // Only asks for them. `any`: the thread has channels.
  __device__ Weights(const GemmParams& p, int c0, bool any)
      : from_(static_cast<const T*>(p.weight) + c0), channels_(static_cast<int>(p.out.acc.c)) {
    if constexpr (kKept) {
      if (!any) return;
#pragma unroll
      for (int tap = 0; tap < kNumber; ++tap) asked_[tap].load(from_ + tap * channels_);
    }
  }
  __device__ void arrive() {
    if constexpr (kKept) {
#pragma unroll
      for (int tap = 0; tap < kNumber; ++tap) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) kept_[tap][i] = to_float(asked_[tap].elements[i]);
      }
    }
  }
  template <int kRows>
  __device__ void add(float (&y)[kVector], const Taps<T, kRows, kTaps>& taps, int first_row) const {
#pragma unroll
    for (int jy = 0; jy < kRows; ++jy) {
#pragma unroll
      for (int jx = 0; jx < kTaps; ++jx) {
        if constexpr (kKept) {
          add_tap(y, taps.x[jy][jx], kept_[jy * kTaps + jx]);
        } else {
          float weight[kVector];
          load_vector(from_ + ((first_row + jy) * kTaps + jx) * channels_, kVector, true, weight);
          add_tap(y, taps.x[jy][jx], weight);
        }
      }
    }
  }

 private:
  const T* from_;
  int channels_;
  Packet<T> asked_[kNumber];
  float kept_[kNumber][kVector];
};

// kLanes threads have a truncation group of a site; 0: nothing is compared, every candidate is
// written. kTaps: of a row.
template <class T, int kLanes, int kTaps>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    depthwise_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ Teams teams) {
  __shared__ int listed[kListed];
  constexpr bool kCompares = kLanes > 0;
  const FeatureMap& acc = p.out.acc;
  const int tid = static_cast<int>(threadIdx.x);
  const int share = static_cast<int>(blockIdx.x), team = teams.vectors.divide(tid);
  const int vector =
      static_cast<int>(blockIdx.y) * teams.vectors.value + tid - team * teams.vectors.value;
  const int c0 = vector * kVector;
  const bool works = team < teams.sites && c0 < static_cast<int>(acc.c);
  const bool lists_itself = p.shares.any(), ahead = p.makers > 0;
  // The weights are no other kernel's output.
  Weights<T, kTaps> weights(p, c0, works);
  float bias[kVector] = {};
  if (works && p.bias != nullptr) load_floats(p.bias + c0, kVector, bias);
  const ConvQuery query(p);
  OwnCandidates<kThreads, ConvQuery> own(query, p.shares, share);
  if (lists_itself) own.prepare();
  if (ahead)
    p.list.wait_until_done(p.makers);
  else
    wait_for_inputs();
  // The block's candidates: those of its share, or every so many of the list.
  int size, first_entry = 0, listed_from = 0;
  if (lists_itself) {
    own.find();
    size = own.size();
    if (size > 0 && tid == 0 && blockIdx.y == 0) add_to(p.out.counts, size);
    own.list(0, listed);
    __syncthreads();
  } else {
    first_entry = p.list.first();
    size = p.list.last() - first_entry;
  }
  const auto site_of = [&](int entry) {
    if (!works || entry >= size) return -1;
    return lists_itself ? listed[entry - listed_from] : p.list.entry(first_entry + entry);
  };
  const int first = lists_itself ? 0 : share * teams.sites;
  const int stride = lists_itself ? teams.sites : static_cast<int>(gridDim.x) * teams.sites;
  int next = site_of(first + team);
  weights.arrive();
  const FastActivation act(p.act);
  const GroupRule rule(p.out, c0, works ? kVector : 0);
  const Pitches pitches(p, T{});
  const auto acc_ld = static_cast<int>(acc.ld);
  const T* const x = static_cast<const T*>(p.x.data) + c0;
  T* const y_of_first = static_cast<T*>(acc.data) + c0;
  if (ahead) wait_for_inputs();
#pragma unroll 1
  for (int begin = first; begin < size; begin += stride) {
    const int entry = begin + team, site = next;
    if (lists_itself && begin + 2 * stride > listed_from + kListed) {
      listed_from = begin + stride;
      own.list(listed_from, listed);
      __syncthreads();
    }
    next = site_of(entry + stride);
    float y[kVector], old[kVector] = {};
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] = bias[i];
    T* const to = y_of_first + static_cast<int64_t>(site) * acc_ld;
    if (site >= 0) {
      const Position at = position_of(site, p.h, p.w);
      const int top = p.y.base(at.y), left = p.x_axis.base(at.x);
      const int row = at.n * static_cast<int>(p.x.h) + top;
      const T* const window_at = beyond(beyond(x, static_cast<int64_t>(row) * pitches.row),
                                        static_cast<int64_t>(left) * pitches.site);
      Packet<T> before;
      if constexpr (kCompares) before.load(to);
      if constexpr (kTaps == 3) {
        Taps<T, 3, 3> window;
        window.fetch(p, pitches, window_at, top, left);
        weights.add(y, window, 0);
      } else {
#pragma unroll 1
        for (int jy = 0; jy < p.y.phase.taps; ++jy) {
          Taps<T, 1, kTaps> taps;
          taps.fetch(p, pitches, beyond(window_at, static_cast<int64_t>(jy) * pitches.tap_y),
                     top + jy * p.y.phase.step, left);
          weights.add(y, taps, jy);
        }
      }
      act.apply(p.act, c0, kVector, y);
      if constexpr (kCompares) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) old[i] = to_float(before.elements[i]);
      } else {
        store_vector(to, kVector, true, y);
        if (c0 == 0) p.out.mask.data[site] = 1;
      }
    }
    if constexpr (kCompares) {
      round_to<T>(y, site >= 0 ? kVector : 0);
      const bool changed = rule.template changed<kLanes>(y, old);
      if (site < 0 || !changed) continue;
      store_vector(to, kVector, true, y);
      p.out.mask.data[site] = 1;
    }
  }
}

int resident_blocks(const Teams& teams) {
  return kBlocksPerMultiprocessor * current_device().multiprocessors / teams.columns;
}

template <class T, int kLanes, int kTaps>
cudaError_t launch_depthwise(const GemmParams& p, cudaStream_t stream) {
  const Teams teams(p, group_of(p));
  const int64_t all = (p.out.acc.sites() + teams.sites - 1) / teams.sites;
  const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(all, resident_blocks(teams)));
  const int along_x = p.shares.any() ? p.shares.count : static_cast<int>(blocks);
  return launch(depthwise_kernel<T, kLanes, kTaps>, {along_x, kThreads, 0, 1, teams.columns},
                stream, p, teams);
}

template <class T, int kTaps>
cudaError_t launch_taps(const GemmParams& p, cudaStream_t stream) {
  if (p.out.truncation.policy == Policy::none) return launch_depthwise<T, 0, kTaps>(p, stream);
  return p.out.acc.c <= 32 ? launch_depthwise<T, 4, kTaps>(p, stream)
                           : launch_depthwise<T, 8, kTaps>(p, stream);
}

template <class T>
cudaError_t launch_type(const GemmParams& p, cudaStream_t stream) {
  return p.x_axis.phase.taps == 3 ? launch_taps<T, 3>(p, stream) : launch_taps<T, 5>(p, stream);
}

}  // namespace

bool conv_depthwise_takes(const GemmParams& p) {
  const int taps = p.x_axis.phase.taps;
  constexpr int64_t kMost = 1 << 30;
  const int64_t row = p.x.w * p.x.ld * static_cast<int64_t>(sizeof(float));
  return row * std::abs(p.y.phase.step) < kMost && p.out.acc.ld < kMost / 4 &&
         p.pre_scale == nullptr && p.residual.data == nullptr &&
         ((taps == 3 && p.y.phase.taps == 3) || taps == 5) && is_aligned(p.x) && p.acc_aligned &&
         reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
}

Shares conv_depthwise_shares(const GemmParams& p) {
  const Teams teams(p, group_of(p));
  const int resident = resident_blocks(teams);
  // Blocks with more to do have it more unevenly than by a list.
  if (resident * teams.sites < expected_candidates(p.out.acc)) return {};
  return Shares(p.out.acc, resident);
}

cudaError_t conv_depthwise(const GemmParams& p, cudaStream_t stream) {
  return with_type(p.out.acc.dtype,
                   [&](auto type) { return launch_type<typename decltype(type)::T>(p, stream); });
}

}  // namespace deltafx::cuda
