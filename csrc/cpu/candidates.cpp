#include "cpu/candidates.h"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"

namespace deltafx {

bool any(const uint8_t* bytes, int64_t count) {
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    uint64_t word[8];
    std::memcpy(word, bytes + i, 64);
    if (word[0] | word[1] | word[2] | word[3] | word[4] | word[5] | word[6] | word[7]) return true;
  }
  for (; i < count; ++i)
    if (bytes[i]) return true;
  return false;
}

namespace {

// dst[x] |= src[x * step]
void merge(uint8_t* __restrict dst, const uint8_t* __restrict src, int64_t count, int64_t step) {
  if (step == 1) {
    for (int64_t x = 0; x < count; ++x) dst[x] |= src[x];
  } else if (step == 2) {
    for (int64_t x = 0; x < count; ++x) dst[x] |= src[2 * x];
  } else {
    for (int64_t x = 0; x < count; ++x) dst[x] |= src[x * step];
  }
}

}  // namespace

Candidates::Candidates(int64_t n, int64_t h, int64_t w) : n_(n), h_(h), w_(w) {
  const int64_t sites = n * h * w;
  uint8_t* memory = scratch_of<uint8_t>(Scratch::candidates, sites * 5 + n * h + 64);
  list_ = reinterpret_cast<int32_t*>(memory);
  bytes_ = memory + sites * 4;
  touched_ = bytes_ + sites;
  std::memset(touched_, 0, static_cast<size_t>(n * h));
}

uint8_t* Candidates::row(int64_t n, int64_t y) {
  const int64_t r = n * h_ + y;
  uint8_t* bytes = bytes_ + r * w_;
  if (!touched_[r]) {
    touched_[r] = 1;
    std::memset(bytes, 0, static_cast<size_t>(w_));
  }
  return bytes;
}

void Candidates::add_windows(const Mask& mask, const Window& wy, const Window& wx) {
  uint8_t* merged = scratch_of<uint8_t>(Scratch::work, mask.w + mask.h);
  uint8_t* row_active = merged + mask.w;
  for (int64_t n = 0; n < n_; ++n) {
    const uint8_t* stream = mask.data + n * mask.h * mask.w;
    for (int64_t y = 0; y < mask.h; ++y) row_active[y] = any(stream + y * mask.w, mask.w);
    for (int64_t oy = 0; oy < h_; ++oy) {
      bool found = false;
      for (int64_t k = 0; k < wy.kernel; ++k) {
        const int64_t iy = oy * wy.stride - wy.pad + k * wy.dilation;
        if (iy < 0 || iy >= mask.h || !row_active[iy]) continue;
        if (!found) std::memcpy(merged, stream + iy * mask.w, static_cast<size_t>(mask.w));
        if (found) merge(merged, stream + iy * mask.w, mask.w, 1);
        found = true;
      }
      if (!found) continue;
      uint8_t* out = row(n, oy);
      for (int64_t k = 0; k < wx.kernel; ++k) {
        // ox * stride + offset must lie in [0, mask.w)
        const int64_t offset = k * wx.dilation - wx.pad;
        const int64_t first = offset >= 0 ? 0 : (-offset + wx.stride - 1) / wx.stride;
        const int64_t last = offset >= mask.w ? -1 : (mask.w - 1 - offset) / wx.stride;
        const int64_t count = std::min(last + 1, w_) - first;
        if (count > 0) merge(out + first, merged + first * wx.stride + offset, count, wx.stride);
      }
    }
  }
}

