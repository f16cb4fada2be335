// Attention of one token a row on the tensor cores, split over the sequence.
#pragma once

#include "attention_params.cuh"
#include "common/fp8.cuh"
#include "common/packed.cuh"

namespace shadowkv {

/// Values of a tile that came in 8 bits, each in the second half of its row, become T there: a warp.
/// `scale` is that of the token of this lane, of the first 16.
template <typename T, int D>
__device__ inline void widen_values(T* tile, float scale) {
  constexpr int STRIDE = D + 8, WORDS = D / 32;
  const int token = threadIdx.x % TILE, half = threadIdx.x % 32 / TILE;
  scale = __shfl_sync(ALL_LANES, scale, token);
  if (!__any_sync(ALL_LANES, is_apart(scale))) return;
  T* row = tile + token * STRIDE;
  const auto* from = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(row) + D) +
                     half * WORDS;
  uint4 held[WORDS];
  if (is_apart(scale)) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w) held[w] = from[w];
  }
  __syncwarp();  // The upper half is read before it is written.
  if (is_apart(scale)) {
    auto* to = reinterpret_cast<uint4*>(row + half * (D / 2));
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      to[2 * w] = widened<T>(held[w].x, held[w].y, scale);
      to[2 * w + 1] = widened<T>(held[w].z, held[w].w, scale);
    }
  }
  __syncwarp();
}

/// Where a packed token's piece of 16 bytes waits in its row: the header behind the row's elements,
/// lower bytes in its second half, codes in its second quarter.
template <int D>
__device__ inline int packed_place(int piece) {
  const int end = PACKED_HEADER_BYTES * (piece - 1);
  return piece == 0 ? 2 * D : piece <= D / 16 ? D + end : end - D / 2;
}

/// Packed values of a tile, which came as `packed_place` says, become bfloat16 there: a warp.
/// `scale` is that of the token of this lane, of the first 16: whether it is apart.
template <int D>
__device__ inline void unpack_values(__nv_bfloat16* tile, float scale) {
  constexpr int STRIDE = D + 8, WORDS = D / 32;
  const int token = threadIdx.x % TILE, half = threadIdx.x % 32 / TILE;
  const bool is_packed = is_apart(__shfl_sync(ALL_LANES, scale, token));
  if (!__any_sync(ALL_LANES, is_packed)) return;
  char* row = reinterpret_cast<char*>(tile + token * STRIDE);
  const auto* header = reinterpret_cast<const uint8_t*>(row + packed_place<D>(0));
  uint4 lower[WORDS];
  uint2 codes[WORDS];
  uint32_t base = 0;
  int strays = 0;
  if (is_packed) {
    const uint32_t first = *reinterpret_cast<const uint32_t*>(header);
    base = packed_base(first), strays = packed_strays(first);
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      lower[w] = reinterpret_cast<const uint4*>(row + D)[half * WORDS + w];
      codes[w] = reinterpret_cast<const uint2*>(row + D / 2)[half * WORDS + w];
    }
  }
  __syncwarp();  // All is read before any of it is written.
  if (is_packed) {
    auto* to = reinterpret_cast<uint4*>(row + half * D);
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      to[2 * w] = unpack_eight(lower[w].x, lower[w].y, codes[w].x, base);
      to[2 * w + 1] = unpack_eight(lower[w].z, lower[w].w, codes[w].y, base);
    }
  }
  __syncwarp();
  if (!__any_sync(ALL_LANES, strays > 0)) return;
  if (half == 0) {
    for (int s = 0; s < strays; ++s) {
      const int place = header[2 + 2 * s];
      if (place < D) row[2 * place + 1] = static_cast<char>(header[3 + 2 * s]);
    }
  }
  __syncwarp();
}

