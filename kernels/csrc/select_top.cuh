// Second kernel of select_chunks: softmax norms, maximum over the group, and the best chunks.
//
// The chunks are ranked by an integer that has the order of the score; 0 is a barred chunk. The
// score of the last chosen one is found digit by digit, then all chosen are written in their order.
// Digits are those of the distance from the lowest score: the leading ones of floating-point numbers
// of one size are all the same, and a thousand threads would count them in one place.
#pragma once

#include "common/block.cuh"
#include "select_params.h"

namespace shadowkv {

constexpr int DIGIT_BITS = 11;
static_assert(DIGITS == 1 << DIGIT_BITS);

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

/// Keep of the keys that share `prefix` above `shift + bits` only those with the digit of the
/// `wanted`-th largest; returns that digit, and takes from `wanted` how many have a higher one.
__device__ inline uint32_t find_digit(const uint32_t* keys, int count, uint32_t prefix, int shift,
                                      int bits, int& wanted, int* histogram, uint64_t* room) {
  __shared__ int found_digit, found_wanted;
  const int digits = 1 << bits;
  for (int i = threadIdx.x; i < DIGITS; i += blockDim.x) histogram[i] = 0;
  __syncthreads();
  for (int c = threadIdx.x; c < count; c += blockDim.x) {
    const uint32_t key = keys[c];
    const bool same = shift + bits == 32 || key >> (shift + bits) == prefix;
    if (key && same) atomicAdd(&histogram[key >> shift & (digits - 1)], 1);
  }
  __syncthreads();
  // A thread owns two digits, the highest first.
  const int high = digits - 1 - 2 * static_cast<int>(threadIdx.x), low = high - 1;
  const int of_high = high >= 0 ? histogram[high] : 0, of_low = low >= 0 ? histogram[low] : 0;
  uint64_t total;
  const int above = static_cast<int>(scan_block(of_high + of_low, room, total));
  if (above < wanted && wanted <= above + of_high) {
    found_digit = high, found_wanted = wanted - above;
  } else if (above + of_high < wanted && wanted <= above + of_high + of_low) {
    found_digit = low, found_wanted = wanted - above - of_high;
  }
  __syncthreads();
  wanted = found_wanted;
  const uint32_t digit = found_digit;
  __syncthreads();
  return digit;
}

/// Grid [Hk, R]: the ids of the best chunks of a row and KV head, ascending, then -1.
__global__ void __launch_bounds__(SELECT_THREADS)
    select_best(const __grid_constant__ SelectParams p) {
  extern __shared__ __align__(16) uint32_t shared_keys[];
  __shared__ float norms[MAX_QUERY_GROUP];
  __shared__ int histogram[DIGITS];
  __shared__ uint64_t room[33];
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
  scan_block(mine, room, selectable);
  const int wanted = min(max(min(p.budget_chunks[blockIdx.y], p.max_chunks), 0),
                         static_cast<int>(selectable));
  for (int i = wanted + threadIdx.x; i < p.max_chunks; i += blockDim.x) ids[i] = -1;
  if (wanted == 0) return;

  for (int c = threadIdx.x; c < count; c += blockDim.x) {
    if (keys[c]) keys[c] -= lowest - 1;
  }
  int room_at_cut = wanted;  // after all digits: how many keys equal to the last may stay
  uint32_t cut = 0;
  for (int left = 32 - __clz(highest - lowest + 1); left > 0;) {
    const int bits = min(left, DIGIT_BITS);
    left -= bits;
    cut = cut << bits | find_digit(keys, count, cut, left, bits, room_at_cut, histogram, room);
  }

  // A thread owns a run of chunks of odd length: neighbours read other banks.
  const int run = ((count + blockDim.x - 1) / blockDim.x) | 1;
  const int first = min(static_cast<int64_t>(threadIdx.x) * run, static_cast<int64_t>(count));
  const int end = min(first + run, count);
  uint64_t counts = 0, total;  // keys above the cut in the upper half, equal to it in the lower
  for (int c = first; c < end; ++c) {
    counts += (keys[c] > cut ? uint64_t{1} << 32 : 0) + (keys[c] == cut);
  }
  const uint64_t before = scan_block(counts, room, total);
  int above = static_cast<int>(before >> 32), ties = static_cast<int>(before & 0xffffffffu);
  for (int c = first; c < end; ++c) {
    const bool tie = keys[c] == cut;
    if (keys[c] > cut || (tie && ties < room_at_cut)) ids[above + min(ties, room_at_cut)] = c;
    above += keys[c] > cut;
    ties += tie;
  }
}

}  // namespace shadowkv
