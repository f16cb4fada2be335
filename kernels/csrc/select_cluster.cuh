// select_chunks as one kernel, where GPUs have clusters: the logits never leave shared memory.
//
// Eight blocks serve a row and KV head, each a range of its chunks, so that ids ascend with ranks.
// They exchange three things, each written before a barrier of the cluster and read behind it:
// softmax totals; histograms of how far scores lie below the best; the few keys of the bin that
// holds the last one wanted. Every block works out the same from them, where its own ids begin too.
#pragma once

#include "common/cluster.cuh"
#include "select_cluster_cut.cuh"
#include "select_cluster_scores.cuh"

namespace shadowkv {

/// Softmax norms of the query heads and each one's best score, from the totals of all blocks.
__device__ inline void find_cluster_norms(ClusterRoom& room, int group) {
  const int g = threadIdx.x / CLUSTER_BLOCKS, rank = threadIdx.x % CLUSTER_BLOCKS;
  if (threadIdx.x / 32 * 32 >= MAX_QUERY_GROUP * CLUSTER_BLOCKS) return;  // whole warps
  Softmax softmax;
  if (g < group) {
    const float2 own = of_rank(room.totals, rank)[g];
    softmax.highest = own.x, softmax.total = own.y;
  }
  softmax.add_lanes(CLUSTER_BLOCKS - 1);
  if (rank == 0 && g < group) {
    const bool any = softmax.highest != -INFINITY;
    const float norm = any ? softmax.highest + log2f(softmax.total) : 0.f;
    room.norms[g] = norm, room.peaks[g] = softmax.highest - norm;
  }
}

/// Key of each chunk into the place of head 0's logit, and into the bins by its distance to `best`.
__device__ inline void rank_share(const SelectParams& p, ClusterRoom& room, float* scores, int chunks,
                                  float best_of_all) {
  for (int first = threadIdx.x * 4; first < chunks; first += CLUSTER_THREADS * 4) {
    float best[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll 4
    for (int g = 0; g < p.group; ++g) {
      const float norm = room.norms[g];
      const float4 four = *reinterpret_cast<const float4*>(scores + g * p.share_stride + first);
      best[0] = fmaxf(best[0], four.x - norm), best[1] = fmaxf(best[1], four.y - norm);
      best[2] = fmaxf(best[2], four.z - norm), best[3] = fmaxf(best[3], four.w - norm);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i >= chunks) break;
      set_key(scores, first + i, ordered(best[i]));
      if (best[i] != -INFINITY) count_in_bin(room, bin_of(best_of_all, best[i]));
    }
  }
}

/// Grid [8, Hk, R] in clusters of 8: ids of the best chunks of a row and KV head, ascending, then -1.
///
/// HALVES: 1 where at most 8 query heads share a KV head, else 2.
template <typename T, typename Stored, int D, int HALVES>
__global__ void __launch_bounds__(CLUSTER_THREADS, HALVES == 1 ? 3 : 2)
    select_in_cluster(const __grid_constant__ SelectParams p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char cluster_shared[];
  ClusterRoom& room = *reinterpret_cast<ClusterRoom*>(cluster_shared);
  float* scores = reinterpret_cast<float*>(cluster_shared + sizeof(ClusterRoom));
  const int64_t r = blockIdx.z, head = blockIdx.y, plane = r * p.heads + head;
  const int64_t prompt = p.prompt_index[r];
  const int count = max(min(p.num_chunks[r], p.chunks), 0);
  // By the row's own count, so that the blocks of a short row have equal shares too.
  const int share = cluster_share(count), rank = cluster_rank();
  const int first = min(rank * share, count), chunks = min(share, count - first);

  const int64_t first_landmark = static_cast<int64_t>(first) * p.per_chunk;
  score_share<T, Stored, D, HALVES>(
      p, static_cast<const T*>(p.query) + plane * p.group * D,
      static_cast<const Stored*>(p.landmarks) + prompt * p.landmark_prompt +
          head * p.landmark_head + first_landmark * D,
      p.scales + (p.scales ? prompt * p.scale_prompt + head * p.scale_head + first_landmark : 0),
      p.excluded + r * p.excluded_row + head * p.excluded_head + first, chunks, scores, room);
  __syncthreads();
  start_following();  // Its landmarks are read while this one ranks its chunks.
  if (threadIdx.x < p.group) {
    Softmax softmax;
    for (int w = 0; w < CLUSTER_WARPS; ++w) {
      const float2 one = room.of_warps[w][threadIdx.x];
      softmax.add(one.x, one.y);
    }
    room.totals[threadIdx.x] = make_float2(softmax.highest, softmax.total);
  }
  clear_bins(room);
  if (threadIdx.x == 0) room.placed = 0;
  cluster_sync();

  find_cluster_norms(room, p.group);
  __syncthreads();
  float best = -INFINITY;
  for (int g = 0; g < p.group; ++g) best = fmaxf(best, room.peaks[g]);
  rank_share(p, room, scores, chunks, best);
  cluster_sync();

  int* ids = p.ids + plane * p.max_chunks;
  // Of this thread's bins: chosen keys of lower ranks.
  int wanted = max(min(p.budget_chunks[r], p.max_chunks), 0);
  int in_lower = find_cluster_bin(room, rank, wanted);
  for (int i = wanted + rank * CLUSTER_THREADS + threadIdx.x; i < p.max_chunks;
       i += CLUSTER_BLOCKS * CLUSTER_THREADS) {
    ids[i] = -1;
  }
  if (wanted > 0) {
    if (room.bin < SELECT_BINS - 1 && room.in_bin <= MOST_TIED) {
      in_lower += cut_by_list(room, rank, scores, first, chunks, wanted, best);
    } else {
      in_lower = cut_by_digits(room, rank, scores, first, chunks, wanted);
    }
    write_share(room, scores, first, chunks, in_lower, ids);
  } else {
    cluster_arrive();
  }
  cluster_wait();  // Others may still read what lies here.
#else
  __trap();  // The host asks what the kernel was compiled for.
#endif
}

}  // namespace shadowkv
