// Keys of missing chunks in float32, without tensor cores.
#pragma once

#include "rebuild_rows.cuh"

namespace shadowkv {

constexpr int FLOAT_ROWS = 16;

/// Grid [tiles, Hk, R]: a thread makes one dimension of all tokens of the tile.
template <int D>
__global__ void __launch_bounds__(D) rebuild_float(const __grid_constant__ RebuildParams p) {
  __shared__ TileRows<FLOAT_ROWS> rows;
  __shared__ float keys[FLOAT_ROWS * (D + 4)];
  const int64_t r = blockIdx.z, head = blockIdx.y, plane = r * p.heads + head;
  const int64_t missing = p.miss_counts[plane];
  if (static_cast<int64_t>(blockIdx.x) * FLOAT_ROWS >= missing * p.chunk_size) return;
  find_rows(p, plane, rows);
  __syncthreads();
  const int64_t prompt = p.prompt_index[r];
  const float* coefficients =
      static_cast<const float*>(p.coefficients) + prompt * p.coefficient_prompt;
  const float* basis = static_cast<const float*>(p.basis) + prompt * p.basis_prompt +
                       head * p.basis_head + threadIdx.x;
  const int rank = max(min(p.rank[r], p.columns), 0);
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
  __syncthreads();
  rotate_and_store<float, D, FLOAT_ROWS, D + 4>(p, rows, keys);
}

}  // namespace shadowkv
