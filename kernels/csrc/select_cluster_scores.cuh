// Scores of a block of a cluster: its landmarks to logits in shared memory.
#pragma once

#include "common/block.cuh"
#include "select_cluster_room.cuh"
#include "select_landmarks.cuh"

namespace shadowkv {

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

/// Stages that a warp scores, one plane after the other, in the order in which they are loaded.
template <typename Stored, int D>
struct Stages {
  static constexpr int ROWS = STAGE_TILES<Stored, D> * 8;
  const Stored* landmarks;  // of the block's share of the plane
  const float* scales;      // of those in 8 bits
  int count;                // landmarks
  int plane, stage;

  /// From the first of its stages of a plane on.
  __device__ Stages(const SelectParams& p, int rank, int warp, int from) : plane(from) {
    enter(p, rank, warp);
  }

  __device__ bool is_there(const SelectParams& p) const { return plane < p.planes; }

  __device__ void advance(const SelectParams& p, int rank, int warp) {
    stage += SCORERS;
    if (stage * ROWS < count) return;
    plane += p.clusters;
    enter(p, rank, warp);
  }

 private:
  /// Planes that have nothing for this warp are passed over.
  __device__ void enter(const SelectParams& p, int rank, int warp) {
    for (; plane < p.planes; plane += p.clusters) {
      const Share own = share_of(p, plane, rank);
      stage = warp, count = own.chunks * p.per_chunk;
      if (stage * ROWS >= count) continue;
      const int64_t prompt = p.prompt_index[own.row];
      const int64_t first = static_cast<int64_t>(own.first) * p.per_chunk;
      landmarks = static_cast<const Stored*>(p.landmarks) + prompt * p.landmark_prompt +
                  own.head * p.landmark_head + first * D;
      if constexpr (sizeof(Stored) == 1) {
        scales = p.scales + prompt * p.scale_prompt + own.head * p.scale_head + first;
      }
      return;
    }
  }
};

/// A warp's ring of landmarks, which the memory system fills: how many bytes are under way does not
/// depend on registers, nor on what else runs on the processor.
template <typename Stored, int D>
class LandmarkRing {
 public:
  using Piece = Pieces<Stored, D>;
  static constexpr int TILES = STAGE_TILES<Stored, D>, ROWS = TILES * 8;
  static constexpr int SLOT = CLUSTER_STAGE_BYTES / static_cast<int>(sizeof(Stored));
  static constexpr bool SCALED = sizeof(Stored) == 1;
  static_assert(TILES >= 1 && ROWS <= MOST_STAGE_LANDMARKS);

  __device__ LandmarkRing(ClusterRoom& room, int warp)
      : arrived_(room.arrived[warp]),
        ring_(reinterpret_cast<Stored*>(room.ring[warp])),
        scales_(room.scales[warp]),
        policy_(evict_first()) {
    if (threadIdx.x % 32 == 0) {
      for (int s = 0; s < CLUSTER_STAGES; ++s) init_barrier(&arrived_[s], SCALED ? 33 : 1);
    }
    __syncwarp();
  }

  /// Begin to fill a slot, of which this warp has read what it held.
  __device__ void begin(int slot, const Stages<Stored, D>& from) const {
    const int lane = threadIdx.x % 32, first = from.stage * ROWS;
    if constexpr (SCALED) {
      if (lane < min(ROWS, from.count - first)) {
        load_word(&scales_[slot][lane], from.scales + first + lane);
      }
      arrive_when_loaded(&arrived_[slot]);
    }
    if (lane == 0) {
      load_bulk(ring_ + slot * SLOT, from.landmarks + static_cast<int64_t>(first) * D,
                min(ROWS, from.count - first) * D * sizeof(Stored), &arrived_[slot], policy_);
    }
  }

