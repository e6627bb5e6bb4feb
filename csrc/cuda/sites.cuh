// The kernel of the ops that compute each candidate by itself: all but encode and the convolutions
// with tensor cores. An op is a functor that gives eight channels of a site.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/candidates.cuh"
#include "cuda/shares.cuh"
#include "cuda/update.cuh"

namespace deltafx::cuda {

constexpr int kSiteThreads = 256, kSiteBlocks = 3;  // of a multiprocessor
constexpr int kListedSites = 1024;  // of its own candidates, that a block lists at a time

// In place of a query, where the candidates are in a list.
struct Listed {};

// Whether a query reads the accumulator, which other blocks of the same sites may have written.
template <class Query>
auto reads_result(const Query& query, int) -> decltype(query.reads_result()) {
  return query.reads_result();
}
template <class Query>
bool reads_result(const Query&, long) {
  return false;
}

// `lanes` threads, 8 to 32, have lanes * 8 channels of a site; blocks along y, `columns` of them,
// have the other channels.
struct SiteLaunch {
  Output out;
  Activation act;
  CandidateList list;
  Shares shares;  // of which each block finds the candidates for itself, if there is no list
  Divisor w, h;
  bool aligned;  // the accumulator, for whole vectors
  int lanes, columns;

  SiteLaunch(const Output& output, const Activation& activation)
      : out(output),
        act(activation),
        list{},
        shares{},
        w(static_cast<int>(output.acc.w)),
        h(static_cast<int>(output.acc.h)),
        aligned(is_aligned(output.acc)),
        lanes(output.acc.c <= 64    ? 8
              : output.acc.c <= 128 ? 16
                                    : 32),
        columns(static_cast<int>((output.acc.c + 32 * kVector - 1) / (32 * kVector))) {}

