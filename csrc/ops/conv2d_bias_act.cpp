// deltafx::conv2d_bias_act: a convolution at every site with its bias, residual and relu, by cuDNN,
// straight into the accumulator. CUDA and half precision only, and only where torch came with
// cuDNN.
#if defined(DELTAFX_CUDA) && __has_include(<cudnn.h>)
#define DELTAFX_CUDNN
#include <ATen/cudnn/Handle.h>
#include <ATen/ops/empty.h>
#include <cudnn.h>
#include <dlfcn.h>
#endif

#include "ops/dispatch.h"
#include "ops/schema.h"

namespace deltafx {

#ifdef DELTAFX_CUDNN
namespace {

#define DELTAFX_TEXT_(x) #x
#define DELTAFX_TEXT(x) DELTAFX_TEXT_(x)

// The functions of the library that torch has loaded; linking to it would tie this shared object
// to where it lies.
template <class Function>
Function* cudnn_function(const char* name) {
  static void* const library =
      dlopen("libcudnn.so." DELTAFX_TEXT(CUDNN_MAJOR), RTLD_NOW | RTLD_NOLOAD);
  TORCH_CHECK(library != nullptr, "deltafx: cuDNN ", CUDNN_MAJOR, " is not loaded");
  void* const found = dlsym(library, name);
  TORCH_CHECK(found != nullptr, "deltafx: cuDNN has no ", name);
  return reinterpret_cast<Function*>(found);
}
#define CUDNN(name, ...)                                                                           \
  do {                                                                                             \
    static auto* const function = cudnn_function<decltype(name)>(#name);                           \
    const cudnnStatus_t status = function(__VA_ARGS__);                                            \
    TORCH_CHECK(status == CUDNN_STATUS_SUCCESS, "deltafx: " #name " failed with status ", status); \
  } while (false)

// A cuDNN descriptor, destroyed with this object.
template <class Descriptor>
class Owned {
 public:
  using Function = cudnnStatus_t(Descriptor);
  Owned(cudnnStatus_t (*create)(Descriptor*), Function* destroy) : destroy_(destroy) {
    TORCH_CHECK(create(&descriptor_) == CUDNN_STATUS_SUCCESS, "deltafx: no cuDNN descriptor");
  }
  ~Owned() { destroy_(descriptor_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  operator Descriptor() const { return descriptor_; }

 private:
  Descriptor descriptor_{};
  Function* destroy_;
};
#define DESCRIPTOR(kind)                                                                         \
  Owned<cudnn##kind##Descriptor_t>(                                                              \
      cudnn_function<decltype(cudnnCreate##kind##Descriptor)>("cudnnCreate" #kind "Descriptor"), \
      cudnn_function<decltype(cudnnDestroy##kind##Descriptor)>("cudnnDestroy" #kind "Descriptor"))

cudnnDataType_t data_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kBFloat16:
      return CUDNN_DATA_BFLOAT16;
    case at::kHalf:
      return CUDNN_DATA_HALF;
    default:
      TORCH_CHECK_TYPE(false, "deltafx: this is for half precision, not for ", t.scalar_type());
  }
}

void check_like(const Tensor& t, const Tensor& acc, const char* name) {
  check_same_device(t, acc, name);
  TORCH_CHECK_TYPE(t.scalar_type() == acc.scalar_type(), "deltafx: ", name, " is ", t.scalar_type(),
                   " but the accumulator is ", acc.scalar_type());
  TORCH_CHECK_VALUE(t.is_contiguous(at::MemoryFormat::ChannelsLast), "deltafx: ", name,
                    " must be channels_last and whole");
}

int int_of(int64_t v) { return static_cast<int>(v); }

void set_tensor(cudnnTensorDescriptor_t descriptor, const Tensor& t) {
  CUDNN(cudnnSetTensor4dDescriptor, descriptor, CUDNN_TENSOR_NHWC, data_type(t), int_of(t.size(0)),
        int_of(t.size(1)), int_of(t.size(2)), int_of(t.size(3)));
}

void conv2d_bias_act(const Tensor& acc, const Tensor& x, const Tensor& weight, const Tensor& bias,
                     const OptionalTensor& residual, at::IntArrayRef stride,
                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool relu) {
  check_like(acc, acc, "acc");
  check_like(x, acc, "x");
  check_like(weight, acc, "weight");
  if (residual.has_value()) {
    check_like(*residual, acc, "residual");
    TORCH_CHECK_VALUE(residual->sizes() == acc.sizes(), "deltafx: residual is ", residual->sizes(),
                      " but the accumulator is ", acc.sizes());
  }
  check_same_device(bias, acc, "bias");
  TORCH_CHECK_VALUE(bias.scalar_type() == acc.scalar_type() && bias.is_contiguous() &&
                        bias.numel() == acc.size(1),
                    "deltafx: bias must be ", acc.size(1), " of ", acc.scalar_type());
  const c10::cuda::CUDAGuard guard(acc.device());
  const cudnnHandle_t handle = at::native::getCudnnHandle();
  const auto xd = DESCRIPTOR(Tensor), yd = DESCRIPTOR(Tensor), bd = DESCRIPTOR(Tensor);
  const auto wd = DESCRIPTOR(Filter);
  const auto cd = DESCRIPTOR(Convolution);
  const auto ad = DESCRIPTOR(Activation);
  set_tensor(xd, x);
  set_tensor(yd, acc);
  CUDNN(cudnnSetTensor4dDescriptor, bd, CUDNN_TENSOR_NHWC, data_type(bias), 1, int_of(bias.numel()),
        1, 1);
  CUDNN(cudnnSetFilter4dDescriptor, wd, data_type(weight), CUDNN_TENSOR_NHWC,
        int_of(weight.size(0)), int_of(weight.size(1)), int_of(weight.size(2)),
        int_of(weight.size(3)));
  const Window wy = window_of(weight.sizes().slice(2), stride, padding, dilation, 0);
  const Window wx = window_of(weight.sizes().slice(2), stride, padding, dilation, 1);
  CUDNN(cudnnSetConvolution2dDescriptor, cd, int_of(wy.pad), int_of(wx.pad), int_of(wy.stride),
        int_of(wx.stride), int_of(wy.dilation), int_of(wx.dilation), CUDNN_CROSS_CORRELATION,
        CUDNN_DATA_FLOAT);
  CUDNN(cudnnSetConvolutionGroupCount, cd, int_of(groups));
  CUDNN(cudnnSetConvolutionMathType, cd, CUDNN_TENSOR_OP_MATH);
  CUDNN(cudnnSetActivationDescriptor, ad, relu ? CUDNN_ACTIVATION_RELU : CUDNN_ACTIVATION_IDENTITY,
        CUDNN_PROPAGATE_NAN, 0.0);
  // The one algorithm that also goes without an activation. It sums each output's own window, so
  // it spreads no NaN beyond the windows that hold it.
  constexpr cudnnConvolutionFwdAlgo_t kAlgorithm = CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM;
  size_t bytes = 0;
  CUDNN(cudnnGetConvolutionForwardWorkspaceSize, handle, xd, wd, cd, yd, kAlgorithm, &bytes);
  const Tensor memory = at::empty({static_cast<int64_t>(bytes)}, acc.options().dtype(at::kByte));
  const float one = 1.f, zero = 0.f;
  const Tensor& z = residual.has_value() ? *residual : acc;
  CUDNN(cudnnConvolutionBiasActivationForward, handle, &one, xd, x.const_data_ptr(), wd,
        weight.const_data_ptr(), cd, kAlgorithm, memory.mutable_data_ptr(), bytes,
        residual.has_value() ? &one : &zero, yd, z.const_data_ptr(), bd, bias.const_data_ptr(), ad,
        yd, acc.mutable_data_ptr());
}

}  // namespace
#endif

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def(
      "conv2d_bias_act(Tensor(a!) acc, Tensor x, Tensor weight, Tensor bias, Tensor? residual, "
      "int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, bool relu) -> ()",
      {at::Tag::pt2_compliant_tag});
}
#ifdef DELTAFX_CUDNN
TORCH_LIBRARY_IMPL(deltafx, CUDA, m) { m.impl("conv2d_bias_act", conv2d_bias_act); }
#endif

}  // namespace deltafx
