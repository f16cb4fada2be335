// What the threads of a warp or block work out together.
#pragma once

#include <cstdint>
#include <type_traits>

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

/// One of the first two parts of a block, of THREADS each, whole warps, whose threads work together.
template <int THREADS>
struct PartOfBlock {
  static __device__ int part() { return static_cast<int>(threadIdx.x) / THREADS; }
  static __device__ int index() { return static_cast<int>(threadIdx.x) % THREADS; }
  static __device__ void sync() {
    if (part() == 0) {
      asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
    } else {
      asm volatile("bar.sync 2, %0;" ::"n"(THREADS) : "memory");
    }
  }
};

/// The sum of the values of the threads before this one; `total` of all. All threads of the block
/// call it, with room for 33 words that it may use again after their next barrier.
template <typename T>
__device__ inline T scan_block(std::common_type_t<T> value, T* room, T& total) {
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  T sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T before = __shfl_up_sync(ALL_LANES, sum, step);
    if (lane >= step) sum += before;
  }
  __syncthreads();  // The room may still be read from the call before.
  if (lane == 31) room[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    T of_warp = lane < warps ? room[lane] : 0;
    const T own = of_warp;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const T before = __shfl_up_sync(ALL_LANES, of_warp, step);
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
