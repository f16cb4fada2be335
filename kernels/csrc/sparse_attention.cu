// sparse_attention: see shadowkv_cli/ops/sparse_attention.py.
#include "sparse_attention.cuh"

#include <algorithm>

#include "attention_launch.h"

namespace shadowkv {

namespace {

constexpr int TOKENS_A_SPLIT = 256;
constexpr int MOST_SPARSE_SPLITS = 64;
static_assert(MOST_SPARSE_SPLITS <= MOST_SPLITS);

}  // namespace

std::tuple<Tensor, Tensor> sparse_attention(Tensor query, Tensor keys, Tensor values,
                                            Tensor key_slots, Tensor value_slots, Tensor lengths,
                                            std::vector<int64_t> capacities, int64_t chunk_size,
                                            double scale) {
  constexpr const char* op = "sparse_attention";
  check_sizes(query, op, "query", {-1, -1, -1});
  const Device device(query, op, "query");
  query = dense_query(query);
  auto p = attention_params<SparseSource>(op, query, keys, values, scale);
  const int64_t rows = query.size(0), heads = keys.size(1);
  const int64_t sections = static_cast<int64_t>(capacities.size());
  SHADOWKV_CHECK(keys.size(0) == rows, op, "keys must have ", rows, " rows, got ", text(keys));
  SHADOWKV_CHECK(sections <= MAX_SECTIONS, op, "capacities may name ", MAX_SECTIONS,
                 " sections, got ", sections);
  SHADOWKV_CHECK(chunk_size > 0, op, "chunk_size must be positive, got ", chunk_size);
  check_table(key_slots, op, "key_slots", query, {rows, heads, -1});
  check_table(value_slots, op, "value_slots", query, {rows, heads, key_slots.size(2)});
  check_table(lengths, op, "lengths", query, {rows, sections});
  SparseSource& source = p.source;
  source.key_slots = static_cast<const int*>(key_slots.data_ptr());
  source.value_slots = static_cast<const int*>(value_slots.data_ptr());
  source.lengths = static_cast<const int*>(lengths.data_ptr());
  source.sections = static_cast<int>(sections);
  source.heads = static_cast<int>(heads);
  source.chosen = static_cast<int>(key_slots.size(2));
  source.chunk_size = static_cast<int>(chunk_size);
  for (int64_t s = 0; s < sections; ++s) {
    source.capacity[s] = static_cast<int>(capacities[s]);
    source.fixed += source.capacity[s];
  }
  SHADOWKV_CHECK(keys.size(2) >= source.fixed && values.size(2) >= source.fixed, op,
                 "keys and values must hold the ", source.fixed, " tokens of the fixed part");
  // By sizes alone: where chunks lie, and with whom a row shares the batch, changes no bit.
  const int64_t tokens = source.fixed + key_slots.size(2) * chunk_size;
  const int splits = std::clamp(ceil_div(tokens, TOKENS_A_SPLIT), 1, MOST_SPARSE_SPLITS);
  Tensor lse = torch::stable::new_empty(query, {rows, query.size(1)}, ScalarType::Float);
  Tensor out =
      attend(op, device, query, heads, splits, p, static_cast<float*>(lse.data_ptr()));
  return {out, lse};
}

}  // namespace shadowkv
