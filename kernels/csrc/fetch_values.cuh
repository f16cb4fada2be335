// Copies missing chunks to their slots, across the bus where the values lie in pinned host memory.
#pragma once

#include "common/block.cuh"

namespace shadowkv {

struct FetchParams {
  const char* values;  // [P, Hk, C] chunks of `words` words
  char* buffer;        // [R, Hk, B] of the same
  int64_t value_prompt, value_head, value_chunk;  // strides in bytes
  int64_t buffer_row, buffer_head, buffer_slot;
  const int* prompt_index;  // [R]
  const int* ids;           // [R, Hk, N]
  const int* slots;         // [R, Hk, N]
  const int* list;          // of misses
  const int* count;         // how many
  int heads, wanted, words;
};

constexpr int FETCH_THREADS = 256;
constexpr int LOADS_IN_FLIGHT = 4;

/// A warp takes 128 words at a time of all missing chunks laid end to end.
template <typename Word>
__global__ void __launch_bounds__(FETCH_THREADS)
    copy_chunks(const __grid_constant__ FetchParams p) {
  constexpr int BATCH = 32 * LOADS_IN_FLIGHT;
  const int lane = threadIdx.x % 32;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * FETCH_THREADS + threadIdx.x) / 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (FETCH_THREADS / 32) * BATCH;
  const int64_t total = static_cast<int64_t>(*p.count) * p.words;
  for (int64_t first = warp * BATCH; first < total; first += step) {
    Word held[LOADS_IN_FLIGHT];
    char* to[LOADS_IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < LOADS_IN_FLIGHT; ++i) {
      const int64_t word = first + i * 32 + lane;
      to[i] = nullptr;
      if (word < total) {
        const int miss = static_cast<int>(word / p.words);
        const int64_t offset = (word - static_cast<int64_t>(miss) * p.words) * sizeof(Word);
        const int place = p.list[miss], plane = place / p.wanted;
        const int row = plane / p.heads, head = plane - row * p.heads;
        // Not cached: the host may write new values between two launches.
        held[i] = __ldcv(reinterpret_cast<const Word*>(
            p.values + p.prompt_index[row] * p.value_prompt + head * p.value_head +
            p.ids[place] * p.value_chunk + offset));
        to[i] = p.buffer + row * p.buffer_row + head * p.buffer_head +
                p.slots[place] * p.buffer_slot + offset;
      }
    }
#pragma unroll
    for (int i = 0; i < LOADS_IN_FLIGHT; ++i) {
      if (to[i]) *reinterpret_cast<Word*>(to[i]) = held[i];
    }
  }
}

}  // namespace shadowkv
