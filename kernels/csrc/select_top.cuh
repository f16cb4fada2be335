// Second kernel of select_chunks: softmax norms, maximum over the group, and the best chunks.
//
// Where the keys fit shared memory the last one that is wanted is found by a histogram of how far
// scores lie below the best, fine where that is little; the few keys of its bin are compared with
// each other. Where that does not find it, digit by digit.
#pragma once

#include "common/highest.cuh"
#include "common/progress.cuh"
#include "select_order.cuh"

namespace shadowkv {

struct TopRoom {
  int bins[SELECT_BINS];
  uint32_t keys[MOST_TIED];
  int ids[MOST_TIED];
  uint64_t scan[33];
  float norms[MAX_QUERY_GROUP], highest[MAX_QUERY_GROUP];
  int bin, above, tied;
  uint32_t cut_key;
  int cut_id;
};

/// log2 of the softmax's sum and the highest logit of each query head, a warp a head.
__device__ inline void find_norms(const SelectParams& p, int64_t plane, float* norms,
                                  float* highest_logits) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int g = threadIdx.x / 32; g < p.group; g += warps) {
    const float2* totals = p.totals + (plane * p.group + g) * p.segments;
    float highest = -INFINITY, total = 0;
    for (int s = lane; s < p.segments; s += 32) highest = fmaxf(highest, totals[s].x);
    highest = warp_max(highest);
    for (int s = lane; s < p.segments; s += 32) {
      total += totals[s].y * weight(totals[s].x, highest);
    }
    total = warp_sum(total);
    if (lane == 0) {
      norms[g] = highest == -INFINITY ? 0.f : highest + log2f(total);
      highest_logits[g] = highest;
    }
  }
}

/// Keys of four neighbouring chunks a thread; `count` says what to do with each score.
template <typename F>
__device__ void rank_chunks(const SelectParams& p, int64_t plane, int count, const float* norms,
                            uint32_t* keys, F&& each) {
  const float* logits = p.logits + plane * p.group * p.logit_stride;
#pragma unroll 2
  for (int first = threadIdx.x * 4; first < count; first += blockDim.x * 4) {
    float best[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll 4
    for (int g = 0; g < p.group; ++g) {
      const float4 four =
          *reinterpret_cast<const float4*>(logits + g * static_cast<int64_t>(p.logit_stride) + first);
      best[0] = fmaxf(best[0], four.x - norms[g]), best[1] = fmaxf(best[1], four.y - norms[g]);
      best[2] = fmaxf(best[2], four.z - norms[g]), best[3] = fmaxf(best[3], four.w - norms[g]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i >= count) break;
      keys[first + i] = ordered(best[i]);
      each(best[i]);
    }
  }
}

/// The bin of the `wanted`-th best score, and how many lie in better ones.
__device__ inline void find_bin(TopRoom& room, int wanted) {
  constexpr int OWN = SELECT_BINS / SELECT_THREADS;
  int own[OWN], sum = 0;
#pragma unroll
  for (int i = 0; i < OWN; ++i) sum += own[i] = room.bins[threadIdx.x * OWN + i];
  uint64_t total;
  int before = static_cast<int>(scan_block(sum, room.scan, total));
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    if (before < wanted && wanted <= before + own[i]) {
      room.bin = threadIdx.x * OWN + i, room.above = before;
    }
    before += own[i];
  }
  __syncthreads();
}

