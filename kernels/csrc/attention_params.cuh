// What both kernels of attention share: their arguments, and how the warps of a block are merged.
//
// A block serves one row, KV head and split; its warps take tokens in turn, and all query heads of
// the group share each key and value. A Source says which tokens a row attends:
//   plane(row)      the prompt of keys and values
//   row(row, head)  with count, and at(i): the places of the i-th key and value, -1 for none
//   APART           what values may be that lie elsewhere, from the row's `apart` on: in 8 bits or
//                   packed; SAME: there are none.
// Logits are in base 2 (the scale holds log2 e), so that 2^x is the weight.
#pragma once

#include "common/block.cuh"

namespace shadowkv {

enum class Form { SAME, FP8, PACKED };

struct Place {
  int key, value;
  float scale = -1;  // of a value in 8 bits, 0 of a packed one; negative: it is not apart
};

__device__ inline bool is_apart(float scale) { return !(scale < 0); }

template <typename Source>
struct AttentionParams {
  const void* query;  // [R, Hq, D], contiguous
  const void* keys;
  const void* values;
  int64_t key_plane, key_head, key_token;  // strides in elements
  int64_t value_plane, value_head, value_token;
  float scale;
  int group;
  float* sums;     // [R * Hq, splits, D], not yet divided by the total of the weights
  float2* totals;  // [R * Hq, splits]: highest logit, total of the weights
  Source source;
};

constexpr int ATTENTION_WARPS = 4;
constexpr int TILE = 16;
constexpr int MAX_GROUP = 16;

/// Bytes of shared memory of one warp: two tiles of keys and of values, later its sums.
template <typename T, int D>
constexpr int ATTENTION_WARP_BYTES =
    sizeof(T) == 4 ? MAX_GROUP * D * 4 : 2 * 2 * TILE * (D + 8) * static_cast<int>(sizeof(T));

/// Add up the warps' sums [G, D] in shared memory and write those of the block's split.
template <int D, int WARP_BYTES, typename Source>
__device__ void merge_warps(const AttentionParams<Source>& p, const char* shared,
                            const float2 (*totals)[MAX_GROUP]) {
  const int64_t first_head = (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * p.group;
  for (int i = threadIdx.x; i < p.group * D; i += blockDim.x) {
    const int g = i / D, d = i % D;
    float highest = -INFINITY;
    for (int w = 0; w < ATTENTION_WARPS; ++w) highest = fmaxf(highest, totals[w][g].x);
    float sum = 0, total = 0;
    for (int w = 0; w < ATTENTION_WARPS; ++w) {
      const float share = weight(totals[w][g].x, highest);
      sum += share * reinterpret_cast<const float*>(shared + w * WARP_BYTES)[i];
      total += share * totals[w][g].y;
    }
    const int64_t place = (first_head + g) * gridDim.x + blockIdx.x;
    p.sums[place * D + d] = sum;
    if (d == 0) p.totals[place] = make_float2(highest, total);
  }
}

}  // namespace shadowkv
