// A stream waits for what another kernel counts.
#pragma once

#include "common/progress.cuh"

namespace shadowkv {

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
