// What every kernel uses: element types, eight channels at a time, and the order between kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/types.h"

namespace deltafx::cuda {

// Channels that a thread handles at a time; kTruncationGroup / kVector threads hold a group.
constexpr int kVector = 8;
constexpr int kGroupLanes = static_cast<int>(kTruncationGroup) / kVector;
constexpr unsigned kAllLanes = 0xffffffffu;

// Whether the code that is being compiled may use Ampere's instructions, or Hopper's clusters.
#ifdef __CUDA_ARCH__
constexpr bool kHasAmpere = __CUDA_ARCH__ >= 800, kHasClusters = __CUDA_ARCH__ >= 900;
#else
constexpr bool kHasAmpere = false, kHasClusters = false;
#endif

// Blocks until the kernels before this one in the stream are done and their writes visible. Every
// kernel calls it before it touches what another kernel writes, even if it then has nothing to do:
// a kernel counts as done only when all before it are.
__device__ __forceinline__ void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Has numbers, none of which is negative, worked out by here: the compiler would rather do it where
// they are used first, which may be behind a wait.
template <class... Ints>
__device__ __forceinline__ void work_out(Ints... numbers) {
  if ((numbers | ...) < 0) __trap();
}

// A number that what is made of it is worked out behind here, and not before a loop around, where
// it would keep a register each.
__device__ __forceinline__ int here(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

// Bits `begin`, if it is not negative, to end - 1; none of 32 or above.
__device__ __forceinline__ int bits_between(int begin, int end) {
  const int below = (1 << max(begin, 0)) - 1;
  return end > 0 ? ((1 << end) - 1) & ~below : 0;
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// f(Type<T>{}) for the T that a feature map has; returns what it does.
template <class Element>
struct Type {
  using T = Element;
};
template <class F>
cudaError_t with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(Type<float>{});
    case DType::bf16:
      return f(Type<__nv_bfloat16>{});
    case DType::f16:
      return f(Type<__half>{});
  }
  return cudaErrorInvalidValue;
}

// Eight elements of T, moved in accesses of 16 bytes.
template <class T>
union Packet {
  uint4 words[kVector * sizeof(T) / 16];
  T elements[kVector];
  __device__ Packet() {}
  __device__ void load(const T* aligned) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(words) / 16); ++i)
      words[i] = reinterpret_cast<const uint4*>(aligned)[i];
  }
};

// v = p[0..count), the rest 0. `aligned`: p is at a multiple of 16 bytes and count is kVector.
template <class T>
__device__ __forceinline__ void load_vector(const T* p, int count, bool aligned,
                                            float (&v)[kVector]) {
  if (aligned) {
    Packet<T> packet;
    packet.load(p);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = to_float(packet.elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = i < count ? to_float(p[i]) : 0.f;
  }
}

template <class T>
__device__ __forceinline__ void store_vector(T* p, int count, bool aligned,
                                             const float (&v)[kVector]) {
  if (aligned) {
    Packet<T> packet;
#pragma unroll
    for (int i = 0; i < kVector; ++i) packet.elements[i] = from_float<T>(v[i]);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(packet.words) / 16); ++i)
      reinterpret_cast<uint4*>(p)[i] = packet.words[i];
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) p[i] = from_float<T>(v[i]);
  }
}

// load_vector for a few constants, whose alignment is seen here.
__device__ __forceinline__ void load_floats(const float* p, int count, float (&v)[kVector]) {
  load_vector(p, count, count >= kVector && reinterpret_cast<uintptr_t>(p) % 16 == 0, v);
}

// load_vector for a type known at run time only.
__device__ __forceinline__ void load_any(const void* data, DType dtype, int64_t offset, int count,
                                         bool aligned, float (&v)[kVector]) {
  switch (dtype) {
    case DType::f32:
      return load_vector(static_cast<const float*>(data) + offset, count, aligned, v);
    case DType::bf16:
      return load_vector(static_cast<const __nv_bfloat16*>(data) + offset, count, aligned, v);
    case DType::f16:
      return load_vector(static_cast<const __half*>(data) + offset, count, aligned, v);
  }
}

// Divides numbers from 0 to 2^31 - 1 by a number that the host knows, by a multiplication.
struct Divisor {
  int value;
  uint32_t factor;
  int shift;
  Divisor() = default;
  explicit Divisor(int d) : value(d), factor(0), shift(0) {
    int bits = 0;
    while ((int64_t{1} << bits) < d) ++bits;
    if (d == 1) return;
    factor = static_cast<uint32_t>(((uint64_t{1} << (31 + bits)) + d - 1) / d);
    shift = bits - 1;
  }
  __device__ __forceinline__ int divide(int n) const {
    return factor == 0 ? n : static_cast<int>(__umulhi(static_cast<uint32_t>(n), factor) >> shift);
  }
};

struct Position {
  int n, y, x;
};
__device__ __forceinline__ Position position_of(int site, int h, int w) {
  const unsigned row = static_cast<unsigned>(site) / w, n = row / h;
  return {static_cast<int>(n), static_cast<int>(row - n * h),
          static_cast<int>(static_cast<unsigned>(site) - row * w)};
}

__device__ __forceinline__ Position position_of(int site, const Divisor& h, const Divisor& w) {
  const int row = w.divide(site), n = h.divide(row);
  return {n, row - n * h.value, site - row * w.value};
}

// Whether a site that no input reaches has lost its constant: its accumulator is NaN.
__device__ __forceinline__ bool is_lost(const FeatureMap& acc, const Position& at) {
  const int64_t offset = ((at.n * acc.h + at.y) * acc.w + at.x) * acc.ld;
  const float v = acc.dtype == DType::f32 ? static_cast<const float*>(acc.data)[offset]
                  : acc.dtype == DType::bf16
                      ? to_float(static_cast<const __nv_bfloat16*>(acc.data)[offset])
                      : to_float(static_cast<const __half*>(acc.data)[offset]);
  return v != v;
}

// Whether vectors of channels of a map may be moved in accesses of 16 bytes.
inline bool is_aligned(const void* data, DType dtype, int64_t ld, int64_t channels) {
  const int64_t size = dtype == DType::f32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld * size % 16 == 0 &&
         channels % kVector == 0;
}
inline bool is_aligned(const FeatureMap& map) {
  return is_aligned(map.data, map.dtype, map.ld, map.c);
}

}  // namespace deltafx::cuda