void Candidates::add_transposed_windows(const Mask& mask, const Window& wy, const Window& wx) {
  for (int64_t n = 0; n < n_; ++n)
    for (int64_t iy = 0; iy < mask.h; ++iy) {
      const uint8_t* src = mask.data + (n * mask.h + iy) * mask.w;
      if (!any(src, mask.w)) continue;
      for (int64_t ky = 0; ky < wy.kernel; ++ky) {
        const int64_t oy = iy * wy.stride - wy.pad + ky * wy.dilation;
        if (oy < 0 || oy >= h_) continue;
        uint8_t* out = row(n, oy);
        for (int64_t kx = 0; kx < wx.kernel; ++kx)
          for (int64_t ix = 0; ix < mask.w; ++ix) {
            const int64_t ox = ix * wx.stride - wx.pad + kx * wx.dilation;
            if (ox >= 0 && ox < w_) out[ox] |= src[ix];
          }
      }
    }
}

void Candidates::add_ranges(const Mask& mask, const int32_t* y0, const int32_t* y1,
                            const int32_t* x0, const int32_t* x1) {
  int32_t* sums = scratch_of<int32_t>(Scratch::work, mask.w + 1 + mask.w);
  uint8_t* merged = reinterpret_cast<uint8_t*>(sums + mask.w + 1);
  for (int64_t n = 0; n < n_; ++n) {
    const uint8_t* stream = mask.data + n * mask.h * mask.w;
    for (int64_t oy = 0; oy < h_; ++oy) {
      if (y0[oy] >= y1[oy] || !any(stream + y0[oy] * mask.w, (y1[oy] - y0[oy]) * mask.w)) continue;
      std::memcpy(merged, stream + y0[oy] * mask.w, static_cast<size_t>(mask.w));
      for (int64_t iy = y0[oy] + 1; iy < y1[oy]; ++iy)
        merge(merged, stream + iy * mask.w, mask.w, 1);
      sums[0] = 0;
      for (int64_t x = 0; x < mask.w; ++x) sums[x + 1] = sums[x] + merged[x];
      uint8_t* out = row(n, oy);
      for (int64_t ox = 0; ox < w_; ++ox) out[ox] |= sums[x1[ox]] > sums[x0[ox]];
    }
  }
}

void Candidates::add_sites(const Mask& mask) {
  for (int64_t n = 0; n < n_; ++n)
    for (int64_t y = 0; y < h_; ++y) {
      const uint8_t* src = mask.data + (n * h_ + y) * w_;
      if (any(src, w_)) merge(row(n, y), src, w_, 1);
    }
}

void Candidates::add_streams(const Mask& mask) {
  const int64_t per_stream = mask.h * mask.w;
  for (int64_t n = 0; n < n_; ++n)
    if (any(mask.data + n * per_stream, per_stream)) add_rectangle(n, 0, h_, 0, w_);
}

void Candidates::add_rectangle(int64_t stream, int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
  if (x0 >= x1) return;
  for (int64_t y = y0; y < y1; ++y)
    std::memset(row(stream, y) + x0, 1, static_cast<size_t>(x1 - x0));
}

const int32_t* Candidates::list() {
  int64_t size = 0;
  for (int64_t r = 0; r < n_ * h_; ++r) {
    if (!touched_[r]) continue;
    const uint8_t* bytes = bytes_ + r * w_;
    const int32_t base = static_cast<int32_t>(r * w_);
    int64_t x = 0;
    for (; x + 8 <= w_; x += 8) {
      uint64_t word;
      std::memcpy(&word, bytes + x, 8);
      if (word == 0) continue;
      // Branch-free append: the slot is overwritten unless the byte was set.
      for (int k = 0; k < 8; ++k) {
        list_[size] = base + static_cast<int32_t>(x + k);
        size += bytes[x + k] != 0;
      }
    }
    for (; x < w_; ++x) {
      list_[size] = base + static_cast<int32_t>(x);
      size += bytes[x] != 0;
    }
  }
  size_ = size;
  return list_;
}

void commit(const Output& out, const int32_t* candidates, int64_t size, const uint8_t* active) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) {
    count += active[i];
    out.mask.data[candidates[i]] |= active[i];
  }
  out.counts[0] = size;
  out.counts[1] = count;
}

}  // namespace deltafx
