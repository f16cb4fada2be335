// Slots of the selected chunks: hits keep theirs, misses take the least recently used ones.
//
// A block serves one row and KV head. As many slots as chunks are missing are found by their age,
// of equal age the lower ones, and taken in their order.
#pragma once

#include <climits>

#include "common/highest.cuh"

namespace shadowkv {

struct ResidencyParams {
  const int* ids;      // [R, Hk, N]
  const int* step;     // [R]
  int* chunk_of_slot;  // [R, Hk, B]
  int* last_used;      // [R, Hk, B]
  int* slot_of_chunk;  // [R, Hk, C]
  int* slots;          // [R, Hk, N]
  int* misses;         // [R, Hk, N], places in ids, then -1
  int* miss_counts;    // [R, Hk]
  uint32_t* ages;      // [R, Hk, B + N], or null where shared memory holds ages and free slots
  int heads, wanted, buffer, chunks;
};

constexpr int RESIDENCY_DIGIT_BITS = 10;
constexpr int RESIDENCY_THREADS = 1 << (RESIDENCY_DIGIT_BITS - 1);

__global__ void __launch_bounds__(RESIDENCY_THREADS)
    place_chunks(const __grid_constant__ ResidencyParams p) {
  extern __shared__ __align__(16) uint32_t shared_ages[];
  __shared__ DigitRoom<RESIDENCY_DIGIT_BITS> room;
  const int64_t plane = static_cast<int64_t>(blockIdx.y) * p.heads + blockIdx.x;
  const int* ids = p.ids + plane * p.wanted;
  int* slots = p.slots + plane * p.wanted;
  int* misses = p.misses + plane * p.wanted;
  int* chunk_of_slot = p.chunk_of_slot + plane * p.buffer;
  int* last_used = p.last_used + plane * p.buffer;
  int* slot_of_chunk = p.slot_of_chunk + plane * p.chunks;
  uint32_t* ages = p.ages ? p.ages + plane * (p.buffer + p.wanted) : shared_ages;
  int* free_slots = reinterpret_cast<int*>(ages + p.buffer);
  const int step = p.step[blockIdx.y];

  auto is_missing = [&](int i) { return ids[i] >= 0 && slots[i] < 0; };
  // A thread owns a run of chunks, so that misses are counted in their order.
  const int run = (p.wanted + blockDim.x - 1) / blockDim.x;
  const int first = min(static_cast<int>(threadIdx.x) * run, p.wanted);
  const int end = min(first + run, p.wanted);
  uint64_t mine = 0, missing;
  for (int i = first; i < end; ++i) {
    const int id = ids[i], slot = id >= 0 ? slot_of_chunk[id] : -1;
    slots[i] = slot;
    mine += id >= 0 && slot < 0;
    if (slot >= 0) last_used[slot] = step;
  }
  int next = static_cast<int>(scan_block(mine, room.scan, missing));  // a barrier: hits are marked
  const int count = static_cast<int>(missing);
  if (threadIdx.x == 0) p.miss_counts[plane] = count;
  for (int i = count + threadIdx.x; i < p.wanted; i += blockDim.x) misses[i] = -1;
  if (count == 0) return;

  for (int slot = threadIdx.x; slot < p.buffer; slot += blockDim.x) {
    // Never used (-1) is older than all; never free (the largest number) is 0, not to be had.
    ages[slot] = static_cast<uint32_t>(INT_MAX) - static_cast<uint32_t>(last_used[slot]);
  }
  write_highest(ages, p.buffer, count, free_slots, room);
  __syncthreads();

  for (int i = first, k = next; i < end; ++i) {
    if (!is_missing(i)) continue;
    const int evicted = chunk_of_slot[free_slots[k++]];
    if (evicted >= 0) slot_of_chunk[evicted] = -1;
  }
  __syncthreads();
  for (int i = first; i < end; ++i) {
    if (!is_missing(i)) continue;
    misses[next] = i;
    const int slot = free_slots[next++];
    slot_of_chunk[ids[i]] = slot;
    chunk_of_slot[slot] = ids[i];
    last_used[slot] = step;
    slots[i] = slot;
  }
}

}  // namespace shadowkv
