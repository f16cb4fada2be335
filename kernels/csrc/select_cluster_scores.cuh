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
  static constexpr bool SCALED = sizeof(Stored) == 1;
  static_assert(TILES >= 1 && ROWS <= MOST_STAGE_LANDMARKS);

  __device__ LandmarkRing(ClusterRoom& room, int warp, bool scales_in_words)
      : arrived_(room.arrived[warp]),
        ring_(shared_address(room.ring[warp])),
        scales_(shared_address(room.scales[warp])),
        policy_(evict_first()),
        lanes_load_scales_(SCALED && !scales_in_words) {
    if (threadIdx.x % 32 == 0) {
      for (int s = 0; s < CLUSTER_STAGES; ++s) {
        init_barrier(&arrived_[s], lanes_load_scales_ ? 33 : 1);
      }
    }
    __syncwarp();
  }

  /// Begin to fill a slot, of which this warp has read what it held.
  __device__ void begin(int slot, const Stages<Stored, D>& from) const {
    const int lane = threadIdx.x % 32, first = from.stage * ROWS;
    const int rows = min(ROWS, from.count - first);
    if (lanes_load_scales_) {
      if (lane < rows) load_word(scales_of(slot, lane), from.scales + first + lane);
      arrive_when_loaded(&arrived_[slot]);
    }
    if (lane > 0) return;
    const uint32_t bytes = rows * D * sizeof(Stored);
    // A word that holds the last scale is there as a whole.
    const uint32_t scale_bytes = SCALED && !lanes_load_scales_ ? (rows + 3) / 4 * 16 : 0;
    expect_bytes(&arrived_[slot], bytes + scale_bytes);
    begin_load(ring_ + slot * CLUSTER_STAGE_BYTES,
               from.landmarks + static_cast<int64_t>(first) * D, bytes, &arrived_[slot], policy_);
    if (scale_bytes) {
      begin_load(scales_of(slot, 0), from.scales + first, scale_bytes, &arrived_[slot]);
    }
  }

  /// Wait for a slot and read it: then it is free.
  __device__ void take(int slot, uint32_t parity, float scale,
                       uint32_t (&words)[TILES][Piece::COUNT][Piece::WORDS],
                       float (&scales)[TILES]) const {
    const int lane = threadIdx.x % 32, quad = lane % 4;
    while (!is_complete(&arrived_[slot], parity)) {
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const uint32_t row = ring_ + slot * CLUSTER_STAGE_BYTES +
                           (n * 8 + lane / 4) * D * sizeof(Stored) + quad * Piece::BYTES;
#pragma unroll
      for (int j = 0; j < Piece::COUNT; ++j) {
        load_shared(row + j * 4 * Piece::BYTES, words[n][j]);
      }
      scales[n] = SCALED ? scale * load_shared(scales_of(slot, n * 8 + lane / 4)) : scale;
    }
    fence_bulk();  // A read that still waits would find what the next copy brings.
    __syncwarp();
  }

 private:
  __device__ uint32_t scales_of(int slot, int landmark) const {
    return scales_ + (slot * MOST_STAGE_LANDMARKS + landmark) * static_cast<int>(sizeof(float));
  }

  uint64_t* arrived_;
  uint32_t ring_, scales_;  // addresses in shared memory
  uint64_t policy_;
  bool lanes_load_scales_;  // a lane each, where they do not lie in words of 16 bytes
};

/// The same of 2 or 4 neighbouring landmarks, which lanes four apart have one each.
__device__ __noinline__ float combined_lanes(float x, int per_chunk) {
  const float two[2] = {x, __shfl_xor_sync(ALL_LANES, x, 4)};
  if (per_chunk == 2) return combined(two);
  const float four[4] = {x, two[1], __shfl_xor_sync(ALL_LANES, x, 8),
                         __shfl_xor_sync(ALL_LANES, x, 12)};
  return combined(four);
}

/// Where a lane writes logits: of a tile it has one landmark in two neighbouring query heads.
struct LogitPlace {
  uint32_t to;  // in shared memory, of the first landmark of all in the first of these heads
  int stride;   // bytes from head to head
  int heads;    // of these that there are; none but for the first landmark of a chunk
  int per_chunk;

