// The splits of one query head become its output; a head that attends nothing gets zeros.
#pragma once

#include "common/block.cuh"

namespace shadowkv {

constexpr int MOST_SPLITS = 128;
constexpr int MERGED_AT_ONCE = 16;  // splits whose sums are on their way together

/// A block a query head, a thread a dimension. `lse` (natural logarithm) may be null.
template <typename T, int D>
__global__ void __launch_bounds__(D)
    merge_splits(const float* sums, const float2* totals, int splits, T* out, float* lse) {
  __shared__ float2 shared_totals[MOST_SPLITS];
  const int64_t head = blockIdx.x;
  const int d = threadIdx.x;
  sums += head * splits * D + d;
  float held[MERGED_AT_ONCE];
  auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < MERGED_AT_ONCE; ++i) {
      held[i] = first + i < splits ? sums[static_cast<int64_t>(first + i) * D] : 0.f;
    }
  };
  load(0);  // beside the totals, that its latency is not added to theirs
  for (int s = d; s < splits; s += D) shared_totals[s] = totals[head * splits + s];
  __syncthreads();
  float highest = -INFINITY;
  for (int s = 0; s < splits; ++s) highest = fmaxf(highest, shared_totals[s].x);
  float sum = 0, total = 0;
  for (int first = 0; first < splits; first += MERGED_AT_ONCE) {
    if (first) load(first);
#pragma unroll
    for (int i = 0; i < MERGED_AT_ONCE; ++i) {
      if (first + i >= splits) break;
      const float2 of_split = shared_totals[first + i];
      const float share = weight(of_split.x, highest);
      sum += share * held[i];
      total += share * of_split.y;
    }
  }
  out[head * D + d] = from_float<T>(total > 0 ? sum / total : 0.f);
  if (lse && d == 0) lse[head] = (highest + log2f(total)) * 0.69314718056f;
}

}  // namespace shadowkv
