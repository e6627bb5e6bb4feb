// Which output sites of a convolution are candidates.
#pragma once

#include "cuda/conv_gemm.h"

namespace deltafx::cuda {

// Whether an output coordinate has a kernel element inside the input.
__host__ __device__ inline bool has_tap(const PhaseAxis& phase, int base, int in) {
  for (int j = 0; j < phase.taps; ++j) {
    const int i = base + j * phase.step;
    if (i >= 0 && i < in) return true;
  }
  return false;
}

// The candidates of a phase: sites whose taps meet an active site, or whose residual is active.
// Sites without any tap inside the input hold a constant that no input can make them compute. They
// follow their stream instead, so that a lost state is refilled.
struct ConvQuery {
  Mask x, residual;
  GemmAxis y_axis, x_axis;
  const int32_t* streams;  // per stream, whether x has an active site; null: no site needs it
  Windows windows;

  ConvQuery() = default;
  ConvQuery(const Mask& x_mask, const Mask& residual_mask, const GemmAxis& y, const GemmAxis& x_of,
            const int32_t* active_streams)
      : x(x_mask), residual(residual_mask), y_axis(y), x_axis(x_of), streams(active_streams) {
    windows = are_points() && x.w % kFlags == 0 ? Windows::points
              : are_in_words(kSmall, 3, 8)      ? Windows::small
              : are_in_words(kSmall, 5, 4)      ? Windows::narrow
              : are_in_words(kWide, 4, 8)       ? Windows::wide
                                                : Windows::any;
  }
  // Of a kernel that finds its candidates itself.
  __device__ explicit ConvQuery(const GemmParams& p)
      : x(p.x_mask),
        residual(p.residual_mask),
        y_axis(p.y),
        x_axis(p.x_axis),
        streams(nullptr),
        windows(p.windows) {}

  __device__ static bool in_phase(const GemmAxis& axis, int o) {
    return !axis.transposed || (o + axis.pad) % axis.stride == axis.phase.remainder;
  }
  __device__ bool is_candidate(const Position& at) const {
    if (!in_phase(y_axis, at.y) || !in_phase(x_axis, at.x)) return false;
    const int top = y_axis.base(at.y), left = x_axis.base(at.x);
    const int h = static_cast<int>(x.h), w = static_cast<int>(x.w);
    const uint8_t* stream = x.data + static_cast<int64_t>(at.n) * h * w;
    bool found = false;
    for (int jy = 0; jy < y_axis.phase.taps; ++jy) {
      const int iy = top + jy * y_axis.phase.step;
      if (iy < 0 || iy >= h) continue;
      for (int jx = 0; jx < x_axis.phase.taps; ++jx) {
        const int ix = left + jx * x_axis.phase.step;
        found |= ix >= 0 && ix < w && stream[static_cast<int64_t>(iy) * w + ix] != 0;
      }
    }
    if (residual.data != nullptr)
      found |= residual.data[(at.n * residual.h + at.y) * residual.w + at.x] != 0;
    if (streams != nullptr && !found && streams[at.n] != 0)
      found = !has_tap(y_axis.phase, top, h) || !has_tap(x_axis.phase, left, w);
    return found;
  }

  // Whether a run of eight sites is eight bytes of each mask, at a multiple of eight.
  __device__ bool is_pointwise() const { return windows == Windows::points; }
  // The bytes of such a run.
  __device__ uint64_t eight_sites(int run) const {
    uint64_t bytes = reinterpret_cast<const uint64_t*>(x.data)[run];
    if (residual.data != nullptr) bytes |= reinterpret_cast<const uint64_t*>(residual.data)[run];
    return bytes;
  }

  // Whether flags_at answers for eight sites.
  __device__ bool has_places() const {
    return windows == Windows::small || windows == Windows::narrow || windows == Windows::wide;
  }
  // How windows are found in runs that go on from row to row.
  Windows windows_of_shares() const {
    return are_points() && x.n * x.h * x.w % kFlags == 0 ? Windows::points : windows;
  }