  __device__ LogitPlace(const SelectParams& p, float* scores, int half)
      : stride(p.share_stride * static_cast<int>(sizeof(float))), per_chunk(p.per_chunk) {
    const int lane = threadIdx.x % 32, row = lane / 4, g = lane % 4 * 2 + half * 8;
    to = shared_address(scores + (row >> per_chunk / 2)) + g * stride;
    heads = row & (per_chunk - 1) ? 0 : min(p.group - g, 2);
  }

  /// Those of the tile that begins with landmark `first`.
  __device__ void write(int first, float x, float y) const {
    if (per_chunk > 1) x = combined_lanes(x, per_chunk), y = combined_lanes(y, per_chunk);
    const uint32_t here = to + (first >> per_chunk / 2) * static_cast<int>(sizeof(float));
    if (heads > 0) store_shared(here, x);
    if (heads > 1) store_shared(here + stride, y);
  }
};

/// Logits of a stage's landmarks, `first` and those after it, of which there are `count`.
///
/// Landmarks are the rows of a product, sixteen; its columns are eight query heads. What has 8 bits
/// becomes two tiles of eight. Of a tile in 16 bits the lower rows hold half of the dimensions and
/// the upper rows the other half, as a lane has loaded them: each is multiplied by its part of the
/// queries.
template <typename Product, typename Stored, int D, int HALVES, int TILES, int COUNT, int WORDS>
__device__ inline void score_stage(const uint32_t (&query)[D / 16][2 * HALVES],
                                   const uint32_t (&words)[TILES][COUNT][WORDS], int first,
                                   int count, const float (&scale)[TILES],
                                   const LogitPlace* places) {
  using Piece = Pieces<Stored, D>;
  constexpr bool PAIRS = sizeof(Stored) == 1;
  static_assert(PAIRS ? TILES % 2 == 0 : WORDS == 4);
#pragma unroll
  for (int t = 0; t < TILES; t += PAIRS ? 2 : 1, first += PAIRS ? 16 : 8) {
    if (first >= count) break;  // the whole warp
    float sums[HALVES][2][4] = {};  // two, of which neither waits for the other
    if constexpr (PAIRS) {
      constexpr int STEPS = Piece::DIMS / 4;
#pragma unroll
      for (int s = 0; s < D / 16; ++s) {
        const uint2 lower = Piece::operands(words[t][s / STEPS], s % STEPS);
        const uint2 upper = Piece::operands(words[t + 1][s / STEPS], s % STEPS);
        const uint32_t rows[4] = {lower.x, upper.x, lower.y, upper.y};
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
          multiply_add<Product>(sums[half][s % 2], rows, query[s][half], query[s][half + HALVES]);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < COUNT; ++j) {
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            multiply_add<Product>(sums[half][i], words[t][j], query[2 * j][half + i * HALVES],
                                  query[2 * j + 1][half + i * HALVES]);
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      const float (&s)[2][4] = sums[half];
      if constexpr (PAIRS) {
        const float own = scale[t], next = scale[t + 1];
        places[half].write(first, (s[0][0] + s[1][0]) * own, (s[0][1] + s[1][1]) * own);
        if (first + 8 >= count) continue;
        places[half].write(first + 8, (s[0][2] + s[1][2]) * next, (s[0][3] + s[1][3]) * next);
      } else {
        const float own = scale[t];
        places[half].write(first, (s[0][0] + s[1][2]) * own, (s[0][1] + s[1][3]) * own);
      }
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
  constexpr int TILES = Ring::TILES;
  const int lane = threadIdx.x % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32 - RANK_PARTS * RANK_WARPS;
  const Ring ring(room, warp, p.scales_in_words);
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
    LogitPlace places[2] = {{p, scores, 0}, {p, scores, 1}};
    while (before >= 0 && !is_complete(&room.ranked[before % 2], before / 2 % 2)) {
    }
#pragma unroll 1
    for (int stage = warp; stage * Ring::ROWS < count; stage += SCORERS) {
      uint32_t words[TILES][Piece::COUNT][Piece::WORDS];
      float scales[TILES];
      ring.take(slot, parity, p.scale, words, scales);
      if (coming.is_there(p)) {
        ring.begin(slot, coming);
        coming.advance(p, rank, warp);
      }
      if (++slot == CLUSTER_STAGES) slot = 0, parity ^= 1;
      score_stage<Product, Stored, D, HALVES>(query, words, stage * Ring::ROWS, count, scales,
                                              places);
    }
    __syncwarp();
    if (lane == 0) arrive(&room.scored[n % 2]);
  }
}

}  // namespace shadowkv
