// Rotates queries and keys by table: a thread turns N pairs, or passes N dimensions on.
//
// Products and sums are rounded one by one, as torch does: the outcome is equal to the bit.
#pragma once

#include "common/words.cuh"

namespace shadowkv {

/// Strides are in elements.
struct HeadParams {
  const void* from;  // [R, H, T, D]
  void* to;          // the same, or where it came from
  int64_t row, head, token, to_row, to_head, to_token;
  int heads;
};

struct RotateParams {
  HeadParams query, key;
  const void* cos;  // [R or 1, T, 2 * pairs]
  const void* sin;
  int64_t cos_row, cos_token, sin_row, sin_token;
  int64_t total;  // units of all rows, tokens and heads
  int tokens, dim, pairs;
  int units;  // of a head: of N pairs each, then of N dimensions each
};

constexpr int ROTATE_THREADS = 128;

template <typename T>
__device__ inline T turn(float along, float cos, float across, float sin) {
  return from_float<T>(__fadd_rn(__fmul_rn(along, cos), __fmul_rn(across, sin)));
}

/// Turn N pairs; for pairs side by side, `x` holds them one after the other in both of its words.
template <typename T, int N, bool INTERLEAVED>
__device__ inline void turn_pairs(T (&x)[2][N], const T (&cos)[N], const T (&sin)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    T& first = INTERLEAVED ? x[2 * i / N][2 * i % N] : x[0][i];
    T& second = INTERLEAVED ? x[(2 * i + 1) / N][(2 * i + 1) % N] : x[1][i];
    const float a = to_float(first), b = to_float(second);
    const float c = to_float(cos[i]), s = to_float(sin[i]);
    first = turn<T>(a, c, -b, s);
    second = turn<T>(b, c, a, s);
  }
}

/// Units in the order rows, tokens, heads: the heads of a token share its entries of the table.
template <typename T, int N, bool INTERLEAVED>
__global__ void __launch_bounds__(ROTATE_THREADS)
    rotate_units(const __grid_constant__ RotateParams p) {
  int64_t row = flat_thread();
  if (row >= p.total) return;
  const int unit = split_index(row, p.units);
  int head = split_index(row, p.query.heads + p.key.heads);
  const int64_t token = split_index(row, p.tokens);
  const bool is_key = head >= p.query.heads;
  const HeadParams& h = is_key ? p.key : p.query;
  if (is_key) head -= p.query.heads;
  const T* from = static_cast<const T*>(h.from) + row * h.row + head * h.head + token * h.token;
  T* to = static_cast<T*>(h.to) + row * h.to_row + head * h.to_head + token * h.to_token;

  const int pair = unit * N;
  T x[2][N];
  if (pair >= p.pairs) {
    const int place = p.pairs + pair;
    load_words<T, N>(from + place, x[0]);
    store_words<T, N>(to + place, x[0]);
    return;
  }
  const int first = INTERLEAVED ? 2 * pair : pair;
  const int second = INTERLEAVED ? first + N : pair + p.pairs;
  T cos[N], sin[N];
  load_words<T, N>(from + first, x[0]);
  load_words<T, N>(from + second, x[1]);
  load_cached<T, N>(static_cast<const T*>(p.cos) + row * p.cos_row + token * p.cos_token + pair,
                    cos);
  load_cached<T, N>(static_cast<const T*>(p.sin) + row * p.sin_row + token * p.sin_token + pair,
                    sin);
  turn_pairs<T, N, INTERLEAVED>(x, cos, sin);
  store_words<T, N>(to + first, x[0]);
  store_words<T, N>(to + second, x[1]);
}

}  // namespace shadowkv
