// Candidate lists: the output sites whose window touches an active site of an input.
#pragma once

#include "common/types.h"

namespace deltafx {

// A growing union of candidate sites over an output map [n, h, w], kept as bytes in scratch of the
// calling thread. One at a time per thread: make it, add inputs, take the list, run the op.
class Candidates {
 public:
  Candidates(int64_t n, int64_t h, int64_t w);
  // Sites whose window (same geometry as a convolution) touches an active site of `mask`.
  void add_windows(const Mask& mask, const Window& wy, const Window& wx);
  // The same for a transposed convolution: an active i makes i * stride - pad + k * dilation one.
  void add_transposed_windows(const Mask& mask, const Window& wy, const Window& wx);
  // Sites whose input coordinates lie in [y0[o], y1[o]) x [x0[o], x1[o]): adaptive pools, resizes.
  void add_ranges(const Mask& mask, const int32_t* y0, const int32_t* y1, const int32_t* x0,
                  const int32_t* x1);
  // Sites that are active in `mask`, which has the output's size.
  void add_sites(const Mask& mask);
  // Every site of the streams whose part of `mask` [n, *, *] has an active site (gates).
  void add_streams(const Mask& mask);
  // Every site of the rectangle [y0, y1) x [x0, x1) of a stream.
  void add_rectangle(int64_t stream, int64_t y0, int64_t y1, int64_t x0, int64_t x1);
  // Site indices (n * h + y) * w + x, ascending. Valid until the next Candidates of this thread.
  const int32_t* list();
  int64_t size() const { return size_; }

 private:
  uint8_t* row(int64_t n, int64_t y);  // the bytes of a row, which is hereby touched
  int64_t n_, h_, w_, size_ = 0;
  uint8_t* bytes_;
  uint8_t* touched_;  // one byte a row: rows never touched are neither cleared nor scanned
  int32_t* list_ = nullptr;
};

bool any(const uint8_t* bytes, int64_t count);

// Ends an op: sets the mask at the candidates whose flag is set and writes both counts.
void commit(const Output& out, const int32_t* candidates, int64_t size, const uint8_t* active);

}  // namespace deltafx
