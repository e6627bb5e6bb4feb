// What differs between instances of the convolution kernel: element type, tile, gather.
#pragma once

#include "cuda/device.cuh"

namespace deltafx::cuda {

// Rows of a tile are 128 bytes of depth in shared memory, as eight chunks of 16 bytes; chunk c of
// row r lies at c ^ (r % 8), so that neither the copies nor ldmatrix meet bank conflicts.
constexpr int kRowBytes = 128;
constexpr int kChunkBytes = 16;

// Math: how a tile is multiplied. kAmpere: by instructions that older GPUs lack.

struct Half {
  using T = __half;
  static constexpr bool kTensorCores = true, kAmpere = true;
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  static __device__ __forceinline__ uint32_t operand(uint32_t v) { return v; }
};

struct BFloat16 {
  using T = __nv_bfloat16;
  static constexpr bool kTensorCores = true, kAmpere = true;
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  static __device__ __forceinline__ uint32_t operand(uint32_t v) { return v; }
};

struct TensorFloat32 {
  using T = float;
  static constexpr bool kTensorCores = true, kAmpere = true;
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  // Rounded to nearest: the hardware by itself would cut the low bits off, which is a bias.
  static __device__ __forceinline__ uint32_t operand(uint32_t v) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(v)));
    return rounded;
  }
};

// Multiplied and added in fp32, without tensor cores.
struct Float32 {
  using T = float;
  static constexpr bool kTensorCores = false, kAmpere = true;
};

// The same by instructions that every GPU has.
template <class Element>
struct Plain {
  using T = Element;
  static constexpr bool kTensorCores = false, kAmpere = false;
};

enum class Gather {
  chunks,   // a chunk is within one tap and aligned: copied
  elements  // any channels, and the prologue
};

// kRows sites x kColumns output channels a tile; kWarpRows x kWarpColumns warps share it.
template <class MathType, Gather kGatherType, bool kLargeTile>
struct GemmTraits {
  using Math = MathType;
  using T = typename Math::T;
  static constexpr Gather kGather = kGatherType;
  static constexpr int kRows = kLargeTile ? 128 : 64;
  static constexpr int kColumns = kLargeTile ? 128 : 64;
  static constexpr int kWarpRows = 2;
  static constexpr int kWarpColumns = kLargeTile ? 4 : 2;
  static constexpr int kThreads = 32 * kWarpRows * kWarpColumns;
  // Where nothing is copied while the thread goes on, a stage for itself would hide nothing, and
  // Turing's shared memory holds three blocks of one stage.
  static constexpr int kStages = !Math::kAmpere ? 1 : kLargeTile ? 3 : 4;
  static constexpr int kBlocksPerMultiprocessor = kLargeTile ? 2 : 3;
  // Small tiles may be split along their depth, in as many parts as a cluster has blocks. The parts
  // are added up in the same order whether they were split or not, so results never depend on it.
  // (Without tensor cores, half precision needs the registers and no shorter sums.)
  static constexpr bool kSplits = !kLargeTile && Math::kAmpere;
  static constexpr bool kParts = kSplits || (!kLargeTile && sizeof(T) == 4);

  static constexpr int kChunkElements = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));  // of a stage
  static constexpr int kTilesM = kRows / kWarpRows / 16;                  // 16 x 8 tiles of a warp
  static constexpr int kTilesN = kColumns / kWarpColumns / 8;
  static constexpr int kCopyRows = kThreads / 8;  // rows that the block copies at once
  static constexpr int kStageBytes = (kRows + kColumns) * kRowBytes;
  static constexpr int kPitch = kColumns + 4;              // of the fp32 results in shared memory
  static constexpr int kResultBytes = kRows * kPitch * 4;  // in the stages' memory
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kResultBytes ? kStages * kStageBytes : kResultBytes;
};

}  // namespace deltafx::cuda
