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

/// A value of this lane that stays in a register: what follows from the kernel's parameters the
/// compiler would read again, and wait for, in every turn of a loop.
__device__ inline int kept(int x) { return __shfl_sync(ALL_LANES, x, threadIdx.x % 32); }

/// How landmarks lie in the ring of a warp: stages of whole tiles of eight, then scales. Packed ones
/// take two tiles at a time, since a stage costs as much as unpacking one.
template <typename Stored, int D>
struct RingShape {
  static constexpr int ROW_BYTES = LANDMARK_WIDTH<Stored, D> * static_cast<int>(sizeof(Stored));
  static constexpr int TILES = IS_PACKED<Stored> ? 2 : 2048 / (8 * ROW_BYTES);
  static constexpr int ROWS = TILES * 8, STAGE_BYTES = ROWS * ROW_BYTES;
  static constexpr int SCALE_BYTES = IS_FP8<Stored> ? ROWS * static_cast<int>(sizeof(float)) : 0;
  static constexpr int FIT = CLUSTER_WARP_BYTES / (STAGE_BYTES + SCALE_BYTES);
  static constexpr int STAGES = FIT < MOST_CLUSTER_STAGES ? FIT : MOST_CLUSTER_STAGES;
  static_assert(TILES >= 1 && STAGES >= 2);
};

/// Stages that a warp scores, one plane after the other, in the order in which they are loaded.
template <typename Stored, int D>
struct Stages {
  static constexpr int ROWS = RingShape<Stored, D>::ROWS;
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
                  own.head * p.landmark_head + first * LANDMARK_WIDTH<Stored, D>;
      if constexpr (IS_FP8<Stored>) {
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
  using Piece = Pieces<Loaded<Stored>, D>;
  using Shape = RingShape<Stored, D>;
  static constexpr int TILES = Shape::TILES, ROWS = Shape::ROWS, STAGES = Shape::STAGES;
  static constexpr int ROW_BYTES = Shape::ROW_BYTES;
  static constexpr bool SCALED = IS_FP8<Stored>;

  __device__ LandmarkRing(ScorerRoom& room, bool scales_in_words)
      : ring_(kept(shared_address(room.ring))),
        policy_(evict_first()),
        lanes_load_scales_(SCALED && !scales_in_words) {
    if (threadIdx.x % 32 == 0) {
      for (int s = 0; s < STAGES; ++s) {
        init_barrier(arrived(s), lanes_load_scales_ ? 33 : 1);
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
      arrive_when_loaded(arrived(slot));
    }
    if (lane > 0) return;
    const uint32_t bytes = rows * ROW_BYTES;
    // A word that holds the last scale is there as a whole.
    const uint32_t scale_bytes = SCALED && !lanes_load_scales_ ? (rows + 3) / 4 * 16 : 0;
    expect_bytes(arrived(slot), bytes + scale_bytes);
    begin_load(stage_of(slot),
               from.landmarks + static_cast<int64_t>(first) * LANDMARK_WIDTH<Stored, D>, bytes,
               arrived(slot), policy_);
    if (scale_bytes) {
      begin_load(scales_of(slot, 0), from.scales + first, scale_bytes, arrived(slot));
    }
  }

  /// Wait for what was begun.
  __device__ void wait(int slot, uint32_t parity) const {
    while (!is_complete(arrived(slot), parity)) {
    }
  }

  /// This lane's part of a slot.
  __device__ void read(int slot, float scale,
                       uint32_t (&words)[TILES][Piece::COUNT][Piece::WORDS],
                       float (&scales)[TILES]) const {
    const int lane = threadIdx.x % 32, quad = lane % 4;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const uint32_t row = stage_of(slot) + (n * 8 + lane / 4) * ROW_BYTES + quad * Piece::BYTES;
#pragma unroll
      for (int j = 0; j < Piece::COUNT; ++j) {
        load_shared(row + j * 4 * Piece::BYTES, words[n][j]);
      }
      scales[n] = SCALED ? scale * load_shared(scales_of(slot, n * 8 + lane / 4)) : scale;
    }
  }

  /// A slot was read: it is free.
  __device__ static void release() {
    fence_bulk();  // A read that still waits would find what the next copy brings.
    __syncwarp();
  }

  /// Address in shared memory.
  __device__ uint32_t stage_of(int slot) const { return ring_ + slot * Shape::STAGE_BYTES; }

 private:
  __device__ uint32_t scales_of(int slot, int landmark) const {
    return ring_ + STAGES * Shape::STAGE_BYTES + slot * Shape::SCALE_BYTES +
           landmark * static_cast<int>(sizeof(float));
  }

  __device__ Barrier arrived(int slot) const {
    return Barrier(ring_ + CLUSTER_WARP_BYTES + slot * static_cast<int>(sizeof(uint64_t)));
  }

  uint32_t ring_;  // an address in shared memory
  uint64_t policy_;
  bool lanes_load_scales_;  // a lane each, where they do not lie in words of 16 bytes
};

/// The same of 2 or 4 neighbouring landmarks, which lanes four apart have one each.
__device__ __noinline__ float combined_lanes(float x, int log_per_chunk) {
  const float two[2] = {x, __shfl_xor_sync(ALL_LANES, x, 4)};
  if (log_per_chunk == 1) return combined(two);
  const float four[4] = {x, two[1], __shfl_xor_sync(ALL_LANES, x, 8),
                         __shfl_xor_sync(ALL_LANES, x, 12)};
  return combined(four);
}

/// Where a lane writes logits: of a tile it has one landmark in two neighbouring query heads.
struct LogitPlace {
  uint32_t to;  // in shared memory, of the first landmark of all in the first of these heads
  int stride;   // bytes from head to head
  int heads;    // of these that there are; none but for the first landmark of a chunk
  int log_per_chunk;

