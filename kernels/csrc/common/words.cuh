// Elements by 16 bytes or one by one, and the place of a thread in a flat grid.
#pragma once

#include "matrix.cuh"

namespace shadowkv {

/// N elements that are read once: a 16-byte word, or one element.
template <typename T, int N>
__device__ inline void load_words(const T* from, T (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = *from;
  } else {
    static_assert(N * sizeof(T) == 16);
    const uint4 word = load_once(from);
    memcpy(to, &word, 16);
  }
}

/// The same of what other blocks read too.
template <typename T, int N>
__device__ inline void load_cached(const T* from, T (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = *from;
  } else {
    static_assert(N * sizeof(T) == 16);
    const uint4 word = __ldg(reinterpret_cast<const uint4*>(from));
    memcpy(to, &word, 16);
  }
}

template <typename T, int N>
__device__ inline void store_words(T* to, const T (&from)[N]) {
  if constexpr (N == 1) {
    *to = from[0];
  } else {
    static_assert(N * sizeof(T) == 16);
    uint4 word;
    memcpy(&word, from, 16);
    *reinterpret_cast<uint4*>(to) = word;
  }
}

__device__ inline int64_t flat_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

/// Divide an index by a width: the quotient stays in `index`, the remainder is returned.
__device__ inline int split_index(int64_t& index, int width) {
  int rest;
  if (index <= UINT32_MAX) {  // several times faster than a division of 64 bits
    const uint32_t low = static_cast<uint32_t>(index), quotient = low / width;
    rest = static_cast<int>(low - quotient * width);
    index = quotient;
  } else {
    rest = static_cast<int>(index % width);
    index /= width;
  }
  return rest;
}

}  // namespace shadowkv
