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
  int planes, heads, chunks, wanted, words;
};

constexpr int FETCH_THREADS = 256;
/// Blocks that must find registers on one processor: at most 64 a thread, beside other kernels.
constexpr int FETCH_BLOCKS_A_PROCESSOR = 4;
constexpr int LOADS_IN_FLIGHT = 8;

/// The chunks that a block copies at a time, found by one thread each.
struct CopyTile {
  const char* from[FETCH_THREADS];
  char* to[FETCH_THREADS];
  float scale[FETCH_THREADS];
};

/// Where the misses of each row and head begin when all are laid end to end, into
/// `starts` [planes + 1] in shared memory; the last is how many there are.
__device__ inline void find_starts(const FetchParams& p, int* starts) {
  __shared__ uint64_t room[33];
  int listed = 0;
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
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (starts[middle] <= miss ? low : high) = middle;
  }
  return low;
}

/// Find the chunk that is the `miss`-th of all missing ones, as this thread's of the tile.
template <bool SCALED>
__device__ inline void find_chunk(const FetchParams& p, const int* starts, int miss,
                                  CopyTile& tile) {
  const int plane = plane_of(starts, p.planes, miss);
  const int row = plane / p.heads, head = plane - row * p.heads;
  const int prompt = p.prompt_index[row];
  const int64_t table = static_cast<int64_t>(plane) * p.wanted;
  const int64_t place = table + p.misses[table + miss - starts[plane]];
  const int id = p.ids[place], slot = p.slots[place];
  tile.from[threadIdx.x] =
      p.values + prompt * p.value_prompt + head * p.value_head + id * p.value_chunk;
  tile.to[threadIdx.x] =
      p.buffer + row * p.buffer_row + head * p.buffer_head + slot * p.buffer_slot;
  if constexpr (SCALED) {
    const int64_t of_head = static_cast<int64_t>(prompt) * p.heads + head;
    tile.scale[threadIdx.x] = p.scales[of_head * p.chunks + id];
  }
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

/// Copy the words of a tile's chunks, laid end to end: the threads take one each, and so on.
template <typename Word, typename T, bool CONVERTS>
__device__ inline void copy_tile(const CopyTile& tile, int count, int words) {
  // A step of the whole block in chunks and words: no division in the loop.
  const int chunks = FETCH_THREADS / words, rest = FETCH_THREADS - chunks * words;
  int chunk = static_cast<int>(threadIdx.x) / words;
  int word = static_cast<int>(threadIdx.x) - chunk * words;
  auto step = [&] {
    chunk += chunks;
    word += rest;
    if (word >= words) word -= words, ++chunk;
  };
  while (chunk < count) {
    const int first_chunk = chunk, first_word = word;
    const Word* from[LOADS_IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < LOADS_IN_FLIGHT; ++i, step()) {
      from[i] = chunk < count ? reinterpret_cast<const Word*>(tile.from[chunk]) + word : nullptr;
    }
    Word held[LOADS_IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < LOADS_IN_FLIGHT; ++i) {
      // Not cached: the host may write new values between two launches.
      if (from[i]) held[i] = __ldcv(from[i]);
    }
    // The same way again: registers hold words, not where they go.
    chunk = first_chunk, word = first_word;
#pragma unroll
    for (int i = 0; i < LOADS_IN_FLIGHT; ++i, step()) {
      if (chunk >= count) continue;
      char* to = tile.to[chunk] + word * static_cast<int64_t>(sizeof(Word) * sizeof(T));
      if constexpr (CONVERTS) {
        store_converted<T>(held[i], tile.scale[chunk], to);
      } else {
        *reinterpret_cast<Word*>(to) = held[i];
      }
    }
  }
}

/// A block takes an even share of all missing chunks laid end to end. T is what a byte of the
/// values becomes: itself, or an element of the buffer.
template <typename Word, typename T = uint8_t>
__global__ void __launch_bounds__(FETCH_THREADS, FETCH_BLOCKS_A_PROCESSOR)
    copy_chunks(const __grid_constant__ FetchParams p) {
  constexpr bool CONVERTS = !std::is_same_v<T, uint8_t>;
  extern __shared__ int starts[];
  __shared__ CopyTile tile;
  find_starts(p, starts);
  const int64_t total = starts[p.planes];
  const int first = static_cast<int>(total * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(total * (blockIdx.x + 1) / gridDim.x);
  for (int base = first; base < end; base += FETCH_THREADS) {
    const int count = min(end - base, FETCH_THREADS), own = static_cast<int>(threadIdx.x);
    if (own < count) find_chunk<CONVERTS>(p, starts, base + own, tile);
    __syncthreads();
    copy_tile<Word, T, CONVERTS>(tile, count, p.words);
    __syncthreads();  // The next chunks take the place of these.
  }
}

}  // namespace shadowkv
