// Scores of a block of a cluster: its landmarks to logits in shared memory, softmax totals with them.
#pragma once

#include "common/block.cuh"
#include "select_landmarks.cuh"
#include "select_params.h"

namespace shadowkv {

constexpr int CLUSTER_WARPS = CLUSTER_THREADS / 32;

/// The highest of some logits, and the sum of 2^(logit - highest).
struct Softmax {
  float highest = -INFINITY, total = 0;

  __device__ void add(float other_highest, float other_total) {
    const float most = fmaxf(highest, other_highest);
    total = total * weight(highest, most) + other_total * weight(other_highest, most);
    highest = most;
  }

  /// Add those of the lanes that differ in these bits of their number.
  __device__ void add_lanes(int bits) {
#pragma unroll
    for (int step = 1; step <= bits; step *= 2) {
      if (bits & step) {
        const float other = __shfl_xor_sync(ALL_LANES, highest, step);
        add(other, __shfl_xor_sync(ALL_LANES, total, step));
      }
    }
  }
};

/// log2 of the sum of 2^x over the logits of a chunk's landmarks.
template <int L>
__device__ inline float combined(const float (&logits)[L]) {
  float highest = -INFINITY, total = 0;
#pragma unroll
  for (int i = 0; i < L; ++i) highest = fmaxf(highest, logits[i]);
#pragma unroll
  for (int i = 0; i < L; ++i) total += weight(logits[i], highest);
  return highest + log2f(total);
}

/// Logits of a block's chunks into scores [G, share_stride], minus infinity where one is barred, and
/// their softmax totals by warp and query head into `of_warps`.
///
/// `per_chunk` is 1, 2 or 4: a chunk's landmarks are neighbours in a row of a product, two a lane.
/// The pointers are those of the first of the `chunks`. Of a last tile that is not full, the chunks
/// that are not there are barred.
template <typename T, typename Stored, int D, int HALVES>
__device__ void score_share(const SelectParams& p, const T* queries, const Stored* landmarks,
                            const float* scales, const bool* excluded, int chunks, float* scores,
                            float2 (*of_warps)[MAX_QUERY_GROUP]) {
  using Product = ProductOf<T, Stored>;
  using Piece = Pieces<Stored, D>;
  constexpr int STEPS = Piece::DIMS / 4;
  // At most half the loads of `score_landmarks` are under way a thread: there are more threads.
  constexpr int TILES = Piece::TILES / 2 < 4 ? Piece::TILES / 2 : 4;
  const int lane = threadIdx.x % 32, quad = lane % 4, warp = threadIdx.x / 32;
  const int per_chunk = p.per_chunk, shift = per_chunk / 2, count = chunks * per_chunk;
  uint32_t query[D / 16][2 * HALVES];
  load_queries<T, Stored, D, HALVES>(queries, p.group, query);
  const uint64_t policy = evict_first();
  Softmax softmax[HALVES];
  landmarks += quad * Piece::DIMS;
  for (int first = warp * TILES * 8; first < count; first += CLUSTER_WARPS * TILES * 8) {
    uint32_t words[TILES][Piece::COUNT][Piece::WORDS];
    unsigned barred_tiles = 0;  // a bit a tile
    float scale[TILES][2];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      // Beyond the last landmark the last one is read again; its logits are barred.
      const int row = min(first + n * 8 + lane / 4, count - 1);
#pragma unroll
      for (int j = 0; j < Piece::COUNT; ++j) {
        Piece::load(landmarks + static_cast<int64_t>(row) * D + j * 4 * Piece::DIMS, policy,
                    words[n][j]);
      }
      const int column = first + n * 8 + lane % 8;
      const bool is_barred = column >= count | excluded[min(column, count - 1) >> shift];
      barred_tiles |= static_cast<unsigned>(is_barred) << n;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scale[n][i] = p.scale;
        if constexpr (sizeof(Stored) == 1) {
          scale[n][i] *= scales[min(first + n * 8 + quad * 2 + i, count - 1)];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      if (first + n * 8 >= count) continue;  // the whole warp
      float c[4] = {};
#pragma unroll
      for (int s = 0; s < D / 16; ++s) {
        const uint2 b = Piece::operands(words[n][s / STEPS], s % STEPS);
        if constexpr (HALVES == 2) {
          multiply_add<Product>(c, query[s], b.x, b.y);
        } else {
          const uint32_t upper[4] = {query[s][0], 0, query[s][1], 0};
          multiply_add<Product>(c, upper, b.x, b.y);
        }
      }
      const unsigned barred = __ballot_sync(ALL_LANES, barred_tiles >> n & 1) >> quad * 2;
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        const int g = lane / 4 + half * 8;
        float* to = scores + g * p.share_stride + ((first + n * 8) >> shift);
        // Barred chunks may hold anything: their logits are never looked at.
        const float x = c[half * 2] * scale[n][0], y = c[half * 2 + 1] * scale[n][1];
        if (per_chunk == 1) {
          if (g < p.group) {
            const float two[2] = {barred & 1 ? -INFINITY : x, barred & 2 ? -INFINITY : y};
            *reinterpret_cast<float2*>(to + quad * 2) = make_float2(two[0], two[1]);
            softmax[half].add(two[0], 1), softmax[half].add(two[1], 1);
          }
          continue;
        }
        float logit;
        bool writes = g < p.group;
        if (per_chunk == 2) {
          const float two[2] = {x, y};
          logit = combined(two);
          to += quad;
        } else {
          const float four[4] = {x, y, __shfl_xor_sync(ALL_LANES, x, 1),
                                 __shfl_xor_sync(ALL_LANES, y, 1)};
          logit = combined(four);
          to += quad / 2;
          writes = writes && quad % 2 == 0;
        }
        if (writes) {
          *to = logit = barred & 1 ? -INFINITY : logit;
          softmax[half].add(logit, 1);
        }
      }
    }
  }
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    softmax[half].add_lanes(3);
    const int g = lane / 4 + half * 8;
    if (quad == 0 && g < p.group) {
      of_warps[warp][g] = make_float2(softmax[half].highest, softmax[half].total);
    }
  }
}

}  // namespace shadowkv
