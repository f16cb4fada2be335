// Keys of missing chunks: coefficients times basis on the tensor cores, then the rotary embedding.
#pragma once

#include "rebuild_rows.cuh"

namespace shadowkv {

constexpr int REBUILD_WARPS = 4;
constexpr int REBUILD_ROWS = 128;  // 32 a warp
constexpr int SLAB = 32;           // columns of the coefficients at a time
constexpr int REBUILD_STAGES = 3;

template <typename T, int D>
constexpr int SLAB_BYTES = (REBUILD_ROWS * (SLAB + 8) + SLAB * (D + 8)) * sizeof(T);
template <int D>
constexpr int KEYS_BYTES = REBUILD_ROWS * (D + 4) * 4;
template <typename T, int D>
constexpr int REBUILD_BYTES = REBUILD_STAGES * SLAB_BYTES<T, D> > KEYS_BYTES<D>
                                  ? REBUILD_STAGES * SLAB_BYTES<T, D>
                                  : KEYS_BYTES<D>;

/// Grid [tiles, Hk, R].
template <typename T, int D>
__global__ void __launch_bounds__(REBUILD_WARPS * 32, 2)
    rebuild_tiles(const __grid_constant__ RebuildParams p) {
  constexpr int A_STRIDE = SLAB + 8, B_STRIDE = D + 8, KEY_STRIDE = D + 4;
  extern __shared__ __align__(16) char shared[];
  __shared__ TileRows<REBUILD_ROWS> rows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t r = blockIdx.z, head = blockIdx.y, plane = r * p.heads + head;
  const int64_t missing = p.miss_counts[plane];
  if (static_cast<int64_t>(blockIdx.x) * REBUILD_ROWS >= missing * p.chunk_size) return;
  find_rows(p, plane, rows);
  __syncthreads();

  const int64_t prompt = p.prompt_index[r];
  const int rank = max(min(p.rank[r], p.columns), 0), slabs = (rank + SLAB - 1) / SLAB;
  const T* coefficients = static_cast<const T*>(p.coefficients) + prompt * p.coefficient_prompt;
  const T* basis =
      static_cast<const T*>(p.basis) + prompt * p.basis_prompt + head * p.basis_head;
  auto a_of = [&](int slab) {
    return reinterpret_cast<T*>(shared + slab % REBUILD_STAGES * SLAB_BYTES<T, D>);
  };
  auto fetch = [&](int slab) {
    T* a = a_of(slab);
    T* b = a + REBUILD_ROWS * A_STRIDE;
    for (int i = threadIdx.x; i < REBUILD_ROWS * SLAB / 8; i += blockDim.x) {
      const int row = i / (SLAB / 8), piece = i % (SLAB / 8) * 8, column = slab * SLAB + piece;
      const int token = rows.token[row];
      // Columns from the rank on belong to other rows of the batch and may hold anything.
      const int kept = token < 0 ? 0 : max(min(rank - column, 8), 0);
      const T* from = coefficients + max(token, 0) * p.coefficient_token + (kept ? column : 0);
      if (p.aligned) {
        copy_async(a + row * A_STRIDE + piece, from, kept * static_cast<int>(sizeof(T)));
      } else {
        for (int e = 0; e < 8; ++e) {
          a[row * A_STRIDE + piece + e] = e < kept ? from[e] : from_float<T>(0.f);
        }
      }
    }
    for (int i = threadIdx.x; i < SLAB * D / 8; i += blockDim.x) {
      const int row = i / (D / 8), piece = i % (D / 8) * 8, k = slab * SLAB + row;
      copy_async(b + row * B_STRIDE + piece, basis + min(k, rank - 1) * p.basis_row + piece,
                 k < rank ? 16 : 0);
    }
  };

  float c[2][D / 8][4] = {};
#pragma unroll
  for (int slab = 0; slab < REBUILD_STAGES - 1; ++slab) {
    if (slab < slabs) fetch(slab);
    commit_copies();
  }
  for (int slab = 0; slab < slabs; ++slab) {
    wait_copies<REBUILD_STAGES - 2>();
    __syncthreads();  // The slab is there, and everybody is done with the one before it.
    if (slab + REBUILD_STAGES - 1 < slabs) fetch(slab + REBUILD_STAGES - 1);
    commit_copies();
    const T* a = a_of(slab) + warp * 32 * A_STRIDE;
    const T* b = a_of(slab) + REBUILD_ROWS * A_STRIDE;
#pragma unroll
    for (int k = 0; k < SLAB / 16; ++k) {
      uint32_t fragments[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_matrices(fragments[m], a + (m * 16 + lane % 16) * A_STRIDE + k * 16 + lane / 16 * 8);
      }
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t words[4];
        load_matrices_transposed(words,
                                 b + (k * 16 + lane % 16) * B_STRIDE + n * 16 + lane / 16 * 8);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add<T>(c[m][2 * n], fragments[m], words[0], words[1]);
          multiply_add<T>(c[m][2 * n + 1], fragments[m], words[2], words[3]);
        }
      }
    }
  }
  wait_copies<0>();
  __syncthreads();  // The keys take the place of the slabs.

  float* keys = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int i = 0; i < D / 8 * 2; ++i) {
      const int row = warp * 32 + m * 16 + i % 2 * 8 + lane / 4, d = i / 2 * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(keys + row * KEY_STRIDE + d) =
          make_float2(c[m][i / 2][i % 2 * 2], c[m][i / 2][i % 2 * 2 + 1]);
    }
  }
  __syncthreads();
  rotate_and_store<T, D, REBUILD_ROWS, KEY_STRIDE>(p, rows, keys);
}

}  // namespace shadowkv
