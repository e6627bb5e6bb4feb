// Convolution as a product: blocks of candidates are gathered into rows that stay in the L2 cache,
// multiplied with the packed panels, and finished while a tile of results is in the L1 cache.
// Included by kernels.inl. T is the type of the feature maps.

constexpr int64_t kRowsBytes = 384 << 10;  // of gathered rows a block may take
constexpr int64_t kTileBytes = 192 << 10;  // of results, where all channels are kept at once
constexpr int64_t kMaxRows = 112;
constexpr int64_t kDepth = 512;  // of k between two visits of a tile
constexpr double kSmallWork =
    1 << 20;  // multiply-adds below which threads cost more than they give

// At most kGemmRows candidates that are multiplied together.
struct RowGroup {
  const float* a;
  int64_t lda;
  int first, rows;  // within the block
};

// What one conv_phase call does with blocks of candidates.
template <class T>
class ConvBlock {
 public:
  ConvBlock(const ConvParams& p, const ConvSites& work)
      : p_(p), work_(work), layout_(work.layout), finish_(p, work.count) {
    taps_ = static_cast<int64_t>(work.phase.taps.size());
    k_ = taps_ * layout_.cin;
    lda_ = row_stride(k_);
    const ConvGeometry& g = p.geometry;
    if (p.depthwise.weight != nullptr) depthwise_.emplace(p);
    direct_ = std::is_same_v<T, float> && p.pre_scale == nullptr && layout_.groups == 1 &&
              p.depthwise.weight == nullptr && !g.transposed && g.y.kernel == 1 &&
              g.x.kernel == 1 && g.y.stride == 1 && g.x.stride == 1 && g.y.pad == 0 &&
              g.x.pad == 0 && p.x.ld % 512 != 0;
  }

  static int64_t max_rows(const ConvSites& work) {
    const int64_t k = static_cast<int64_t>(work.phase.taps.size()) * work.layout.cin;
    int64_t rows = kRowsBytes / (row_stride(k) * 4);
    if (work.layout.groups > 1) {
      const int64_t tile = kTileBytes / (work.layout.groups * work.layout.cout * 4);
      rows = rows < tile ? rows : tile;
    }
    rows = rows / kGemmRows * kGemmRows;
    return rows < kGemmRows ? kGemmRows : rows > kMaxRows ? kMaxRows : rows;
  }

  // Candidates [begin, end), at most max_rows, output channels [c0, c1), whole truncation groups.
  void run(int64_t begin, int64_t end, int64_t c0, int64_t c1) {
    if (layout_.groups > 1)
      run_grouped(begin, end);
    else
      run_single(begin, end, c0, c1);
  }

 private:
  // Cuts the block into row groups of nearly equal height: a lone last row would be slow.
  int split(int64_t count, RowGroup* groups) const {
    const int n = static_cast<int>((count + kGemmRows - 1) / kGemmRows);
    int first = 0;
    for (int i = 0; i < n; ++i) {
      const int rows = static_cast<int>(count * (i + 1) / n - count * i / n);
      groups[i] = {nullptr, 0, first, rows};
      first += rows;
    }
    return n;
  }

  void gather(int64_t begin, int64_t first_channel, RowGroup* groups, int n) {
    const int32_t* sites = work_.sites + begin;
    const int64_t count = groups[n - 1].first + groups[n - 1].rows;
    float* rows = scratch_of<float>(Scratch::rows, count * lda_ + kRowSlack);
    if (depthwise_) {
      depthwise_->rows(sites, count, rows, lda_);
      for (int i = 0; i < n; ++i) {
        groups[i].a = rows + groups[i].first * lda_;
        groups[i].lda = lda_;
      }
      return;
    }
    const Gather<T> gather(p_, work_.phase, first_channel, layout_.cin);
    const ConvGeometry& g = p_.geometry;
    const int64_t out_step = conv_out_step(g), in_step = conv_in_step(g);
    SiteWalk walk(p_.out.acc);
    for (int i = 0; i < n; ++i) {
      RowGroup& group = groups[i];
      const int last = group.first + group.rows - 1;
      if (direct_ && sites[last] - sites[group.first] == group.rows - 1) {
        group.a = static_cast<const float*>(p_.x.data) + sites[group.first] * p_.x.ld;
        group.lda = p_.x.ld;
        continue;
      }
      group.a = rows + group.first * lda_;
      group.lda = lda_;
      for (int r = group.first; r <= last;) {
        const int64_t ox = walk.to(sites[r]);
        int64_t run = 1;
        while (r + run <= last && sites[r + run] == sites[r] + run * out_step &&
               ox + run * out_step < walk.w)
          ++run;
        gather.rows(walk.n, conv_base(g, g.y, walk.y), conv_base(g, g.x, ox), in_step, run,
                    rows + r * lda_, lda_);
        r += static_cast<int>(run);
      }
    }
  }

