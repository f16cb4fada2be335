// What both kernels of rebuild_keys share: which tokens a tile makes, and how keys are stored.
//
// A block makes a tile of tokens of one row and KV head: the head's missing chunks laid end to end.
#pragma once

#include "common/block.cuh"

namespace shadowkv {

struct RebuildParams {
  const void* coefficients;  // [P, S, r]
  const void* basis;         // [P, Hk, r, D], D contiguous
  int64_t coefficient_prompt, coefficient_token;  // strides in elements
  int64_t basis_prompt, basis_head, basis_row;
  bool aligned;  // coefficients can be read in 16-byte words
  const int* prompt_index;  // [R]
  const int* rank;          // [R]
  const int* ids;           // [R, Hk, N]
  const int* slots;         // [R, Hk, N]
  const int* misses;        // [R, Hk, N], places in ids
  const int* miss_counts;   // [R, Hk]
  const void* cos;          // [T, S', E]
  const void* sin;
  int64_t cos_table, cos_token, sin_table, sin_token;
  const int* table_index;  // [P]
  void* buffer;            // [R, Hk, B, c, D]
  int64_t buffer_row, buffer_head, buffer_slot, buffer_token;
  int heads, wanted, columns, chunk_size, pairs;
  bool interleaved;
};

/// What a tile's rows are: a token of the prompt, and where its key goes. -1: no such row.
template <int ROWS>
struct TileRows {
  int token[ROWS];
  int64_t target[ROWS];
};

template <int ROWS>
__device__ void find_rows(const RebuildParams& p, int64_t plane, TileRows<ROWS>& rows) {
  const int* ids = p.ids + plane * p.wanted;
  const int* slots = p.slots + plane * p.wanted;
  const int* misses = p.misses + plane * p.wanted;
  const int64_t count = static_cast<int64_t>(p.miss_counts[plane]) * p.chunk_size;
  for (int i = threadIdx.x; i < ROWS; i += blockDim.x) {
    const int64_t place = static_cast<int64_t>(blockIdx.x) * ROWS + i;
    rows.token[i] = -1;
    if (place < count) {
      const int chunk = static_cast<int>(place / p.chunk_size);
      const int token = static_cast<int>(place - static_cast<int64_t>(chunk) * p.chunk_size);
      const int wanted = misses[chunk];
      rows.token[i] = ids[wanted] * p.chunk_size + token;
      rows.target[i] = slots[wanted] * p.buffer_slot + token * p.buffer_token;
    }
  }
}

/// Rotate a tile's keys, float32 [ROWS, STRIDE] in shared memory, and write them to the buffer.
template <typename T, int D, int ROWS, int STRIDE>
__device__ void rotate_and_store(const RebuildParams& p, const TileRows<ROWS>& rows,
                                 const float* keys) {
  constexpr int PIECE = 16 / sizeof(T);  // dimensions in 16 bytes
  const int64_t r = blockIdx.z, head = blockIdx.y;
  const int64_t table = p.table_index[p.prompt_index[r]];
  const T* cos = static_cast<const T*>(p.cos) + table * p.cos_table;
  const T* sin = static_cast<const T*>(p.sin) + table * p.sin_table;
  T* buffer = static_cast<T*>(p.buffer) + r * p.buffer_row + head * p.buffer_head;
  for (int i = threadIdx.x; i < ROWS * D / PIECE; i += blockDim.x) {
    const int row = i / (D / PIECE), first = i % (D / PIECE) * PIECE;
    if (rows.token[row] < 0) continue;
    const T* of_cos = cos + rows.token[row] * p.cos_token;
    const T* of_sin = sin + rows.token[row] * p.sin_token;
    const float* key = keys + row * STRIDE;
    __align__(16) T out[PIECE];
#pragma unroll
    for (int e = 0; e < PIECE; ++e) {
      const int d = first + e;
      float x = key[d];
      if (d < 2 * p.pairs) {
        const bool second = p.interleaved ? d % 2 : d >= p.pairs;
        const int pair = p.interleaved ? d / 2 : d - (second ? p.pairs : 0);
        const int other = p.interleaved ? d ^ 1 : second ? d - p.pairs : d + p.pairs;
        const float turned = key[other] * to_float(of_sin[pair]);
        x = x * to_float(of_cos[pair]) + (second ? turned : -turned);
      }
      out[e] = from_float<T>(x);
    }
    *reinterpret_cast<uint4*>(buffer + rows.target[row] + first) =
        *reinterpret_cast<const uint4*>(out);
  }
}

}  // namespace shadowkv
