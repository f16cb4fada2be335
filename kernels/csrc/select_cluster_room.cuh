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

/// Bins are found in two messages: of the coarse ones, and of those that one of them consists of.
constexpr int COARSE_BINS = 32, FINE_BINS = SELECT_BINS / COARSE_BINS;
static_assert(COARSE_BINS == 32 && FINE_BINS == 32, "a lane of a warp takes one of each");
constexpr int RANK_WARPS = RANK_THREADS / 32;

/// Messages, from each rank one, take two places in turns. Of a pair of counts, 16 bits each.
struct alignas(16) RankRoom {
  uint32_t bins[SELECT_BINS / 2];
  union {
    float2 totals[MOST_CLUSTER_BLOCKS][MAX_QUERY_GROUP];  // highest logit, sum below it
    uint32_t fine[MOST_CLUSTER_BLOCKS][FINE_BINS / 2];
  };
  union {
    uint32_t coarse[MOST_CLUSTER_BLOCKS][COARSE_BINS / 2];
    uint2 tied[MOST_TIED + MOST_CLUSTER_BLOCKS];  // key and id, rank by rank; a word of each rank
  };
  float2 of_warps[RANK_WARPS][MAX_QUERY_GROUP];  // totals
  union {
    struct {
      float norms[MAX_QUERY_GROUP], peaks[MAX_QUERY_GROUP];
    };
    uint32_t scan[RANK_WARPS];
  };
  uint64_t sent[2], met[2];
  int bin, above;             // the bin of the last key wanted; keys in better ones
  int in_bin, in_bin_before;  // keys in it, of all blocks and of lower ranks
  int placed, cut_id;
  uint32_t cut_key;
  int rehearsed[REHEARSED];  // ids that nobody wants
};

/// What a scoring warp has for itself.
struct alignas(16) ScorerRoom {
  char ring[CLUSTER_WARP_BYTES];  // landmarks on their way; the scales of those in 8 bits
  uint64_t arrived[MOST_CLUSTER_STAGES];
};

/// Behind it lie logits, `buffers` of [G, share_stride], planes in turns; and keys of each part.
struct alignas(128) ClusterRoom {
  ScorerRoom scorers[SCORERS];
  RankRoom parts[RANK_PARTS];
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
