// How the blocks of a cluster find the last key that is wanted, and write what is chosen.
#pragma once

#include "select_cluster_room.cuh"

namespace shadowkv {

constexpr int OWN_BINS = SELECT_BINS / RANK_THREADS;
static_assert(OWN_BINS % 8 == 0, "a thread reads its bins as words of 16 bytes");

/// One for all who call it: instructions come from far away at every layer.
__device__ __noinline__ uint32_t scan_rankers(uint32_t value, uint32_t* room, uint32_t& total) {
  return scan_block<Rankers>(value, room, total);
}

__device__ inline void clear_bins(RankRoom& room) {
#pragma unroll 1
  for (int i = Rankers::index(); i < SELECT_BINS / 2; i += RANK_THREADS) room.bins[i] = 0;
}

/// Counts of 16 bits: a row has at most MOST_CLUSTER_CHUNKS.
__device__ inline void count_in_bin(RankRoom& room, int bin) {
  atomicAdd(&room.bins[bin / 2], bin % 2 ? 1u << 16 : 1u);
}

__device__ inline int count_of(uint32_t two, int bin) {
  return static_cast<int>(bin % 2 ? two >> 16 : two & 0xffffu);
}

/// Find the bin of the `wanted`-th key of the cluster, lowest bin first; fewer are wanted where fewer
/// are there. Returns how many keys lower ranks have in the better ones of this thread's bins.
__device__ __noinline__ int find_cluster_bin(RankRoom& room, int blocks, int rank, int& wanted) {
  uint32_t of_all[OWN_BINS / 2] = {}, of_lower[OWN_BINS / 2] = {};  // two sums a word, too
#pragma unroll
  for (int w = 0; w < OWN_BINS / 8; ++w) {
    uint4 fours[MOST_CLUSTER_BLOCKS];  // All are on their way before the first is there.
#pragma unroll
    for (int r = 0; r < MOST_CLUSTER_BLOCKS; ++r) {
      const uint4* bins = reinterpret_cast<const uint4*>(of_rank(room.bins, r < blocks ? r : rank));
      fours[r] = bins[Rankers::index() * (OWN_BINS / 8) + w];
    }
#pragma unroll
    for (int r = 0; r < MOST_CLUSTER_BLOCKS; ++r) {
      const uint32_t words[4] = {fours[r].x, fours[r].y, fours[r].z, fours[r].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        of_all[w * 4 + i] += r < blocks ? words[i] : 0;
        of_lower[w * 4 + i] += r < rank ? words[i] : 0;
      }
    }
  }
  uint32_t sum = 0, total;
#pragma unroll
  for (int i = 0; i < OWN_BINS; ++i) sum += count_of(of_all[i / 2], i);
  int before = static_cast<int>(scan_rankers(sum, room.scan, total));
  wanted = min(wanted, static_cast<int>(total));
  if (wanted == 0) return 0;
  const int first = Rankers::index() * OWN_BINS;
#pragma unroll
  for (int i = 0; i < OWN_BINS; ++i) {
    const int own = count_of(of_all[i / 2], i);
    if (before < wanted && wanted <= before + own) {
      room.bin = first + i, room.above = before;
      room.in_bin = own, room.in_bin_before = count_of(of_lower[i / 2], i);
    }
    before += own;
  }
  Rankers::sync();
  int in_lower = 0;
#pragma unroll
  for (int i = 0; i < OWN_BINS; ++i) {
    in_lower += first + i < room.bin ? count_of(of_lower[i / 2], i) : 0;
  }
  return in_lower;
}

/// Find the last key that is wanted, and the highest id that may have it, by comparing all keys of
/// its bin with each other. Returns the chosen ones of lower ranks that this thread has seen.
/// Arrives where it is known that no other block's memory is read.
__device__ inline int cut_by_list(RankRoom& room, Meeting& meeting, int blocks, int rank,
                                  const uint32_t* keys, int first, int chunks, int wanted,
                                  float best) {
  const int all = room.in_bin, begin = room.in_bin_before;
  if (Rankers::index() < 32) {  // While other warps look for the keys.
    const int r = Rankers::index() % MOST_CLUSTER_BLOCKS;
    int end = r < blocks ? count_of(of_rank(room.bins, r)[room.bin / 2], room.bin) : 0;
#pragma unroll
    for (int step = 1; step < MOST_CLUSTER_BLOCKS; step *= 2) {
      const int before = __shfl_up_sync(ALL_LANES, end, step);
      if (r >= step) end += before;
    }
    if (Rankers::index() < MOST_CLUSTER_BLOCKS) room.ends[r] = end;
  }
#pragma unroll 2
  for (int c = Rankers::index(); c < chunks; c += RANK_THREADS) {
    const uint32_t key = keys[c];
    if (key && bin_of(best, score_of(key)) == room.bin) {
      const int place = begin + atomicAdd(&room.placed, 1);
      room.tied[place] = make_uint2(key, static_cast<uint32_t>(first + c));
    }
  }
  meeting.sync();
#pragma unroll 1
  for (int i = Rankers::index(); i < all; i += RANK_THREADS) {
    int owner = 0;
#pragma unroll
    for (int r = 0; r < MOST_CLUSTER_BLOCKS - 1; ++r) owner += room.ends[r] <= i;
    if (owner != rank) room.tied[i] = of_rank(room.tied, owner)[i];
  }
  meeting.arrive();
  Rankers::sync();
#pragma unroll 1
  for (int i = Rankers::index(); i < all; i += RANK_THREADS) {
    const uint2 one = room.tied[i];
    int ahead = room.above;
#pragma unroll 4
    for (int j = 0; j < all; ++j) {
      const uint2 other = room.tied[j];
      ahead += other.x > one.x || (other.x == one.x && other.y < one.y);
    }
    if (ahead == wanted - 1) room.cut_key = one.x, room.cut_id = static_cast<int>(one.y);
  }
  Rankers::sync();
  int in_lower = 0;
#pragma unroll 1
  for (int i = Rankers::index(); i < begin; i += RANK_THREADS) {
    const uint2 one = room.tied[i];
    in_lower += one.x > room.cut_key ||
                (one.x == room.cut_key && static_cast<int>(one.y) <= room.cut_id);
  }
  return in_lower;
}

/// The same for any keys, 11 bits at a time, where a bin holds too many of them. Returns the chosen
/// ones of lower ranks that this thread has counted, those in better bins too.
__device__ __noinline__ int cut_by_digits(RankRoom& room, Meeting& meeting, int blocks, int rank,
                                    const uint32_t* keys, int first, int chunks, int wanted) {
  constexpr int BITS = 11;
  static_assert(1 << BITS == SELECT_BINS);
  uint32_t prefix = 0;
  int in_lower = 0;
  for (int left = 32; left > 0;) {
    const int bits = min(left, BITS), highest_digit = (1 << bits) - 1;
    left -= bits;
    meeting.sync();  // Everybody has read the bins.
    clear_bins(room);
    Rankers::sync();
#pragma unroll 1
    for (int c = Rankers::index(); c < chunks; c += RANK_THREADS) {
      const uint32_t key = keys[c];
      const bool same = left + bits == 32 || key >> (left + bits) == prefix;
      if (key && same) {
        count_in_bin(room, highest_digit - static_cast<int>(key >> left & highest_digit));
      }
    }
    meeting.sync();
    in_lower += find_cluster_bin(room, blocks, rank, wanted);
    wanted -= room.above;
    prefix = prefix << bits | static_cast<uint32_t>(highest_digit - room.bin);
  }
  meeting.arrive();
  // Of equal keys the first `wanted` in the order of ranks and ids.
  const int before = room.in_bin_before, ties = max(wanted - before, 0);
  if (Rankers::index() == 0) {
    in_lower += min(before, wanted);
    room.cut_key = prefix;
    room.cut_id = ties == 0 ? -1 : INT32_MAX;
  }
  const int run = (chunks + RANK_THREADS - 1) / RANK_THREADS;
  const int begin = min(Rankers::index() * run, chunks), end = min(begin + run, chunks);
  uint32_t mine = 0, total;
#pragma unroll 1
  for (int c = begin; c < end; ++c) mine += keys[c] == prefix;
  int place = static_cast<int>(scan_rankers(mine, room.scan, total));
#pragma unroll 1
  for (int c = begin; c < end; ++c) {
    if (keys[c] == prefix && ++place == ties) room.cut_id = first + c;
  }
  Rankers::sync();
  return in_lower;
}

/// Write a block's ids of keys above the cut, and of those equal to it up to its id, ascending.
/// `in_lower`: summed over the threads, the ids that lower ranks write.
__device__ inline void write_share(RankRoom& room, const uint32_t* keys, int first, int chunks,
                                   int in_lower, int* ids) {
  const uint32_t cut = room.cut_key;
  const int last = room.cut_id;
  auto is_chosen = [&](int c) {
    const uint32_t key = keys[c];
    return key > cut || (key == cut && first + c <= last);
  };
  // A thread owns a run of keys of odd length: neighbours read other banks.
  const int run = ((chunks + RANK_THREADS - 1) / RANK_THREADS) | 1;
  const int begin = min(Rankers::index() * run, chunks), end = min(begin + run, chunks);
  uint64_t chosen = 0;  // a bit each, of as many as it has
#pragma unroll 4
  for (int i = 0; i < min(end - begin, 64); ++i) {
    chosen |= static_cast<uint64_t>(is_chosen(begin + i)) << i;
  }
  const bool has_last = end - begin > 64 && is_chosen(begin + 64);
  // Two sums in a word: each is of no more chunks than a row has.
  const uint32_t both = static_cast<uint32_t>(in_lower) << 16 | (__popcll(chosen) + has_last);
  uint32_t total;
  const uint32_t before = scan_rankers(both, room.scan, total);
  int place = static_cast<int>((total >> 16) + (before & 0xffffu));
#pragma unroll 1
  for (; chosen; chosen &= chosen - 1) ids[place++] = first + begin + __ffsll(chosen) - 1;
  if (has_last) ids[place] = first + begin + 64;
}

}  // namespace shadowkv
