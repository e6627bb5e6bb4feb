// Vectors of the ISA this is compiled for, through GCC/Clang vector extensions: one source serves
// AVX-512, AVX2 and everything else. Included inside namespace deltafx::DELTAFX_ISA by kernels.inl.
//
// A Vec is DELTAFX_LANES floats. Memory is fp32, bf16 or (memory only) fp16; arithmetic is fp32.

constexpr int kLanes = DELTAFX_LANES;
typedef float Vec __attribute__((vector_size(DELTAFX_LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(DELTAFX_LANES * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(DELTAFX_LANES * 2)));

#define DELTAFX_INLINE inline __attribute__((always_inline))

struct BF16 {
  uint16_t bits;
};

// v - 0 is v, also for -0, so no addition is left of this.
DELTAFX_INLINE Vec splat(float v) { return v - Vec{}; }

DELTAFX_INLINE float to_float(float v) { return v; }
DELTAFX_INLINE float to_float(BF16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even; a NaN stays a NaN.
DELTAFX_INLINE uint16_t bf16_bits(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  if (v != v) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
DELTAFX_INLINE void store_one(float* p, float v) { *p = v; }
DELTAFX_INLINE void store_one(BF16* p, float v) { p->bits = bf16_bits(v); }

DELTAFX_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
DELTAFX_INLINE Vec load(const BF16* p) {
  HalfVec half;
  __builtin_memcpy(&half, p, sizeof half);
  const IntVec wide = __builtin_convertvector(half, IntVec) << 16;
  Vec v;
  __builtin_memcpy(&v, &wide, sizeof v);
  return v;
}
DELTAFX_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
DELTAFX_INLINE void store(BF16* p, Vec v) {
  IntVec bits;
  __builtin_memcpy(&bits, &v, sizeof v);
  const IntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const IntVec nan = v != v;
  const HalfVec half = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), HalfVec);
  __builtin_memcpy(p, &half, sizeof half);
}

// A store past the caches, to memory that is not read again soon: no line is fetched to be filled.
// `p` is aligned to a vector. fence() comes before another thread may read what was streamed.
#if defined(__x86_64__) && DELTAFX_LANES == 16
constexpr bool kStreams = true;
DELTAFX_INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
DELTAFX_INLINE void fence() { _mm_sfence(); }
#elif defined(__x86_64__) && DELTAFX_LANES == 8
constexpr bool kStreams = true;
DELTAFX_INLINE void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
DELTAFX_INLINE void fence() { _mm_sfence(); }
#else
constexpr bool kStreams = false;
DELTAFX_INLINE void stream(float* p, Vec v) { store(p, v); }
DELTAFX_INLINE void fence() {}
#endif
DELTAFX_INLINE void stream(BF16* p, Vec v) { store(p, v); }

// The first `count` (< kLanes) lanes; the others are 0. Masked where the ISA can: a copy through
// lanes in memory stalls, and rows of few channels are all tail.
template <class T>
DELTAFX_INLINE Vec load_some(const T* p, int64_t count) {
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
DELTAFX_INLINE void store_some(T* p, Vec v, int64_t count) {
  T lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}
#if defined(__x86_64__) && DELTAFX_LANES == 16
template <>
DELTAFX_INLINE Vec load_some<float>(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
template <>
DELTAFX_INLINE void store_some<float>(float* p, Vec v, int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
}
template <>
DELTAFX_INLINE Vec load_some<BF16>(const BF16* p, int64_t count) {
  const __m256i half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
  BF16 lanes[kLanes];
  __builtin_memcpy(lanes, &half, sizeof half);
  return load(lanes);
}
template <>
DELTAFX_INLINE void store_some<BF16>(BF16* p, Vec v, int64_t count) {
  BF16 lanes[kLanes];
  store(lanes, v);
  __m256i half;
  __builtin_memcpy(&half, lanes, sizeof half);
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1), half);
}
#elif defined(__x86_64__) && DELTAFX_LANES == 8
DELTAFX_INLINE __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <>
DELTAFX_INLINE Vec load_some<float>(const float* p, int64_t count) {
  return _mm256_maskload_ps(p, first_lanes(count));
}
template <>
DELTAFX_INLINE void store_some<float>(float* p, Vec v, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), v);
}
#endif

struct AllLanes {};  // in place of a count of lanes: all of them, known at compile time

