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
  uint32_t* words;     // [R, Hk, residency_words], or null where shared memory holds them
  int heads, wanted, buffer, chunks;
};

constexpr int RESIDENCY_DIGIT_BITS = 10;
constexpr int RESIDENCY_THREADS = 1 << (RESIDENCY_DIGIT_BITS - 1);

/// Words of 32 bits that a block works on.
__host__ __device__ constexpr int64_t residency_words(int64_t buffer, int64_t wanted) {
  return 2 * buffer + 3 * wanted;
}

/// Bring a plane's slots near: their ages, and the chunks they hold.
__device__ inline void read_slots(const int* last_used, const int* chunk_of_slot, int buffer,
                                  uint32_t* ages, int* held) {
  constexpr int AT_ONCE = 4;  // loads that a thread waits for together
#pragma unroll 1
  for (int base = threadIdx.x; base < buffer; base += AT_ONCE * RESIDENCY_THREADS) {
    int last[AT_ONCE], chunk[AT_ONCE];
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      const int slot = base + k * RESIDENCY_THREADS;
      if (slot < buffer) last[k] = last_used[slot], chunk[k] = chunk_of_slot[slot];
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      const int slot = base + k * RESIDENCY_THREADS;
      // Never used (-1) is older than all; never free (the largest number) is 0, not to be had.
      if (slot < buffer) ages[slot] = static_cast<uint32_t>(INT_MAX) - static_cast<uint32_t>(last[k]);
      if (slot < buffer) held[slot] = chunk[k];
    }
  }
}

/// Beside a kernel that fills the memory's queues each dependent read takes a microsecond or two:
/// there are two, ids and their slots, with which all else is read.
__global__ void __launch_bounds__(RESIDENCY_THREADS)
    place_chunks(const __grid_constant__ ResidencyParams p) {
  extern __shared__ __align__(16) uint32_t shared_words[];
  __shared__ DigitRoom<RESIDENCY_DIGIT_BITS> room;
  const int64_t plane = static_cast<int64_t>(blockIdx.y) * p.heads + blockIdx.x;
  const int* ids = p.ids + plane * p.wanted;
  int* slots = p.slots + plane * p.wanted;
  int* misses = p.misses + plane * p.wanted;
  int* chunk_of_slot = p.chunk_of_slot + plane * p.buffer;
  int* last_used = p.last_used + plane * p.buffer;
  int* slot_of_chunk = p.slot_of_chunk + plane * p.chunks;
  uint32_t* ages = p.words ? p.words + plane * residency_words(p.buffer, p.wanted) : shared_words;
  int* held = reinterpret_cast<int*>(ages) + p.buffer;
  int* chosen = held + p.buffer;
  int* found = chosen + p.wanted;
  int* free_slots = found + p.wanted;
  const int step = p.step[blockIdx.y];

  // A thread owns a run of chunks, so that misses are counted in their order.
  const int run = (p.wanted + RESIDENCY_THREADS - 1) / RESIDENCY_THREADS;
  const int first = min(static_cast<int>(threadIdx.x) * run, p.wanted);
  const int end = min(first + run, p.wanted);
  auto is_missing = [&](int i) { return chosen[i] >= 0 && found[i] < 0; };
  int id = first < end ? ids[first] : -1;
  int slot = id >= 0 ? slot_of_chunk[id] : -1;
  read_slots(last_used, chunk_of_slot, p.buffer, ages, held);
  uint64_t mine = 0, missing;
#pragma unroll 1
  for (int i = first; i < end;) {
    chosen[i] = id, found[i] = slots[i] = slot;
    mine += id >= 0 && slot < 0;
    if (++i == end) break;
    id = ids[i], slot = id >= 0 ? slot_of_chunk[id] : -1;
  }
  int next = static_cast<int>(scan_block(mine, room.scan, missing));  // a barrier: ages are there
  const int count = static_cast<int>(missing);
#pragma unroll 1
  for (int i = first; i < end; ++i) {
    if (found[i] < 0) continue;
    last_used[found[i]] = step;
    ages[found[i]] = static_cast<uint32_t>(INT_MAX) - static_cast<uint32_t>(step);
  }
  if (threadIdx.x == 0) p.miss_counts[plane] = count;
#pragma unroll 1
  for (int i = count + threadIdx.x; i < p.wanted; i += RESIDENCY_THREADS) misses[i] = -1;
  if (count == 0) return;
  __syncthreads();
  write_highest(ages, p.buffer, count, free_slots, room);
  __syncthreads();

#pragma unroll 1
  for (int i = first, k = next; i < end; ++i) {
    if (!is_missing(i)) continue;
    const int evicted = held[free_slots[k++]];
    if (evicted >= 0) slot_of_chunk[evicted] = -1;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = first; i < end; ++i) {
    if (!is_missing(i)) continue;
    misses[next] = i;
    const int taken = free_slots[next++];
    slot_of_chunk[chosen[i]] = taken;
    chunk_of_slot[taken] = chosen[i];
    last_used[taken] = step;
    slots[i] = taken;
  }
}

}  // namespace shadowkv