  __device__ LogitPlace() {}

  __device__ LogitPlace(const SelectParams& p, float* scores, int half)
      : stride(kept(p.share_stride * static_cast<int>(sizeof(float)))),
        log_per_chunk(kept(p.per_chunk / 2)) {
    const int lane = threadIdx.x % 32, row = lane / 4, g = lane % 4 * 2 + half * 8;
    to = shared_address(scores + (row >> log_per_chunk)) + g * stride;
    heads = kept(row & (p.per_chunk - 1) ? 0 : min(p.group - g, 2));
  }

  /// Those of the tile that begins with landmark `first`.
  __device__ void write(int first, float x, float y) const {
    if (log_per_chunk > 0) {
      x = combined_lanes(x, log_per_chunk), y = combined_lanes(y, log_per_chunk);
    }
    const uint32_t here = to + (first >> log_per_chunk) * static_cast<int>(sizeof(float));
    if (heads > 0) store_shared(here, x);
    if (heads > 1) store_shared(here + stride, y);
  }
};

/// Logits of two tiles from their sums, which are in two parts.
template <int HALVES>
__device__ inline void write_pair(const float (&sums)[HALVES][2][4], int first, int count,
                                  float scale, float next_scale, const LogitPlace* places) {
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    const float (&s)[2][4] = sums[half];
    places[half].write(first, (s[0][0] + s[1][0]) * scale, (s[0][1] + s[1][1]) * scale);
    if (first + 8 >= count) continue;
    places[half].write(first + 8, (s[0][2] + s[1][2]) * next_scale,
                       (s[0][3] + s[1][3]) * next_scale);
  }
}

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
  constexpr bool PAIRS = IS_FP8<Stored>;
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
    if constexpr (PAIRS) {
      write_pair(sums, first, count, scale[t], scale[t + 1], places);
    } else {
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        const float (&s)[2][4] = sums[half];
        const float own = scale[t];
        places[half].write(first, (s[0][0] + s[1][2]) * own, (s[0][1] + s[1][3]) * own);
      }
    }
  }
}

