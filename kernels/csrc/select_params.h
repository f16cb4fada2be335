// What the kernels of select_chunks share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace shadowkv {

struct SelectParams {
  const void* query;      // [R, Hq, D], contiguous
  const void* landmarks;  // [P, Hk, C, L, D], contiguous from C on
  const float* scales;    // [P, Hk, C, L], contiguous from C on: of landmarks in 8 bits, or null
  int64_t landmark_prompt, landmark_head, scale_prompt, scale_head;
  const int* prompt_index;  // [R]
  const int* num_chunks;    // [R]
  const bool* excluded;     // [R, Hk, C]
  int64_t excluded_row, excluded_head;
  const int* budget_chunks;  // [R]
  int heads, group, chunks, per_chunk, max_chunks, logit_stride;
  int segments, segment_chunks;  // a block of the first kernel scores a segment of the chunks
  int share_stride;              // floats from head to head in a block of a cluster
  float scale;                   // holds log2 e: logits are in base 2
  float* logits;                 // [R, Hq, logit_stride], minus infinity where a chunk is barred
  float2* totals;                // [R, Hq, segments]: highest logit, sum of 2^(logit - highest)
  uint32_t* keys;                // [R, Hk, C], where shared memory does not hold them
  int* ids;                      // [R, Hk, N]
};

constexpr int SCORE_WARPS = 4;
constexpr int SEGMENT = 256;               // landmarks
constexpr int SCORE_STRIDE = SEGMENT + 8;  // query heads lie in banks of their own
constexpr int MAX_QUERY_GROUP = 16;
constexpr int SELECT_DIGIT_BITS = 10;
constexpr int SELECT_THREADS = 1 << (SELECT_DIGIT_BITS - 1);
constexpr int SELECT_BINS = 2048;
constexpr int MOST_TIED = 1024;  // keys in a bin that are compared with each other
constexpr int CLUSTER_BLOCKS = 8;  // of a row and KV head, in one kernel; the most that is portable
constexpr int CLUSTER_THREADS = SELECT_BINS / 8;
/// Landmarks that a warp of a cluster has under way: bytes of a stage, and stages.
constexpr int CLUSTER_STAGE_BYTES = 2048, CLUSTER_STAGES = 2;
constexpr int CLUSTER_RING_BYTES = CLUSTER_THREADS / 32 * CLUSTER_STAGES * CLUSTER_STAGE_BYTES;
constexpr int MOST_CLUSTER_CHUNKS = (1 << 16) - 1;

/// Chunks of a block of a cluster: whole tiles of eight.
__host__ __device__ constexpr int cluster_share(int chunks) {
  return (chunks + CLUSTER_BLOCKS * 8 - 1) / (CLUSTER_BLOCKS * 8) * 8;
}

}  // namespace shadowkv
