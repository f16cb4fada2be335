// First kernel of select_chunks: one read of the landmarks, all query heads of a group at once.
#pragma once

#include "common/block.cuh"
#include "select_landmarks.cuh"
#include "select_params.h"

namespace shadowkv {

/// Products of a segment's landmarks and the queries into scores [G, SCORE_STRIDE].
///
/// Landmarks go from memory to registers, and the query is permuted in the same way, so that the
/// product does not see the order of the dimensions.
template <typename T, typename Stored, int D>
__device__ void score_landmarks(const SelectParams& p, const T* queries, const Stored* landmarks,
                                int count, float* scores) {
  using Product = ProductOf<T, Stored>;
  using Piece = Pieces<Loaded<Stored>, D>;
  constexpr int STEPS = Piece::DIMS / 4, WIDTH = LANDMARK_WIDTH<Stored, D>;
  const int lane = threadIdx.x % 32, quad = lane % 4;
  uint32_t query[D / 16][4];
  load_queries<T, Loaded<Stored>, D, 2>(queries, p.group, query);
  constexpr int TILES = Piece::TILES;
  const uint64_t policy = evict_first();
  for (int first = threadIdx.x / 32 * TILES * 8; first < count; first += SCORE_WARPS * TILES * 8) {
    uint32_t words[TILES][Piece::COUNT][Piece::WORDS];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      // Beyond the last landmark the last one is read again; its logits are never looked at.
      const Stored* row =
          landmarks + static_cast<int64_t>(min(first + n * 8 + lane / 4, count - 1)) * WIDTH;
      if constexpr (IS_PACKED<Stored>) {
        const PackedRow<D, const Packed*> packed(row);
#pragma unroll
        for (int j = 0; j < Piece::COUNT; ++j) packed.template eight<true>(j, words[n][j]);
      } else {
#pragma unroll
        for (int j = 0; j < Piece::COUNT; ++j) {
          Piece::load(row + (j * 4 + quad) * Piece::DIMS, policy, words[n][j]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      float c[4] = {};
#pragma unroll
      for (int s = 0; s < D / 16; ++s) {
        const uint2 b = Piece::operands(words[n][s / STEPS], s % STEPS);
        multiply_add<Product>(c, query[s], b.x, b.y);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int g = lane / 4 + half * 8;
        // A segment may end within the tiles: what lies behind is another head's, or nothing.
        if (g < p.group && first + n * 8 < SEGMENT) {
          *reinterpret_cast<float2*>(scores + g * SCORE_STRIDE + first + n * 8 + quad * 2) =
              make_float2(c[half * 2], c[half * 2 + 1]);
        }
      }
    }
  }
}

/// The same in float32, a landmark a warp.
template <typename Stored, int D>
__device__ void score_landmarks_float(const SelectParams& p, const float* queries,
                                      const Stored* landmarks, int count, float* scores) {
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
      landmark[i] = to_float(landmarks[static_cast<int64_t>(row) * D + i * 32 + lane]);
    }
#pragma unroll
    for (int g = 0; g < MAX_QUERY_GROUP; ++g) {
      if (g < p.group) {
        float logit = 0;
#pragma unroll
        for (int i = 0; i < OWN; ++i) logit += query[g][i] * landmark[i];
        logit = warp_sum(logit);
        if (lane == 0) scores[g * SCORE_STRIDE + row] = logit;
      }
    }
  }
}

/// log2 of the sum of 2^(scale x) over a chunk's landmarks; `scales` are their own, or null.
__device__ inline float combine(const float* products, const float* scales, int count,
                                float scale) {
  auto logit = [&](int i) { return products[i] * (scales ? scale * scales[i] : scale); };
  if (count == 1) return logit(0);
  float highest = -INFINITY, total = 0;
  for (int i = 0; i < count; ++i) highest = fmaxf(highest, logit(i));
  for (int i = 0; i < count; ++i) total += weight(logit(i), highest);
  return highest + log2f(total);
}

/// Grid [segments, Hk, R]: logits of a segment's chunks, and the total of their softmax.
template <typename T, typename Stored, int D>
__global__ void __launch_bounds__(SCORE_WARPS * 32)
    score_chunks(const __grid_constant__ SelectParams p) {
  extern __shared__ __align__(16) float scores[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t r = blockIdx.z, head = blockIdx.y, first_head = (r * p.heads + head) * p.group;
  const int64_t prompt = p.prompt_index[r];
  const int first = blockIdx.x * p.segment_chunks;
  const int end = min(first + p.segment_chunks, min(p.num_chunks[r], p.chunks));
  const int count = max(end - first, 0);
  const T* queries = static_cast<const T*>(p.query) + first_head * D;
  const Stored* landmarks =
      static_cast<const Stored*>(p.landmarks) + prompt * p.landmark_prompt +
      head * p.landmark_head +
      static_cast<int64_t>(first) * p.per_chunk * LANDMARK_WIDTH<Stored, D>;
  if constexpr (sizeof(T) == 4) {
    score_landmarks_float<Stored, D>(p, queries, landmarks, count * p.per_chunk, scores);
  } else {
    score_landmarks<T, Stored, D>(p, queries, landmarks, count * p.per_chunk, scores);
  }
  __syncthreads();

  const bool* excluded = p.excluded + r * p.excluded_row + head * p.excluded_head + first;
  const float* scales = p.scales;
  if (scales) {
    scales += prompt * p.scale_prompt + head * p.scale_head +
              static_cast<int64_t>(first) * p.per_chunk;
  }
  for (int g = warp; g < p.group; g += SCORE_WARPS) {
    float* logits = p.logits + (first_head + g) * p.logit_stride + first;
    float highest = -INFINITY, total = 0;
    for (int c = lane; c < count; c += 32) {
      // Barred chunks may hold anything: their logits are never looked at.
      const int of_chunk = c * p.per_chunk;
      const float logit = excluded[c] ? -INFINITY
                                      : combine(scores + g * SCORE_STRIDE + of_chunk,
                                                scales ? scales + of_chunk : nullptr, p.per_chunk,
                                                p.scale);
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
