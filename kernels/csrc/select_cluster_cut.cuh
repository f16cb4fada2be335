// How the blocks of a cluster find the last key that is wanted, and write what is chosen.
#pragma once

#include "select_cluster_room.cuh"

namespace shadowkv {

constexpr int OWN_BINS = SELECT_BINS / RANK_THREADS;  // of a thread
static_assert(OWN_BINS % 8 == 0, "a thread reads its bins as words of 16 bytes");

/// What is found of the bin of the last key wanted, in all blocks and in those of lower ranks.
struct Cut {
  int bin;
  int above, lower_above;  // keys in better bins
  int in_bin, lower_in_bin;
};

/// Sums of the values of the threads before this one, and of all: of two counts, in 16 bits each.
__device__ __noinline__ uint32_t scan_rankers(uint32_t value, uint32_t* room, uint32_t& total) {
  const int lane = Rankers::index() % 32, warp = Rankers::index() / 32;
  uint32_t sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t before = __shfl_up_sync(ALL_LANES, sum, step);
    if (lane >= step) sum += before;
  }
  Rankers::sync();  // The room may still be read from the call before.
  if (lane == 31) room[warp] = sum;
  Rankers::sync();
  uint32_t before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < RANK_WARPS; ++w) {
    const uint32_t of_warp = room[w];
    before += w < warp ? of_warp : 0;
    total += of_warp;
  }
  return before + sum - value;
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

/// Of 32 bins, a lane each, the one of the `wanted`-th key, lowest bin first; fewer are wanted where
/// fewer are there. `all` and `lower`: keys in a bin, of all blocks and of lower ranks. Every warp
/// works out the same.
__device__ __noinline__ Cut find_cut(int all, int lower, int& wanted) {
  const int lane = threadIdx.x % 32;
  const uint32_t both = static_cast<uint32_t>(all) << 16 | static_cast<uint32_t>(lower);
  uint32_t sum = both;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t before = __shfl_up_sync(ALL_LANES, sum, step);
    if (lane >= step) sum += before;
  }
  wanted = min(wanted, static_cast<int>(__shfl_sync(ALL_LANES, sum, 31) >> 16));
  const int before = static_cast<int>((sum - both) >> 16);
  const bool is_here = before < wanted && wanted <= before + all;
  Cut cut{};
  cut.bin = __ffs(__ballot_sync(ALL_LANES, is_here)) - 1;
  if (wanted == 0) return cut;
  const uint32_t above = __shfl_sync(ALL_LANES, sum - both, cut.bin);
  const uint32_t in_bin = __shfl_sync(ALL_LANES, both, cut.bin);
  cut.above = static_cast<int>(above >> 16), cut.lower_above = static_cast<int>(above & 0xffffu);
  cut.in_bin = static_cast<int>(in_bin >> 16), cut.lower_in_bin = static_cast<int>(in_bin & 0xffffu);
  return cut;
}

/// The same from counts of all ranks, whose `lane`-th this lane takes.
__device__ inline Cut find_cut(const uint32_t (*counts)[16], int blocks, int rank, int& wanted) {
  const int lane = threadIdx.x % 32;
  int all = 0, lower = 0;
#pragma unroll
  for (int r = 0; r < MOST_CLUSTER_BLOCKS; ++r) {
    if (r >= blocks) break;
    const int own = count_of(counts[r][lane / 2], lane);
    all += own, lower += r < rank ? own : 0;
  }
  return find_cut(all, lower, wanted);
}

/// Tell all blocks how many keys lie in each of this one's coarse bins. All warps do, so that each
/// has read the message before.
__device__ inline void send_coarse(RankRoom& room, const ClusterMail& mail, int blocks, int rank) {
  constexpr int SHARERS = RANK_THREADS / COARSE_BINS;  // of a coarse bin
  constexpr int WORDS = FINE_BINS / 2 / SHARERS;
  static_assert(SHARERS == 4 && WORDS == 4);
  const int lane = Rankers::index() % 32, warp = Rankers::index() / 32;
  const uint4 four = reinterpret_cast<const uint4*>(room.bins)[Rankers::index()];
  uint32_t sum = four.x + four.y + four.z + four.w;  // a block's share is far below 2^16
  sum = (sum & 0xffffu) + (sum >> 16);
  sum += __shfl_xor_sync(ALL_LANES, sum, 1);
  sum += __shfl_xor_sync(ALL_LANES, sum, 2);
  sum |= __shfl_xor_sync(ALL_LANES, sum, 4) << 16;  // of lanes 0, 8, 16, 24
  const uint4 words = make_uint4(__shfl_sync(ALL_LANES, sum, 0), __shfl_sync(ALL_LANES, sum, 8),
                                 __shfl_sync(ALL_LANES, sum, 16), __shfl_sync(ALL_LANES, sum, 24));
  if (lane < blocks) mail.send(&room.coarse[rank][warp * 4], lane, words);
}

