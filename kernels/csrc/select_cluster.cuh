// select_chunks as one kernel, where GPUs have clusters: the logits never leave shared memory.
//
// As many clusters as run at once take planes, each a row and KV head, in turns. The blocks of one
// take a range of its chunks each, so that ids ascend with ranks. They send each other up to four
// messages: softmax totals; how many scores lie how far below the best, in coarse bins; the same in
// the finer ones of a coarse bin; the few keys of the bin that holds the last one wanted. Every
// block works out the same from them, where its own ids begin too. Meanwhile other warps score the
// next planes, so that landmarks are read all the time; and since all blocks have begun, kernels
// beside this one cannot take their room. Few loops are unrolled: in a layer other kernels drive
// the instructions out of the caches, and reading 100 KiB of them took longer than ranking.
#pragma once

#include "common/progress.cuh"
#include "select_cluster_cut.cuh"
#include "select_cluster_scores.cuh"

namespace shadowkv {

/// Of a plane, what a block has to rank.
struct Ranked {
  float* logits;  // [G, stride]
  int stride;
  uint64_t* free;  // where to arrive when the logits were read; or null
  Share own;
  int wanted, most;  // ids to write, and to fill up with -1
  int* ids;
};

/// Four flags, a byte each, of chunks from `first` on; those behind the last are barred.
__device__ __noinline__ uint32_t read_flags(const bool* excluded, int first, int chunks) {
  uint32_t flags = 0;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const bool is_barred = first + i >= chunks || excluded[first + i];
    flags |= static_cast<uint32_t>(is_barred) << (8 * i);
  }
  return flags;
}

/// Which of a thread's chunks are barred: bit 4 k + i of its i-th of the k-th time.
__device__ inline uint64_t find_barred(const bool* excluded, int chunks) {
  constexpr int STEP = RANK_THREADS * 4, AT_ONCE = 4;
  const bool in_words = reinterpret_cast<uint64_t>(excluded) % 4 == 0;
  uint64_t barred = 0;
  int bit = 0;
#pragma unroll 1
  for (int first = Rankers::index() * 4; first < chunks; first += AT_ONCE * STEP) {
    uint32_t flags[AT_ONCE];
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {  // All are on their way before the first is there.
      const int at = first + k * STEP;
      if (in_words && at + 4 <= chunks) {
        flags[k] = *reinterpret_cast<const uint32_t*>(excluded + at);
      }
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k, bit += 4) {
      const int at = first + k * STEP;
      if (at >= chunks) break;
      if (!in_words || at + 4 > chunks) flags[k] = read_flags(excluded, at, chunks);
      const uint32_t bits = (flags[k] | flags[k] >> 7 | flags[k] >> 14 | flags[k] >> 21) & 0xf;
      barred |= static_cast<uint64_t>(bits) << bit;
    }
  }
  return barred;
}

/// Bar chunks, whose logits may be anything, and tell all blocks each query head's highest logit of
/// this one and the sum of 2^(logit - highest).
__device__ inline void send_totals(RankRoom& room, const ClusterMail& mail, const Ranked& plane,
                                   int group, uint64_t barred, int blocks, int rank) {
  const int lane = Rankers::index() % 32, warp = Rankers::index() / 32;
#pragma unroll 1
  for (int g = 0; g < group; ++g) {
    float highest = -INFINITY, sum = 0;
    int bit = 0;
#pragma unroll 2
    for (int first = Rankers::index() * 4; first < plane.own.chunks;
         first += RANK_THREADS * 4, bit += 4) {
      float4* logits = reinterpret_cast<float4*>(plane.logits + g * plane.stride + first);
      float4 four = *logits;
      const int bits = static_cast<int>(barred >> bit) & 0xf;
      if (bits) {
        if (bits & 1) four.x = -INFINITY;
        if (bits & 2) four.y = -INFINITY;
        if (bits & 4) four.z = -INFINITY;
        if (bits & 8) four.w = -INFINITY;
        *logits = four;
      }
      const float next =
          fmaxf(highest, fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)));
      sum = sum * weight(highest, next) + weight(four.x, next) + weight(four.y, next) +
            weight(four.z, next) + weight(four.w, next);
      highest = next;
    }
    const float of_warp = warp_max(highest);
    sum = warp_sum(sum * weight(highest, of_warp));
    if (lane == 0) room.of_warps[warp][g] = make_float2(of_warp, sum);
  }
  Rankers::sync();
  static_assert(RANK_THREADS == MOST_CLUSTER_BLOCKS * MAX_QUERY_GROUP, "a thread tells one of one");
  const int to = Rankers::index() / MAX_QUERY_GROUP, g = Rankers::index() % MAX_QUERY_GROUP;
  if (to >= blocks || g >= group) return;
  float highest = -INFINITY, total = 0;
