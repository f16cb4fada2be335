// The gate of a gated layer: silu in float32, rounded, times the other half, rounded.
#pragma once

#include "common/words.cuh"

namespace shadowkv {

struct GateParams {
  const void* gate;  // [rows] of `words` words of N elements
  const void* up;
  void* out;  // [rows, words]
  int64_t total, gate_row, up_row;  // words of all rows; distances of rows, in elements
  int words;
};

constexpr int GATE_THREADS = 256;
constexpr int GATE_WORDS = 2;

template <typename T>
__device__ inline T gate_element(T gate, T up) {
  const float x = to_float(gate);
  return from_float<T>(to_float(from_float<T>(x / (1.f + expf(-x)))) * to_float(up));
}

/// A block takes GATE_WORDS times its threads in words, of all rows laid end to end.
template <typename T, int N>
__global__ void __launch_bounds__(GATE_THREADS) gate_words(const __grid_constant__ GateParams p) {
  const T* gates = static_cast<const T*>(p.gate);
  const T* ups = static_cast<const T*>(p.up);
  T* out = static_cast<T*>(p.out);
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * (GATE_THREADS * GATE_WORDS) + threadIdx.x;
  T gate[GATE_WORDS][N], up[GATE_WORDS][N];
#pragma unroll
  for (int w = 0; w < GATE_WORDS; ++w) {
    int64_t row = first + w * GATE_THREADS;
    if (row < p.total) {
      const int64_t column = static_cast<int64_t>(split_index(row, p.words)) * N;
      load_words<T, N>(gates + row * p.gate_row + column, gate[w]);
      load_words<T, N>(ups + row * p.up_row + column, up[w]);
    }
  }
#pragma unroll
  for (int w = 0; w < GATE_WORDS; ++w) {
    const int64_t word = first + w * GATE_THREADS;
    if (word < p.total) {
#pragma unroll
      for (int i = 0; i < N; ++i) gate[w][i] = gate_element(gate[w][i], up[w][i]);
      store_words<T, N>(out + word * N, gate[w]);
    }
  }
}

}  // namespace shadowkv
