// The delta ops on CUDA, for csrc/ops. Each enqueues its kernels on a stream and returns the
// launch's error. `memory`: list_ints(sites of the accumulator) ints on the device, which may be
// reused as soon as the call returns by work that is later on the same stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/site_params.h"
#include "cuda/resample.h"

namespace deltafx::cuda {

int64_t list_ints(int64_t sites);

// What is cleared at the begin of a frame: the arenas of masks and of counts.
struct Arenas {
  uint8_t* masks;
  int64_t bytes;
  int64_t* counts;
  int64_t rows;  // of two
};
cudaError_t clear_masks(const Arenas& arenas, cudaStream_t stream);

cudaError_t encode(const EncodeParams& p, cudaStream_t stream);
// Lets an encode that was captured compare the frame at x, from the next launch on: one in the
// layout that it was captured with, at a multiple of 16 bytes, as that was. Launches that are
// already enqueued read what they were to read.
cudaError_t read_frame(cudaGraphExec_t graph, cudaGraphNode_t encode, const void* x);
// Copies bytes of the device, both at multiples of 16.
cudaError_t hand_out(const void* from, void* to, int64_t bytes, cudaStream_t stream);
// Lets a hand_out that was captured write there from the next launch on, like read_frame.
cudaError_t hand_out_to(cudaGraphExec_t graph, cudaGraphNode_t node, void* to);
cudaError_t affine(const AffineParams& p, int32_t* memory, cudaStream_t stream);
cudaError_t gather_channels(const GatherParams& p, int32_t* memory, cudaStream_t stream);
cudaError_t layer_norm(const LayerNormParams& p, int32_t* memory, cudaStream_t stream);
cudaError_t binary(const BinaryParams& p, int32_t* memory, cudaStream_t stream);
cudaError_t pad2d(const PadParams& p, int32_t* memory, cudaStream_t stream);
// memory: as above, and then an int for each tile of each stream.
cudaError_t global_pool2d(const GlobalPoolParams& p, int32_t* memory, cudaStream_t stream);

// The tables of PoolParams and ResizeParams are on the host; here the rules that made them count.
cudaError_t pool2d(const PoolParams& p, const PoolRule& y, const PoolRule& x, int32_t* memory,
                   bool listed, cudaStream_t stream);
cudaError_t resize2d(const ResizeParams& p, const ResizeRule& y, const ResizeRule& x,
                     int32_t* memory, cudaStream_t stream);

}  // namespace deltafx::cuda
