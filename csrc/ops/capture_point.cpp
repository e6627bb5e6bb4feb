// torch.classes.deltafx.CapturePoint: how far the capture of a stream has come, so that what is
// launched next can depend on that instead of, or besides, what was launched last. So one stream
// captures calls that run beside each other. CUDA only.
#ifdef DELTAFX_CUDA
#include <torch/custom_class.h>

#include <vector>

#include "ops/dispatch.h"

namespace deltafx {
namespace {

class CapturePoint : public torch::CustomClassHolder {
 public:
  // Whether captures on a device have points: CUDA before 13 does not tell all of an edge.
  static bool supported(c10::Device device) { return device.is_cuda() && CUDART_VERSION >= 13000; }

  // That of the current stream of the device of `like`, which must be capturing.
  static c10::intrusive_ptr<CapturePoint> here(const Tensor& like) {
    TORCH_CHECK_VALUE(like.is_cuda(), "deltafx: there are no captures on ", like.device());
    auto point =
        c10::make_intrusive<CapturePoint>(c10::cuda::getCurrentCUDAStream(like.device().index()));
    point->take();
    return point;
  }

  explicit CapturePoint(c10::cuda::CUDAStream stream) : stream_(stream) {}

  // What is launched next depends on what is before this point, and on nothing else.
  void go_back() { set(Change::replace); }
  // What is launched next depends on what is before this point as well.
  void join() { set(Change::add); }

 private:
  enum class Change { replace, add };

#if CUDART_VERSION >= 13000
  void take() {
    const c10::cuda::CUDAGuard guard(stream_.device());
    cudaStreamCaptureStatus status;
    const cudaGraphNode_t* nodes = nullptr;
    const cudaGraphEdgeData* edges = nullptr;
    size_t count = 0;
    C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream_.stream(), &status, nullptr, nullptr, &nodes,
                                            &edges, &count));
    TORCH_CHECK(status == cudaStreamCaptureStatusActive, "deltafx: the current stream of ",
                stream_.device(), " is not being captured as a CUDA graph");
    nodes_.assign(nodes, nodes + count);
    if (edges != nullptr) edges_.assign(edges, edges + count);
  }

  void set(Change change) {
    const c10::cuda::CUDAGuard guard(stream_.device());
    C10_CUDA_CHECK(cudaStreamUpdateCaptureDependencies(
        stream_.stream(), nodes_.data(), edges_.empty() ? nullptr : edges_.data(), nodes_.size(),
        change == Change::add ? cudaStreamAddCaptureDependencies
                              : cudaStreamSetCaptureDependencies));
  }

  std::vector<cudaGraphNode_t> nodes_;
  std::vector<cudaGraphEdgeData> edges_;  // none: all are of the ordinary kind
#else
  void take() { refuse(); }
  void set(Change) { refuse(); }
  static void refuse() {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "deltafx: calls beside each other need CUDA 13, and this was "
                                "compiled for ",
                                CUDART_VERSION);
  }
#endif

  c10::cuda::CUDAStream stream_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.class_<CapturePoint>("CapturePoint")
      .def_static("supported", &CapturePoint::supported)
      .def_static("here", &CapturePoint::here)
      .def("go_back", &CapturePoint::go_back)
      .def("join", &CapturePoint::join);
}

}  // namespace deltafx
#endif
