// binary: two feature maps, or a feature map and a gate. Included by kernels.inl.

// The channels of an operand at a site as fp32.
inline const float* operand_row(const Operand& operand, int64_t n, int64_t site, int64_t c,
                                float* buffer) {
  const int64_t offset = n * operand.stride_n + site * operand.stride_site;
  if (operand.stride_c != 0) return fp32_row(operand.data, operand.dtype, offset, c, buffer);
  const float value = operand.dtype == DType::f32
                          ? static_cast<const float*>(operand.data)[offset]
                          : to_float(static_cast<const BF16*>(operand.data)[offset]);
  for (int64_t i = 0; i < c; i += kLanes) store(buffer + i, splat(value));
  return buffer;
}

inline void add_operand(Candidates& candidates, const Operand& operand, const FeatureMap& acc) {
  const Mask& mask = operand.mask;
  if (mask.data == nullptr) return;
  if (mask.h == acc.h && mask.w == acc.w && mask.n == acc.n)
    candidates.add_sites(mask);
  else if (mask.n == acc.n)
    candidates.add_streams(mask);
  else if (any(mask.data, mask.sites()))
    for (int64_t n = 0; n < acc.n; ++n) candidates.add_rectangle(n, 0, acc.h, 0, acc.w);
}

inline void binary(const BinaryParams& p) {
  const FeatureMap& acc = p.out.acc;
  const int64_t per_stream = acc.h * acc.w, width = padded(acc.c);
  Candidates candidates(acc.n, acc.h, acc.w);
  add_operand(candidates, p.a, acc);
  add_operand(candidates, p.b, acc);
  update_candidates(
      p.out, p.act, candidates, 3 * acc.c, 2 * width, [&](int32_t site, float* y, float* work) {
        const int64_t n = acc.n == 1 ? 0 : site / per_stream;
        const float* a = operand_row(p.a, n, site - n * per_stream, acc.c, work);
        const float* b = operand_row(p.b, n, site - n * per_stream, acc.c, work + width);
        const auto combine = [&](auto op) {
          for_vectors(acc.c, [&](int64_t i, auto lanes) {
            store_lanes(y + i, op(load_lanes(a + i, lanes), load_lanes(b + i, lanes)), lanes);
          });
        };
        switch (p.op) {
          case BinaryOp::add:
            return combine([](Vec u, Vec v) { return u + v; });
          case BinaryOp::sub:
            return combine([](Vec u, Vec v) { return u - v; });
          case BinaryOp::mul:
            return combine([](Vec u, Vec v) { return u * v; });
          case BinaryOp::div:
            return combine([](Vec u, Vec v) { return u / v; });
          case BinaryOp::max:  // a NaN on either side is one in the result
            return combine([](Vec u, Vec v) { return select((u > v) | (u != u), u, v); });
        }
      });
}
