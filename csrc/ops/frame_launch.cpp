// torch.classes.deltafx.FrameLaunch: a frame that was captured as a CUDA graph, from the tensors
// that come in to new tensors that go out, in one call: where nothing changed, the host takes
// longer for a frame than the device. CUDA only.
#ifdef DELTAFX_CUDA
#include <ATen/cuda/EmptyTensor.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty_like.h>
#include <torch/custom_class.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "ops/frame_args.h"

namespace deltafx {

int64_t last_node(const Tensor& like) {
#if CUDART_VERSION >= 13000
  const c10::cuda::CUDAGuard guard(like.device());
  cudaStreamCaptureStatus status;
  const cudaGraphNode_t* nodes = nullptr;
  const cudaGraphEdgeData* edges = nullptr;
  size_t count = 0;
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(c10::cuda::getCurrentCUDAStream().stream(), &status,
                                          nullptr, nullptr, &nodes, &edges, &count));
  if (status == cudaStreamCaptureStatusActive && count == 1)
    return reinterpret_cast<int64_t>(nodes[0]);  // NOLINT: as torch's handles
#endif
  return 0;
}

namespace {

// As the comparison of a frame wants it; see cuda::read_frame.
constexpr uintptr_t kAlignment = 16;

// Whether a tensor is what its memory holds, and nothing but that.
bool is_plain(const Tensor& t) {
  return t.is_cuda() && t.layout() == at::kStrided && !t.is_conj() && !t.is_neg() &&
         !t._is_zerotensor() && !t.unsafeGetTensorImpl()->is_python_dispatch();
}

// Whether it fills that memory, in whatever order of dimensions.
bool is_whole(const Tensor& t) { return is_plain(t) && t.is_non_overlapping_and_dense(); }

// Another of the same layout, with nothing in it yet.
Tensor another(const Tensor& t, const c10::Device& device) {
  return at::detail::empty_strided_cuda(t.sizes(), t.strides(), t.scalar_type(), device);
}

// Whether elements of two tensors lie equally far apart.
bool lies_as(const Tensor& t, const Tensor& other) {
  if (t.sizes() != other.sizes()) return false;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1 && t.stride(d) != other.stride(d)) return false;
  return true;
}

class FrameLaunch : public torch::CustomClassHolder {
 public:
  // graph: the cudaGraph_t, or 0, if another launches it: between `read` and `results`. inputs:
  // what it reads. readers: for each of them the node that alone reads it (see last_node), or 0:
  // then frames are copied there, else the input's own memory is not needed any more. outputs: what
  // it writes. writers: for each of them the node that hands it out, or 0: then it is copied behind
  // the graph. Whoever makes this keeps the graph.
  FrameLaunch(int64_t graph, std::vector<Tensor> inputs, const std::vector<int64_t>& readers,
              std::vector<Tensor> outputs, const std::vector<int64_t>& writers)
      : inputs_(std::move(inputs)), outputs_(std::move(outputs)) {
    TORCH_CHECK(outputs_.size() == writers.size(), "deltafx: there are ", outputs_.size(),
                " outputs and ", writers.size(), " writers of them");
    TORCH_CHECK(!inputs_.empty() && inputs_.size() == readers.size(), "deltafx: there are ",
                inputs_.size(), " inputs and ", readers.size(), " readers of them");
    device_ = inputs_[0].device();
    const c10::cuda::CUDAGuard guard(device_);
    if (graph != 0)
      C10_CUDA_CHECK(cudaGraphInstantiateWithFlags(&graph_,
                                                   reinterpret_cast<cudaGraph_t>(graph),  // NOLINT
                                                   cudaGraphInstantiateFlagAutoFreeOnLaunch));
    for (size_t i = 0; i < inputs_.size(); ++i) {
      auto* node = reinterpret_cast<cudaGraphNode_t>(readers[i]);  // NOLINT: as torch's handles
      Tensor& own = inputs_[i];
      if (graph_ == nullptr || node == nullptr || !is_plain(own)) {
        node = nullptr;
      } else if (cuda::read_frame(graph_, node, own.const_data_ptr()) != cudaSuccess) {
        cudaGetLastError();  // it cannot be told to, so its frames are copied
        node = nullptr;
      } else {
        own = own.to(at::kMeta);  // its layout is all that is asked for
      }
      readers_.push_back({node, nullptr});
    }
    for (const int64_t writer : writers)
      writers_.push_back(graph_ == nullptr ? nullptr
                                           : reinterpret_cast<cudaGraphNode_t>(writer));  // NOLINT
  }
  FrameLaunch(const FrameLaunch&) = delete;
  FrameLaunch& operator=(const FrameLaunch&) = delete;
  ~FrameLaunch() override {
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
  }

