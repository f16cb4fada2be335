// fetch_values across the bus by few threads: the memory system copies, and most of each processor is
// left to kernels that work meanwhile. As much is under way as fills the bus, and not much more: what
// waits for the host stands in the way of what others read from the GPU's own memory.
#pragma once

#include "common/bulk.cuh"
#include "common/progress.cuh"
#include "fetch_values.cuh"

namespace shadowkv {

constexpr int BULK_WARPS = 2;
constexpr int BULK_THREADS = BULK_WARPS * 32;
/// A warp stores what has come while more is under way.
constexpr int BULK_STAGES = 2;
/// Bytes of a copy at most: few large ones keep the unit that copies less busy than many small ones.
constexpr int BULK_PIECE = 2048;

/// What becomes a T takes more warps, of which each has less under way.
template <typename T>
struct Bulk {
  static constexpr bool CONVERTS = !std::is_same_v<T, uint8_t>;
  static constexpr int STAGE_BYTES = (CONVERTS ? 8 : 16) * 1024;
  /// Few, so that few processors lack room for a block that rebuilds keys or attends.
  static constexpr int BLOCKS = CONVERTS ? 12 : 6;
  static constexpr int HELD_BYTES = BULK_WARPS * BULK_STAGES * STAGE_BYTES;
  /// Warps that read at a time, of all launches that take turns.
  static constexpr int TURNS = BLOCKS * BULK_WARPS;
};

/// A part of a missing chunk; no bytes: none.
struct BulkPiece {
  const char* from;
  char* to;
  int bytes;
  float scale;
};

/// Where a piece that is under way goes.
struct BulkTarget {
  char* to;
  int bytes;
  float scale;
};

/// Behind the stages of all warps.
struct BulkRoom {
  uint64_t barriers[BULK_WARPS][BULK_STAGES];
  BulkTarget targets[BULK_WARPS][BULK_STAGES][32];
  int starts[1];  // [planes + 1]
};

/// Bytes of shared memory of a block.
template <typename T>
constexpr size_t bulk_bytes(int64_t planes) {
  return Bulk<T>::HELD_BYTES + sizeof(BulkRoom) + planes * sizeof(int);
}

/// The `index`-th piece of all missing chunks laid end to end, of which a chunk has `pieces`.
template <typename T>
__device__ inline BulkPiece find_piece(const FetchParams& p, const int* starts, int pieces,
                                       int index) {
  const int miss = index / pieces, begin = (index - miss * pieces) * BULK_PIECE;
  const int plane = plane_of(starts, p.planes, miss);
  const int row = plane / p.heads, head = plane - row * p.heads;
  const int64_t table = static_cast<int64_t>(plane) * p.wanted;
  const int64_t place = table + p.misses[table + miss - starts[plane]];
  const int prompt = p.prompt_index[row], id = p.ids[place];
  BulkPiece piece;
  piece.from = p.values + prompt * p.value_prompt + head * p.value_head + id * p.value_chunk + begin;
  piece.to = p.buffer + row * p.buffer_row + head * p.buffer_head + p.slots[place] * p.buffer_slot +
             begin * static_cast<int64_t>(sizeof(T));
  piece.bytes = min(p.words * 16 - begin, BULK_PIECE);
  piece.scale = 1.f;
  if constexpr (Bulk<T>::CONVERTS) {
    piece.scale = p.scales[(static_cast<int64_t>(prompt) * p.heads + head) * p.chunks + id];
  }
  return piece;
}

/// Write a stage's pieces of elements in 8 bits, which lie one behind the other, as T: a warp.
template <typename T>
__device__ inline void convert_pieces(const char* held, int held_bytes, int piece_bytes,
                                      const BulkTarget* targets) {
  int place = 0, begin = threadIdx.x % 32 * 16;
#pragma unroll 4
  for (int at = begin; at < held_bytes; at += 32 * 16, begin += 32 * 16) {
    for (; begin >= piece_bytes; begin -= piece_bytes) ++place;
    const BulkTarget target = targets[place];
    if (begin < target.bytes) {
      store_converted<T>(*reinterpret_cast<const uint4*>(held + at), target.scale,
                         target.to + begin * static_cast<int64_t>(sizeof(T)));
    }
  }
}

/// Wait until fewer than `most` warps read, first come, first served: a warp. Whoever waits holds
/// nothing that another one waits for.
__device__ inline void take_turn(uint32_t* turns, int most) {
  if (turns && threadIdx.x % 32 == 0) {
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

/// Another warp may begin.
__device__ inline void pass_turn(uint32_t* turns) {
  __syncwarp();
  if (turns && threadIdx.x % 32 == 0) atomicAdd(&turns[1], 1);
}

/// A lane has a piece under way in each of its warp's stages, as far as they hold them. T is what a
/// byte of the values becomes, see `copy_chunks`; words have 16 bytes.
template <typename T>
__global__ void __launch_bounds__(BULK_THREADS)
    fetch_in_bulk(const __grid_constant__ FetchParams p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  constexpr int STAGE_BYTES = Bulk<T>::STAGE_BYTES;
  BulkRoom& room = *reinterpret_cast<BulkRoom*>(shared + Bulk<T>::HELD_BYTES);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  char* held = shared + warp * BULK_STAGES * STAGE_BYTES;
  if (lane < BULK_STAGES) init_barrier(&room.barriers[warp][lane]);
  find_starts(p, room.starts);
  const int chunk_bytes = p.words * 16, piece_bytes = min(chunk_bytes, BULK_PIECE);
  const int pieces = (chunk_bytes + BULK_PIECE - 1) / BULK_PIECE;
  const int in_stage = min(STAGE_BYTES / piece_bytes, 32);
  const int total = room.starts[p.planes] * pieces;
  const int step = static_cast<int>(gridDim.x) * BULK_WARPS * in_stage;
  int index = (static_cast<int>(blockIdx.x) * BULK_WARPS + warp) * in_stage + lane;
  auto find_next = [&]() {
    const bool is_there = lane < in_stage && index < total;
    const BulkPiece piece =
        is_there ? find_piece<T>(p, room.starts, pieces, index) : BulkPiece{nullptr, nullptr, 0, 0};
    index += step;
    return piece;
  };
  auto begin = [&](int stage, const BulkPiece& piece) {
    const uint32_t bytes = __reduce_add_sync(ALL_LANES, static_cast<uint32_t>(piece.bytes));
    room.targets[warp][stage][lane] = {piece.to, piece.bytes, piece.scale};
    uint64_t* barrier = &room.barriers[warp][stage];
    if (lane == 0 && bytes) expect_bytes(barrier, bytes);
    __syncwarp();
    if (piece.bytes) {
      begin_load(shared_address(held + stage * STAGE_BYTES + lane * piece_bytes), piece.from,
                 piece.bytes, barrier);
    }
  };

  bool has_turn = true;
#pragma unroll 1
  for (int n = -BULK_STAGES;; ++n) {  // The stages are filled first.
    const int stage = (n + BULK_STAGES) % BULK_STAGES;
    const BulkTarget* targets = room.targets[warp][stage];
    const char* from = held + stage * STAGE_BYTES;
    if (n >= 0 && !targets[0].bytes) break;
    const BulkPiece next = find_next();  // while others are under way
    if (n == -BULK_STAGES) {
      if (!__any_sync(ALL_LANES, next.bytes)) return;
      take_turn(p.turns, Bulk<T>::TURNS);
    }
    if (n >= 0) {
      while (!is_complete(&room.barriers[warp][stage], n / BULK_STAGES % 2)) {
      }
      if constexpr (Bulk<T>::CONVERTS) {
        convert_pieces<T>(from, in_stage * piece_bytes, piece_bytes, targets);
        fence_bulk();  // What all lanes read comes before what the next copies bring.
      } else {
        fence_bulk();
        if (targets[lane].bytes) {
          store_bulk(targets[lane].to, from + lane * piece_bytes, targets[lane].bytes);
        }
        wait_until_read();
      }
      __syncwarp();
    }
    begin(stage, next);
    if (has_turn && !__any_sync(ALL_LANES, next.bytes)) {
      pass_turn(p.turns);  // The next one begins while this one's last stage is under way.
      has_turn = false;
    }
  }
  wait_until_stored();
#else
  __trap();  // The host asks what the kernel was compiled for.
#endif
}

}  // namespace shadowkv