  __device__ uint32_t flags(const Position& at, int count) const {
    return has_places() ? flags_at(place(at)) & ((1u << count) - 1) : other_flags(at, count);
  }
  // Of any window.
  __device__ uint32_t other_flags(Position at, int count) const {
    uint32_t found = 0;
    if (y_axis.transposed || streams != nullptr || x_axis.stride > 2) {
#pragma unroll 1
      for (int i = 0; i < count; ++i, ++at.x) found |= (is_candidate(at) ? 1u : 0u) << i;
      return found;
    }
    const int taps = x_axis.phase.taps, step = x_axis.phase.step, left = x_axis.base(at.x);
    const int span = (kFlags - 1) * x_axis.stride + (taps - 1) * step;
    // All tap rows into one, 24 bytes wide, and that tap by tap to the left; or tap by tap.
    const bool wide = step < 8 && span < 24;
    const bool aligned = (x.w | reinterpret_cast<uintptr_t>(x.data)) % 8 == 0;
    const bool in_words = wide && aligned;
    uint64_t bytes = 0, a = 0, b = 0, c = 0;
    if (residual.data != nullptr)
      bytes = eight_bytes(residual, at.n * static_cast<int>(residual.h) + at.y, at.x);
    if (in_words) or_rows(at, left, span, a, b, c);
#pragma unroll 1
    for (int jy = 0; jy < (in_words ? 0 : y_axis.phase.taps); ++jy) {
      const int iy = y_axis.base(at.y) + jy * y_axis.phase.step;
      if (iy < 0 || iy >= x.h) continue;
      const int row = at.n * static_cast<int>(x.h) + iy;
      if (wide) {
        a |= eight_bytes(x, row, left);
        if (span >= 8) b |= eight_bytes(x, row, left + 8);
        if (span >= 16) c |= eight_bytes(x, row, left + 16);
        continue;
      }
      if (aligned && x_axis.stride == 1) {
        const auto* words =
            reinterpret_cast<const uint64_t*>(x.data) + row * (static_cast<int>(x.w) / 8);
        bytes |= or_taps(words, left, taps, step);
        continue;
      }
#pragma unroll 1
      for (int jx = 0; jx < taps; ++jx) {
        a = eight_bytes(x, row, left + jx * step);
        if (x_axis.stride == 2) a = even_bytes(a, eight_bytes(x, row, left + jx * step + 8));
        bytes |= a;
      }
    }
    if (wide) {
#pragma unroll 1
      for (int jx = 0; jx < taps; ++jx) {
        bytes |= x_axis.stride == 1 ? a : even_bytes(a, b);
        const int bits = 8 * step;
        a = a >> bits | b << (64 - bits);
        b = b >> bits | c << (64 - bits);
        c >>= bits;
      }
    }
    return bits_of(bytes) & ((1u << count) - 1);
  }

  // Where the taps of eight sites lie in the masks: which words of which rows there are, and that
  // tap 0 of the first site is byte `shift` of the first.
  struct Place {
    const uint8_t *from, *own;
    int rows, columns, shift;
    int own_sites;  // up to the row's end
  };
  __device__ __forceinline__ Place place(const Position& at) const {
    const int log_bytes = windows == Windows::narrow ? 2 : 3;
    const int h = static_cast<int>(x.h), w = static_cast<int>(x.w) >> log_bytes;
    const int top = at.y * y_axis.stride + y_axis.phase.offset;
    const int left = at.x * x_axis.stride + x_axis.phase.offset, first = left >> log_bytes;
    // The rows from max(top, 0) up to min(top + taps, h), the words of a row likewise.
    const int rows = bits_between(-top, min(y_axis.phase.taps, h - top));
    const int columns = bits_between(-first, min(8, w - first));
    const auto own = static_cast<int64_t>(at.n * static_cast<int>(residual.h) + at.y) *
                         static_cast<int>(residual.w) +
                     at.x;
    return {x.data + ((static_cast<int64_t>(at.n * h + top) * w + first) << log_bytes),
            residual.data == nullptr ? nullptr : residual.data + own,
            rows,
            columns,
            left & ((1 << log_bytes) - 1),
            static_cast<int>(residual.w) - at.x};
  }
  __device__ __forceinline__ uint32_t flags_at(const Place& place) const {
    return windows == Windows::small    ? flags_of_words<uint2, kSmall, 3>(place)
           : windows == Windows::narrow ? flags_of_words<uint32_t, kSmall, 5>(place)
                                        : flags_of_words<uint2, kWide, 4>(place);
  }

