// The kernel of the ops that compute each candidate by itself: all but encode and the convolutions
// with tensor cores. An op is a functor that gives eight channels of a site.
#pragma once

#include "cuda/candidates.cuh"
#include "cuda/update.cuh"

namespace deltafx::cuda {

constexpr int kSiteThreads = 256;

// A piece of work is a site's next `lanes` * 8 channels, by `lanes` threads, 8 to 32; a site of
// more than 256 channels is several pieces, so that few candidates still fill the device.
// f(position, site, c0, count, y): y[0..count) = channels [c0, c0 + count), before the activation.
template <class T, class F>
__global__ void __launch_bounds__(kSiteThreads, 3)
    sites_kernel(const __grid_constant__ Output out, const __grid_constant__ Activation act,
                 bool aligned, CandidateList list, int lanes, const __grid_constant__ F f) {
  __shared__ int active_total;
  if (threadIdx.x == 0) active_total = 0;
  wait_for_inputs();
  const int first_entry = list.first(), size = list.last() - first_entry;
  if (size == 0) return;
  __syncthreads();
  const FastActivation activation(act);
  const int channels = static_cast<int>(out.acc.c), lane = threadIdx.x % lanes;
  const int pieces = (channels + lanes * kVector - 1) / (lanes * kVector);
  const int per_warp = 32 / lanes, work = size * pieces;
  const int first = (blockIdx.x * kSiteThreads + threadIdx.x) / 32 * per_warp;
  const int step = static_cast<int>(gridDim.x) * (kSiteThreads / 32) * per_warp;
  int found = 0;
  for (int i = first; i < work; i += step) {
    const int own = i + static_cast<int>(threadIdx.x % 32) / lanes;
    const bool valid = own < work;
    const int entry = first_entry + (valid ? own / pieces : 0);
    const int site = valid ? site_in(list.entries[entry]) : 0;
    const Position at = position_of(site, static_cast<int>(out.acc.h), static_cast<int>(out.acc.w));
    const int c0 = own % pieces * lanes * kVector + lane * kVector;
    const int count = valid ? min(kVector, channels - c0) : 0;
    float y[kVector] = {};
    if (count > 0) {
      f(at, site, c0, count, y);
      activation.apply(act, c0, count, y);
    }
    const bool active = update_group<T>(out, aligned, site, c0, count, y) && valid;
    const unsigned ballot = __ballot_sync(kAllLanes, active);
    const unsigned own_lanes = (lanes == 32 ? kAllLanes : (1u << lanes) - 1)
                               << (threadIdx.x % 32 / lanes * lanes);
    if (!valid || lane != 0 || (ballot & own_lanes) == 0) continue;
    out.mask.data[site] = 1;
    // A site of several pieces counts once: whoever marks its entry first counts it.
    if (pieces == 1 ||
        !(atomicOr(reinterpret_cast<unsigned*>(list.entries) + entry, kActiveBit) & kActiveBit))
      ++found;
  }
  if (found > 0) atomicAdd(&active_total, found);
  __syncthreads();
  if (threadIdx.x == 0 && active_total > 0) add_to(out.counts + 1, active_total);
}

template <class T, class F>
cudaError_t launch_sites_as(const Output& out, const Activation& act, const CandidateList& list,
                            const F& f, cudaStream_t stream) {
  const FeatureMap& acc = out.acc;
  const int lanes = acc.c <= 64 ? 8 : acc.c <= 128 ? 16 : 32;
  const int64_t per_block = kSiteThreads / lanes, pieces = (acc.c + 255) / 256;
  const int64_t most = int64_t{8} * current_device().multiprocessors;
  const int64_t needed = (acc.sites() * pieces + per_block - 1) / per_block;
  const Grid grid{static_cast<int>(needed < most ? needed : most), kSiteThreads};
  return launch(sites_kernel<T, F>, grid, stream, out, act, is_aligned(acc), list, lanes, f);
}

template <class F>
cudaError_t launch_sites(const Output& out, const Activation& act, const CandidateList& list,
                         const F& f, cudaStream_t stream) {
  switch (out.acc.dtype) {
    case DType::f32:
      return launch_sites_as<float>(out, act, list, f, stream);
    case DType::bf16:
      return launch_sites_as<__nv_bfloat16>(out, act, list, f, stream);
    case DType::f16:
      return launch_sites_as<__half>(out, act, list, f, stream);
  }
  return cudaErrorInvalidValue;
}

// Both launches of an op: the list of its candidates, in `memory`, and their update.
template <class Query, class F>
cudaError_t update_sites(const Output& out, const Activation& act, const Query& query, const F& f,
                         int32_t* memory, cudaStream_t stream) {
  const CandidateList list = list_in(memory, out.counts);
  const cudaError_t error = list_candidates(query, out.acc, list, stream);
  return error != cudaSuccess ? error : launch_sites(out, act, list, f, stream);
}

}  // namespace deltafx::cuda