  /// Wait for a slot and read it: then it is free.
  __device__ void take(int slot, uint32_t parity, float scale,
                       uint32_t (&words)[TILES][Piece::COUNT][Piece::WORDS],
                       float (&scales)[TILES][2]) const {
    const int lane = threadIdx.x % 32, quad = lane % 4;
    while (!is_complete(&arrived_[slot], parity)) {
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const Stored* row = ring_ + slot * SLOT + (n * 8 + lane / 4) * D + quad * Piece::DIMS;
#pragma unroll
      for (int j = 0; j < Piece::COUNT; ++j) {
        Piece::load_shared(row + j * 4 * Piece::DIMS, words[n][j]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scales[n][i] = SCALED ? scale * scales_[slot][n * 8 + quad * 2 + i] : scale;
      }
    }
    fence_bulk();  // A read that still waits would find what the next copy brings.
    __syncwarp();
  }

 private:
  uint64_t* arrived_;
  Stored* ring_;
  float (*scales_)[MOST_STAGE_LANDMARKS];
  uint64_t policy_;
};

/// Logits of one tile of landmarks into scores [G, share_stride], those of barred chunks too.
///
/// `per_chunk` is 1, 2 or 4: a chunk's landmarks are neighbours in a row of a product, two a lane.
template <typename Product, typename Piece, int STEPS, int D, int HALVES>
__device__ inline void score_tile(const SelectParams& p, const uint32_t (&query)[D / 16][2 * HALVES],
                                  const uint32_t (&words)[Piece::COUNT][Piece::WORDS], int tile,
                                  const float (&scale)[2], float* scores) {
  const int lane = threadIdx.x % 32, quad = lane % 4;
  float sums[2][4] = {};  // of the even and the odd products: neither waits for the other
#pragma unroll
  for (int s = 0; s < D / 16; ++s) {
    const uint2 b = Piece::operands(words[s / STEPS], s % STEPS);
    if constexpr (HALVES == 2) {
      multiply_add<Product>(sums[s % 2], query[s], b.x, b.y);
    } else {
      const uint32_t upper[4] = {query[s][0], 0, query[s][1], 0};
      multiply_add<Product>(sums[s % 2], upper, b.x, b.y);
    }
  }
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    const int g = lane / 4 + half * 8;
    float* to = scores + g * p.share_stride + (tile * 8 >> p.per_chunk / 2);
    const float x = (sums[0][half * 2] + sums[1][half * 2]) * scale[0];
    const float y = (sums[0][half * 2 + 1] + sums[1][half * 2 + 1]) * scale[1];
    if (p.per_chunk == 1) {
      if (g < p.group) *reinterpret_cast<float2*>(to + quad * 2) = make_float2(x, y);
    } else if (p.per_chunk == 2) {
      const float two[2] = {x, y};
      const float logit = combined(two);
      if (g < p.group) to[quad] = logit;
    } else {
      const float four[4] = {x, y, __shfl_xor_sync(ALL_LANES, x, 1),
                             __shfl_xor_sync(ALL_LANES, y, 1)};
      const float logit = combined(four);
      if (g < p.group && quad % 2 == 0) to[quad / 2] = logit;
    }
  }
}

/// Score this block's shares of its cluster's planes, one after the other, into the buffers `logits`,
/// as fast as these are ranked.
template <typename T, typename Stored, int D, int HALVES>
__device__ void score_planes(const SelectParams& p, int rank, ClusterRoom& room, float* logits) {
  using Product = ProductOf<T, Stored>;
  using Ring = LandmarkRing<Stored, D>;
  using Piece = typename Ring::Piece;
  constexpr int TILES = Ring::TILES, STEPS = Piece::DIMS / 4;
  constexpr int RANK_WARPS = RANK_PARTS * RANK_THREADS / 32;
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x) / 32 - RANK_WARPS;
  const Ring ring(room, warp);
  Stages<Stored, D> coming(p, rank, warp, first_plane(p));
  for (int s = 0; s < CLUSTER_STAGES && coming.is_there(p); ++s) {
    ring.begin(s, coming);
    coming.advance(p, rank, warp);
  }
  int slot = 0;
  uint32_t parity = 0;
  for (int plane = first_plane(p), n = 0; plane < p.planes; plane += p.clusters, ++n) {
    const int count = share_of(p, plane, rank).chunks * p.per_chunk, before = n - p.buffers;
    float* scores = logits + n % p.buffers * p.group * p.share_stride;
    uint32_t query[D / 16][2 * HALVES];
    load_queries<T, Stored, D, HALVES>(
        static_cast<const T*>(p.query) + static_cast<int64_t>(plane) * p.group * D, p.group, query);
    while (before >= 0 && !is_complete(&room.ranked[before % 2], before / 2 % 2)) {
    }
#pragma unroll 1
    for (int stage = warp; stage * Ring::ROWS < count; stage += SCORERS) {
      uint32_t words[TILES][Piece::COUNT][Piece::WORDS];
      float scales[TILES][2];
      ring.take(slot, parity, p.scale, words, scales);
      if (coming.is_there(p)) {
        ring.begin(slot, coming);
        coming.advance(p, rank, warp);
      }
      if (++slot == CLUSTER_STAGES) slot = 0, parity ^= 1;
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        const int tile = stage * TILES + t;
        if (tile * 8 >= count) continue;  // the whole warp
        score_tile<Product, Piece, STEPS, D, HALVES>(p, query, words[t], tile, scales[t], scores);
      }
    }
    __syncwarp();
    if (lane == 0) arrive(&room.scored[n % 2]);
  }
}

}  // namespace shadowkv