template <class T>
DELTAFX_INLINE Vec load_lanes(const T* p, AllLanes) {
  return load(p);
}
template <class T>
DELTAFX_INLINE Vec load_lanes(const T* p, int64_t count) {
  return load_some(p, count);
}
template <class T>
DELTAFX_INLINE void store_lanes(T* p, Vec v, AllLanes) {
  store(p, v);
}
template <class T>
DELTAFX_INLINE void store_lanes(T* p, Vec v, int64_t count) {
  store_some(p, v, count);
}

// f(i, lanes) for each vector of channels [0, c): lanes is AllLanes, or the count of the last few.
template <class F>
DELTAFX_INLINE void for_vectors(int64_t c, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= c; i += kLanes) f(i, AllLanes{});
  if (i < c) f(i, c - i);
}

// What storing as T and loading again gives.
DELTAFX_INLINE Vec rounded_to(Vec v, const float*) { return v; }
DELTAFX_INLINE Vec rounded_to(Vec v, const BF16*) {
  BF16 lanes[kLanes];
  store(lanes, v);
  return load(lanes);
}

DELTAFX_INLINE Vec select(IntVec mask, Vec a, Vec b) { return mask ? a : b; }
// NaN in either operand of the comparison selects b, so put the value that may be NaN there.
DELTAFX_INLINE Vec max_of(Vec bound, Vec v) { return select(bound > v, bound, v); }
DELTAFX_INLINE Vec min_of(Vec bound, Vec v) { return select(bound < v, bound, v); }
DELTAFX_INLINE Vec abs_of(Vec v) {
  IntVec bits;
  __builtin_memcpy(&bits, &v, sizeof v);
  bits &= 0x7fffffff;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}

// Constant lane numbers. They live in memory, because GCC does not fold a vector that is filled
// lane by lane, and would fill it at run time.
struct LaneTable {
  int32_t lane[kLanes];
};
template <class F>
constexpr LaneTable lane_table(F f) {
  LaneTable table{};
  for (int i = 0; i < kLanes; ++i) table.lane[i] = f(i);
  return table;
}
DELTAFX_INLINE IntVec lanes_of(const LaneTable& table) {
  IntVec v;
  __builtin_memcpy(&v, table.lane, sizeof v);
  return v;
}

template <int Half>
DELTAFX_INLINE Vec swapped_by(Vec v) {
  static constexpr LaneTable from = lane_table([](int i) { return i ^ Half; });
  return __builtin_shuffle(v, lanes_of(from));
}

// By halves, which is log2(kLanes) shuffles and adds where a chain would be kLanes adds.
DELTAFX_INLINE float sum_of(Vec v) {
  if constexpr (kLanes > 8) v += swapped_by<8>(v);
  if constexpr (kLanes > 4) v += swapped_by<4>(v);
  v += swapped_by<2>(v);
  v += swapped_by<1>(v);
  return v[0];
}

DELTAFX_INLINE bool any_lane(IntVec v) {
#if defined(__x86_64__) && DELTAFX_LANES == 16
  __m512i bits;
  __builtin_memcpy(&bits, &v, sizeof v);
  return _mm512_test_epi32_mask(bits, bits) != 0;
#else
  uint64_t words[kLanes / 2], any = 0;
  __builtin_memcpy(words, &v, sizeof v);
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / 2; ++i) any |= words[i];
  return any != 0;
#endif
}

// e^x within 2 ulp, by the reduction x = n ln2 + r and a polynomial for e^r (Cephes' expf).
// Saturates: below -104 gives 0, above 89 gives inf. NaN stays NaN.
DELTAFX_INLINE Vec exp_of(Vec x) {
  const Vec clamped = min_of(splat(89.f), max_of(splat(-104.f), x));
  const Vec shifted = clamped * 1.44269504088896341f + 12582912.f;  // 1.5 * 2^23 rounds to nearest
  const Vec n = shifted - 12582912.f;
  Vec r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  // Two steps of scaling, so that results down to the denormals are right.
  const IntVec power = __builtin_convertvector(select(n != n, Vec{}, n), IntVec);
  const IntVec half = power >> 1;
  const IntVec a = (half + 127) << 23;
  const IntVec b = (power - half + 127) << 23;
  Vec fa, fb;
  __builtin_memcpy(&fa, &a, sizeof a);
  __builtin_memcpy(&fb, &b, sizeof b);
  const Vec y = p * fa * fb;
  return select(x != x, x, y);
}
