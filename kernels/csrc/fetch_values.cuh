// Copies missing chunks to their slots, across the bus where the values lie in pinned host memory.
#pragma once

#include "common/block.cuh"

namespace shadowkv {

struct FetchParams {
  const char* values;    // [P, Hk, C] chunks of `words` words
  char* buffer;          // [R, Hk, B] chunks of as many
  const float* scales;   // [P, Hk, C], or null
  float* buffer_scales;  // [R, Hk, B]
  int64_t value_prompt, value_head, value_chunk;  // strides in bytes
  int64_t buffer_row, buffer_head, buffer_slot;
  const int* prompt_index;  // [R]
  const int* ids;           // [R, Hk, N]
  const int* slots;         // [R, Hk, N]
  const int* misses;        // [R, Hk, N], places in ids
  const int* miss_counts;   // [R, Hk]
  uint32_t* turns;          // [2], taken and passed; or null
  int planes, heads, chunks, slots_of_head, wanted, words;
};

constexpr int FETCH_THREADS = 256;
constexpr int LOADS_IN_FLIGHT = 4;

/// Where the misses of each row and head begin when all are laid end to end, into
/// `starts` [planes + 1] in shared memory; the last is how many there are.
__device__ inline void find_starts(const FetchParams& p, int* starts) {
  __shared__ uint64_t room[33];
  int listed = 0;
#pragma unroll 1
  for (int base = 0; base < p.planes; base += blockDim.x) {
    const int plane = base + static_cast<int>(threadIdx.x);
    uint64_t total;
    const uint64_t own = plane < p.planes ? p.miss_counts[plane] : 0;
    const int before = static_cast<int>(scan_block(own, room, total));
    if (plane < p.planes) starts[plane] = listed + before;
    listed += static_cast<int>(total);
  }
  if (threadIdx.x == 0) starts[p.planes] = listed;
  __syncthreads();
}

/// The last of `starts` that is not above `miss`: its row and head.
__device__ inline int plane_of(const int* starts, int planes, int miss) {
  int low = 0, high = planes;  // starts[low] <= miss < starts[high]
#pragma unroll 1
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (starts[middle] <= miss ? low : high) = middle;
  }
  return low;
}

/// A chunk to be copied: its prompt and id, the slot it goes to, and the addresses of both.
struct Miss {
  const char* from;
  char* to;
  int plane, prompt, head, id, slot;
};

/// The `index`-th of all missing chunks laid end to end.
__device__ inline Miss find_miss(const FetchParams& p, const int* starts, int index) {
  Miss found;
  found.plane = plane_of(starts, p.planes, index);
  const int row = found.plane / p.heads;
  found.head = found.plane - row * p.heads;
  const int64_t table = static_cast<int64_t>(found.plane) * p.wanted;
  const int64_t place = table + p.misses[table + index - starts[found.plane]];
  found.prompt = p.prompt_index[row], found.id = p.ids[place], found.slot = p.slots[place];
  found.from = p.values + found.prompt * p.value_prompt + found.head * p.value_head +
               found.id * p.value_chunk;
  found.to = p.buffer + row * p.buffer_row + found.head * p.buffer_head +
             found.slot * p.buffer_slot;
  return found;
}

/// A chunk's scale goes to its slot, if there are scales.
__device__ inline void copy_scale(const FetchParams& p, const Miss& miss) {
  if (!p.scales) return;
  const int64_t of_head = static_cast<int64_t>(miss.prompt) * p.heads + miss.head;
  const int64_t to = static_cast<int64_t>(miss.plane) * p.slots_of_head + miss.slot;
  p.buffer_scales[to] = p.scales[of_head * p.chunks + miss.id];
}

/// A warp takes 128 words at a time of all missing chunks laid end to end.
template <typename Word>
__global__ void __launch_bounds__(FETCH_THREADS)
    copy_chunks(const __grid_constant__ FetchParams p) {
  constexpr int BATCH = 32 * LOADS_IN_FLIGHT;
  extern __shared__ int starts[];
  find_starts(p, starts);
  const int lane = threadIdx.x % 32;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * FETCH_THREADS + threadIdx.x) / 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (FETCH_THREADS / 32) * BATCH;
  const int64_t total = static_cast<int64_t>(starts[p.planes]) * p.words;
  for (int64_t first = warp * BATCH; first < total; first += step) {
    Word held[LOADS_IN_FLIGHT];
    char* to[LOADS_IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < LOADS_IN_FLIGHT; ++i) {
      const int64_t word = first + i * 32 + lane;
      to[i] = nullptr;
      if (word < total) {
        const int index = static_cast<int>(word / p.words);
        const int64_t offset = (word - static_cast<int64_t>(index) * p.words) * sizeof(Word);
        const Miss miss = find_miss(p, starts, index);
        // Not cached: the host may write new values between two launches.
        held[i] = __ldcv(reinterpret_cast<const Word*>(miss.from + offset));
        to[i] = miss.to + offset;
        if (offset == 0) copy_scale(p, miss);
      }
    }
#pragma unroll
    for (int i = 0; i < LOADS_IN_FLIGHT; ++i) {
      if (to[i]) *reinterpret_cast<Word*>(to[i]) = held[i];
    }
  }
}

}  // namespace shadowkv
