// Second kernel of select_chunks: softmax norms, maximum over the group, and the best chunks.
//
// The chunks are ranked by an integer that has the order of the score; 0 is a barred chunk.
#pragma once

#include "common/highest.cuh"
#include "select_params.h"

namespace shadowkv {

constexpr int KEYS_A_THREAD = 16;  // loads in flight

__device__ inline uint32_t ordered(float score) {
  if (score == -INFINITY) return 0;
  const uint32_t bits = __float_as_uint(score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// Keys of chunks `SELECT_THREADS` apart; returns how many of them may be chosen.
__device__ inline int rank_chunks(const SelectParams& p, const float* logits, const float* norms,
                                  int base, int count, uint32_t* keys) {
  float best[KEYS_A_THREAD];
#pragma unroll
  for (int i = 0; i < KEYS_A_THREAD; ++i) best[i] = -INFINITY;
  for (int g = 0; g < p.group; ++g, logits += p.chunks) {
#pragma unroll
    for (int i = 0; i < KEYS_A_THREAD; ++i) {
      const int c = base + i * SELECT_THREADS;
      if (c < count) best[i] = fmaxf(best[i], logits[c] - norms[g]);
    }
  }
  int selectable = 0;
#pragma unroll
  for (int i = 0; i < KEYS_A_THREAD; ++i) {
    const int c = base + i * SELECT_THREADS;
    if (c < count) selectable += (keys[c] = ordered(best[i])) != 0;
  }
  return selectable;
}

/// Grid [Hk, R]: the ids of the best chunks of a row and KV head, ascending, then -1.
__global__ void __launch_bounds__(SELECT_THREADS)
    select_best(const __grid_constant__ SelectParams p) {
  extern __shared__ __align__(16) uint32_t shared_keys[];
  __shared__ float norms[MAX_QUERY_GROUP];
  __shared__ DigitRoom<SELECT_DIGIT_BITS> room;
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
  for (int base = threadIdx.x; base < count; base += KEYS_A_THREAD * SELECT_THREADS) {
    mine += rank_chunks(p, p.logits + plane * p.group * p.chunks, norms, base, count, keys);
  }
  scan_block(mine, room.scan, selectable);
  const int wanted = min(max(min(p.budget_chunks[blockIdx.y], p.max_chunks), 0),
                         static_cast<int>(selectable));
  for (int i = wanted + threadIdx.x; i < p.max_chunks; i += blockDim.x) ids[i] = -1;
  if (wanted == 0) return;

  write_highest(keys, count, wanted, ids, room);
}

}  // namespace shadowkv
