// What one kernel has done so far, counted in memory where another one waits for it.
#pragma once

namespace shadowkv {

/// What this thread wrote, or saw written, comes before the count.
__device__ inline void count_done(int* done, int parts) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(done), "r"(parts) : "memory");
}

__device__ inline int read_done(const int* done) {
  int found;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(done) : "memory");
  return found;
}

}  // namespace shadowkv
