// Scores of a block of a cluster: its landmarks to logits in shared memory, softmax totals with them.
#pragma once

#include "common/block.cuh"
#include "common/bulk.cuh"
#include "select_cluster_cut.cuh"
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

/// Landmarks of a stage of the ring: whole tiles of eight.
template <typename Stored, int D>
constexpr int STAGE_TILES = CLUSTER_STAGE_BYTES / (8 * D * static_cast<int>(sizeof(Stored)));

/// What a lane must know of a stage's landmarks beside them.
template <int TILES>
struct StageNotes {
  unsigned barred;  // a bit a tile, of the column `lane % 8`
  float scale[TILES][2];
};

/// Logits of a block's chunks into scores [G, share_stride], minus infinity where one is barred, and
/// their softmax totals by warp and query head into `room.of_warps`.
///
/// Each warp has a ring of its own, which the memory system fills: how many bytes are under way does
/// not depend on registers, nor on what else runs on the processor.
/// `per_chunk` is 1, 2 or 4: a chunk's landmarks are neighbours in a row of a product, two a lane.
/// The pointers are those of the first of the `chunks`. Of a last tile that is not full, the chunks
/// that are not there are barred.
template <typename T, typename Stored, int D, int HALVES>
__device__ void score_share(const SelectParams& p, const T* queries, const Stored* landmarks,
                            const float* scales, const bool* excluded, int chunks, float* scores,
                            ClusterRoom& room) {
  using Product = ProductOf<T, Stored>;
  using Piece = Pieces<Stored, D>;
  constexpr int STEPS = Piece::DIMS / 4, TILES = STAGE_TILES<Stored, D>, ROWS = TILES * 8;
  static_assert(TILES >= 1, "a stage holds a tile");
  const int lane = threadIdx.x % 32, quad = lane % 4, warp = threadIdx.x / 32;
  const int per_chunk = p.per_chunk, shift = per_chunk / 2, count = chunks * per_chunk;
  const int stages = (count + ROWS - 1) / ROWS;
  uint64_t* barriers = room.barriers[warp];
  Stored* ring =
      reinterpret_cast<Stored*>(room.ring + warp * CLUSTER_STAGES * CLUSTER_STAGE_BYTES);
  const uint64_t policy = evict_first();
  if (lane == 0) {
    for (int s = 0; s < CLUSTER_STAGES; ++s) init_barrier(&barriers[s]);
  }
  __syncwarp();

  auto begin = [&](int slot, int stage) {  // To fill a slot of the ring.
    const int first = stage * ROWS;
    if (lane == 0) {
      load_bulk(ring + slot * ROWS * D, landmarks + static_cast<int64_t>(first) * D,
                min(ROWS, count - first) * D * sizeof(Stored), &barriers[slot], policy);
    }
    StageNotes<TILES> notes{};
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const int column = first + n * 8 + lane % 8;
      const bool is_barred = column >= count | excluded[min(column, count - 1) >> shift];
      notes.barred |= static_cast<unsigned>(is_barred) << n;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        notes.scale[n][i] = p.scale;
        if constexpr (sizeof(Stored) == 1) {
          notes.scale[n][i] *= scales[min(first + n * 8 + quad * 2 + i, count - 1)];
        }
      }
    }
    return notes;
  };
  StageNotes<TILES> notes[CLUSTER_STAGES];
#pragma unroll
  for (int s = 0; s < CLUSTER_STAGES; ++s) {
    const int stage = warp + s * CLUSTER_WARPS;
    if (stage < stages) notes[s] = begin(s, stage);
  }
  uint32_t query[D / 16][2 * HALVES];
  load_queries<T, Stored, D, HALVES>(queries, p.group, query);
  Softmax softmax[HALVES];

  auto score = [&](const uint32_t (&words)[Piece::COUNT][Piece::WORDS], int tile,
                   const float (&scale)[2], bool is_barred) {
    float c[4] = {};
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
      const uint2 b = Piece::operands(words[s / STEPS], s % STEPS);
      if constexpr (HALVES == 2) {
        multiply_add<Product>(c, query[s], b.x, b.y);
      } else {
        const uint32_t upper[4] = {query[s][0], 0, query[s][1], 0};
        multiply_add<Product>(c, upper, b.x, b.y);
      }
    }
    const unsigned barred = __ballot_sync(ALL_LANES, is_barred) >> quad * 2;
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      const int g = lane / 4 + half * 8;
      float* to = scores + g * p.share_stride + (tile * 8 >> shift);
      // Barred chunks may hold anything: their logits are never looked at.
      const float x = c[half * 2] * scale[0], y = c[half * 2 + 1] * scale[1];
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
  };

  uint32_t parity = 0;
  for (int round = warp; round < stages; round += CLUSTER_STAGES * CLUSTER_WARPS) {
#pragma unroll
    for (int s = 0; s < CLUSTER_STAGES; ++s) {
      const int stage = round + s * CLUSTER_WARPS;
      if (stage >= stages) break;
      while (!is_complete(&barriers[s], parity)) {
      }
      uint32_t words[TILES][Piece::COUNT][Piece::WORDS];
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        const Stored* row = ring + (s * ROWS + n * 8 + lane / 4) * D + quad * Piece::DIMS;
#pragma unroll
        for (int j = 0; j < Piece::COUNT; ++j) {
          Piece::load_shared(row + j * 4 * Piece::DIMS, words[n][j]);
        }
      }
      const StageNotes<TILES> own = notes[s];
      fence_bulk();  // A read that still waits would find what the next copy brings.
      __syncwarp();
      const int next = stage + CLUSTER_STAGES * CLUSTER_WARPS;
      if (next < stages) notes[s] = begin(s, next);
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        const int tile = stage * TILES + n;
        if (tile * 8 >= count) continue;  // the whole warp
        score(words[n], tile, own.scale[n], own.barred >> n & 1);
      }
    }
    parity ^= 1;
  }
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    softmax[half].add_lanes(3);
    const int g = lane / 4 + half * 8;
    if (quad == 0 && g < p.group) {
      room.of_warps[warp][g] = make_float2(softmax[half].highest, softmax[half].total);
    }
  }
}

}  // namespace shadowkv
