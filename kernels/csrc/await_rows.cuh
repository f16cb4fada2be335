// A stream waits for what another kernel counts.
#pragma once

#include <cstdint>

#include "common/progress.cuh"

namespace shadowkv {

/// Nanoseconds after which the work that is waited for is taken to be lost.
constexpr uint64_t LONGEST_WAIT = 60'000'000'000;

__device__ inline uint64_t now() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

/// One warp, which is all that waiting takes from the kernels that are waited for.
__global__ void __launch_bounds__(32) wait_for_rows(int* done, int rows, int parts) {
  const uint64_t began = now();
  for (int r = threadIdx.x; r < rows; r += 32) {
    while (read_done(done + r) < parts) {
      __nanosleep(100);
      if (now() - began > LONGEST_WAIT) __trap();
    }
    done[r] = 0;
  }
}

}  // namespace shadowkv
