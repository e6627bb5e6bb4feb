#include "cuda/conv_hopper.h"

#include "cuda/launch.h"

namespace deltafx::cuda {
namespace {

bool is_16_byte_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// An image's channels lie four apart; other maps come in vectors of eight.
bool gathers(const GemmParams& p) {
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
  // Large tiles halve what is read for a product. They pay where a twentieth of the sites fills the
  // device with them, and in deep convolutions of middling maps, whose depth is split.
  const int64_t tiles = p.out.acc.sites() / 128 * (p.out.acc.c / 128);
  const int64_t multiprocessors = current_device().multiprocessors;
  const bool deep = p.packed_depth >= 1024 && tiles * p.packed_depth >= 3072 * multiprocessors;
  return p.out.acc.c % 128 == 0 && p.x.c > 4 && (deep || tiles >= 20 * multiprocessors);
}

}  // namespace deltafx::cuda
