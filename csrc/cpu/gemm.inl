// The register-blocked product of gathered rows and a packed panel. Included by kernels.inl.
//
// Every element is one chain of fused multiply-adds in the order of k, whatever the tile it falls
// in: a site's value never depends on the sites computed beside it, so static pictures stay static.
// Slices of a deep product are summed apart, which also keeps rounding errors from growing with k.

// The tallest tile whose accumulators, panel vectors and one broadcast fit the register file.
constexpr int kGemmRows = kLanes == 16 ? 14 : 6;
constexpr int kGemmVecs = 2;

// Keeps GCC from turning a value that is used again into repeated memory operands.
#if defined(__x86_64__)
#define DELTAFX_PIN(v) asm("" : "+v"(v))
#else
#define DELTAFX_PIN(v) (void)(v)
#endif

// c[r][0 .. V vectors) (+)= sum over k of a[r * lda + k] * b[k * ldb + ...]
template <int R, int V>
__attribute__((noinline)) void gemm_tile(const float* a, int64_t lda, const float* b, int64_t ldb,
                                         int64_t k, float* c, int64_t ldc, bool accumulate) {
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = Vec{};
  // A base pointer every third row, so that rows are reached as base, base + lda, base + 2 lda.
  constexpr int kBases = (R + 2) / 3;
  const float* base[kBases];
#pragma GCC unroll 16
  for (int i = 0; i < kBases; ++i) base[i] = a + 3 * i * lda;
  for (int64_t i = 0; i < k; ++i) {
    Vec panel[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      panel[v] = load(b + v * kLanes);
      DELTAFX_PIN(panel[v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec x = splat(base[r / 3][(r % 3) * lda]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += x * panel[v];
    }
    b += ldb;
#pragma GCC unroll 16
    for (int j = 0; j < kBases; ++j) ++base[j];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* at = c + r * ldc + v * kLanes;
      store(at, accumulate ? load(at) + acc[r][v] : acc[r][v]);
    }
}

using GemmTile = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t,
                          bool);

template <int V, int... R>
constexpr GemmTile gemm_tile_at(int rows, std::integer_sequence<int, R...>) {
  constexpr GemmTile tiles[] = {gemm_tile<R + 1, V>...};
  return tiles[rows - 1];
}

// A chain of additions this long is started anew and added to the others: rounding errors grow with
// the length of a chain, and the sum of two short ones is closer to the truth than one long one.
constexpr int64_t kGemmChain = 128;

// Rows [0, rows <= kGemmRows) of c times one panel of `width` (32 or 16) columns, of which the
// first `columns` matter: c is written in whole vectors, no further than those columns need.
inline void gemm_panel(const float* a, int64_t lda, int rows, const float* b, int64_t width,
                       int64_t columns, int64_t k, float* c, int64_t ldc, bool accumulate) {
  static_assert(32 % (kGemmVecs * kLanes) == 0, "a panel is a whole number of tiles");
  using Rows = std::make_integer_sequence<int, kGemmRows>;
  const GemmTile two = gemm_tile_at<2>(rows, Rows{}), one = gemm_tile_at<1>(rows, Rows{});
  for (int64_t j = 0; j < width && j < columns;) {
    const bool wide = columns - j > kLanes && width - j >= 2 * kLanes;
    const GemmTile tile = wide ? two : one;
    int64_t k0 = 0;
    do {  // once where k is 0 too: a phase without taps still has its zeros to write
      const int64_t depth = k - k0 < kGemmChain ? k - k0 : kGemmChain;
      tile(a + k0, lda, b + j + k0 * width, width, depth, c + j, ldc, accumulate || k0 > 0);
      k0 += kGemmChain;
    } while (k0 < k);
    j += (wide ? 2 : 1) * kLanes;
  }
}