  // On the current stream; waits for nothing.
  std::vector<Tensor> run(const std::vector<Tensor>& frames) {
    const c10::cuda::CUDAGuard guard(device_);
    const std::vector<Tensor> converted = read(frames);
    std::vector<Tensor> made;
    made.reserve(outputs_.size());
    for (size_t i = 0; i < outputs_.size(); ++i) {
      made.push_back(writers_[i] == nullptr ? Tensor() : another(outputs_[i], device_));
      if (writers_[i] != nullptr)
        C10_CUDA_CHECK(cuda::hand_out_to(graph_, writers_[i], made[i].mutable_data_ptr()));
    }
    C10_CUDA_CHECK(cudaGraphLaunch(graph_, c10::cuda::getCurrentCUDAStream().stream()));
    for (size_t i = 0; i < outputs_.size(); ++i)
      if (writers_[i] == nullptr) made[i] = copy_of(outputs_[i]);
    return made;
  }

  // Lets the next launch read these frames; returns what has to be there until then.
  std::vector<Tensor> read(const std::vector<Tensor>& frames) {
    std::vector<Tensor> converted;
    TORCH_CHECK_VALUE(frames.size() == inputs_.size(), "deltafx: the graph has ", inputs_.size(),
                      " inputs, not ", frames.size());
    for (size_t i = 0; i < frames.size(); ++i) {
      Reader& reader = readers_[i];
      if (reader.node == nullptr) {
        inputs_[i].copy_(frames[i], /*non_blocking=*/true);
        continue;
      }
      const bool readable = is_readable(inputs_[i], frames[i]);
      if (!readable) {
        converted.push_back(another(inputs_[i], device_));
        converted.back().copy_(frames[i], /*non_blocking=*/true);
      }
      const void* from = (readable ? frames[i] : converted.back()).const_data_ptr();
      if (from == reader.from) continue;
      C10_CUDA_CHECK(cuda::read_frame(graph_, reader.node, from));
      reader.from = from;
    }
    return converted;
  }

  // Copies of the outputs, which later frames leave alone.
  std::vector<Tensor> results() const {
    std::vector<Tensor> made;
    made.reserve(outputs_.size());
    if (outputs_.size() == 1) {  // as of nearly every model
      made.push_back(copy_of(outputs_[0]));
      return made;
    }
    for (const Tensor& t : outputs_) made.push_back(at::empty_like(t));
    if (!made.empty()) at::_foreach_copy_(made, outputs_);
    return made;
  }

 private:
  struct Reader {
    cudaGraphNode_t node;  // null: frames are copied
    const void* from;      // where the graph reads the input, once it was told
  };

  // Whether a frame can be read where it is, in an input's place.
  bool is_readable(const Tensor& own, const Tensor& frame) const {
    return is_plain(frame) && frame.device() == device_ &&
           frame.scalar_type() == own.scalar_type() && lies_as(frame, own) &&
           reinterpret_cast<uintptr_t>(frame.const_data_ptr()) % kAlignment == 0;
  }

  static Tensor copy_of(const Tensor& t) {
    if (!is_whole(t)) return t.clone();
    Tensor made = another(t, t.device());
    C10_CUDA_CHECK(cudaMemcpyAsync(made.mutable_data_ptr(), t.const_data_ptr(), t.nbytes(),
                                   cudaMemcpyDeviceToDevice,
                                   c10::cuda::getCurrentCUDAStream(t.get_device()).stream()));
    return made;
  }

  std::vector<Tensor> inputs_, outputs_;
  c10::Device device_ = c10::kCUDA;
  std::vector<Reader> readers_;
  std::vector<cudaGraphNode_t> writers_;
  cudaGraphExec_t graph_ = nullptr;
};

// Has the current stream, which is being captured, hand out an output, to wherever FrameLaunch says
// at each launch; the node of it, or 0, if that cannot be.
int64_t hand_out(const Tensor& output) {
  if (!is_whole(output) || output.numel() == 0 ||
      reinterpret_cast<uintptr_t>(output.const_data_ptr()) % kAlignment != 0)
    return 0;
  void* own = output.mutable_data_ptr();  // until it is told
  run_on_cuda(output, [&](cudaStream_t stream) {
    return cuda::hand_out(own, own, static_cast<int64_t>(output.nbytes()), stream);
  });
  return last_node(output);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.class_<FrameLaunch>("FrameLaunch")
      .def(torch::init<int64_t, std::vector<Tensor>, std::vector<int64_t>, std::vector<Tensor>,
                       std::vector<int64_t>>())
      .def("run", &FrameLaunch::run)
      .def("read", &FrameLaunch::read)
      .def("results", &FrameLaunch::results)
      .def_static("last_node", &last_node)
      .def_static("hand_out", &hand_out);
}

}  // namespace deltafx
#endif
