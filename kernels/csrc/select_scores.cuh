// First kernel of select_chunks: one read of the landmarks, all query heads of a group at once.
#pragma once

#include "common/block.cuh"
#include "select_params.h"

namespace shadowkv {

/// Raw logits of a segment's landmarks into scores [G, SCORE_STRIDE], on the tensor cores.
///
/// Landmarks go from memory to registers: a lane reads 16 bytes of a row, and the query is permuted
/// in the same way, so that the product does not see the order of the dimensions.
template <typename T, int D>
__device__ void score_landmarks(const SelectParams& p, const T* queries, const T* landmarks,
                                int count, float* scores) {
  constexpr int TILES = 4;  // of 8 landmarks: 16 loads in flight at D = 128
  const int lane = threadIdx.x % 32, quad = lane % 4;
  uint32_t query[D / 16][4];
#pragma unroll
  for (int j = 0; j < D / 32; ++j) {
    uint4 rows[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int g = lane / 4 + half * 8;
      if (g < p.group) {
        rows[half] = *reinterpret_cast<const uint4*>(queries + g * D + (j * 4 + quad) * 8);
      }
    }
    const uint4 &a = rows[0], &b = rows[1];
    query[2 * j][0] = a.x, query[2 * j][1] = b.x, query[2 * j][2] = a.y, query[2 * j][3] = b.y;
    query[2 * j + 1][0] = a.z, query[2 * j + 1][1] = b.z;
    query[2 * j + 1][2] = a.w, query[2 * j + 1][3] = b.w;
  }
  for (int first = threadIdx.x / 32 * TILES * 8; first < count; first += SCORE_WARPS * TILES * 8) {
    uint4 words[TILES][D / 32];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      // Beyond the last landmark the last one is read again; its logits are never looked at.
      const T* row = landmarks + static_cast<int64_t>(min(first + n * 8 + lane / 4, count - 1)) * D;
#pragma unroll
      for (int j = 0; j < D / 32; ++j) words[n][j] = load_once(row + (j * 4 + quad) * 8);
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      float c[4] = {};
#pragma unroll
      for (int j = 0; j < D / 32; ++j) {
        multiply_add<T>(c, query[2 * j], words[n][j].x, words[n][j].y);
        multiply_add<T>(c, query[2 * j + 1], words[n][j].z, words[n][j].w);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int g = lane / 4 + half * 8;
        if (g < p.group) {
          *reinterpret_cast<float2*>(scores + g * SCORE_STRIDE + first + n * 8 + quad * 2) =
              make_float2(c[half * 2] * p.scale, c[half * 2 + 1] * p.scale);
        }
      }
    }
  }
}

/// The same in float32, a landmark a warp.
template <int D>
__device__ void score_landmarks_float(const SelectParams& p, const float* queries,
                                      const float* landmarks, int count, float* scores) {
  constexpr int OWN = D / 32;
  const int lane = threadIdx.x % 32;
  float query[MAX_QUERY_GROUP][OWN];
#pragma unroll
  for (int g = 0; g < MAX_QUERY_GROUP; ++g) {
#pragma unroll
    for (int i = 0; i < OWN; ++i) query[g][i] = g < p.group ? queries[g * D + i * 32 + lane] : 0;
  }
  for (int row = threadIdx.x / 32; row < count; row += SCORE_WARPS) {
    float landmark[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      landmark[i] = landmarks[static_cast<int64_t>(row) * D + i * 32 + lane];
    }
#pragma unroll
    for (int g = 0; g < MAX_QUERY_GROUP; ++g) {
      if (g < p.group) {
        float logit = 0;
#pragma unroll
        for (int i = 0; i < OWN; ++i) logit += query[g][i] * landmark[i];
        logit = warp_sum(logit) * p.scale;
        if (lane == 0) scores[g * SCORE_STRIDE + row] = logit;
      }
    }
  }
}

/// log2 of the sum of 2^x over a chunk's landmarks.
__device__ inline float combine(const float* logits, int count) {
  if (count == 1) return logits[0];
  float highest = -INFINITY, total = 0;
  for (int i = 0; i < count; ++i) highest = fmaxf(highest, logits[i]);
  for (int i = 0; i < count; ++i) total += weight(logits[i], highest);
  return highest + log2f(total);
}

/// Grid [segments, Hk, R]: logits of a segment's chunks, and the total of their softmax.
template <typename T, int D>
__global__ void __launch_bounds__(SCORE_WARPS * 32)
    score_chunks(const __grid_constant__ SelectParams p) {
  extern __shared__ __align__(16) float scores[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t r = blockIdx.z, head = blockIdx.y, first_head = (r * p.heads + head) * p.group;
  const int first = blockIdx.x * p.segment_chunks;
  const int end = min(first + p.segment_chunks, min(p.num_chunks[r], p.chunks));
  const int count = max(end - first, 0);
  const T* queries = static_cast<const T*>(p.query) + first_head * D;
  const T* landmarks = static_cast<const T*>(p.landmarks) + p.prompt_index[r] * p.landmark_prompt +
                       head * p.landmark_head + static_cast<int64_t>(first) * p.per_chunk * D;
  if constexpr (sizeof(T) == 4) {
    score_landmarks_float<D>(p, queries, landmarks, count * p.per_chunk, scores);
  } else {
    score_landmarks<T, D>(p, queries, landmarks, count * p.per_chunk, scores);
  }
  __syncthreads();

  const bool* excluded = p.excluded + r * p.excluded_row + head * p.excluded_head + first;
  for (int g = warp; g < p.group; g += SCORE_WARPS) {
    float* logits = p.logits + (first_head + g) * p.chunks + first;
    float highest = -INFINITY, total = 0;
    for (int c = lane; c < count; c += 32) {
      // Barred chunks may hold anything: their logits are never looked at.
      const float* raw = scores + g * SCORE_STRIDE + c * p.per_chunk;
      const float logit = excluded[c] ? -INFINITY : combine(raw, p.per_chunk);
      logits[c] = logit;
      const float most = fmaxf(highest, logit);
      total = total * weight(highest, most) + weight(logit, most);
      highest = most;
    }
    const float most = warp_max(highest);
    total = warp_sum(total * weight(highest, most));
    if (lane == 0) p.totals[(first_head + g) * p.segments + blockIdx.x] = make_float2(most, total);
  }
}

}  // namespace shadowkv
