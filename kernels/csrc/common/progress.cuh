// What one kernel has done so far, counted in memory where another one waits for it.
#pragma once

#include <cstdint>

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

/// Nanoseconds after which the work that is waited for is taken to be lost.
constexpr uint64_t LONGEST_WAIT = 60'000'000'000;

__device__ inline uint64_t now() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

}  // namespace shadowkv
