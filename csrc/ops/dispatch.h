// From an op's checked parameters to the kernels of the device that its accumulator is on.
#pragma once

#include "common/checks.h"
#include "cpu/kernels.h"

#ifdef DELTAFX_CUDA
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/ops.h"

namespace deltafx {

// launch(stream), on the device of `on` and its current stream.
template <class Launch>
void run_on_cuda(const Tensor& on, const Launch& launch) {
  const c10::cuda::CUDAGuard guard(on.device());
  C10_CUDA_CHECK(launch(c10::cuda::getCurrentCUDAStream().stream()));
}
// launch(memory, stream), with `ints` ints of device memory or more: those of `given` or, where an
// operator is called by itself, its own. Kernels may read what none of them has written yet, so
// there is none that nobody ever wrote.
template <class Launch>
void run_on_cuda(const Tensor& acc, const OptionalTensor& given, int64_t ints,
                 const Launch& launch) {
  run_on_cuda(acc, [&](cudaStream_t stream) {
    if (given.has_value()) return launch(ints_of(*given, ints, acc, "memory"), stream);
    const Tensor own = at::zeros({ints}, acc.options().dtype(at::kInt));
    return launch(own.mutable_data_ptr<int32_t>(), stream);
  });
}

}  // namespace deltafx

#define DELTAFX_IMPL(...)                              \
  TORCH_LIBRARY_IMPL(deltafx, CPU, m) { __VA_ARGS__; } \
  TORCH_LIBRARY_IMPL(deltafx, CUDA, m) { __VA_ARGS__; }
// Runs op `name`, whose kernels take nothing but p.
#define DELTAFX_RUN(name, p, acc, memory)                                                   \
  do {                                                                                      \
    if ((acc).is_cuda())                                                                    \
      return run_on_cuda(                                                                   \
          acc, memory, cuda::list_ints((p).out.acc.sites()),                                \
          [&](int32_t* list, cudaStream_t stream) { return cuda::name(p, list, stream); }); \
    kernels().name(p);                                                                      \
  } while (false)
#else
#define DELTAFX_IMPL(...) \
  TORCH_LIBRARY_IMPL(deltafx, CPU, m) { __VA_ARGS__; }
#define DELTAFX_RUN(name, p, acc, memory) kernels().name(p)
#endif