/// Find the last key that is wanted, and the highest id that may have it. False where its bin
/// holds too many, or all that is far away.
__device__ inline bool find_cut(TopRoom& room, const uint32_t* keys, int count, int wanted,
                                float best) {
  find_bin(room, wanted);
  if (room.bin == SELECT_BINS - 1 || room.bins[room.bin] > MOST_TIED) return false;
  for (int c = threadIdx.x; c < count; c += blockDim.x) {
    if (keys[c] && bin_of(best, score_of(keys[c])) == room.bin) {
      const int place = atomicAdd(&room.tied, 1);
      room.keys[place] = keys[c], room.ids[place] = c;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < room.tied; i += blockDim.x) {
    const uint32_t key = room.keys[i];
    const int id = room.ids[i];
    int ahead = room.above;
    for (int j = 0; j < room.tied; ++j) {
      ahead += room.keys[j] > key || (room.keys[j] == key && room.ids[j] < id);
    }
    if (ahead == wanted - 1) room.cut_key = key, room.cut_id = id;
  }
  __syncthreads();
  return true;
}

/// Write the ids of keys above the cut, and of those equal to it up to its id, ascending.
__device__ inline void write_chosen(TopRoom& room, const uint32_t* keys, int count, int* ids) {
  const uint32_t cut = room.cut_key;
  const int last = room.cut_id;
  auto is_chosen = [&](int c) { return keys[c] > cut || (keys[c] == cut && c <= last); };
  // A thread owns a run of keys of odd length: neighbours read other banks.
  const int run = ((count + SELECT_THREADS - 1) / SELECT_THREADS) | 1;
  const int first = min(static_cast<int>(threadIdx.x) * run, count);
  const int end = min(first + run, count);
  int mine = 0;
  for (int c = first; c < end; ++c) mine += is_chosen(c);
  uint64_t total;
  int place = static_cast<int>(scan_block(mine, room.scan, total));
  for (int c = first; c < end; ++c) {
    if (is_chosen(c)) ids[place++] = c;
  }
}

/// The ids of the best chunks of a row and KV head, ascending, then -1: a block's, with `keys` for it.
__device__ inline void write_best(const SelectParams& p, TopRoom& room,
                                  DigitRoom<SELECT_DIGIT_BITS>& digits, uint32_t* keys) {
  const int64_t plane = static_cast<int64_t>(blockIdx.y) * p.heads + blockIdx.x;
  const int count = max(min(p.num_chunks[blockIdx.y], p.chunks), 0);
  int* ids = p.ids + plane * p.max_chunks;

  for (int i = threadIdx.x; i < SELECT_BINS; i += blockDim.x) room.bins[i] = 0;
  if (threadIdx.x == 0) room.tied = 0;
  find_norms(p, plane, room.norms, room.highest);
  __syncthreads();
  float best = -INFINITY;
  for (int g = 0; g < p.group; ++g) best = fmaxf(best, room.highest[g] - room.norms[g]);
  uint64_t mine = 0, selectable;
  rank_chunks(p, plane, count, room.norms, keys, [&](float score) {
    if (score == -INFINITY) return;
    ++mine;
    atomicAdd(&room.bins[bin_of(best, score)], 1);
  });
  scan_block(mine, room.scan, selectable);
  const int wanted = min(max(min(p.budget_chunks[blockIdx.y], p.max_chunks), 0),
                         static_cast<int>(selectable));
  for (int i = wanted + threadIdx.x; i < p.max_chunks; i += blockDim.x) ids[i] = -1;
  if (wanted == 0) return;
  if (find_cut(room, keys, count, wanted, best)) {
    write_chosen(room, keys, count, ids);
  } else {
    write_highest(keys, count, wanted, ids, digits);
  }
}

/// Grid [Hk, R]: the ids of the best chunks of each row and KV head.
///
/// SHARED: the keys of a plane, a multiple of four, fit shared memory beside the room.
template <bool SHARED>
__global__ void __launch_bounds__(SELECT_THREADS, SHARED ? 2 : 1)
    select_best(const __grid_constant__ SelectParams p) {
  extern __shared__ __align__(16) char shared[];
  __shared__ DigitRoom<SELECT_DIGIT_BITS> digits;
  const int64_t plane = static_cast<int64_t>(blockIdx.y) * p.heads + blockIdx.x;
  uint32_t* keys = SHARED ? reinterpret_cast<uint32_t*>(shared + sizeof(TopRoom))
                          : p.keys + plane * p.chunks;
  write_best(p, *reinterpret_cast<TopRoom*>(shared), digits, keys);
  __syncthreads();
  if (threadIdx.x == 0 && p.done) count_done(p.done + blockIdx.y, SELECT_PARTS);
}

}  // namespace shadowkv
