// What a block of a cluster has in shared memory, and which part of a plane is its.
#pragma once

#include "common/block.cuh"
#include "common/cluster.cuh"
#include "select_order.cuh"
#include "select_params.h"

namespace shadowkv {

/// The threads that rank a plane.
using Rankers = PartOfBlock<RANK_THREADS>;
using Meeting = ClusterMeeting<Rankers>;

struct alignas(16) RankRoom {
  uint32_t bins[SELECT_BINS / 2];  // two counts of 16 bits a word
  uint2 tied[MOST_TIED];           // key and id, rank by rank: first a block's own, then all
  uint64_t met[2];
  uint32_t scan[33];
  float highest[RANK_THREADS / 32][MAX_QUERY_GROUP], sums[RANK_THREADS / 32][MAX_QUERY_GROUP];
  float2 totals[MAX_QUERY_GROUP];
  float norms[MAX_QUERY_GROUP], peaks[MAX_QUERY_GROUP];
  int bin, above;                 // the bin of the last key wanted; keys in better ones
  int in_bin, in_bin_before;      // keys in it, of all blocks and of lower ranks
  int ends[MOST_CLUSTER_BLOCKS];  // where a rank's part of `tied` ends
  int placed, cut_id;
  uint32_t cut_key;
  int rehearsed[REHEARSED];  // ids that nobody wants
};

/// Behind it lie logits, `buffers` of [G, share_stride], planes in turns; and keys of each part.
struct alignas(128) ClusterRoom {
  char ring[SCORERS][CLUSTER_WARP_BYTES];                       // landmarks on their way
  float scales[SCORERS][CLUSTER_STAGES][MOST_STAGE_LANDMARKS];  // of those in 8 bits
  RankRoom parts[RANK_PARTS];
  uint64_t arrived[SCORERS][CLUSTER_STAGES];
  uint64_t scored[2], ranked[2];  // of every other plane: logits are there, nobody needs them
};

/// The chunks of a plane, a row and KV head, that a block of its cluster takes.
struct Share {
  int row, head;
  int first, chunks;
};

/// By the row's own count, so that the blocks of a short row have equal shares too.
__device__ inline Share share_of(const SelectParams& p, int plane, int rank) {
  Share own;
  own.row = plane / p.heads, own.head = plane - own.row * p.heads;
  const int count = max(min(p.num_chunks[own.row], p.chunks), 0);
  const int share = cluster_share(count, p.blocks);
  own.first = min(rank * share, count), own.chunks = min(share, count - own.first);
  return own;
}

/// The first plane of this cluster, which takes every `clusters`-th from there on.
__device__ inline int first_plane(const SelectParams& p) { return blockIdx.x / p.blocks; }

}  // namespace shadowkv