/// Grid [splits, Hk, R]: each warp takes tiles of 16 tokens, the next one on its way meanwhile.
template <typename T, int D, typename Source>
__global__ void __launch_bounds__(ATTENTION_WARPS * 32, 3)
    attend_tiles(const __grid_constant__ AttentionParams<Source> p) {
  constexpr int STRIDE = D + 8;  // rows 16 bytes apart in their banks
  constexpr int WARP_BYTES = ATTENTION_WARP_BYTES<T, D>;
  constexpr Form FORM = Source::APART;
  extern __shared__ __align__(16) char shared[];
  __shared__ float2 totals[ATTENTION_WARPS][MAX_GROUP];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int head = blockIdx.y, r = blockIdx.z;
  const auto row = p.source.row(r, head);
  const int64_t plane = p.source.plane(r);
  const T* keys = static_cast<const T*>(p.keys) + plane * p.key_plane + head * p.key_head;
  const T* values = static_cast<const T*>(p.values) + plane * p.value_plane + head * p.value_head;
  T* tiles = reinterpret_cast<T*>(shared + warp * WARP_BYTES);

  uint32_t query[D / 16][4];  // A fragments; rows beyond the group are zeros
  const T* queries = static_cast<const T*>(p.query) +
                     (static_cast<int64_t>(r) * gridDim.y + head) * p.group * D;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int g = lane / 4 + (i % 2) * 8, d = k * 16 + (lane % 4) * 2 + (i / 2) * 8;
      query[k][i] = g < p.group ? *reinterpret_cast<const uint32_t*>(queries + g * D + d) : 0u;
    }
  }

  const int count = row.count, num_tiles = (count + TILE - 1) / TILE;
  const int step = gridDim.x * ATTENTION_WARPS;
  auto find = [&](int tile) {
    const int i = tile * TILE + lane;
    return lane < TILE && tile < num_tiles && i < count ? row.at(i) : Place{-1, -1};
  };
  auto fetch = [&](int stage, Place place) {
    T* key_tile = tiles + stage * 2 * TILE * STRIDE;
    T* value_tile = key_tile + TILE * STRIDE;
    [[maybe_unused]] unsigned apart = 0;
    if constexpr (FORM != Form::SAME) apart = __ballot_sync(ALL_LANES, is_apart(place.scale));
#pragma unroll
    for (int i = lane; i < TILE * D / 8; i += 32) {
      const int token = i / (D / 8), piece = i % (D / 8) * 8;
      const int key = __shfl_sync(ALL_LANES, place.key, token);
      const int value = __shfl_sync(ALL_LANES, place.value, token);
      T* to = value_tile + token * STRIDE + piece;
      copy_async(key_tile + token * STRIDE + piece, keys + max(key, 0) * p.key_token + piece,
                 key < 0 ? 0 : 16);
      if constexpr (FORM == Form::FP8) {
        if (apart >> token & 1) {
          const uint8_t* from = row.apart + static_cast<int64_t>(value) * D + piece * 2;
          if (piece * 2 < D) copy_async(to + D / 2, from, 16);
          continue;
        }
      }
      if constexpr (FORM == Form::PACKED) {
        if (apart >> token & 1) {
          const int own = piece / 8;
          const uint8_t* from = row.apart + static_cast<int64_t>(value) * PACKED_WIDTH<D>;
          char* bytes = reinterpret_cast<char*>(value_tile + token * STRIDE);
          if (own < PACKED_WIDTH<D> / 16) {
            copy_async(bytes + packed_place<D>(own), from + own * 16, 16);
          }
          continue;
        }
      }
      copy_async(to, values + max(value, 0) * p.value_token + piece, value < 0 ? 0 : 16);
    }
  };

  float out[D / 8][4] = {};  // C fragments
  float highest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
  int tile = blockIdx.x * ATTENTION_WARPS + warp;
  Place place = find(tile);
  unsigned live = __ballot_sync(ALL_LANES, place.key >= 0);
  if (tile < num_tiles) fetch(0, place);
  commit_copies();
  [[maybe_unused]] float scale = place.scale;
  place = find(tile + step);
  for (int stage = 0; tile < num_tiles; tile += step, stage ^= 1) {
    const unsigned next_live = __ballot_sync(ALL_LANES, place.key >= 0);
    [[maybe_unused]] const float next_scale = place.scale;
    if (tile + step < num_tiles) fetch(stage ^ 1, place);
    commit_copies();
    place = find(tile + 2 * step);
    wait_copies<1>();
    __syncwarp();

    const T* key_tile = tiles + stage * 2 * TILE * STRIDE;
    T* value_tile = tiles + (stage * 2 + 1) * TILE * STRIDE;
    if constexpr (FORM == Form::FP8) widen_values<T, D>(value_tile, scale);
    if constexpr (FORM == Form::PACKED) unpack_values<D>(value_tile, scale);
    scale = next_scale;
    float logits[2][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t b[4];
      const int token = lane / 16 * 8 + lane % 8;
      load_matrices(b, key_tile + token * STRIDE + k * 16 + lane / 8 % 2 * 8);
      multiply_add<T>(logits[0], query[k], b[0], b[1]);
      multiply_add<T>(logits[1], query[k], b[2], b[3]);
    }
    float tile_highest[2] = {highest[0], highest[1]};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = i / 4 * 8 + (lane % 4) * 2 + i % 2;
      float& logit = logits[i / 4][i % 4];
      logit = live >> token & 1 ? logit * p.scale : -INFINITY;
      tile_highest[i / 2 % 2] = fmaxf(tile_highest[i / 2 % 2], logit);
    }
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& most = tile_highest[half];
      most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
      most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
      shrink[half] = weight(highest[half], most);
      highest[half] = most;
      total[half] *= shrink[half];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& logit = logits[i / 4][i % 4];
      logit = weight(logit, highest[i / 2 % 2]);
      total[i / 2 % 2] += logit;
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] *= shrink[i / 2];
    }
    const uint32_t weights[4] = {
        pack<T>(logits[0][0], logits[0][1]), pack<T>(logits[0][2], logits[0][3]),
        pack<T>(logits[1][0], logits[1][1]), pack<T>(logits[1][2], logits[1][3])};
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      const int token = lane / 8 % 2 * 8 + lane % 8;
      load_matrices_transposed(b, value_tile + token * STRIDE + n * 16 + lane / 16 * 8);
      multiply_add<T>(out[2 * n], weights, b[0], b[1]);
      multiply_add<T>(out[2 * n + 1], weights, b[2], b[3]);
    }
    live = next_live;
    __syncwarp();  // The next copies overwrite this stage.
  }

  wait_copies<0>();
  __syncwarp();
  float* sums = reinterpret_cast<float*>(tiles);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int g = lane / 4 + half * 8;
    total[half] += __shfl_xor_sync(ALL_LANES, total[half], 1);
    total[half] += __shfl_xor_sync(ALL_LANES, total[half], 2);
    if (g < p.group) {
      if (lane % 4 == 0) totals[warp][g] = make_float2(highest[half], total[half]);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<float2*>(sums + g * D + n * 8 + (lane % 4) * 2) =
            make_float2(out[n][half * 2], out[n][half * 2 + 1]);
      }
    }
  }
  __syncthreads();
  merge_warps<D, WARP_BYTES>(p, shared, totals);
}

}  // namespace shadowkv
