// How scores are ranked: an integer that has their order, and bins by the distance to the best.
#pragma once

#include <cstdint>

#include "select_params.h"

namespace shadowkv {

/// 0 is a barred chunk.
__device__ inline uint32_t ordered(float score) {
  if (score == -INFINITY) return 0;
  const uint32_t bits = __float_as_uint(score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float score_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/// 128 bins for every doubling of one more than the distance to the best score.
__device__ inline int bin_of(float best, float score) {
  const float distance = fmaxf(best - score, 0.f) + 1.f;
  return min(static_cast<int>((__float_as_uint(distance) - 0x3f800000u) >> 16), SELECT_BINS - 1);
}

}  // namespace shadowkv
