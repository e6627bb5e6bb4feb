#include "cpu/parallel.h"

#include <ATen/Parallel.h>

#include <cstdlib>
#include <memory>
#include <new>

namespace deltafx {

int num_threads() { return at::get_num_threads(); }

void parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFn fn) {
  if (begin >= end) return;
  if (end - begin <= grain) {
    fn(begin, end);
    return;
  }
  at::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { fn(b, e); });
}

namespace {
struct Free {
  void operator()(void* p) const { std::free(p); }
};
struct Block {
  std::unique_ptr<void, Free> memory;
  int64_t bytes = 0;
};
}  // namespace

void* scratch(Scratch slot, int64_t bytes) {
  thread_local Block blocks[static_cast<int>(Scratch::count)];
  Block& block = blocks[static_cast<int>(slot)];
  if (block.bytes < bytes) {
    const int64_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    block.memory.reset();
    block.bytes = 0;
    void* p = std::aligned_alloc(4096, static_cast<size_t>(size));
    if (p == nullptr) throw std::bad_alloc();
    block.memory.reset(p);
    block.bytes = size;
  }
  return block.memory.get();
}

}  // namespace deltafx
