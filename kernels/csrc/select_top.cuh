// Second kernel of select_chunks: softmax norms, maximum over the group, and the best chunks.
//
// The chunks are ranked by an integer that has the order of the score; 0 is a barred chunk. The
// score of the last chosen one is found digit by digit, then all chosen are written in their order.
// Digits are those of the distance from the lowest score: the leading ones of floating-point numbers
// of one size are all the same, and a thousand threads would count them in one place.
#pragma once

#include "common/highest.cuh"
#include "select_params.h"

namespace shadowkv {

/// The lowest and the highest of the block's numbers, with room for 64 words.
__device__ inline void find_range(uint32_t& lowest, uint32_t& highest, uint32_t* room) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  lowest = __reduce_min_sync(ALL_LANES, lowest);
  highest = __reduce_max_sync(ALL_LANES, highest);
  if (lane == 0) room[warp] = lowest, room[32 + warp] = highest;
  __syncthreads();
  lowest = __reduce_min_sync(ALL_LANES, lane < warps ? room[lane] : UINT32_MAX);
  highest = __reduce_max_sync(ALL_LANES, lane < warps ? room[32 + lane] : 0u);
}

__device__ inline uint32_t ordered(float score) {
  if (score == -INFINITY) return 0;
  const uint32_t bits = __float_as_uint(score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// Grid [Hk, R]: the ids of the best chunks of a row and KV head, ascending, then -1.
__global__ void __launch_bounds__(SELECT_THREADS)
    select_best(const __grid_constant__ SelectParams p) {
  extern __shared__ __align__(16) uint32_t shared_keys[];
  __shared__ float norms[MAX_QUERY_GROUP];
  __shared__ DigitRoom<SELECT_DIGIT_BITS> room;
  __shared__ uint32_t range_room[64];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t plane = static_cast<int64_t>(blockIdx.y) * p.heads + blockIdx.x;
  const int count = max(min(p.num_chunks[blockIdx.y], p.chunks), 0);
  uint32_t* keys = p.keys ? p.keys + plane * p.chunks : shared_keys;
  int* ids = p.ids + plane * p.max_chunks;

  if (warp < p.group) {
    const float2* totals = p.totals + (plane * p.group + warp) * p.segments;
    float highest = -INFINITY, total = 0;
    for (int s = lane; s < p.segments; s += 32) highest = fmaxf(highest, totals[s].x);
    highest = warp_max(highest);
    for (int s = lane; s < p.segments; s += 32) {
      total += totals[s].y * weight(totals[s].x, highest);
    }
    total = warp_sum(total);
    if (lane == 0) norms[warp] = highest == -INFINITY ? 0.f : highest + log2f(total);
  }
  __syncthreads();
  uint64_t mine = 0, selectable;
  uint32_t lowest = UINT32_MAX, highest = 0;
  for (int c = threadIdx.x; c < count; c += blockDim.x) {
    const float* logits = p.logits + plane * p.group * p.chunks + c;
    float score = -INFINITY;
    for (int g = 0; g < p.group; ++g) {
      score = fmaxf(score, logits[static_cast<int64_t>(g) * p.chunks] - norms[g]);
    }
    const uint32_t key = ordered(score);
    keys[c] = key;
    if (key) ++mine, lowest = min(lowest, key), highest = max(highest, key);
  }
  find_range(lowest, highest, range_room);
  scan_block(mine, room.scan, selectable);
  const int wanted = min(max(min(p.budget_chunks[blockIdx.y], p.max_chunks), 0),
                         static_cast<int>(selectable));
  for (int i = wanted + threadIdx.x; i < p.max_chunks; i += blockDim.x) ids[i] = -1;
  if (wanted == 0) return;

  for (int c = threadIdx.x; c < count; c += blockDim.x) {
    if (keys[c]) keys[c] -= lowest - 1;
  }
  write_highest(keys, count, 32 - __clz(highest - lowest + 1), wanted, ids, room);
}

}  // namespace shadowkv
