// What the delta ops' schemas and their arguments have in common. For csrc/ops only.
#pragma once

#include "common/checks.h"
#include "cpu/site_params.h"

// The accumulator, update mask and counts that an op writes.
#define DELTAFX_HEAD "Tensor(a!) acc, Tensor(b!) mask, Tensor(c!) counts, "
// How it decides what to write; and int32s for the list of its candidates, which are the kernels'
// own from call to call on one stream: as many as StatePlan.lists says. An operator that is called
// by itself may go without, and none takes any on the CPU.
#define DELTAFX_RULE "Tensor? inv_scale, Tensor? threshold, str policy, Tensor(z!)? memory=None"
// That as the last arguments, without and with a fused activation.
#define DELTAFX_TRUNCATION DELTAFX_RULE ") -> ()"
#define DELTAFX_ACTIVATION "str act, float[] act_params, Tensor? act_weight, "
#define DELTAFX_TAIL DELTAFX_ACTIVATION DELTAFX_TRUNCATION

namespace deltafx {

// An accumulator that is read, on the device of the one that is written, with its update mask.
Input input_of(const Tensor& x, const Tensor& x_mask, const Tensor& acc);
// The same where x must have the channels of acc, and, if `same_size`, its sites.
Input input_like(const Tensor& x, const Tensor& x_mask, const Tensor& acc, bool same_size);

}  // namespace deltafx
