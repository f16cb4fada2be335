// First kernel of select_chunks on the tensor cores: warps stream the landmarks of all rows and
// heads through shared memory, each through a ring of its own, so that reading never pauses.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/block.cuh"
#include "common/fp8.cuh"
#include "select_params.h"

namespace shadowkv {

constexpr int STREAM_WARPS = 2;
constexpr int UNIT = 32;  // landmarks that a warp scores at a time
/// Small blocks that end soon: what waits for another lane's, and goes first, finds room.
constexpr int UNITS_A_WARP = 6;

/// How units of landmarks [32, D] lie in a ring, and how a lane reads them for the products: of
/// eight landmarks one, pieces of so many bytes, each beside those of its three neighbours.
template <typename Stored, int D>
struct Ring {
  static constexpr int ROW = D * sizeof(Stored);
  static constexpr int UNIT_BYTES = UNIT * ROW;
  static constexpr int STAGES = std::min(24 * 1024 / UNIT_BYTES, 8);
  static constexpr int BYTES = STAGES * UNIT_BYTES;
  static constexpr int PIECE = ROW % 64 == 0 ? 16 : 8;
  static constexpr int PIECES = ROW / 4 / PIECE;
  static constexpr int DIMS = PIECE / sizeof(Stored);
  static constexpr int STEPS = DIMS / 4;  // products a piece: four dimensions a lane
};

/// Four elements as two registers of another type of the same size.
template <typename To, typename From>
__device__ uint2 converted(uint2 four) {
  if constexpr (std::is_same_v<To, From>) return four;
  From x[4];
  memcpy(x, &four, sizeof(x));
  return make_uint2(pack<To>(to_float(x[0]), to_float(x[1])),
                    pack<To>(to_float(x[2]), to_float(x[3])));
}

/// A run of units, one row and head after the other.
struct Place {
  int plane, unit;

  __device__ Place(int64_t flat, int units)
      : plane(static_cast<int>(flat / units)), unit(static_cast<int>(flat % units)) {}
  __device__ void advance(int units) {
    if (++unit == units) unit = 0, ++plane;
  }
};

/// The landmarks of a row and head, as far as they may be selected.
template <typename Stored, int D>
struct Landmarks {
  const char* rows;
  int count;

  __device__ Landmarks(const SelectParams& p, int plane) {
    const int r = plane / p.heads, head = plane - r * p.heads;
    rows = reinterpret_cast<const char*>(static_cast<const Stored*>(p.landmarks) +
                                         p.prompt_index[r] * p.landmark_prompt +
                                         head * p.landmark_head);
    count = max(min(p.num_chunks[r], p.chunks), 0) * p.per_chunk;
  }

  /// Begin to copy a unit; beyond the last landmark come zeros.
  __device__ void copy(int unit, char* to) const {
    using R = Ring<Stored, D>;
    const char* from = rows + static_cast<int64_t>(unit) * R::UNIT_BYTES;
    const int left = (count - unit * UNIT) * R::ROW;
#pragma unroll
    for (int i = 0; i < R::UNIT_BYTES / 16 / 32; ++i) {
      const int offset = (i * 32 + static_cast<int>(threadIdx.x) % 32) * 16;
      copy_async(to + offset, offset < left ? from + offset : rows, offset < left ? 16 : 0);
    }
  }
};

/// What a lane knows of one landmark of a unit.
struct Own {
  bool allowed;
  float scale;
};

/// Products of a unit's landmarks with the queries: a tile of eight landmarks each.
template <typename T, typename Stored, int D>
__device__ void multiply_unit(const uint32_t (&query)[D / 16][4], const char* unit,
                              float (&c)[UNIT / 8][4]) {
  using Product = std::conditional_t<sizeof(Stored) == 1, __half, T>;
  using R = Ring<Stored, D>;
  const int lane = threadIdx.x % 32, quad = lane % 4;
#pragma unroll
  for (int n = 0; n < UNIT / 8; ++n) {
    const char* row = unit + (n * 8 + lane / 4) * R::ROW + quad * R::PIECE;
    c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
#pragma unroll
    for (int j = 0; j < R::PIECES; ++j) {
      uint32_t words[R::PIECE / 4];
      memcpy(words, __builtin_assume_aligned(row + j * 4 * R::PIECE, R::PIECE), R::PIECE);
#pragma unroll
      for (int step = 0; step < R::STEPS; ++step) {
        if constexpr (sizeof(Stored) == 1) {
          multiply_add<Product>(c[n], query[j * R::STEPS + step], halves_of(words[step], 0),
                                halves_of(words[step], 1));
        } else {
          multiply_add<Product>(c[n], query[j * R::STEPS + step], words[2 * step],
                                words[2 * step + 1]);
        }
      }
    }
  }
}

/// The queries of a plane as operands, permuted as the pieces of a landmark are.
template <typename T, typename Stored, int D>
__device__ void load_queries(const SelectParams& p, int plane, uint32_t (&query)[D / 16][4]) {
  using Product = std::conditional_t<sizeof(Stored) == 1, __half, T>;
  using R = Ring<Stored, D>;
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const T* queries = static_cast<const T*>(p.query) + static_cast<int64_t>(plane) * p.group * D;
#pragma unroll
  for (int s = 0; s < D / 16; ++s) {
    const int d = (s / R::STEPS * 4 + quad) * R::DIMS + s % R::STEPS * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int g = lane / 4 + half * 8;
      uint2 four = make_uint2(0, 0);
      if (g < p.group) {
        four = converted<Product, T>(*reinterpret_cast<const uint2*>(queries + g * D + d));
      }
      query[s][half] = four.x, query[s][half + 2] = four.y;
    }
  }
}

