// ATen's thread pool behind a plain function, so that kernels need no ATen header.
#pragma once

#include <cstdint>

namespace deltafx {

// A reference to a callable, not owning it: cheaper than std::function and free of allocation.
class RangeFn {
 public:
  template <class F>
  RangeFn(const F& f)  // NOLINT: implicit on purpose
      : self_(&f), call_([](const void* self, int64_t begin, int64_t end) {
          (*static_cast<const F*>(self))(begin, end);
        }) {}
  void operator()(int64_t begin, int64_t end) const { call_(self_, begin, end); }

 private:
  const void* self_;
  void (*call_)(const void*, int64_t, int64_t);
};

int num_threads();
// Calls fn(b, e) on disjoint ranges that cover [begin, end), each at least `grain` long where
// possible, on ATen's pool; on the calling thread where one range suffices.
void parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFn fn);

// Memory of the calling thread that grows and is kept: kernels take their scratch here, so a frame
// allocates nothing once warm. `slot` keeps independent uses within one kernel apart.
enum class Scratch : int { candidates, rows, tile, flags, work, count };
void* scratch(Scratch slot, int64_t bytes);

template <class T>
T* scratch_of(Scratch slot, int64_t count) {
  return static_cast<T*>(scratch(slot, count * static_cast<int64_t>(sizeof(T))));
}

}  // namespace deltafx
