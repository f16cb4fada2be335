// rebuild_keys: see shadowkv_cli/ops/rebuild_keys.py.
#include "rebuild_keys.cuh"

#include <algorithm>

#include "common/dispatch.h"
#include "common/misses.h"
#include "common/stream.h"
#include "rebuild_float.cuh"

namespace shadowkv {

namespace {

/// Of a row and head, so that they can be counted in 32 bits.
constexpr int64_t MOST_TOKENS = 1 << 30;

void check_table_of_rotations(const char* op, const char* name, const Tensor& t,
                              const Tensor& like) {
  check_device(t, op, name, like);
  check_sizes(t, op, name, {-1, -1, -1});
  SHADOWKV_CHECK(t.scalar_type() == like.scalar_type(), op, name,
                 " must have the dtype of the other tensors");
  SHADOWKV_CHECK(t.size(2) <= 1 || t.stride(2) == 1, op, name,
                 " must be contiguous in the last dimension");
}

}  // namespace

void rebuild_keys(Tensor coefficients, Tensor basis, Tensor prompt_index, Tensor rank, Tensor ids,
                  Tensor slots, Tensor misses, Tensor miss_counts, Tensor cos, Tensor sin,
                  Tensor table_index, bool interleaved, Tensor buffer) {
  constexpr const char* op = "rebuild_keys";
  const Device device(buffer, op, "buffer");
  check_sizes(buffer, op, "buffer", {-1, -1, -1, -1, -1});
  check_words(buffer, op, "buffer", buffer);
  check_sizes(coefficients, op, "coefficients", {-1, -1, -1});
  check_device(coefficients, op, "coefficients", buffer);
  const int64_t rows = buffer.size(0), heads = buffer.size(1), dim = buffer.size(4);
  const int64_t prompts = coefficients.size(0), columns = coefficients.size(2);
  SHADOWKV_CHECK(coefficients.scalar_type() == buffer.scalar_type(), op,
                 "coefficients must have the dtype of the buffer");
  SHADOWKV_CHECK(columns <= 1 || coefficients.stride(2) == 1, op,
                 "coefficients must be contiguous in the last dimension");
  check_sizes(basis, op, "basis", {prompts, heads, columns, dim});
  check_words(basis, op, "basis", buffer);
  check_table(prompt_index, op, "prompt_index", buffer, {rows});
  check_table(rank, op, "rank", buffer, {rows});
  check_table(table_index, op, "table_index", buffer, {prompts});
  check_table_of_rotations(op, "cos", cos, buffer);
  check_table_of_rotations(op, "sin", sin, buffer);
  check_sizes(sin, op, "sin", {cos.size(0), cos.size(1), cos.size(2)});
  SHADOWKV_CHECK(2 * cos.size(2) <= dim, op, "cos turns ", 2 * cos.size(2),
                 " dimensions, keys have ", dim);
  check_misses(op, ids, slots, misses, miss_counts, buffer);
  if (ids.numel() == 0 || buffer.numel() == 0) return;
  const int64_t tokens = ids.size(2) * buffer.size(3);
  SHADOWKV_CHECK(tokens <= MOST_TOKENS, op, "ids ask for ", tokens, " tokens of a head, more than ",
                 MOST_TOKENS);

  RebuildParams p{};
  p.coefficients = coefficients.data_ptr();
  p.coefficient_prompt = coefficients.stride(0);
  p.coefficient_token = coefficients.stride(1);
  p.aligned = is_aligned(coefficients);
  p.basis = basis.data_ptr();
  p.basis_prompt = basis.stride(0);
  p.basis_head = basis.stride(1);
  p.basis_row = basis.stride(2);
  p.prompt_index = static_cast<const int*>(prompt_index.data_ptr());
  p.rank = static_cast<const int*>(rank.data_ptr());
  p.ids = static_cast<const int*>(ids.data_ptr());
  p.slots = static_cast<const int*>(slots.data_ptr());
  p.misses = static_cast<const int*>(misses.data_ptr());
  p.wanted = static_cast<int>(ids.size(2));
  p.cos = cos.data_ptr();
  p.cos_table = cos.stride(0);
  p.cos_token = cos.stride(1);
  p.sin = sin.data_ptr();
  p.sin_table = sin.stride(0);
  p.sin_token = sin.stride(1);
  p.rotations_aligned = is_aligned(cos) && is_aligned(sin);
  p.table_index = static_cast<const int*>(table_index.data_ptr());
  p.buffer = buffer.data_ptr();
  p.buffer_row = buffer.stride(0);
  p.buffer_head = buffer.stride(1);
  p.buffer_slot = buffer.stride(2);
  p.buffer_token = buffer.stride(3);
  p.heads = static_cast<int>(heads);
  p.columns = static_cast<int>(columns);
  p.chunk_size = static_cast<int>(buffer.size(3));
  p.pairs = static_cast<int>(cos.size(2));
  p.interleaved = interleaved;
  // One wave of blocks, of which each goes on to further tiles: few are missing as a rule, and a
  // block that finds nothing to do takes a place all the same.
  auto grid = [&](int tile_rows, int blocks_a_processor) {
    const int tiles = ceil_div(tokens, tile_rows);
    const int wave = ceil_div(device.processors() * blocks_a_processor, rows * heads);
    return dim3(heads, rows, std::min(tiles, wave));
  };
  dispatch(op, buffer.scalar_type(), dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(head_dim)::value;
    if constexpr (std::is_same_v<T, float>) {
      rebuild_float<D>
          <<<grid(FLOAT_ROWS, FLOAT_BLOCKS_A_PROCESSOR), D, 0, device.stream()>>>(p);
    } else {
      device.allow_shared(rebuild_tiles<T, D>, REBUILD_BYTES<T, D>);
      rebuild_tiles<T, D><<<grid(REBUILD_ROWS, REBUILD_BLOCKS_IN_A_WAVE), REBUILD_THREADS,
                            REBUILD_BYTES<T, D>, device.stream()>>>(p);
    }
    device.check_launch();
  });
}

}  // namespace shadowkv