 protected:
  // Bytes `left` to left + span of the tap rows, in one: a, b, c. A row of the mask is whole words,
  // so those of all rows are read before any is looked at.
  __device__ __forceinline__ void or_rows(const Position& at, int left, int span, uint64_t& a,
                                          uint64_t& b, uint64_t& c) const {
    constexpr int kRowsAtOnce = 4, kWords = 4;
    const int h = static_cast<int>(x.h), w = static_cast<int>(x.w) / 8;
    const int first = left >> 3, shift = (left & 7) * 8, last = (left + span) >> 3;
    const int top = y_axis.base(at.y);
    const auto* stream = reinterpret_cast<const uint64_t*>(x.data) + at.n * h * w;
    uint64_t words[kWords] = {};
#pragma unroll 1
    for (int begin = 0; begin < y_axis.phase.taps; begin += kRowsAtOnce) {
      uint64_t v[kRowsAtOnce][kWords];
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) {
        const int y = top + (begin + j) * y_axis.phase.step;
        const bool inside = begin + j < y_axis.phase.taps && y >= 0 && y < h;
#pragma unroll
        for (int k = 0; k < kWords; ++k) {
          const int word = first + k;
          v[j][k] = 0;
          if (inside && word >= 0 && word < w && word <= last) v[j][k] = stream[y * w + word];
        }
      }
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) {
#pragma unroll
        for (int k = 0; k < kWords; ++k) words[k] |= v[j][k];
      }
    }
    const auto shifted = [&](uint64_t low, uint64_t high) {
      return shift != 0 ? low >> shift | high << (64 - shift) : low;
    };
    a = shifted(words[0], words[1]), b = shifted(words[1], words[2]),
    c = shifted(words[2], words[3]);
  }
  // Bytes `left` to left + 7 and those of the other taps of a row of whole words, in one; some taps
  // are read before any is looked at.
  __device__ __forceinline__ uint64_t or_taps(const uint64_t* row, int left, int taps,
                                              int step) const {
    constexpr int kTapsAtOnce = 3;
    const int w = static_cast<int>(x.w) / 8;
    uint64_t found = 0;
#pragma unroll 1
    for (int begin = 0; begin < taps; begin += kTapsAtOnce) {
      uint64_t low[kTapsAtOnce], high[kTapsAtOnce];
#pragma unroll
      for (int j = 0; j < kTapsAtOnce; ++j) {
        const int word = (left + (begin + j) * step) >> 3;
        const bool reads = begin + j < taps;
        low[j] = reads && word >= 0 && word < w ? row[word] : 0;
        high[j] = reads && word + 1 >= 0 && word + 1 < w ? row[word + 1] : 0;
      }
#pragma unroll
      for (int j = 0; j < kTapsAtOnce; ++j) {
        const int shift = ((left + (begin + j) * step) & 7) * 8;
        found |= shift != 0 ? low[j] >> shift | high[j] << (64 - shift) : low[j];
      }
    }
    return found;
  }
  static constexpr int kSmall = 3, kWide = 8;  // taps of an axis

  static __device__ __forceinline__ uint2 either(uint2 a, uint2 b) {
    return make_uint2(a.x | b.x, a.y | b.y);
  }
  static __device__ __forceinline__ uint32_t either(uint32_t a, uint32_t b) { return a | b; }
  // All words are asked for together, and from then on a byte of the mask is one of the Bits.
  template <class Word, int kRows, int kWords, class Bits = uint32_t>
  __device__ __forceinline__ uint32_t flags_of_words(const Place& place) const {
    constexpr int kBytes = static_cast<int>(sizeof(Word)), kAtOnce = kRows > 4 ? 4 : kRows;
    const int w = static_cast<int>(x.w) / kBytes, taps = x_axis.phase.taps;
    const auto* from = reinterpret_cast<const Word*>(place.from);
    const auto* own_words = reinterpret_cast<const Word*>(place.own);
    __builtin_assume(__isGlobal(from));
    __builtin_assume(__isGlobal(own_words));
    Word any[kWords] = {}, own[kFlags / kBytes] = {};
    if (own_words != nullptr) {
#pragma unroll
      for (int k = 0; k < kFlags / kBytes; ++k)
        if (k * kBytes < place.own_sites) own[k] = own_words[k];
    }
#pragma unroll 1
    for (int rows = place.rows; rows != 0; rows >>= kAtOnce, from += kAtOnce * w) {
      Word words[kAtOnce][kWords];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int k = 0; k < kWords; ++k) {
          words[j][k] = {};
          if ((rows >> j & place.columns >> k & 1) != 0) words[j][k] = from[j * w + k];
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int k = 0; k < kWords; ++k) any[k] = either(any[k], words[j][k]);
      }
    }
    Bits bits = 0;
    uint32_t own_bits = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) bits |= static_cast<Bits>(bits_of(any[k])) << (kBytes * k);
