// Keys of missing chunks: coefficients times basis on the tensor cores, then the rotary embedding.
#pragma once

#include "rebuild_rows.cuh"

namespace shadowkv {

constexpr int REBUILD_WARPS = 4;
constexpr int REBUILD_THREADS = REBUILD_WARPS * 32;
constexpr int REBUILD_ROWS = REBUILD_WARPS * 16;
constexpr int SLAB = 32;           // columns of the coefficients at a time
constexpr int REBUILD_STAGES = 5;  // a rank of 160 is on its way as a whole
/// Blocks that must find registers on one processor: at most 128 a thread, beside other kernels.
constexpr int REBUILD_BLOCKS_A_PROCESSOR = 4;
/// As many as shared memory holds.
constexpr int REBUILD_BLOCKS_IN_A_WAVE = 2;

template <typename T, int D>
constexpr int SLAB_BYTES = (REBUILD_ROWS * (SLAB + 8) + SLAB * (D + 8)) * sizeof(T);
/// The rotations lie behind the slabs, whose place the keys take.
template <typename T, int D>
constexpr int ROTATIONS_AT = REBUILD_STAGES * SLAB_BYTES<T, D>;
template <typename T, int D>
constexpr int REBUILD_BYTES = ROTATIONS_AT<T, D> + REBUILD_ROWS * D * static_cast<int>(sizeof(T));

/// Grid [Hk, R, tiles at a time].
template <typename T, int D>
__global__ void __launch_bounds__(REBUILD_THREADS, REBUILD_BLOCKS_A_PROCESSOR)
    rebuild_tiles(const __grid_constant__ RebuildParams p) {
  constexpr int A_STRIDE = SLAB + 8, B_STRIDE = D + 8, KEY_STRIDE = D + 8;
  static_assert(REBUILD_ROWS * SLAB / 8 % REBUILD_THREADS == 0);
  static_assert(SLAB * D / 8 % REBUILD_THREADS == 0);
  static_assert(REBUILD_ROWS * KEY_STRIDE * 4 <= ROTATIONS_AT<T, D>);
  extern __shared__ __align__(16) char shared[];
  __shared__ TileRows<REBUILD_ROWS> rows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T* rotations = reinterpret_cast<T*>(shared + ROTATIONS_AT<T, D>);
  float* keys = reinterpret_cast<float*>(shared);
  auto a_of = [&](int slab) {
    return reinterpret_cast<T*>(shared + slab % REBUILD_STAGES * SLAB_BYTES<T, D>);
  };

  const int step = static_cast<int>(gridDim.z) * REBUILD_ROWS;
  int first = static_cast<int>(blockIdx.z) * REBUILD_ROWS;
  for (; find_rows(p, first, rows); first += step) {
    const int rank = rows.rank, slabs = (rank + SLAB - 1) / SLAB;
    const T* coefficients =
        static_cast<const T*>(p.coefficients) + rows.prompt * p.coefficient_prompt;
    const T* basis =
        static_cast<const T*>(p.basis) + rows.prompt * p.basis_prompt + blockIdx.x * p.basis_head;
    auto fetch = [&](int slab) {
      T* a = a_of(slab);
      T* b = a + REBUILD_ROWS * A_STRIDE;
#pragma unroll
      for (int j = 0; j < REBUILD_ROWS * SLAB / 8 / REBUILD_THREADS; ++j) {
        const int i = j * REBUILD_THREADS + threadIdx.x;
        const int row = i / (SLAB / 8), piece = i % (SLAB / 8) * 8, column = slab * SLAB + piece;
        const int token = rows.token[row];
        // Columns from the rank on belong to other rows of the batch and may hold anything.
        const int kept = token < 0 ? 0 : max(min(rank - column, 8), 0);
        const T* from = coefficients + max(token, 0) * p.coefficient_token + (kept ? column : 0);
        copy_piece(a + row * A_STRIDE + piece, from, kept, p.aligned);
      }
#pragma unroll
      for (int j = 0; j < SLAB * D / 8 / REBUILD_THREADS; ++j) {
        const int i = j * REBUILD_THREADS + threadIdx.x;
        const int row = i / (D / 8), piece = i % (D / 8) * 8, k = slab * SLAB + row;
        copy_async(b + row * B_STRIDE + piece, basis + min(k, rank - 1) * p.basis_row + piece,
                   k < rank ? 16 : 0);
      }
    };
    // A group of copies a slab, and the rotations with the last of them: they wait for no product.
    for (int slab = 0; slab < REBUILD_STAGES; ++slab) {
      if (slab < slabs) fetch(slab);
      if (slab == REBUILD_STAGES - 1) fetch_rotations<T, D>(p, rows, rotations);
      commit_copies();
    }
    float c[D / 8][4] = {};
    for (int slab = 0; slab < slabs; ++slab) {
      wait_copies<REBUILD_STAGES - 1>();
      __syncthreads();
      const T* a = a_of(slab) + warp * 16 * A_STRIDE;
      const T* b = a_of(slab) + REBUILD_ROWS * A_STRIDE;
#pragma unroll
      for (int k = 0; k < SLAB / 16; ++k) {
        uint32_t fragment[4];
        load_matrices(fragment, a + lane % 16 * A_STRIDE + k * 16 + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
          uint32_t words[4];
          load_matrices_transposed(words,
                                   b + (k * 16 + lane % 16) * B_STRIDE + n * 16 + lane / 16 * 8);
          multiply_add<T>(c[2 * n], fragment, words[0], words[1]);
          multiply_add<T>(c[2 * n + 1], fragment, words[2], words[3]);
        }
      }
      if (slab + REBUILD_STAGES < slabs) {
        __syncthreads();  // Everybody is done with the slab that is overwritten.
        fetch(slab + REBUILD_STAGES);
      }
      commit_copies();
    }
    wait_copies<0>();
    __syncthreads();  // The keys take the place of the slabs; the rotations are there.

#pragma unroll
    for (int i = 0; i < D / 8 * 2; ++i) {
      const int row = warp * 16 + i % 2 * 8 + lane / 4, d = i / 2 * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(keys + row * KEY_STRIDE + d) =
          make_float2(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
    }
    __syncthreads();
    rotate_and_store<T, D, KEY_STRIDE>(p, rows, keys, rotations);
    __syncthreads();  // The next tile takes the place of this one.
  }
}

}  // namespace shadowkv
