// What the kernels of select_chunks share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace shadowkv {

struct SelectParams {
  const void* query;      // [R, Hq, D], contiguous
  const void* landmarks;  // [P, Hk, C, L, D], packed [P, Hk, C, L, W], contiguous from C on
  const float* scales;    // [P, Hk, C, L], contiguous from C on: of landmarks in 8 bits, or null
  int64_t landmark_prompt, landmark_head, scale_prompt, scale_head;
  bool scales_in_words;     // those of a plane begin at a multiple of 16 bytes
  const int* prompt_index;  // [R]
  const int* num_chunks;    // [R]
  const bool* excluded;     // [R, Hk, C]
  int64_t excluded_row, excluded_head;
  const int* budget_chunks;  // [R]
  int heads, group, chunks, per_chunk, max_chunks, logit_stride;
  int segments, segment_chunks;  // a block of the first kernel scores a segment of the chunks
  int planes;                    // R * Hk, which clusters take in turns
  int blocks, clusters;          // of a cluster; that run
  int share_stride, share_keys;  // floats from head to head in a block of a cluster; keys of a plane
  int buffers;                   // of logits in a block of a cluster: 1 or 2
  float scale;                   // holds log2 e: logits are in base 2
  float* logits;                 // [R, Hq, logit_stride], minus infinity where a chunk is barred
  float2* totals;                // [R, Hq, segments]: highest logit, sum of 2^(logit - highest)
  uint32_t* keys;                // [R, Hk, C], where shared memory does not hold them
  int* ids;                      // [R, Hk, N]
  int* done;                     // [R], or null: SELECT_PARTS more for each KV head that is written
};

constexpr int SCORE_WARPS = 4;
constexpr int SEGMENT = 256;               // landmarks
constexpr int SCORE_STRIDE = SEGMENT + 8;  // query heads lie in banks of their own
constexpr int MAX_QUERY_GROUP = 16;
constexpr int SELECT_DIGIT_BITS = 10;
constexpr int SELECT_THREADS = 1 << (SELECT_DIGIT_BITS - 1);
constexpr int SELECT_BINS = 1024;
constexpr int MOST_TIED = 256;  // keys in a bin that are compared with each other
constexpr int SELECT_PARTS = 8;         // as in shadowkv_cli/ops/await_rows.py
constexpr int MOST_CLUSTER_BLOCKS = 8;  // of a plane, in one kernel; the most that is portable
/// Of a block of a cluster some warps score a plane's chunks while others rank those of the planes
/// before: two parts in turns, since most of that is waiting for other blocks.
constexpr int RANK_THREADS = 128, RANK_PARTS = 2, SCORERS = 8;
constexpr int CLUSTER_THREADS = RANK_PARTS * RANK_THREADS + SCORERS * 32;
/// The registers of a thread are those that so many threads would have: kernels beside it need some.
constexpr int MOST_REGISTER_THREADS = 768;
/// Bytes that a scoring warp has under way, landmarks and scales, in so many stages at most. With
/// more, two buffers of logits and kernels beside it do not fit at 122,880 tokens.
constexpr int CLUSTER_WARP_BYTES = 6656, MOST_CLUSTER_STAGES = 3;
constexpr int REHEARSED = 8;  // chunks
constexpr int MOST_CLUSTER_CHUNKS = (1 << 16) - 1;
constexpr int MOST_SHARE = 64 * RANK_THREADS;  // chunks of a block: a thread's have a bit each

/// Chunks of a block of a cluster: whole tiles of eight.
__host__ __device__ inline int cluster_share(int chunks, int blocks) {
  return (chunks + blocks * 8 - 1) / (blocks * 8) * 8;
}

}  // namespace shadowkv
