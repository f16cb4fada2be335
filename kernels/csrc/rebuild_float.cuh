// Keys of missing chunks in float32, without tensor cores.
#pragma once

#include "rebuild_rows.cuh"

namespace shadowkv {

constexpr int FLOAT_ROWS = 16;
constexpr int FLOAT_BLOCKS_A_PROCESSOR = 8;

/// Grid [Hk, R, tiles at a time]: a thread makes one dimension of all tokens of the tile.
template <int D>
__global__ void __launch_bounds__(D) rebuild_float(const __grid_constant__ RebuildParams p) {
  __shared__ TileRows<FLOAT_ROWS> rows;
  __shared__ __align__(16) float keys[FLOAT_ROWS * (D + 4)];
  __shared__ __align__(16) float rotations[FLOAT_ROWS * D];
  const int step = static_cast<int>(gridDim.z) * FLOAT_ROWS;
  int first = static_cast<int>(blockIdx.z) * FLOAT_ROWS;
  for (; find_rows(p, first, rows); first += step) {
    const int64_t prompt = rows.prompt;
    const float* coefficients =
        static_cast<const float*>(p.coefficients) + prompt * p.coefficient_prompt;
    const float* basis = static_cast<const float*>(p.basis) + prompt * p.basis_prompt +
                         blockIdx.x * p.basis_head + threadIdx.x;
    const int rank = rows.rank;
    fetch_rotations<float, D>(p, rows, rotations);
    commit_copies();
    float sums[FLOAT_ROWS] = {};
    for (int k = 0; k < rank; ++k) {
      const float b = basis[k * p.basis_row];
#pragma unroll
      for (int i = 0; i < FLOAT_ROWS; ++i) {
        sums[i] += b * coefficients[max(rows.token[i], 0) * p.coefficient_token + k];
      }
    }
#pragma unroll
    for (int i = 0; i < FLOAT_ROWS; ++i) keys[i * (D + 4) + threadIdx.x] = sums[i];
    wait_copies<0>();
    __syncthreads();
    rotate_and_store<float, D, D + 4>(p, rows, keys, rotations);
    __syncthreads();  // The next tile takes the place of this one.
  }
}

}  // namespace shadowkv
