// What the threads of a warp or block work out together.
#pragma once

#include <cstdint>

#include "matrix.cuh"

namespace shadowkv {

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lanes));
  return x;
}

/// 2^(x - highest), and 0 for x of minus infinity even where the highest is that too.
__device__ inline float weight(float x, float highest) {
  return x == -INFINITY ? 0.f : exp2f(x - highest);
}

/// The sum of the values of the threads before this one; `total` of all. Every thread of the block
/// calls it, with room for 33 words that it may use again after the next barrier.
__device__ inline uint64_t scan_block(uint64_t value, uint64_t* room, uint64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint64_t sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t before = __shfl_up_sync(ALL_LANES, sum, step);
    if (lane >= step) sum += before;
  }
  __syncthreads();  // The room may still be read from the call before.
  if (lane == 31) room[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    uint64_t of_warp = lane < warps ? room[lane] : 0;
    const uint64_t own = of_warp;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint64_t before = __shfl_up_sync(ALL_LANES, of_warp, step);
      if (lane >= step) of_warp += before;
    }
    room[lane] = of_warp - own;
    if (lane == 31) room[32] = of_warp;
  }
  __syncthreads();
  total = room[32];
  return room[warp] + sum - value;
}

}  // namespace shadowkv
