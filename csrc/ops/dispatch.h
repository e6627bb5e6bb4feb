// From an op's checked parameters to the kernels of the device that its accumulator is on.
#pragma once

#include "common/checks.h"
#include "cpu/kernels.h"

#ifdef DELTAFX_CUDA
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/ops.h"

namespace deltafx {

// launch(memory, stream), with `ints` ints of device memory, on acc's device and its current
// stream.
template <class Launch>
void run_on_cuda(const Tensor& acc, int64_t ints, const Launch& launch) {
  const c10::cuda::CUDAGuard guard(acc.device());
  const Tensor memory = at::empty({ints}, acc.options().dtype(at::kInt));
  C10_CUDA_CHECK(
      launch(memory.mutable_data_ptr<int32_t>(), c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace deltafx

#define DELTAFX_IMPL(...)                              \
  TORCH_LIBRARY_IMPL(deltafx, CPU, m) { __VA_ARGS__; } \
  TORCH_LIBRARY_IMPL(deltafx, CUDA, m) { __VA_ARGS__; }
// Runs op `name`, whose kernels take nothing but p.
#define DELTAFX_RUN(name, p, acc)                                                               \
  do {                                                                                          \
    if ((acc).is_cuda())                                                                        \
      return run_on_cuda(                                                                       \
          acc, cuda::list_ints((p).out.acc.sites()),                                            \
          [&](int32_t* memory, cudaStream_t stream) { return cuda::name(p, memory, stream); }); \
    kernels().name(p);                                                                          \
  } while (false)
#else
#define DELTAFX_IMPL(...) \
  TORCH_LIBRARY_IMPL(deltafx, CPU, m) { __VA_ARGS__; }
#define DELTAFX_RUN(name, p, acc) kernels().name(p)
#endif
