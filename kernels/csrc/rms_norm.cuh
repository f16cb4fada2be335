// Root-mean-square normalisation: a team of threads holds a row in registers between two passes.
//
// How a row is summed depends on its length alone, so other rows change no bit of it.
#pragma once

#include "common/block.cuh"
#include "common/words.cuh"

namespace shadowkv {

struct NormParams {
  const void* x;       // [rows] of `width` elements
  const void* weight;  // [width]
  void* out;           // [rows, width]
  int64_t rows, x_row;  // and the distance of rows, in elements
  int width;
  float eps;
};

constexpr int NORM_THREADS = 256;  // of a block, at least
constexpr int MOST_NORM_THREADS = 512;

/// The sum over a team of warps, and room for a word a warp of the block; called by every thread.
template <int TEAM>
__device__ inline float team_sum(float x, float* room) {
  x = warp_sum(x);
  if constexpr (TEAM > 32) {
    const int warp = threadIdx.x / 32, first = threadIdx.x / TEAM * (TEAM / 32);
    if (threadIdx.x % 32 == 0) room[warp] = x;
    __syncthreads();
    x = 0;
#pragma unroll
    for (int i = 0; i < TEAM / 32; ++i) x += room[first + i];
  }
  return x;
}

template <typename T>
__device__ inline T scale_element(T x, float scale, T weight) {
  return from_float<T>(to_float(from_float<T>(to_float(x) * scale)) * to_float(weight));
}

/// Rows of at most TEAM * WORDS whole words; a block takes as many rows as it has teams.
template <typename T, int TEAM, int WORDS>
__global__ void __launch_bounds__(TEAM > NORM_THREADS ? TEAM : NORM_THREADS)
    normalise_words(const __grid_constant__ NormParams p) {
  constexpr int N = 16 / sizeof(T);
  constexpr int THREADS = TEAM > NORM_THREADS ? TEAM : NORM_THREADS;
  __shared__ float room[THREADS / 32];
  const int member = threadIdx.x % TEAM;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (THREADS / TEAM) + threadIdx.x / TEAM;
  const bool exists = row < p.rows;
  const T* x = static_cast<const T*>(p.x) + row * p.x_row;
  const T* weight = static_cast<const T*>(p.weight);
  T held[WORDS][N], factors[WORDS][N];
  float sum = 0;
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    const int first = (w * TEAM + member) * N;
    if (exists && first < p.width) {
      load_words<T, N>(x + first, held[w]);
      load_cached<T, N>(weight + first, factors[w]);
    }
  }
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    if (exists && (w * TEAM + member) * N < p.width) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum += to_float(held[w][i]) * to_float(held[w][i]);
    }
  }
  const float scale = rsqrtf(team_sum<TEAM>(sum, room) / p.width + p.eps);
  T* out = static_cast<T*>(p.out) + row * p.width;
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    const int first = (w * TEAM + member) * N;
    if (!exists || first >= p.width) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) held[w][i] = scale_element(held[w][i], scale, factors[w][i]);
    store_words<T, N>(out + first, held[w]);
  }
}

/// Rows of any length and alignment, a block each, read twice.
template <typename T>
__global__ void __launch_bounds__(NORM_THREADS)
    normalise_elements(const __grid_constant__ NormParams p) {
  __shared__ float room[NORM_THREADS / 32];
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_row;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + row * p.width;
  float sum = 0;
  for (int i = threadIdx.x; i < p.width; i += NORM_THREADS) {
    const float element = to_float(x[i]);
    sum += element * element;
  }
  const float scale = rsqrtf(team_sum<NORM_THREADS>(sum, room) / p.width + p.eps);
  for (int i = threadIdx.x; i < p.width; i += NORM_THREADS) {
    out[i] = scale_element(x[i], scale, weight[i]);
  }
}

}  // namespace shadowkv
