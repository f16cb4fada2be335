// What both kernels of rebuild_keys share: which tokens a tile makes, and how keys are stored.
//
// A block makes tiles of tokens of one row and KV head: the head's missing chunks laid end to end.
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
  const int* misses;        // [R, Hk, N], places in ids, then -1
  const void* cos;          // [T, S', E]
  const void* sin;
  int64_t cos_table, cos_token, sin_table, sin_token;
  bool rotations_aligned;  // cos and sin can be read in 16-byte words
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
  int prompt, rank, table;  // of the tile
};

/// Find the tile that begins with the `first` of a row's and head's missing tokens; false where
/// there are not so many. Every thread of the block calls it, and may read the tile afterwards.
template <int ROWS>
__device__ bool find_rows(const RebuildParams& p, int first, TileRows<ROWS>& rows) {
  const int64_t plane = static_cast<int64_t>(blockIdx.y) * p.heads + blockIdx.x;
  const int* ids = p.ids + plane * p.wanted;
  const int* slots = p.slots + plane * p.wanted;
  const int* misses = p.misses + plane * p.wanted;
  bool some = false;
  for (int i = threadIdx.x; i < ROWS; i += blockDim.x) {
    const int chunk = (first + i) / p.chunk_size, token = (first + i) - chunk * p.chunk_size;
    // -1 behind the last miss: the count is not waited for.
    const int wanted = chunk < p.wanted ? misses[chunk] : -1;
    rows.token[i] = -1;
    if (wanted >= 0) {
      some = true;
      rows.token[i] = ids[wanted] * p.chunk_size + token;
      rows.target[i] = slots[wanted] * p.buffer_slot + token * p.buffer_token;
    }
  }
  // Another warp: one load after the other, beside those of the rows.
  if (threadIdx.x == blockDim.x - 1) {
    const int prompt = p.prompt_index[blockIdx.y];
    rows.rank = max(min(p.rank[blockIdx.y], p.columns), 0);
    rows.prompt = prompt;
    rows.table = p.table_index[prompt];
  }
  return __syncthreads_or(some);
}

/// Copy the first `kept` elements of 16 bytes to shared memory, zeros for the others; only where
/// the source is aligned is the copy under way afterwards.
template <typename T>
__device__ void copy_piece(T* to, const T* from, int kept, bool aligned) {
  constexpr int PIECE = 16 / sizeof(T);
  if (aligned) {
    copy_async(to, from, kept * static_cast<int>(sizeof(T)));
  } else {
    for (int e = 0; e < PIECE; ++e) to[e] = e < kept ? from[e] : from_float<T>(0.f);
  }
}

/// Copy cos and sin of a tile's tokens to shared memory: [ROWS, 2, D / 2], of which E are used.
template <typename T, int D, int ROWS>
__device__ void fetch_rotations(const RebuildParams& p, const TileRows<ROWS>& rows, T* rotations) {
  constexpr int PIECE = 16 / sizeof(T), PIECES = D / 2 / PIECE;
  const T* cos = static_cast<const T*>(p.cos) + rows.table * p.cos_table;
  const T* sin = static_cast<const T*>(p.sin) + rows.table * p.sin_table;
  for (int i = threadIdx.x; i < ROWS * PIECES; i += blockDim.x) {
    const int row = i / PIECES, pair = i % PIECES * PIECE, kept = min(p.pairs - pair, PIECE);
    const int64_t token = rows.token[row];
    if (token < 0 || kept <= 0) continue;
    T* to = rotations + row * D + pair;
    copy_piece(to, cos + token * p.cos_token + pair, kept, p.rotations_aligned);
    copy_piece(to + D / 2, sin + token * p.sin_token + pair, kept, p.rotations_aligned);
  }
}

/// N elements of shared memory, in 16-byte words.
template <typename T, int N>
__device__ void read_shared(const T* from, T (&to)[N]) {
  constexpr int WORDS = N * static_cast<int>(sizeof(T)) / 16;
  static_assert(N * sizeof(T) == WORDS * 16);
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    const uint4 word = reinterpret_cast<const uint4*>(from)[i];
    memcpy(reinterpret_cast<char*>(to) + i * 16, &word, 16);
  }
}

/// Rotate N dimensions of a key from `first` on, whose partners are N neighbours too.
template <typename T, int D, int N>
__device__ void rotate_piece(const RebuildParams& p, const float* key, const T* rotation, int first,
                             float (&out)[N]) {
  read_shared(key + first, out);
  if (first >= 2 * p.pairs) return;
  const bool second = first >= p.pairs;
  const int pair = first - (second ? p.pairs : 0);
  float other[N];
  T cos[N], sin[N];
  read_shared(key + (second ? pair : first + p.pairs), other);
  read_shared(rotation + pair, cos);
  read_shared(rotation + D / 2 + pair, sin);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const float turned = other[e] * to_float(sin[e]);
    out[e] = out[e] * to_float(cos[e]) + (second ? turned : -turned);
  }
}

/// The same dimension by dimension, wherever their partners are.
template <typename T, int D, int N>
__device__ void rotate_each(const RebuildParams& p, const float* key, const T* rotation, int first,
                            float (&out)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const int d = first + e;
    out[e] = key[d];
    if (d >= 2 * p.pairs) continue;
    const bool second = p.interleaved ? d % 2 : d >= p.pairs;
    const int pair = p.interleaved ? d / 2 : d - (second ? p.pairs : 0);
    const int other = p.interleaved ? d ^ 1 : second ? d - p.pairs : d + p.pairs;
    const float turned = key[other] * to_float(rotation[D / 2 + pair]);
    out[e] = out[e] * to_float(rotation[pair]) + (second ? turned : -turned);
  }
}

/// Rotate a tile's keys, float32 [ROWS, STRIDE] in shared memory as are the rotations, and write
/// them to the buffer.
template <typename T, int D, int STRIDE, int ROWS>
__device__ void rotate_and_store(const RebuildParams& p, const TileRows<ROWS>& rows,
                                 const float* keys, const T* rotations) {
  constexpr int PIECE = 16 / sizeof(T);  // dimensions in 16 bytes
  const bool by_pieces = !p.interleaved && p.pairs % PIECE == 0;
  const int64_t head = blockIdx.x, r = blockIdx.y;
  T* buffer = static_cast<T*>(p.buffer) + r * p.buffer_row + head * p.buffer_head;
  for (int i = threadIdx.x; i < ROWS * D / PIECE; i += blockDim.x) {
    const int row = i / (D / PIECE), first = i % (D / PIECE) * PIECE;
    if (rows.token[row] < 0) continue;
    float turned[PIECE];
    if (by_pieces) {
      rotate_piece<T, D>(p, keys + row * STRIDE, rotations + row * D, first, turned);
    } else {
      rotate_each<T, D>(p, keys + row * STRIDE, rotations + row * D, first, turned);
    }
    __align__(16) T out[PIECE];
#pragma unroll
    for (int e = 0; e < PIECE; ++e) out[e] = from_float<T>(turned[e]);
    *reinterpret_cast<uint4*>(buffer + rows.target[row] + first) =
        *reinterpret_cast<const uint4*>(out);
  }
}

}  // namespace shadowkv
