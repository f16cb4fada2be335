// fetch_values across the bus by few threads: the memory system copies, and most of each processor is
// left to kernels that work meanwhile. As much is under way as fills the bus, and not much more: what
// waits for the host stands in the way of what others read from the GPU's own memory.
#pragma once

#include "common/bulk.cuh"
#include "common/progress.cuh"
#include "fetch_values.cuh"

namespace shadowkv {

/// A block is a warp. Few, so that few processors lack room for a block that rebuilds keys or attends.
constexpr int BULK_THREADS = 32, BULK_BLOCKS = 12;
/// Blocks that read at a time, of all launches that take turns.
constexpr int BULK_TURNS = BULK_BLOCKS;
/// One is being stored while the others are under way.
constexpr int BULK_STAGES = 3;
constexpr int BULK_STAGE_BYTES = 16 * 1024;
/// Bytes of a copy at most: few large ones keep the unit that copies less busy than many small ones.
constexpr int BULK_PIECE = 2048;
/// Pieces that are found at once, by dependent reads, which are slow while others fill the queues of
/// the GPU's memory.
constexpr int BULK_LIST = BULK_THREADS;
constexpr int BULK_HELD_BYTES = BULK_STAGES * BULK_STAGE_BYTES;

/// A part of a missing chunk; no bytes: none.
struct BulkPiece {
  const char* from;
  char* to;
  int bytes;
};

/// Where a piece that is under way goes.
struct BulkTarget {
  char* to;
  int bytes;
};

/// Behind the stages.
struct BulkRoom {
  uint64_t barriers[BULK_STAGES];
  BulkTarget targets[BULK_STAGES][32];
  BulkPiece list[BULK_LIST];
  int starts[1];  // [planes + 1]
};

/// Bytes of shared memory of a block.
constexpr size_t bulk_bytes(int64_t planes) {
  return BULK_HELD_BYTES + sizeof(BulkRoom) + planes * sizeof(int);
}

/// The `index`-th piece of all missing chunks laid end to end, of which a chunk has `pieces`.
__device__ inline BulkPiece find_piece(const FetchParams& p, const int* starts, int pieces,
                                       int index) {
  const int miss = index / pieces, begin = (index - miss * pieces) * BULK_PIECE;
  const Miss found = find_miss(p, starts, miss);
  if (begin == 0) copy_scale(p, found);
  return {found.from + begin, found.to + begin, min(p.words * 16 - begin, BULK_PIECE)};
}

/// Wait until fewer than `most` blocks read, first come, first served. Whoever waits holds nothing
/// that another one waits for.
__device__ inline void take_turn(uint32_t* turns, int most) {
  if (turns && threadIdx.x == 0) {
    const uint32_t own = atomicAdd(&turns[0], 1);
    const uint64_t began = now();
    // Before a look, more may have gone by than were ahead: a difference below 0.
    while (static_cast<int>(own - *static_cast<volatile uint32_t*>(&turns[1])) >= most) {
      __nanosleep(200);
      if (now() - began > LONGEST_WAIT) __trap();
    }
  }
  __syncwarp();
}

/// Another block may begin.
__device__ inline void pass_turn(uint32_t* turns) {
  __syncwarp();
  if (turns && threadIdx.x == 0) atomicAdd(&turns[1], 1);
}

/// A lane has a piece under way in each stage, as far as they hold them; words have 16 bytes.
__global__ void __launch_bounds__(BULK_THREADS)
    fetch_in_bulk(const __grid_constant__ FetchParams p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  BulkRoom& room = *reinterpret_cast<BulkRoom*>(shared + BULK_HELD_BYTES);
  const int lane = threadIdx.x;
  if (lane < BULK_STAGES) init_barrier(&room.barriers[lane]);
  find_starts(p, room.starts);
  const int chunk_bytes = p.words * 16, piece_bytes = min(chunk_bytes, BULK_PIECE);
  const int pieces = (chunk_bytes + BULK_PIECE - 1) / BULK_PIECE;
  const int in_stage = min(BULK_STAGE_BYTES / piece_bytes, 32);
  const int in_list = BULK_LIST / in_stage;  // stages
  const int total = room.starts[p.planes] * pieces;
  int listed = 0, begun = 0;  // stages of this block
  // Blocks take stages in turns.
  auto find_list = [&]() {
    __syncwarp();
    const int stage = lane / in_stage, of_all = (listed + stage) * static_cast<int>(gridDim.x);
    const int index = (of_all + static_cast<int>(blockIdx.x)) * in_stage + lane - stage * in_stage;
    const bool is_there = stage < in_list && index < total;
    room.list[lane] = is_there ? find_piece(p, room.starts, pieces, index)
                               : BulkPiece{nullptr, nullptr, 0};
    listed += in_list;
    __syncwarp();
  };
  /// False: there was nothing left.
  auto begin = [&](int stage) {
    if (begun == listed) find_list();
    const int first = (begun - (listed - in_list)) * in_stage;
    BulkPiece piece{nullptr, nullptr, 0};
    if (lane < in_stage) piece = room.list[first + lane];
    const uint32_t bytes = __reduce_add_sync(ALL_LANES, static_cast<uint32_t>(piece.bytes));
    room.targets[stage][lane] = {piece.to, piece.bytes};
    uint64_t* barrier = &room.barriers[stage];
    if (lane == 0 && bytes) expect_bytes(barrier, bytes);
    __syncwarp();
    if (piece.bytes) {
      begin_load(shared_address(shared + stage * BULK_STAGE_BYTES + lane * piece_bytes), piece.from,
                 piece.bytes, barrier);
    }
    ++begun;
    return bytes != 0;
  };

  find_list();  // while others have their turn
  if (!room.list[0].bytes) return;
  take_turn(p.turns, BULK_TURNS);
#pragma unroll
  for (int stage = 0; stage < BULK_STAGES - 1; ++stage) begin(stage);
  bool has_turn = true;
  int stage = 0, free = BULK_STAGES - 1, parity = 0;
#pragma unroll 1
  while (room.targets[stage][0].bytes) {
    while (!is_complete(&room.barriers[stage], parity)) {
    }
    fence_bulk();
    const BulkTarget target = room.targets[stage][lane];
    if (target.bytes) {
      store_bulk(target.to, shared + stage * BULK_STAGE_BYTES + lane * piece_bytes, target.bytes);
    }
    commit_stores();
    wait_until_read<1>();  // those of the stage before this one
    __syncwarp();
    if (!begin(free) && has_turn) {
      pass_turn(p.turns);  // The next one begins while this one's last stage is under way.
      has_turn = false;
    }
    if (++free == BULK_STAGES) free = 0;
    if (++stage == BULK_STAGES) stage = 0, parity ^= 1;
  }
  wait_until_stored();
#else
  __trap();  // The host asks what the kernel was compiled for.
#endif
}

}  // namespace shadowkv