  int per_block() const { return kSiteThreads / lanes; }  // sites at a time
  // At most `a_multiprocessor` blocks for each of them.
  int blocks(int a_multiprocessor) const {
    return std::max(1, a_multiprocessor * current_device().multiprocessors / columns);
  }
  // Without a list, where a block's own candidates are about what it works on at a time: more are
  // more even by a list. Not in a slice, whose mask may be the input's: no block may mark what
  // another reads. Sites of several columns are written by one block while another looks.
  template <class Query>
  bool can_share(const Query& query) const {
    return out.acc.ld == out.acc.c && (columns == 1 || !reads_result(query, 0)) &&
           blocks(kSiteBlocks) * per_block() >= expected_candidates(out.acc);
  }
};

// f(position, site, c0, count, y): y[0..count) = channels [c0, c0 + count), before the activation;
// y comes as zeros.
template <class T, class Query, class F>
__global__ void __launch_bounds__(kSiteThreads, kSiteBlocks)
    sites_kernel(const __grid_constant__ SiteLaunch p, const __grid_constant__ Query query,
                 const __grid_constant__ F f) {
  constexpr bool kListsItself = !std::is_same_v<Query, Listed>;
  __shared__ int listed[kListsItself ? kListedSites : 1];
  const int tid = static_cast<int>(threadIdx.x), share = static_cast<int>(blockIdx.x);
  const int lane = tid % p.lanes, team = tid % 32 / p.lanes, per_warp = 32 / p.lanes;
  const int c0 = (static_cast<int>(blockIdx.y) * p.lanes + lane) * kVector;
  const int count = min(kVector, static_cast<int>(p.out.acc.c) - c0);
  const bool compares = p.out.truncation.policy != Policy::none;
  OwnCandidates<kSiteThreads, Query> own(query, p.shares, share);
  if constexpr (kListsItself) own.prepare();
  wait_for_inputs();
  int size, first_entry = 0;
  if constexpr (kListsItself) {
    own.find();
    size = own.size();
    if (size > 0 && tid == 0 && blockIdx.y == 0) add_to(p.out.counts, size);
  } else {
    first_entry = p.list.first();
    size = p.list.last() - first_entry;
  }
  if (size == 0) return;
  const FastActivation activation(p.act);
  const int first = (kListsItself ? tid : share * kSiteThreads + tid) / 32 * per_warp;
  const int blocks = kListsItself ? 1 : static_cast<int>(gridDim.x);  // that share a list
  const int step = blocks * (kSiteThreads / 32) * per_warp;
  const int at_a_time = kListsItself ? kListedSites : size;
#pragma unroll 1
  for (int from = 0; from < size; from += at_a_time) {
    if constexpr (kListsItself) own.list(from, listed);
    __syncthreads();
    const int here = min(at_a_time, size - from);
#pragma unroll 1
    for (int i = first; i < here; i += step) {
      const int entry = i + team;
      const bool valid = entry < here && count > 0;
      int site = 0;
      if (valid) site = kListsItself ? listed[entry] : p.list.entries[first_entry + entry];
      T* const to = static_cast<T*>(p.out.acc.data) + site * p.out.acc.ld + c0;
      float y[kVector] = {}, old[kVector] = {};
      Packet<T> before;  // on its way while the op reads its inputs
      if (valid) {
        if (compares && p.aligned) before.load(to);
        f(position_of(site, p.h, p.w), site, c0, count, y);
        activation.apply(p.act, c0, count, y);
        if (compares && p.aligned) {
#pragma unroll
          for (int k = 0; k < kVector; ++k) old[k] = to_float(before.elements[k]);
        } else if (compares) {
          load_vector(to, count, false, old);
        }
      }
      round_to<T>(y, valid ? count : 0);
      const GroupRule rule(p.out, c0, count);  // here, where registers are free for it
      if (rule.changed(y, old) && valid) {
        store_vector(to, count, p.aligned, y);
        p.out.mask.data[site] = 1;
      }
    }
  }
}

template <class T, class Query, class F>
cudaError_t launch_sites(const SiteLaunch& p, const Query& query, const F& f, int blocks,
                         cudaStream_t stream) {
  return launch(sites_kernel<T, Query, F>, {blocks, kSiteThreads, 0, 1, p.columns}, stream, p,
                query, f);
}

// An op whose candidates are in a list.
template <class T, class F>
cudaError_t update_listed(const Output& out, const Activation& act, const CandidateList& list,
                          const F& f, cudaStream_t stream) {
  constexpr int kBlocks = 8;  // of a multiprocessor, at most, so that none has much more to do
  SiteLaunch p(out, act);
  p.list = list;
  const int64_t needed = (out.acc.sites() + p.per_block() - 1) / p.per_block();
  return launch_sites<T>(p, Listed{}, f,
                         static_cast<int>(std::min<int64_t>(needed, p.blocks(kBlocks))), stream);
}

// All of an op: the candidates, by a list in `memory` unless the blocks find them, and their
// update.
template <class T, class Query, class F>
cudaError_t update_sites_as(const Output& out, const Activation& act, const Query& query,
                            const F& f, int32_t* memory, cudaStream_t stream) {
  SiteLaunch p(out, act);
  if (p.can_share(query)) p.shares = Shares(out.acc, p.blocks(kSiteBlocks));
  if (p.shares.any()) return launch_sites<T>(p, query, f, p.shares.count, stream);
  const CandidateList list = list_in(memory, out.counts);
  const cudaError_t error = list_candidates(query, out.acc, list, stream);
  return error != cudaSuccess ? error : update_listed<T>(out, act, list, f, stream);
}

template <class Query, class F>
cudaError_t update_sites(const Output& out, const Activation& act, const Query& query, const F& f,
                         int32_t* memory, cudaStream_t stream) {
  return with_type(out.acc.dtype, [&](auto type) {
    return update_sites_as<typename decltype(type)::T>(out, act, query, f, memory, stream);
  });
}

}  // namespace deltafx::cuda