/// The same of the fine bins that a coarse one consists of.
__device__ inline void send_fine(RankRoom& room, const ClusterMail& mail, int blocks, int rank,
                                 int coarse) {
  const int lane = Rankers::index() % 32, warp = Rankers::index() / 32;
  if (lane >= blocks) return;
  const uint32_t* words = room.bins + coarse * (FINE_BINS / 2) + warp * 4;
  mail.send(&room.fine[rank][warp * 4], lane, *reinterpret_cast<const uint4*>(words));
}

/// Find the bin of the `wanted`-th key of the cluster; fewer are wanted where fewer are there.
__device__ inline Cut find_bin(RankRoom& room, ClusterMail& mail, int blocks, int rank,
                               int& wanted) {
  if (Rankers::index() == 0) mail.expect(blocks * sizeof(room.coarse[0]));
  send_coarse(room, mail, blocks, rank);
  mail.wait();
  Cut coarse = find_cut(room.coarse, blocks, rank, wanted);
  if (wanted == 0) return coarse;
  if (Rankers::index() == 0) mail.expect(blocks * sizeof(room.fine[0]));
  send_fine(room, mail, blocks, rank, coarse.bin);
  mail.wait();
  int in_coarse = wanted - coarse.above;
  Cut cut = find_cut(room.fine, blocks, rank, in_coarse);
  cut.bin += coarse.bin * FINE_BINS;
  cut.above += coarse.above, cut.lower_above += coarse.lower_above;
  return cut;
}

/// Find the last key that is wanted, and the highest id that may have it, by comparing all keys of
/// its bin with each other. Returns the chosen ones of lower ranks that this thread has seen.
__device__ inline int cut_by_list(RankRoom& room, ClusterMail& mail, const Cut& cut, int blocks,
                                  int rank, const uint32_t* keys, int first, int chunks,
                                  int wanted, float best) {
  Rankers::sync();  // All warps have read the message before.
  if (Rankers::index() == 0) mail.expect((cut.in_bin + blocks) * sizeof(uint2));
  // Whoever has no such key says that it has come so far: the next message to it takes that place.
  if (Rankers::index() < blocks) {
    mail.send(&room.tied[cut.in_bin + rank], Rankers::index(), 0, 0);
  }
#pragma unroll 2
  for (int c = Rankers::index(); c < chunks; c += RANK_THREADS) {
    const uint32_t key = keys[c];
    if (key && bin_of(best, score_of(key)) == cut.bin) {
      const int place = cut.lower_in_bin + atomicAdd(&room.placed, 1);
#pragma unroll 1
      for (int r = 0; r < blocks; ++r) {
        mail.send(&room.tied[place], r, key, static_cast<uint32_t>(first + c));
      }
    }
  }
  mail.wait();
#pragma unroll 1
  for (int i = Rankers::index(); i < cut.in_bin; i += RANK_THREADS) {
    const uint2 one = room.tied[i];
    int ahead = cut.above;
#pragma unroll 4
    for (int j = 0; j < cut.in_bin; ++j) {
      const uint2 other = room.tied[j];
      ahead += other.x > one.x || (other.x == one.x && other.y < one.y);
    }
    if (ahead == wanted - 1) room.cut_key = one.x, room.cut_id = static_cast<int>(one.y);
  }
  Rankers::sync();
  int in_lower = 0;
#pragma unroll 1
  for (int i = Rankers::index(); i < cut.lower_in_bin; i += RANK_THREADS) {
    const uint2 one = room.tied[i];
    in_lower += one.x > room.cut_key ||
                (one.x == room.cut_key && static_cast<int>(one.y) <= room.cut_id);
  }
  return in_lower;
}

/// Find the bin of the `wanted`-th key of the cluster, lowest bin first, of which there are so many,
/// in the bins of all blocks. Returns how many keys lower ranks have in the better ones of this
/// thread's bins.
__device__ __noinline__ int find_cluster_bin(RankRoom& room, int blocks, int rank, int wanted) {
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

/// The same for any keys, 10 bits at a time, where a bin holds too many of them. Returns the chosen
/// ones of lower ranks that this thread has counted, those in better bins too.
__device__ __noinline__ int cut_by_digits(RankRoom& room, Meeting& meeting, int blocks, int rank,
                                          const uint32_t* keys, int first, int chunks, int wanted) {
  constexpr int BITS = 10;
  static_assert(1 << BITS == SELECT_BINS);
  uint32_t prefix = 0;
  int in_lower = 0;
  for (int left = 32; left > 0;) {
    const int bits = min(left, BITS), highest_digit = (1 << bits) - 1;
    left -= bits;
    // Everybody has read the bins, and the last message, whose place the next one takes.
    meeting.sync();
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
  meeting.sync();  // Nobody reads another block's bins any more.
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
