// All CPU kernels for one instruction set: included once by each isa_*.cpp, which defines
// DELTAFX_ISA (a namespace) and DELTAFX_LANES (floats a vector). Standard headers come before, out
// of reach of the target pragma, so that no inline function of theirs is compiled for it.

namespace deltafx::DELTAFX_ISA {

#include "cpu/simd.inl"
#include "cpu/activation.inl"
#include "cpu/truncate.inl"
#include "cpu/sites.inl"
#include "cpu/encode.inl"
#include "cpu/affine.inl"
#include "cpu/binary.inl"
#include "cpu/pool.inl"
#include "cpu/resize.inl"
#include "cpu/gemm.inl"
#include "cpu/conv_gather.inl"
#include "cpu/conv_finish.inl"
#include "cpu/conv_direct.inl"
#include "cpu/conv_gemm.inl"

extern const Kernels table;
const Kernels table = {DELTAFX_ISA_NAME, encode, affine,    gather_channels,
                       layer_norm,       binary, pool2d,    global_pool2d,
                       resize2d,         pad2d,  conv_phase};

}  // namespace deltafx::DELTAFX_ISA
