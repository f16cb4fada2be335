// A block finds the highest keys of an array, digit by digit, and writes where they are.
#pragma once

#include "block.cuh"

namespace shadowkv {

/// Digits of so many bits; a block of 2^(BITS - 1) threads owns two of them each.
template <int BITS>
struct DigitRoom {
  static constexpr int DIGITS = 1 << BITS, THREADS = DIGITS / 2;
  int histogram[DIGITS];
  uint64_t scan[33];
  uint32_t range[64];
  int digit, wanted;
};

/// Make the lowest key that is there 1, and return how many bits the highest then has.
///
/// Digits are counted in one place each, so their leading bits must not be the same for all, as
/// those of floating-point numbers of one size are. A thread sees its own keys, `blockDim` apart.
template <int BITS>
__device__ int spread_keys(uint32_t* keys, int count, DigitRoom<BITS>& room) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint32_t lowest = UINT32_MAX, highest = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    if (keys[i]) lowest = min(lowest, keys[i]), highest = max(highest, keys[i]);
  }
  lowest = __reduce_min_sync(ALL_LANES, lowest);
  highest = __reduce_max_sync(ALL_LANES, highest);
  if (lane == 0) room.range[warp] = lowest, room.range[32 + warp] = highest;
  __syncthreads();
  lowest = __reduce_min_sync(ALL_LANES, lane < warps ? room.range[lane] : UINT32_MAX);
  highest = __reduce_max_sync(ALL_LANES, lane < warps ? room.range[32 + lane] : 0u);
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    if (keys[i]) keys[i] -= lowest - 1;
  }
  return 32 - __clz(highest - lowest + 1);
}

/// Of the keys that share `prefix` above `shift + bits`, find the digit of the `wanted`-th highest,
/// and take from `wanted` how many have a higher one. Keys of 0 are not there.
template <int BITS>
__device__ uint32_t find_digit(const uint32_t* keys, int count, uint32_t prefix, int shift,
                               int bits, int& wanted, DigitRoom<BITS>& room) {
  const int digits = 1 << bits;
#pragma unroll 1
  for (int i = threadIdx.x; i < digits; i += blockDim.x) room.histogram[i] = 0;
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const uint32_t key = keys[i];
    const bool same = shift + bits == 32 || key >> (shift + bits) == prefix;
    if (key && same) atomicAdd(&room.histogram[key >> shift & (digits - 1)], 1);
  }
  __syncthreads();
  const int high = digits - 1 - 2 * static_cast<int>(threadIdx.x), low = high - 1;  // highest first
  const int of_high = high >= 0 ? room.histogram[high] : 0;
  const int of_low = low >= 0 ? room.histogram[low] : 0;
  uint64_t total;
  const int above = static_cast<int>(scan_block(of_high + of_low, room.scan, total));
  if (above < wanted && wanted <= above + of_high) {
    room.digit = high, room.wanted = wanted - above;
  } else if (above + of_high < wanted && wanted <= above + of_high + of_low) {
    room.digit = low, room.wanted = wanted - above - of_high;
  }
  __syncthreads();
  wanted = room.wanted;
  const uint32_t digit = room.digit;
  __syncthreads();
  return digit;
}

/// Write the places of the `wanted` highest keys, ascending; of equal keys those in front.
///
/// Keys are 0 where there is none; at least `wanted` (1 or more) are there, each written before a
/// barrier or by the thread that `spread_keys` says. They are changed.
template <int BITS>
__device__ void write_highest(uint32_t* keys, int count, int wanted, int* out,
                              DigitRoom<BITS>& room) {
  int ties_wanted = wanted;
  uint32_t cut = 0;
#pragma unroll 1
  for (int left = spread_keys(keys, count, room); left > 0;) {
    const int bits = min(left, BITS);
    left -= bits;
    cut = cut << bits | find_digit(keys, count, cut, left, bits, ties_wanted, room);
  }
  // A thread owns a run of keys of odd length: neighbours read other banks.
  const int run = ((count + blockDim.x - 1) / blockDim.x) | 1;
  const int first = min(static_cast<int64_t>(threadIdx.x) * run, static_cast<int64_t>(count));
  const int end = min(first + run, count);
  uint64_t counts = 0, total;  // keys above the cut in the upper half, equal to it in the lower
#pragma unroll 1
  for (int i = first; i < end; ++i) {
    counts += (keys[i] > cut ? uint64_t{1} << 32 : 0) + (keys[i] == cut);
  }
  const uint64_t before = scan_block(counts, room.scan, total);
  int above = static_cast<int>(before >> 32), ties = static_cast<int>(before & 0xffffffffu);
#pragma unroll 1
  for (int i = first; i < end; ++i) {
    const bool tie = keys[i] == cut;
    if (keys[i] > cut || (tie && ties < ties_wanted)) out[above + min(ties, ties_wanted)] = i;
    above += keys[i] > cut;
    ties += tie;
  }
}

}  // namespace shadowkv
