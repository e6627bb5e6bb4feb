// The end of the convolution kernel: from fp32 sums in shared memory to the accumulator. Eight
// threads take a truncation group of a site. What they will compare with is fetched for several
// sites at once, before the sums are there: one site at a time would be bound by latency.
#pragma once

#include "cuda/conv_gemm_loader.cuh"
#include "cuda/update.cuh"

namespace deltafx::cuda {

__device__ __forceinline__ void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#endif
}

// Four floats at `address` of block `rank` of the cluster's shared memory.
__device__ __forceinline__ float4 load_from_block(uint32_t address, int rank) {
  float4 v = {};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(there));
#endif
  return v;
}

// Of a tile: which of its rows this block finishes, and whether the sums lie in all blocks.
struct TileRows {
  int first, count;
  int parts;  // 1: the sums are this block's own
};

template <class Traits>
class GemmFinish {
  using T = typename Traits::T;
  static constexpr int kGroups = Traits::kColumns / static_cast<int>(kTruncationGroup);
  static constexpr int kUnits = Traits::kThreads / kGroupLanes;  // groups finished at once
  static constexpr int kBatch = sizeof(T) == 2 && Traits::kParts ? 4 : 2;  // times for a fetch

 public:
  __device__ GemmFinish(const GemmParams& p, const GemmRow<T>* tile, const TileRows& rows,
                        int first_column)
      : p_(p),
        tile_(tile),
        rows_(rows),
        act_(p.act),
        column_(static_cast<int>(threadIdx.x) / kGroupLanes % kGroups *
                    static_cast<int>(kTruncationGroup) +
                static_cast<int>(threadIdx.x) % kGroupLanes * kVector),
        c0_(first_column + column_),
        rule_(p.out, c0_, min(kVector, static_cast<int>(p.out.acc.c) - c0_)) {
    static_assert(kUnits % kGroups == 0, "a thread keeps to its channels");
#pragma unroll
    for (int i = 0; i < kVector; ++i) bias_[i] = 0.f;
    if (p.bias != nullptr) load_floats(p.bias + c0_, rule_.count, bias_);
    fetch(0);
  }

  // Asks for what a first fetch will read, long before: called ahead of the product.
  static __device__ void prefetch(const GemmParams& p, const GemmRow<T>* tile, int first, int rows,
                                  int first_column) {
    const int column = first_column + static_cast<int>(threadIdx.x) / kGroupLanes % kGroups *
                                          static_cast<int>(kTruncationGroup);
    if (column >= p.out.acc.c || threadIdx.x % kGroupLanes != 0) return;
    for (int unit = static_cast<int>(threadIdx.x) / kGroupLanes; unit < rows * kGroups;
         unit += kUnits) {
      const int site = tile[first + unit / kGroups].site;
      if (site < 0) return;
      if (p.out.truncation.policy != Policy::none)
        prefetch_line(static_cast<const T*>(p.out.acc.data) + site * p.out.acc.ld + column);
      if (p.residual.data != nullptr)
        prefetch_line(static_cast<const T*>(p.residual.data) + site * p.residual.ld + column);
    }
  }

  // Finishes all rows, once the sums are in shared memory.
  __device__ void run(const float* sums, uint32_t sums_address) {
    for (int batch = 0; batch * kBatch * kUnits < rows_.count * kGroups; ++batch) {
      if (batch > 0) fetch(batch);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        float y[kVector] = {};
        if (row_[b] >= 0) load_sums(sums, sums_address, row_[b] * Traits::kPitch + column_, y);
        finish(b, y);
      }
    }
  }

 private:
  static __device__ void prefetch_line(const T* at) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
  }

  // Starts reading the accumulator and the residual of the batch's sites.
  __device__ void fetch(int batch) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int unit = (batch * kBatch + b) * kUnits + static_cast<int>(threadIdx.x) / kGroupLanes;
      const int row = unit / kGroups;
      const bool inside = row < rows_.count;
      row_[b] = inside ? rows_.first + row : -1;
      site_[b] = inside ? tile_[rows_.first + row].site : -1;
      if (p_.filtered && site_[b] >= 0 && p_.x_mask.data[site_[b]] == 0) site_[b] = -1;
      if (site_[b] < 0 || rule_.count <= 0) continue;
      if (rule_.policy != Policy::none) load_packet(acc_at(site_[b]), p_.acc_aligned, old_[b]);
      if (p_.residual.data != nullptr)
        load_packet(static_cast<const T*>(p_.residual.data) + site_[b] * p_.residual.ld + c0_,
                    p_.residual_aligned, residual_[b]);
    }
  }

  __device__ T* acc_at(int site) const {
    return static_cast<T*>(p_.out.acc.data) + site * p_.out.acc.ld + c0_;
  }

  __device__ void load_packet(const T* from, bool aligned, Packet<T>& packet) const {
    if (aligned) {
      packet.load(from);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        packet.elements[i] = i < rule_.count ? from[i] : from_float<T>(0.f);
    }
  }

  // The parts are added in order, so the result is that of a block which had them all.
  __device__ void load_sums(const float* sums, uint32_t address, int at,
                            float (&y)[kVector]) const {
    if (rows_.parts == 1) {
      *reinterpret_cast<float4*>(y) = *reinterpret_cast<const float4*>(sums + at);
      *reinterpret_cast<float4*>(y + 4) = *reinterpret_cast<const float4*>(sums + at + 4);
      return;
    }
    constexpr int kAtOnce = 4;  // a split is into 4 or 8 parts
    for (int from = 0; from < rows_.parts; from += kAtOnce) {
      float4 low[kAtOnce], high[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        low[i] = load_from_block(address + at * 4, from + i);
        high[i] = load_from_block(address + at * 4 + 16, from + i);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        y[0] += low[i].x, y[1] += low[i].y, y[2] += low[i].z, y[3] += low[i].w;
        y[4] += high[i].x, y[5] += high[i].y, y[6] += high[i].z, y[7] += high[i].w;
      }
    }
  }

  // Bias, residual, activation and the update rule for a group of the batch's site b.
  __device__ void finish(int b, float (&y)[kVector]) const {
    const bool valid = site_[b] >= 0 && rule_.count > 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] += bias_[i];
    if (p_.residual.data == nullptr || p_.residual_after_act)
      act_.apply(p_.act, c0_, rule_.count, y);
    if (p_.residual.data != nullptr) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] += to_float(residual_[b].elements[i]);
      if (!p_.residual_after_act) act_.apply(p_.act, c0_, rule_.count, y);
    }
    round_to<T>(y, rule_.count);
    float old[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) old[i] = valid ? to_float(old_[b].elements[i]) : 0.f;
    if (rule_.changed(y, old) && valid) {
      store_vector(acc_at(site_[b]), rule_.count, p_.acc_aligned, y);
      p_.out.mask.data[site_[b]] = 1;
    }
  }

  const GemmParams& p_;
  const GemmRow<T>* tile_;
  TileRows rows_;
  FastActivation act_;
  int column_, c0_;
  GroupRule rule_;
  float bias_[kVector];
  int row_[kBatch], site_[kBatch];
  Packet<T> old_[kBatch], residual_[kBatch];
};

}  // namespace deltafx::cuda
