// await_rows: see shadowkv_cli/ops/await_rows.py.
#include <cstdint>

#include "api.h"
#include "common/progress.cuh"
#include "common/check.h"
#include "common/stream.h"

namespace shadowkv {

namespace {

/// Nanoseconds after which the work that is waited for is taken to be lost.
constexpr uint64_t LONGEST_WAIT = 60'000'000'000;

__device__ uint64_t now() {
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

}  // namespace

void await_rows(Tensor done, int64_t parts) {
  constexpr const char* op = "await_rows";
  const Device device(done, op, "done");
  check_table(done, op, "done", done, {-1});
  if (done.numel() == 0) return;
  wait_for_rows<<<1, 32, 0, device.stream()>>>(static_cast<int*>(done.data_ptr()),
                                               static_cast<int>(done.size(0)),
                                               static_cast<int>(parts));
  device.check_launch();
}

}  // namespace shadowkv