#pragma unroll
  for (int w = 0; w < RANK_WARPS; ++w) highest = fmaxf(highest, room.of_warps[w][g].x);
#pragma unroll
  for (int w = 0; w < RANK_WARPS; ++w) {
    const float2 own = room.of_warps[w][g];
    total += own.y * weight(own.x, highest);
  }
  mail.send(&room.totals[rank][g], to, __float_as_uint(highest), __float_as_uint(total));
}

/// Softmax norms of the query heads and each one's best score, from the totals of all blocks.
__device__ inline void find_cluster_norms(RankRoom& room, int group, int blocks) {
  const int g = Rankers::index() / MOST_CLUSTER_BLOCKS;
  const int rank = Rankers::index() % MOST_CLUSTER_BLOCKS;
  float2 own = make_float2(-INFINITY, 0.f);
  if (g < group && rank < blocks) own = room.totals[rank][g];
  float highest = own.x;
#pragma unroll
  for (int other = 1; other < MOST_CLUSTER_BLOCKS; other *= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, other));
  }
  float total = own.y * weight(own.x, highest);
#pragma unroll
  for (int other = 1; other < MOST_CLUSTER_BLOCKS; other *= 2) {
    total += __shfl_xor_sync(ALL_LANES, total, other);
  }
  if (rank == 0 && g < group) {
    const float norm = highest == -INFINITY ? 0.f : highest + log2f(total);
    room.norms[g] = norm, room.peaks[g] = highest - norm;
  }
}

/// Key of each chunk, and into the bins by its distance to `best`.
__device__ inline void find_keys(RankRoom& room, const Ranked& plane, int group, uint32_t* keys,
                                 float best_of_all) {
#pragma unroll 1
  for (int first = Rankers::index() * 4; first < plane.own.chunks; first += RANK_THREADS * 4) {
    float best[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll 2
    for (int g = 0; g < group; ++g) {
      const float norm = room.norms[g];
      const float4 four = *reinterpret_cast<const float4*>(plane.logits + g * plane.stride + first);
      best[0] = fmaxf(best[0], four.x - norm), best[1] = fmaxf(best[1], four.y - norm);
      best[2] = fmaxf(best[2], four.z - norm), best[3] = fmaxf(best[3], four.w - norm);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i >= plane.own.chunks) break;
      keys[first + i] = ordered(best[i]);
      if (best[i] != -INFINITY) count_in_bin(room, bin_of(best_of_all, best[i]));
    }
  }
}

/// Rank a block's chunks of a plane and write its ids.
__device__ inline void rank_plane(RankRoom& room, ClusterMail& mail, Meeting& meeting,
                                  const Ranked& plane, uint64_t barred, int group, int blocks,
                                  int rank, uint32_t* keys) {
  const int first = plane.own.first, chunks = plane.own.chunks;
  if (Rankers::index() == 0) {
    room.placed = 0;
    mail.expect(blocks * group * sizeof(float2));
  }
  send_totals(room, mail, plane, group, barred, blocks, rank);
  clear_bins(room);
  mail.wait();
  find_cluster_norms(room, group, blocks);
  Rankers::sync();
  float best = -INFINITY;
#pragma unroll 1
  for (int g = 0; g < group; ++g) best = fmaxf(best, room.peaks[g]);
  find_keys(room, plane, group, keys, best);
  Rankers::sync();
  if (Rankers::index() == 0 && plane.free) arrive(plane.free);

  int wanted = plane.wanted;
  const Cut cut = find_bin(room, mail, blocks, rank, wanted);
#pragma unroll 1
  for (int i = wanted + rank * RANK_THREADS + Rankers::index(); i < plane.most;
       i += blocks * RANK_THREADS) {
    plane.ids[i] = -1;
  }
  if (wanted > 0) {
    int in_lower;  // Of this thread: ids that lower ranks write.
    if (cut.bin < SELECT_BINS - 1 && cut.in_bin <= MOST_TIED) {
      in_lower = cut_by_list(room, mail, cut, blocks, rank, keys, first, chunks, wanted, best);
      if (Rankers::index() == 0) in_lower += cut.lower_above;
    } else {
      in_lower = cut_by_digits(room, meeting, blocks, rank, keys, first, chunks, wanted);
    }
    write_share(room, keys, first, chunks, in_lower, plane.ids);
  }
  Rankers::sync();
}