/// Products of sixteen packed landmarks, of which each lane unpacks its part of two, and the
/// queries: the same sums as in `score_stage`, to the bit.
template <int D, int HALVES, bool STRAYS>
__device__ inline void multiply_packed(const uint32_t (&query)[D / 16][2 * HALVES],
                                       const PackedRow<D, uint32_t>& row,
                                       const PackedRow<D, uint32_t>& next,
                                       float (&sums)[HALVES][2][4]) {
#pragma unroll
  for (int j = 0; j < D / 32; ++j) {
    uint32_t own[4], other[4];
    row.template eight<STRAYS>(j, own);
    next.template eight<STRAYS>(j, other);
    if constexpr (STRAYS) __syncwarp();  // Lanes have other numbers of them.
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t rows[4] = {own[i], other[i], own[2 + i], other[2 + i]};
        multiply_add<__nv_bfloat16>(sums[half][i], rows, query[2 * j][half + i * HALVES],
                                    query[2 * j + 1][half + i * HALVES]);
      }
    }
  }
}

/// The same of a stage in shared memory.
template <int D, int HALVES>
__device__ inline void multiply_packed_stage(const uint32_t (&query)[D / 16][2 * HALVES],
                                             uint32_t stage, float (&sums)[HALVES][2][4]) {
  const uint32_t first = stage + threadIdx.x % 32 / 4 * PACKED_WIDTH<D>;
  const PackedRow<D, uint32_t> row(first), next(first + 8 * PACKED_WIDTH<D>);
  if (__any_sync(ALL_LANES, row.strays() + next.strays() > 0)) {
    multiply_packed<D, HALVES, true>(query, row, next, sums);
  } else {
    multiply_packed<D, HALVES, false>(query, row, next, sums);
  }
}

/// Score this block's shares of its cluster's planes, one after the other, into the buffers
/// `logits`, as fast as these are ranked.
template <typename T, typename Stored, int D, int HALVES>
__device__ void score_planes(const SelectParams& p, int rank, ClusterRoom& room, float* logits) {
  using Product = ProductOf<T, Stored>;
  using Ring = LandmarkRing<Stored, D>;
  using Piece = typename Ring::Piece;
  const int lane = threadIdx.x % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32 - RANK_PARTS * RANK_WARPS;
  const Ring ring(room.scorers[warp], p.scales_in_words);
  Stages<Stored, D> coming(p, rank, warp, first_plane(p));
  for (int s = 0; s < Ring::STAGES && coming.is_there(p); ++s) {
    ring.begin(s, coming);
    coming.advance(p, rank, warp);
  }
  int slot = 0;
  uint32_t parity = 0;
  for (int plane = first_plane(p), n = 0; plane < p.planes; plane += p.clusters, ++n) {
    const int count = share_of(p, plane, rank).chunks * p.per_chunk, before = n - p.buffers;
    float* scores = logits + n % p.buffers * p.group * p.share_stride;
    uint32_t query[D / 16][2 * HALVES];
    load_queries<T, Loaded<Stored>, D, HALVES>(
        static_cast<const T*>(p.query) + static_cast<int64_t>(plane) * p.group * D, p.group, query);
    LogitPlace places[HALVES];
    for (int half = 0; half < HALVES; ++half) places[half] = LogitPlace(p, scores, half);
    while (before >= 0 && !is_complete(&room.ranked[before % 2], before / 2 % 2)) {
    }
    auto begin_next = [&](int slot) {
      Ring::release();
      if (coming.is_there(p)) {
        ring.begin(slot, coming);
        coming.advance(p, rank, warp);
      }
    };
#pragma unroll 1
    for (int stage = warp; stage * Ring::ROWS < count; stage += SCORERS) {
      const int first = stage * Ring::ROWS;
      ring.wait(slot, parity);
      if constexpr (IS_PACKED<Stored>) {
        float sums[HALVES][2][4] = {};
        multiply_packed_stage<D, HALVES>(query, ring.stage_of(slot), sums);
        begin_next(slot);
        write_pair(sums, first, count, p.scale, p.scale, places);
      } else {
        uint32_t words[Ring::TILES][Piece::COUNT][Piece::WORDS];
        float scales[Ring::TILES];
        ring.read(slot, p.scale, words, scales);
        begin_next(slot);
        score_stage<Product, Stored, D, HALVES>(query, words, first, count, scales, places);
      }
      if (++slot == Ring::STAGES) slot = 0, parity ^= 1;
    }
    __syncwarp();
    if (lane == 0) arrive(&room.scored[n % 2]);
  }
}

}  // namespace shadowkv
