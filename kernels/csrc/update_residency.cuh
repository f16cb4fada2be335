// Slots of the selected chunks: hits keep theirs, the k-th miss takes the k-th least recently used.
//
// A block serves one row and KV head. Slots are ordered by (last use, slot), as a stable sort has
// it, in one 64-bit word each: a bitonic sort of a power of two of them, in shared memory where
// they fit.
#pragma once

#include "common/block.cuh"

namespace shadowkv {

struct ResidencyParams {
  const int* ids;      // [R, Hk, N]
  const int* step;     // [R]
  int* chunk_of_slot;  // [R, Hk, B]
  int* last_used;      // [R, Hk, B]
  int* slot_of_chunk;  // [R, Hk, C]
  int* slots;          // [R, Hk, N]
  bool* misses;        // [R, Hk, N]
  uint64_t* ages;      // [R, Hk, places], or null where shared memory holds them
  int heads, wanted, buffer, chunks, places;
};

constexpr int RESIDENCY_THREADS = 512;

__device__ inline void sort_ascending(uint64_t* words, int count) {
  for (int size = 2; size <= count; size *= 2) {
    for (int gap = size / 2; gap; gap /= 2) {
      for (int i = threadIdx.x; i < count / 2; i += blockDim.x) {
        const int low = 2 * i - (i & (gap - 1)), high = low + gap;
        const bool ascending = (low & size) == 0;
        const uint64_t a = words[low], b = words[high];
        if ((a > b) == ascending) words[low] = b, words[high] = a;
      }
      __syncthreads();
    }
  }
}

__global__ void __launch_bounds__(RESIDENCY_THREADS)
    place_chunks(const __grid_constant__ ResidencyParams p) {
  extern __shared__ __align__(16) uint64_t shared_ages[];
  __shared__ uint64_t room[33];
  const int64_t plane = static_cast<int64_t>(blockIdx.y) * p.heads + blockIdx.x;
  const int* ids = p.ids + plane * p.wanted;
  int* slots = p.slots + plane * p.wanted;
  bool* misses = p.misses + plane * p.wanted;
  int* chunk_of_slot = p.chunk_of_slot + plane * p.buffer;
  int* last_used = p.last_used + plane * p.buffer;
  int* slot_of_chunk = p.slot_of_chunk + plane * p.chunks;
  uint64_t* ages = p.ages ? p.ages + plane * p.places : shared_ages;
  const int step = p.step[blockIdx.y];

  // A thread owns a run of chunks, so that misses are counted in their order.
  const int run = (p.wanted + blockDim.x - 1) / blockDim.x;
  const int first = min(static_cast<int>(threadIdx.x) * run, p.wanted);
  const int end = min(first + run, p.wanted);
  uint64_t mine = 0, missing;
  for (int i = first; i < end; ++i) {
    const int id = ids[i], slot = id >= 0 ? slot_of_chunk[id] : -1;
    const bool miss = id >= 0 && slot < 0;
    slots[i] = slot;
    misses[i] = miss;
    mine += miss;
    if (slot >= 0) last_used[slot] = step;
  }
  int next = static_cast<int>(scan_block(mine, room, missing));  // a barrier: hits are marked
  if (missing == 0) return;

  for (int slot = threadIdx.x; slot < p.places; slot += blockDim.x) {
    // The sign bit turned, negative steps come first; places beyond the buffer come last.
    ages[slot] = slot < p.buffer
                     ? static_cast<uint64_t>(static_cast<uint32_t>(last_used[slot]) ^ 0x80000000u)
                               << 32 | static_cast<uint32_t>(slot)
                     : ~uint64_t{0};
  }
  __syncthreads();
  sort_ascending(ages, p.places);

  for (int i = first, k = next; i < end; ++i) {
    if (!misses[i]) continue;
    const int slot = static_cast<int>(ages[k++] & 0xffffffffu), evicted = chunk_of_slot[slot];
    if (evicted >= 0) slot_of_chunk[evicted] = -1;
  }
  __syncthreads();
  for (int i = first; i < end; ++i) {
    if (!misses[i]) continue;
    const int slot = static_cast<int>(ages[next++] & 0xffffffffu);
    slot_of_chunk[ids[i]] = slot;
    chunk_of_slot[slot] = ids[i];
    last_used[slot] = step;
    slots[i] = slot;
  }
}

}  // namespace shadowkv