/// A plane of a few chunks that nobody wants: ranking it brings the instructions near, which other
/// kernels have driven away, while the first plane is scored.
__device__ inline Ranked plane_of_rehearsal(RankRoom& room, uint32_t* keys, int rank) {
  Ranked plane{};
  plane.logits = reinterpret_cast<float*>(keys);  // all heads' the same
  if (Rankers::index() < REHEARSED) plane.logits[Rankers::index()] = Rankers::index();
  plane.own.first = rank * REHEARSED, plane.own.chunks = REHEARSED;
  plane.wanted = plane.most = REHEARSED;
  plane.ids = room.rehearsed;
  Rankers::sync();
  return plane;
}

/// Rank the chunks that `score_planes` scores.
__device__ inline void rank_planes(const SelectParams& p, int rank, ClusterRoom& all,
                                   float* logits) {
  const int part = Rankers::part(), step = RANK_PARTS * p.clusters;
  uint32_t* keys = reinterpret_cast<uint32_t*>(logits + p.buffers * p.group * p.share_stride) +
                   part * p.share_keys;
  RankRoom& room = all.parts[part];
  ClusterMail mail(room.sent);
  Meeting meeting(room.met, p.blocks);
  int n = part - RANK_PARTS;
#pragma unroll 1
  for (int plane = first_plane(p) + n * p.clusters; plane < p.planes;
       plane += step, n += RANK_PARTS) {
    Ranked ranked;
    uint64_t barred = 0;
    if (n < 0) {
      ranked = plane_of_rehearsal(room, keys, rank);
    } else {
      ranked.own = share_of(p, plane, rank);
      ranked.logits = logits + n % p.buffers * p.group * p.share_stride;
      ranked.stride = p.share_stride;
      ranked.free = &all.ranked[n % 2];
      ranked.most = p.max_chunks;
      ranked.wanted = max(min(p.budget_chunks[ranked.own.row], p.max_chunks), 0);
      ranked.ids = p.ids + static_cast<int64_t>(plane) * p.max_chunks;
      barred = find_barred(p.excluded + ranked.own.row * p.excluded_row +
                               ranked.own.head * p.excluded_head + ranked.own.first,
                           ranked.own.chunks);
      while (!is_complete(&all.scored[n % 2], n / 2 % 2)) {
      }
    }
    rank_plane(room, mail, meeting, ranked, barred, p.group, p.blocks, rank, keys);
    if (Rankers::index() == 0 && n >= 0 && p.done) {
      count_done(p.done + ranked.own.row, SELECT_PARTS / p.blocks);
    }
  }
}

/// Grid: blocks of whole clusters of 4 or 8, at most as many as run at once. Ids of the best chunks
/// of each row and KV head, ascending, then -1.
///
/// HALVES: 1 where at most 8 query heads share a KV head, else 2.
template <typename T, typename Stored, int D, int HALVES>
__global__ void __launch_bounds__(HALVES == 1 ? MOST_REGISTER_THREADS : CLUSTER_THREADS)
    select_in_cluster(const __grid_constant__ SelectParams p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char cluster_shared[];
  ClusterRoom& room = *reinterpret_cast<ClusterRoom*>(cluster_shared);
  float* logits = reinterpret_cast<float*>(cluster_shared + sizeof(ClusterRoom));
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      init_barrier(&room.scored[i], SCORERS);
      init_barrier(&room.ranked[i]);
      for (RankRoom& part : room.parts) {
        init_barrier(&part.sent[i]);
        init_barrier(&part.met[i], p.blocks);
      }
    }
  }
  __syncthreads();
  cluster_arrive();
  if (threadIdx.x < RANK_PARTS * RANK_THREADS) {
    cluster_wait();  // Barriers are there in all blocks.
    rank_planes(p, rank, room, logits);
  } else {
    score_planes<T, Stored, D, HALVES>(p, rank, room, logits);
    cluster_wait();
  }
#else
  __trap();  // The host asks what the kernel was compiled for.
#endif
}

}  // namespace shadowkv
