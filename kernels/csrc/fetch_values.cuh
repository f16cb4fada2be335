// Copies missing chunks to their slots, across the bus where the values lie in pinned host memory;
// values in 8 bits become the buffer's dtype on the way.
#pragma once

#include <type_traits>

#include "common/block.cuh"
#include "common/fp8.cuh"

namespace shadowkv {

struct FetchParams {
  const char* values;   // [P, Hk, C] chunks of `words` words
  const float* scales;  // [P, Hk, C], or null where bytes are copied
  char* buffer;         // [R, Hk, B] chunks of as many elements
  int64_t value_prompt, value_head, value_chunk;  // strides in bytes
  int64_t buffer_row, buffer_head, buffer_slot;
  const int* prompt_index;  // [R]
  const int* ids;           // [R, Hk, N]
  const int* slots;         // [R, Hk, N]
  const int* misses;        // [R, Hk, N], places in ids
  const int* miss_counts;   // [R, Hk]
  uint32_t* turns;          // [2], taken and passed; or null
  int planes, heads, chunks, wanted, words;
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

/// Four elements in 8 bits, times their scale, as T.
template <typename T>
__device__ inline void convert_four(uint32_t four, float scale, T* to) {
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const uint32_t halves = halves_of(four, pair);
    __half2 two;
    memcpy(&two, &halves, sizeof(two));
    const float2 wide = __half22float2(two);
    to[2 * pair] = from_float<T>(wide.x * scale);
    to[2 * pair + 1] = from_float<T>(wide.y * scale);
  }
}

/// Write a word of elements in 8 bits as T, in pieces of up to 16 bytes.
template <typename T, typename Word>
__device__ inline void store_converted(const Word& word, float scale, char* to) {
  if constexpr (sizeof(Word) == 1) {
    *reinterpret_cast<T*>(to) = from_float<T>(to_float(Fp8{word}) * scale);
  } else {
    uint32_t fours[sizeof(Word) / 4];
    memcpy(fours, &word, sizeof(Word));
    __align__(16) T out[sizeof(Word)];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Word) / 4); ++i) {
      convert_four(fours[i], scale, out + 4 * i);
    }
    using Piece = std::conditional_t<sizeof(out) == 8, uint2, uint4>;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(out) / sizeof(Piece)); ++i) {
      reinterpret_cast<Piece*>(to)[i] = reinterpret_cast<const Piece*>(out)[i];
    }
  }
}

/// A warp takes 128 words at a time of all missing chunks laid end to end. T is what a byte of the
/// values becomes: itself, or an element of the buffer.
template <typename Word, typename T = uint8_t>
__global__ void __launch_bounds__(FETCH_THREADS)
    copy_chunks(const __grid_constant__ FetchParams p) {
  constexpr int BATCH = 32 * LOADS_IN_FLIGHT;
  constexpr bool CONVERTS = !std::is_same_v<T, uint8_t>;
  extern __shared__ int starts[];
  find_starts(p, starts);
  const int lane = threadIdx.x % 32;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * FETCH_THREADS + threadIdx.x) / 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (FETCH_THREADS / 32) * BATCH;
  const int64_t total = static_cast<int64_t>(starts[p.planes]) * p.words;
  for (int64_t first = warp * BATCH; first < total; first += step) {
    Word held[LOADS_IN_FLIGHT];
    char* to[LOADS_IN_FLIGHT];
    [[maybe_unused]] float scales[LOADS_IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < LOADS_IN_FLIGHT; ++i) {
      const int64_t word = first + i * 32 + lane;
      to[i] = nullptr;
      if (word < total) {
        const int miss = static_cast<int>(word / p.words);
        const int64_t offset = (word - static_cast<int64_t>(miss) * p.words) * sizeof(Word);
        const int plane = plane_of(starts, p.planes, miss);
        const int row = plane / p.heads, head = plane - row * p.heads;
        const int64_t table = static_cast<int64_t>(plane) * p.wanted;
        const int64_t place = table + p.misses[table + miss - starts[plane]];
        const int prompt = p.prompt_index[row], id = p.ids[place];
        // Not cached: the host may write new values between two launches.
        held[i] = __ldcv(reinterpret_cast<const Word*>(p.values + prompt * p.value_prompt +
                                                       head * p.value_head + id * p.value_chunk +
                                                       offset));
        to[i] = p.buffer + row * p.buffer_row + head * p.buffer_head +
                p.slots[place] * p.buffer_slot + offset * static_cast<int64_t>(sizeof(T));
        if constexpr (CONVERTS) {
          const int64_t of_head = static_cast<int64_t>(prompt) * p.heads + head;
          scales[i] = p.scales[of_head * p.chunks + id];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < LOADS_IN_FLIGHT; ++i) {
      if (!to[i]) continue;
      if constexpr (CONVERTS) {
        store_converted<T>(held[i], scales[i], to[i]);
      } else {
        *reinterpret_cast<Word*>(to[i]) = held[i];
      }
    }
  }
}

}  // namespace shadowkv