#pragma unroll
    for (int k = 0; k < kFlags / kBytes; ++k) own_bits |= bits_of(own[k]) << (kBytes * k);
    bits >>= place.shift;
    // Tap after tap to the left, by doubling.
    if (taps > 1) bits |= bits >> 1;
    if (taps > 2) bits |= bits >> min(2, taps - 2);
    if (kRows > 4 && taps > 4) bits |= bits >> min(4, taps - 4);
    if (kRows > 8 && taps > 8) bits |= bits >> min(8, taps - 8);
    if (kRows > 16 && taps > 16) bits |= bits >> (taps - 16);
    const auto low = static_cast<uint32_t>(bits);
    if (kRows > 8 && x_axis.stride == 4) return fourth_bits(low) | own_bits;
    return (x_axis.stride == 2 ? even_bits(low) : low & 0xff) | own_bits;
  }

  static bool is_in_words(const Mask& mask, int bytes) {
    return (mask.w | static_cast<int64_t>(reinterpret_cast<uintptr_t>(mask.data))) % bytes == 0;
  }
  // Whether windows are the sites themselves, and the masks begin with words.
  bool are_points() const {
    return y_axis.phase.taps == 1 && x_axis.phase.taps == 1 && y_axis.stride == 1 &&
           x_axis.stride == 1 && y_axis.pad == 0 && x_axis.pad == 0 && !y_axis.transposed &&
           (reinterpret_cast<uintptr_t>(x.data) | reinterpret_cast<uintptr_t>(residual.data)) %
                   kFlags ==
               0;
  }
  // Whether the windows are of up to `most` neighbours along an axis, and eight sites' taps lie in
  // so many words of so many bytes, the first of them anywhere in the first.
  bool are_in_words(int most, int words, int bytes) const {
    return y_axis.phase.taps <= most && x_axis.phase.taps <= most && y_axis.phase.step == 1 &&
           x_axis.phase.step == 1 && takes_stride(x_axis.stride, most) && !y_axis.transposed &&
           bytes - 1 + 7 * x_axis.stride + x_axis.phase.taps <= bytes * words &&
           streams == nullptr && is_in_words(x, bytes) &&
           (residual.data == nullptr || is_in_words(residual, bytes));
  }
  static bool takes_stride(int stride, int most) {
    return stride <= 2 || (stride == 4 && most > kWide);
  }
  // Bit i of the lower byte: bit 4 * i.
  static __device__ __forceinline__ uint32_t fourth_bits(uint32_t v) {
    v &= 0x11111111;
    v = (v | v >> 3) & 0x03030303;
    v = (v | v >> 6) & 0x000f000f;
    return (v | v >> 12) & 0xff;
  }
  // Bit i of the lower byte: bit 2 * i.
  static __device__ __forceinline__ uint32_t even_bits(uint32_t v) {
    v &= 0x5555;
    v = (v | v >> 1) & 0x3333;
    v = (v | v >> 2) & 0x0f0f;
    return (v | v >> 4) & 0xff;
  }
};

// Of a kernel for nothing but wide windows: those of a block of convolutions together.
struct WideQuery : ConvQuery {
  static constexpr int kTaps = 31, kWords = 6;
  explicit WideQuery(const ConvQuery& query) : ConvQuery(query) { windows = Windows::wide; }
  static bool takes(const ConvQuery& query) {
    return query.windows == Windows::any && WideQuery(query).are_in_words(kTaps, kWords, 8);
  }
  __device__ __forceinline__ uint32_t flags_at(const Place& place) const {
    return flags_of_words<uint2, kTaps, kWords, uint64_t>(place);
  }
};

// Of a kernel for nothing but Windows::points.
struct PointQuery : ConvQuery {
  using ConvQuery::ConvQuery;
  static constexpr bool is_pointwise() { return true; }
  static constexpr bool has_places() { return false; }
};

}  // namespace deltafx::cuda
