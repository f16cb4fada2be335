// How the blocks of a cluster find the last key that is wanted, and write what is chosen.
#pragma once

#include "common/block.cuh"
#include "common/cluster.cuh"
#include "select_order.cuh"
#include "select_params.h"

namespace shadowkv {

struct CutRoom {
  uint32_t bins[SELECT_BINS / 2];  // two counts of 16 bits a word
  uint2 tied[MOST_TIED];           // key and id, rank by rank: first a block's own, then all
};

struct alignas(128) ClusterRoom {
  union {
    char ring[CLUSTER_RING_BYTES];  // landmarks on their way, first
    CutRoom cut;                    // then what finds the last key
  };
  uint64_t barriers[CLUSTER_THREADS / 32][CLUSTER_STAGES];
  uint64_t scan[33];
  float2 totals[MAX_QUERY_GROUP], of_warps[CLUSTER_THREADS / 32][MAX_QUERY_GROUP];
  float norms[MAX_QUERY_GROUP], peaks[MAX_QUERY_GROUP];
  int bin, above;             // the bin of the last key wanted; keys in better ones
  int in_bin, in_bin_before;  // keys in it, of all blocks and of lower ranks
  int ends[CLUSTER_BLOCKS];   // where a rank's part of `tied` ends
  int placed, cut_id;
  uint32_t cut_key;
};

constexpr int OWN_BINS = SELECT_BINS / CLUSTER_THREADS;
static_assert(OWN_BINS == 8, "a thread reads its bins as one word of 16 bytes");

/// Keys lie where head 0's logits lay.
__device__ inline uint32_t key_at(const float* scores, int c) { return __float_as_uint(scores[c]); }
__device__ inline void set_key(float* scores, int c, uint32_t key) {
  scores[c] = __uint_as_float(key);
}

__device__ inline void clear_bins(ClusterRoom& room) {
  for (int i = threadIdx.x; i < SELECT_BINS / 2; i += CLUSTER_THREADS) room.cut.bins[i] = 0;
}

/// Counts of 16 bits: a row has at most MOST_CLUSTER_CHUNKS.
__device__ inline void count_in_bin(ClusterRoom& room, int bin) {
  atomicAdd(&room.cut.bins[bin / 2], bin % 2 ? 1u << 16 : 1u);
}

__device__ inline int count_of(uint32_t two, int bin) {
  return static_cast<int>(bin % 2 ? two >> 16 : two & 0xffffu);
}

/// Find the bin of the `wanted`-th key of the cluster, lowest bin first; fewer are wanted where fewer
/// are there. Returns how many keys lower ranks have in the better ones of this thread's bins.
__device__ inline int find_cluster_bin(ClusterRoom& room, int rank, int& wanted) {
  uint32_t of_all[OWN_BINS / 2] = {}, of_lower[OWN_BINS / 2] = {};  // two sums a word, too
#pragma unroll
  for (int r = 0; r < CLUSTER_BLOCKS; ++r) {
    const uint4 four = reinterpret_cast<const uint4*>(of_rank(room.cut.bins, r))[threadIdx.x];
    const uint32_t words[OWN_BINS / 2] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < OWN_BINS / 2; ++i) {
      of_all[i] += words[i];
      of_lower[i] += r < rank ? words[i] : 0;
    }
  }
  int sum = 0;
#pragma unroll
  for (int i = 0; i < OWN_BINS; ++i) sum += count_of(of_all[i / 2], i);
  uint64_t total;
  int before = static_cast<int>(scan_block(sum, room.scan, total));
  wanted = min(wanted, static_cast<int>(total));
  if (wanted == 0) return 0;
  const int first = threadIdx.x * OWN_BINS;
#pragma unroll
  for (int i = 0; i < OWN_BINS; ++i) {
    const int own = count_of(of_all[i / 2], i);
    if (before < wanted && wanted <= before + own) {
      room.bin = first + i, room.above = before;
      room.in_bin = own, room.in_bin_before = count_of(of_lower[i / 2], i);
    }
    before += own;
  }
  __syncthreads();
  int in_lower = 0;
#pragma unroll
  for (int i = 0; i < OWN_BINS; ++i) {
    in_lower += first + i < room.bin ? count_of(of_lower[i / 2], i) : 0;
  }
  return in_lower;
}

