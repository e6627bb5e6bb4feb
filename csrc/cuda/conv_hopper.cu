#include "cuda/conv_hopper.h"

#include "cuda/launch.h"

namespace deltafx::cuda {
namespace {

bool is_16_byte_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// An image's channels lie four apart; other maps come in vectors of eight.
bool gathers(const GemmParams& p) {
  if (p.x.sites() * p.x.ld >= int64_t{1} << 31) return false;  // offsets have 32 bits
  if (p.pre_scale != nullptr || p.y.phase.taps == 0 || p.x_axis.phase.taps == 0 ||
      p.y.phase.taps >= kMostTaps || p.x_axis.phase.taps >= kMostTaps)
    return false;
  if (p.x.c <= 4) return p.x.ld == 4 && reinterpret_cast<uintptr_t>(p.x.data) % 8 == 0;
  return is_aligned(p.x);
}

}  // namespace

bool conv_hopper_takes(const GemmParams& p) {
#ifdef DELTAFX_SM90A
  return current_device().capability == 90 && gathers(p) && p.acc_aligned &&
         (p.residual.data == nullptr || p.residual_aligned) && is_16_byte_aligned(p.weight);
#else
  return false;
#endif
}

bool conv_hopper_is_large(const GemmParams& p) {
  // Large tiles halve what is read for a product. They pay in deep convolutions, of many channels
  // or of large maps.
  const int64_t tiles = p.out.acc.sites() / 128 * (p.out.acc.c / 128);
  const int64_t work = tiles * p.packed_depth / current_device().multiprocessors;
  return p.out.acc.c % 128 == 0 && p.x.c > 4 && p.packed_depth >= 1024 &&
         work >= (p.out.acc.c >= 512 ? 3072 : 12288);
}

}  // namespace deltafx::cuda
