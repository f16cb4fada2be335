// The same attention in float32: a warp takes one token at a time, without tensor cores.
#pragma once

#include "attention_params.cuh"
#include "common/fp8.cuh"

namespace shadowkv {

template <int D, typename Source>
__global__ void __launch_bounds__(ATTENTION_WARPS * 32)
    attend_tokens(const __grid_constant__ AttentionParams<Source> p) {
  constexpr int OWN = D / 32;  // dimensions of a lane: lane, lane + 32, …
  constexpr int WARP_BYTES = ATTENTION_WARP_BYTES<float, D>;
  extern __shared__ __align__(16) char shared[];
  __shared__ float2 totals[ATTENTION_WARPS][MAX_GROUP];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int head = blockIdx.y, r = blockIdx.z;
  const auto row = p.source.row(r, head);
  const int64_t plane = p.source.plane(r);
  const float* keys = static_cast<const float*>(p.keys) + plane * p.key_plane + head * p.key_head;
  const float* values =
      static_cast<const float*>(p.values) + plane * p.value_plane + head * p.value_head;
  const float* queries = static_cast<const float*>(p.query) +
                         (static_cast<int64_t>(r) * gridDim.y + head) * p.group * D;

  float query[MAX_GROUP][OWN], out[MAX_GROUP][OWN] = {}, highest[MAX_GROUP], total[MAX_GROUP] = {};
#pragma unroll
  for (int g = 0; g < MAX_GROUP; ++g) {
    highest[g] = -INFINITY;
#pragma unroll
    for (int i = 0; i < OWN; ++i) query[g][i] = g < p.group ? queries[g * D + i * 32 + lane] : 0;
  }
  const int count = row.count, step = gridDim.x * ATTENTION_WARPS;
  for (int token = blockIdx.x * ATTENTION_WARPS + warp; token < count; token += step) {
    const Place place = row.at(token);
    if (place.key < 0) continue;
    float key[OWN], value[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      key[i] = keys[place.key * p.key_token + i * 32 + lane];
      if constexpr (Source::APART == Form::FP8) {
        if (is_apart(place.scale)) {
          const int64_t at = static_cast<int64_t>(place.value) * D + i * 32 + lane;
          value[i] = to_float(Fp8{row.apart[at]}) * place.scale;
          continue;
        }
      }
      value[i] = values[place.value * p.value_token + i * 32 + lane];
    }
#pragma unroll
    for (int g = 0; g < MAX_GROUP; ++g) {
      if (g < p.group) {
        float logit = 0;
#pragma unroll
        for (int i = 0; i < OWN; ++i) logit += query[g][i] * key[i];
        logit = warp_sum(logit) * p.scale;
        const float most = fmaxf(highest[g], logit);
        const float shrink = weight(highest[g], most), share = weight(logit, most);
        highest[g] = most;
        total[g] = total[g] * shrink + share;
#pragma unroll
        for (int i = 0; i < OWN; ++i) out[g][i] = out[g][i] * shrink + share * value[i];
      }
    }
  }
  float* sums = reinterpret_cast<float*>(shared + warp * WARP_BYTES);
#pragma unroll
  for (int g = 0; g < MAX_GROUP; ++g) {
    if (g < p.group) {
      if (lane == 0) totals[warp][g] = make_float2(highest[g], total[g]);
#pragma unroll
      for (int i = 0; i < OWN; ++i) sums[g * D + i * 32 + lane] = out[g][i];
    }
  }
  __syncthreads();
  merge_warps<D, WARP_BYTES>(p, shared, totals);
}

}  // namespace shadowkv