/// log2 of 2^a + 2^b.
__device__ inline float add_logs(float a, float b) {
  const float highest = fmaxf(a, b);
  return highest + log2f(exp2f(a - highest) + exp2f(b - highest));
}

/// Logits of a unit's chunks for one query head a lane quad, and the total of their softmax.
///
/// A lane has the products of landmarks 8n + 2 quad and the next; those of one chunk are combined.
__device__ inline void store_unit(const SelectParams& p, const Own& own, int64_t head, int unit,
                                  const float (&c)[UNIT / 8][4], int half) {
  const int quad = threadIdx.x % 4, per_chunk = p.per_chunk;
  const unsigned allowed = __ballot_sync(ALL_LANES, own.allowed);
  const bool there = head >= 0;
  float* logits = p.logits + (there ? head * p.logit_stride : 0) + unit * (UNIT / per_chunk);
  float x[UNIT / 8][2], highest = -INFINITY, total = 0;
#pragma unroll
  for (int n = 0; n < UNIT / 8; ++n) {
    const int first = n * 8 + quad * 2;
    float a = c[n][half * 2] * p.scale, b = c[n][half * 2 + 1] * p.scale;
    if (p.scales) {
      a *= __shfl_sync(ALL_LANES, own.scale, first);
      b *= __shfl_sync(ALL_LANES, own.scale, first + 1);
    }
    if (per_chunk > 1) {
      a = add_logs(a, b), b = -INFINITY;
      if (per_chunk > 2) a = add_logs(a, __shfl_xor_sync(ALL_LANES, a, 1));
      if (per_chunk > 2 && quad % 2) a = -INFINITY;
    }
    x[n][0] = allowed >> first & 1 ? a : -INFINITY;
    x[n][1] = per_chunk == 1 && (allowed >> (first + 1) & 1) ? b : -INFINITY;
    highest = fmaxf(highest, fmaxf(x[n][0], x[n][1]));
    if (!there) continue;
    if (per_chunk == 1) {
      *reinterpret_cast<float2*>(logits + first) = make_float2(x[n][0], x[n][1]);
    } else if (per_chunk == 2 || quad % 2 == 0) {
      logits[first / per_chunk] = x[n][0];
    }
  }
  highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 1));
  highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 2));
#pragma unroll
  for (int n = 0; n < UNIT / 8; ++n) {
    total += weight(x[n][0], highest) + weight(x[n][1], highest);
  }
  total += __shfl_xor_sync(ALL_LANES, total, 1);
  total += __shfl_xor_sync(ALL_LANES, total, 2);
  if (there && quad == 0) p.totals[head * p.segments + unit] = make_float2(highest, total);
}

/// A flat grid: a warp takes an even share of the units of all rows and heads, `p.segments` each.
template <typename T, typename Stored, int D>
__global__ void __launch_bounds__(STREAM_WARPS * 32)
    stream_scores(const __grid_constant__ SelectParams p, int planes) {
  using R = Ring<Stored, D>;
  extern __shared__ __align__(16) char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, units = p.segments;
  char* ring = shared + warp * R::BYTES;
  const int64_t all = static_cast<int64_t>(planes) * units, warps = gridDim.x * STREAM_WARPS;
  const int64_t own_warp = blockIdx.x * STREAM_WARPS + warp;
  const int64_t begin = all * own_warp / warps, end = all * (own_warp + 1) / warps;
  if (begin == end) return;

  Place ahead(begin, units);
  int source_plane = ahead.plane;
  Landmarks<Stored, D> source(p, source_plane);
  auto copy_next = [&](int64_t flat, int stage) {
    if (flat < end) {
      if (ahead.plane != source_plane) {
        source_plane = ahead.plane;
        source = Landmarks<Stored, D>(p, source_plane);
      }
      source.copy(ahead.unit, ring + stage * R::UNIT_BYTES);
      ahead.advance(units);
    }
    commit_copies();
  };
  for (int stage = 0; stage < R::STAGES; ++stage) copy_next(begin + stage, stage);

  auto look_up = [&](int plane, int unit, int count) {
    const int r = plane / p.heads, head = plane - r * p.heads, landmark = unit * UNIT + lane;
    Own own{false, 0};
    if (landmark < count) {
      own.allowed =
          !p.excluded[r * p.excluded_row + head * p.excluded_head + landmark / p.per_chunk];
      if (p.scales) {
        own.scale = p.scales[p.prompt_index[r] * p.scale_prompt + head * p.scale_head + landmark];
      }
    }
    return own;
  };
  uint32_t query[D / 16][4];
  int plane = -1, count = 0;
  Own own{}, next{};
  int stage = 0;
  Place now(begin, units);
  for (int64_t flat = begin; flat < end; ++flat, now.advance(units)) {
    if (now.plane != plane) {
      plane = now.plane;
      load_queries<T, Stored, D>(p, plane, query);
      count = Landmarks<Stored, D>(p, plane).count;
      next = look_up(plane, now.unit, count);
    }
    own = next;
    next = look_up(plane, now.unit + 1, count);  // while this unit is worked on
    wait_copies<R::STAGES - 1>();
    __syncwarp();
    float c[UNIT / 8][4];
    multiply_unit<T, Stored, D>(query, ring + stage * R::UNIT_BYTES, c);
    __syncwarp();
    copy_next(flat + R::STAGES, stage);
    if (++stage == R::STAGES) stage = 0;
    const int64_t first_head = static_cast<int64_t>(plane) * p.group;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int g = lane / 4 + half * 8;
      if (half * 8 < p.group) store_unit(p, own, g < p.group ? first_head + g : -1, now.unit, c, half);
    }
  }
}

}  // namespace shadowkv