  // c[first .. first + rows) for `columns` columns of consecutive panels, over the full depth.
  void multiply(const RowGroup* groups, int n, const float* panels, int64_t columns, float* c,
                int64_t ldc) const {
    const int64_t steps = k_ > kDepth + kDepth / 2 ? (k_ + kDepth - 1) / kDepth : 1;
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t k0 = k_ * s / steps, k1 = k_ * (s + 1) / steps;
      for (int i = 0; i < n; ++i) {
        float* tile = c + groups[i].first * ldc;
        for (int64_t j = 0; j < columns; j += 32) {
          const int64_t left = columns - j, width = left > 16 ? 32 : 16;
          gemm_panel(groups[i].a + k0, groups[i].lda, groups[i].rows, panels + j * k_ + k0 * width,
                     width, left, k1 - k0, tile + j, ldc, s > 0);
        }
      }
    }
  }

  void finish(int64_t begin, const RowGroup& group, float* c, int64_t ldc, int64_t first,
              int64_t count) const {
    const int64_t i = begin + group.first;
    finish_.rows(c, ldc, work_.sites + i, group.rows, first, count, work_.active + i);
  }

  void prefetch(int64_t begin, const RowGroup& group, int64_t first, int64_t count) const {
    for (int r = 0; r < group.rows; ++r)
      finish_.prefetch(work_.sites[begin + group.first + r], first, count);
  }

  void run_single(int64_t begin, int64_t end, int64_t c0, int64_t c1) {
    RowGroup groups[kMaxRows / kGemmRows + 1];
    const int n = split(end - begin, groups);
    gather(begin, 0, groups, n);
    float* c = scratch_of<float>(Scratch::tile, (end - begin) * kTruncationGroup);
    const float* weights = p_.weight + work_.phase.weights;
    const bool shallow = k_ <= kDepth + kDepth / 2;
    for (int64_t first = c0; first < c1; first += kTruncationGroup) {
      const int64_t count = c1 - first < kTruncationGroup ? c1 - first : kTruncationGroup;
      const float* panels = weights + first * k_;
      // Deep products visit every row group once per slice of k, so that the slice of the panel is
      // read from the L2 cache; shallow ones finish a row group at once, in the L1 cache.
      const int at_once = shallow ? 1 : n;
      for (int i = 0; i < n; i += at_once) {
        for (int g = i; g < i + at_once; ++g) prefetch(begin, groups[g], first, count);
        float* tile = shallow ? c - groups[i].first * kTruncationGroup : c;
        multiply(groups + i, at_once, panels, count, tile, kTruncationGroup);
        for (int g = i; g < i + at_once; ++g)
          finish(begin, groups[g], tile + groups[g].first * kTruncationGroup, kTruncationGroup,
                 first, count);
      }
    }
  }

  // Groups of channels and truncation groups overlap anyhow, so a block keeps all its channels.
  void run_grouped(int64_t begin, int64_t end) {
    RowGroup groups[kMaxRows / kGemmRows + 1];
    const int n = split(end - begin, groups);
    const int64_t channels = p_.out.acc.c;
    const int64_t ldc = row_stride(channels + 32);  // a group's last vector may run over
    float* c = scratch_of<float>(Scratch::tile, (end - begin) * ldc);
    const float* weights = p_.weight + work_.phase.weights;
    for (int64_t s = 0; s < layout_.groups; ++s) {
      gather(begin, s * layout_.cin, groups, n);
      multiply(groups, n, weights + s * k_ * layout_.columns(), layout_.cout, c + s * layout_.cout,
               ldc);
    }
    for (int i = 0; i < n; ++i)
      for (int64_t first = 0; first < channels; first += kTruncationGroup) {
        const int64_t left = channels - first;
        finish(begin, groups[i], c + groups[i].first * ldc + first, ldc, first,
               left < kTruncationGroup ? left : kTruncationGroup);
      }
  }

  const ConvParams& p_;
  const ConvSites& work_;
  const ConvLayout& layout_;
  Finish<T> finish_;
  std::optional<DepthwiseRows<T>> depthwise_;
  int64_t taps_, k_, lda_;
  bool direct_;  // rows of consecutive sites are read where they lie
};

