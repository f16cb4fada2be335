// Means of each chunk's keys, and the smallest cosine similarity of a key and the chunk's mean.
#pragma once

#include "common/block.cuh"

namespace shadowkv {

struct LandmarkParams {
  const void* keys;  // [Hk, S, D]
  int64_t key_head, key_token;  // strides in elements
  int chunks, chunk_size, per_chunk;
  void* landmarks;    // [Hk, C, L, D]
  float* similarity;  // [Hk, C]
};

constexpr int LANDMARK_WARPS = 8;
constexpr float SMALLEST_NORM = 1e-8f;  // as in torch's cosine_similarity

/// Grid [blocks, Hk]: a warp a chunk, in float32; a lane holds the dimensions lane, lane + 32, …
template <typename T, int D>
__global__ void __launch_bounds__(LANDMARK_WARPS * 32)
    average_chunks(const __grid_constant__ LandmarkParams p) {
  constexpr int OWN = D / 32;
  const int lane = threadIdx.x % 32;
  const int chunk = blockIdx.x * LANDMARK_WARPS + threadIdx.x / 32;
  if (chunk >= p.chunks) return;
  const int64_t head = blockIdx.y, place = head * p.chunks + chunk;
  const T* keys = static_cast<const T*>(p.keys) + head * p.key_head +
                  static_cast<int64_t>(chunk) * p.chunk_size * p.key_token + lane;
  T* landmarks = static_cast<T*>(p.landmarks) + place * p.per_chunk * D + lane;

  const int part = p.chunk_size / p.per_chunk;
  float center[OWN] = {};
  for (int l = 0; l < p.per_chunk; ++l) {
    float sum[OWN] = {};
#pragma unroll 4
    for (int t = l * part; t < (l + 1) * part; ++t) {
#pragma unroll
      for (int i = 0; i < OWN; ++i) sum[i] += to_float(keys[t * p.key_token + i * 32]);
    }
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const float mean = sum[i] / part;
      landmarks[l * D + i * 32] = from_float<T>(mean);
      center[i] += mean / p.per_chunk;
    }
  }
  float length = 0;
#pragma unroll
  for (int i = 0; i < OWN; ++i) length += center[i] * center[i];
  length = fmaxf(sqrtf(warp_sum(length)), SMALLEST_NORM);

  float smallest = INFINITY;
#pragma unroll 2
  for (int t = 0; t < p.chunk_size; ++t) {
    float along = 0, own = 0;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const float key = to_float(keys[t * p.key_token + i * 32]);
      along += key * center[i];
      own += key * key;
    }
    along = warp_sum(along);
    own = fmaxf(sqrtf(warp_sum(own)), SMALLEST_NORM);
    smallest = fminf(smallest, along / (own * length));
  }
  if (lane == 0) p.similarity[place] = smallest;
}

}  // namespace shadowkv