/// Find the last key that is wanted, and the highest id that may have it, by comparing all keys of
/// its bin with each other. Returns the chosen ones of lower ranks that this thread has seen.
/// Arrives at the barrier behind which no other block's memory is read.
__device__ inline int cut_by_list(ClusterRoom& room, int rank, const float* scores, int first,
                                  int chunks, int wanted, float best) {
  const int all = room.in_bin, begin = room.in_bin_before;
  if (threadIdx.x < 32) {  // While other warps look for the keys.
    const int r = threadIdx.x % CLUSTER_BLOCKS;
    int end = count_of(of_rank(room.cut.bins, r)[room.bin / 2], room.bin);
#pragma unroll
    for (int step = 1; step < CLUSTER_BLOCKS; step *= 2) {
      const int before = __shfl_up_sync(ALL_LANES, end, step);
      if (r >= step) end += before;
    }
    if (threadIdx.x < CLUSTER_BLOCKS) room.ends[r] = end;
  }
  for (int c = threadIdx.x; c < chunks; c += CLUSTER_THREADS) {
    const uint32_t key = key_at(scores, c);
    if (key && bin_of(best, score_of(key)) == room.bin) {
      const int place = begin + atomicAdd(&room.placed, 1);
      room.cut.tied[place] = make_uint2(key, static_cast<uint32_t>(first + c));
    }
  }
  cluster_sync();
  for (int i = threadIdx.x; i < all; i += CLUSTER_THREADS) {
    int owner = 0;
#pragma unroll
    for (int r = 0; r < CLUSTER_BLOCKS - 1; ++r) owner += room.ends[r] <= i;
    if (owner != rank) room.cut.tied[i] = of_rank(room.cut.tied, owner)[i];
  }
  cluster_arrive();
  __syncthreads();
  for (int i = threadIdx.x; i < all; i += CLUSTER_THREADS) {
    const uint2 one = room.cut.tied[i];
    int ahead = room.above;
    for (int j = 0; j < all; ++j) {
      const uint2 other = room.cut.tied[j];
      ahead += other.x > one.x || (other.x == one.x && other.y < one.y);
    }
    if (ahead == wanted - 1) room.cut_key = one.x, room.cut_id = static_cast<int>(one.y);
  }
  __syncthreads();
  int in_lower = 0;
  for (int i = threadIdx.x; i < begin; i += CLUSTER_THREADS) {
    const uint2 one = room.cut.tied[i];
    in_lower += one.x > room.cut_key ||
                (one.x == room.cut_key && static_cast<int>(one.y) <= room.cut_id);
  }
  return in_lower;
}

/// The same for any keys, 11 bits at a time, where a bin holds too many of them. Returns the chosen
/// ones of lower ranks that this thread has counted, those in better bins too.
__device__ inline int cut_by_digits(ClusterRoom& room, int rank, const float* scores, int first,
                                    int chunks, int wanted) {
  constexpr int BITS = 11;
  static_assert(1 << BITS == SELECT_BINS);
  uint32_t prefix = 0;
  int in_lower = 0;
  for (int left = 32; left > 0;) {
    const int bits = min(left, BITS), highest_digit = (1 << bits) - 1;
    left -= bits;
    cluster_sync();  // Everybody has read the bins.
    clear_bins(room);
    __syncthreads();
    for (int c = threadIdx.x; c < chunks; c += CLUSTER_THREADS) {
      const uint32_t key = key_at(scores, c);
      const bool same = left + bits == 32 || key >> (left + bits) == prefix;
      if (key && same) {
        count_in_bin(room, highest_digit - static_cast<int>(key >> left & highest_digit));
      }
    }
    cluster_sync();
    in_lower += find_cluster_bin(room, rank, wanted);
    wanted -= room.above;
    prefix = prefix << bits | static_cast<uint32_t>(highest_digit - room.bin);
  }
  cluster_arrive();
  // Of equal keys the first `wanted` in the order of ranks and ids.
  const int before = room.in_bin_before, ties = max(wanted - before, 0);
  if (threadIdx.x == 0) {
    in_lower += min(before, wanted);
    room.cut_key = prefix;
    room.cut_id = ties == 0 ? -1 : INT32_MAX;
  }
  const int run = (chunks + CLUSTER_THREADS - 1) / CLUSTER_THREADS;
  const int begin = min(static_cast<int>(threadIdx.x) * run, chunks), end = min(begin + run, chunks);
  int mine = 0;
  for (int c = begin; c < end; ++c) mine += key_at(scores, c) == prefix;
  uint64_t total;
  int place = static_cast<int>(scan_block(mine, room.scan, total));
  for (int c = begin; c < end; ++c) {
    if (key_at(scores, c) == prefix && ++place == ties) room.cut_id = first + c;
  }
  __syncthreads();
  return in_lower;
}

/// Write a block's ids of keys above the cut, and of those equal to it up to its id, ascending.
/// `in_lower`: summed over the threads, the ids that lower ranks write.
__device__ inline void write_share(ClusterRoom& room, const float* scores, int first, int chunks,
                                   int in_lower, int* ids) {
  const uint32_t cut = room.cut_key;
  const int last = room.cut_id;
  auto is_chosen = [&](int c) {
    const uint32_t key = key_at(scores, c);
    return key > cut || (key == cut && first + c <= last);
  };
  // A thread owns a run of keys of odd length: neighbours read other banks.
  const int run = ((chunks + CLUSTER_THREADS - 1) / CLUSTER_THREADS) | 1;
  const int begin = min(static_cast<int>(threadIdx.x) * run, chunks), end = min(begin + run, chunks);
  int mine = 0;
  for (int c = begin; c < end; ++c) mine += is_chosen(c);
  const uint64_t both = static_cast<uint64_t>(in_lower) << 32 | static_cast<uint32_t>(mine);
  uint64_t total;
  const uint64_t before = scan_block(both, room.scan, total);
  int place = static_cast<int>(total >> 32) + static_cast<int>(before & 0xffffffffu);
  for (int c = begin; c < end; ++c) {
    if (is_chosen(c)) ids[place++] = first + c;
  }
}

}  // namespace shadowkv