// Calls fn(task) for every task, each on the thread that is free next.
template <class F>
inline void for_tasks(int64_t tasks, int64_t threads, const F& fn) {
  int64_t next = 0;
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      fn(task);
    }
  });
}

template <class T>
inline void conv_phase_as(const ConvParams& p, const ConvSites& work) {
  const int64_t n = work.count, channels = p.out.acc.c;
  const int64_t taps = static_cast<int64_t>(work.phase.taps.size());
  const double multiply_adds =
      static_cast<double>(n * channels) * static_cast<double>(taps * work.layout.cin + 8);
  const int64_t threads = multiply_adds < kSmallWork ? 1 : num_threads();
  if (work.layout.direct) {
    // Long tasks: a window's upper rows are then still in this core's cache from the row before.
    const int64_t share = n / (4 * threads), size = share < 64 ? 64 : share;
    const int64_t tasks = (n + size - 1) / size;
    for_tasks(tasks, threads < tasks ? threads : tasks, [&](int64_t task) {
      const int64_t end = (task + 1) * size < n ? (task + 1) * size : n;
      DirectConv<T>(p, work).range(task * size, end);
    });
    return;
  }
  // With few candidates the channels are shared out too: a thread then streams half the weights.
  const int64_t column_groups =
      work.layout.groups > 1 ? 1 : (channels + kTruncationGroup - 1) / kTruncationGroup;
  const int64_t rows = ConvBlock<T>::max_rows(work);
  const bool few = n < 2 * threads * kGemmRows || (n + rows - 1) / rows < 2 * threads;
  const int64_t splits = few && column_groups >= threads ? threads : 1;
  const int64_t per_split = (column_groups + splits - 1) / splits;
  int64_t blocks = (n + rows - 1) / rows;
  if (splits == 1 && blocks < 4 * threads) blocks = (blocks + threads - 1) / threads * threads;
  if (blocks > n) blocks = n;
  // Blocks in a row share the rows of their windows, so a thread takes some at once.
  const int64_t at_once = blocks < 32 * threads ? 1 : blocks / (16 * threads);
  const int64_t runs = (blocks + at_once - 1) / at_once, tasks = runs * splits;
  for_tasks(tasks, threads < tasks ? threads : tasks, [&](int64_t task) {
    const int64_t first = task / splits * at_once, split = task % splits;
    const int64_t last = first + at_once < blocks ? first + at_once : blocks;
    const int64_t c0 = split * per_split * kTruncationGroup;
    const int64_t c1 = c0 + per_split * kTruncationGroup;
    ConvBlock<T> block(p, work);
    for (int64_t b = first; b < last; ++b)
      block.run(n * b / blocks, n * (b + 1) / blocks, c0, c1 < channels ? c1 : channels);
    fence();
  });
}

inline void conv_phase(const ConvParams& p, const ConvSites& work) {
  if (p.x.dtype == DType::bf16) return conv_phase_as<BF16>(p, work);
  return conv_phase_as<float>(p, work);
}
