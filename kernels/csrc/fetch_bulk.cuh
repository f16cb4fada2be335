// fetch_values across the bus by few threads: the memory system copies, and most of each processor is
// left to kernels that work meanwhile.
#pragma once

#include "common/bulk.cuh"
#include "fetch_values.cuh"

namespace shadowkv {

constexpr int BULK_THREADS = 32;
/// Bytes that a thread has under way. Blocks of 16 KiB and few registers find room beside others.
constexpr int BULK_PIECE = 512;

/// A part of a missing chunk.
struct BulkPiece {
  const char* from;
  char* to;
  int bytes;
  float scale;
};

struct BulkRoom {
  uint64_t barriers[BULK_THREADS];
  int starts[1];  // [planes + 1]
};

/// Bytes of shared memory of a block.
__host__ __device__ constexpr size_t bulk_bytes(int64_t planes) {
  return BULK_THREADS * BULK_PIECE + sizeof(uint64_t) * BULK_THREADS + (planes + 1) * sizeof(int);
}

/// The `index`-th piece of all missing chunks laid end to end.
template <typename T>
__device__ inline BulkPiece find_piece(const FetchParams& p, const int* starts, int pieces,
                                       int64_t index) {
  const int miss = static_cast<int>(index / pieces);
  const int begin = static_cast<int>(index - static_cast<int64_t>(miss) * pieces) * BULK_PIECE;
  const int plane = plane_of(starts, p.planes, miss);
  const int row = plane / p.heads, head = plane - row * p.heads;
  const int64_t table = static_cast<int64_t>(plane) * p.wanted;
  const int64_t place = table + p.misses[table + miss - starts[plane]];
  const int prompt = p.prompt_index[row], id = p.ids[place];
  BulkPiece piece;
  piece.from = p.values + prompt * p.value_prompt + head * p.value_head + id * p.value_chunk + begin;
  piece.to = p.buffer + row * p.buffer_row + head * p.buffer_head + p.slots[place] * p.buffer_slot +
             begin * static_cast<int64_t>(sizeof(T));
  piece.bytes = min(p.words * 16 - begin, BULK_PIECE);
  piece.scale = 1.f;
  if constexpr (!std::is_same_v<T, uint8_t>) {
    piece.scale = p.scales[(static_cast<int64_t>(prompt) * p.heads + head) * p.chunks + id];
  }
  return piece;
}

/// Write a piece of elements in 8 bits, in shared memory, as T: all lanes of a warp.
template <typename T>
__device__ inline void convert_piece(const char* held, char* to, int bytes, float scale) {
  for (int i = threadIdx.x % 32 * 16; i < bytes; i += 32 * 16) {
    store_converted<T>(*reinterpret_cast<const uint4*>(held + i), scale,
                       to + i * static_cast<int64_t>(sizeof(T)));
  }
}

/// A thread has one piece under way. T is what a byte of the values becomes, see `copy_chunks`; words
/// have 16 bytes.
template <typename T>
__global__ void __launch_bounds__(BULK_THREADS, 32)
    fetch_in_bulk(const __grid_constant__ FetchParams p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  BulkRoom& room = *reinterpret_cast<BulkRoom*>(shared + BULK_THREADS * BULK_PIECE);
  char* held = shared + threadIdx.x * BULK_PIECE;
  uint64_t* barrier = &room.barriers[threadIdx.x];
  init_barrier(barrier);
  find_starts(p, room.starts);
  const int pieces = (p.words * 16 + BULK_PIECE - 1) / BULK_PIECE;
  const int64_t total = static_cast<int64_t>(room.starts[p.planes]) * pieces;
  const int64_t step = static_cast<int64_t>(gridDim.x) * BULK_THREADS;
  int64_t index = static_cast<int64_t>(blockIdx.x) * BULK_THREADS + threadIdx.x;
  BulkPiece next{};
  bool more = index < total;
  if (more) {
    next = find_piece<T>(p, room.starts, pieces, index);
    load_bulk(held, next.from, next.bytes, barrier);
  }
  for (uint32_t parity = 0; __any_sync(ALL_LANES, more); parity ^= 1) {
    const BulkPiece piece = next;
    const bool is_held = more;
    index += step;
    more = index < total;
    if (more) next = find_piece<T>(p, room.starts, pieces, index);  // while the other is under way
    if constexpr (std::is_same_v<T, uint8_t>) {
      if (!is_held) continue;
      while (!is_complete(barrier, parity)) {
      }
      fence_bulk();
      store_bulk(piece.to, held, piece.bytes);
      if (more) wait_until_read();
    } else {
      for (int lane = 0; lane < 32; ++lane) {
        if (!__shfl_sync(ALL_LANES, is_held, lane)) break;  // the last lanes have none
        const int there = threadIdx.x / 32 * 32 + lane;
        while (!is_complete(&room.barriers[there], parity)) {
        }
        char* to = reinterpret_cast<char*>(
            __shfl_sync(ALL_LANES, reinterpret_cast<uint64_t>(piece.to), lane));
        convert_piece<T>(shared + there * BULK_PIECE, to, __shfl_sync(ALL_LANES, piece.bytes, lane),
                         __shfl_sync(ALL_LANES, piece.scale, lane));
      }
      fence_bulk();  // What all lanes read comes before what the next copies bring.
      __syncwarp();
    }
    if (more) load_bulk(held, next.from, next.bytes, barrier);
  }
  wait_until_stored();
#else
  __trap();  // The host asks what the kernel was compiled for.
#endif
}

}  // namespace shadowkv
