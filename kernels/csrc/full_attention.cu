// full_attention: see shadowkv_cli/ops/full_attention.py.
#include "full_attention.cuh"

#include <algorithm>

#include "attention_launch.h"

namespace shadowkv {

namespace {

constexpr int MIN_TOKENS_A_SPLIT = 512;
constexpr int BLOCKS_A_PROCESSOR = 3;

/// One wave of blocks for one row, whatever the number of rows: its result does not depend on them.
int full_splits(int64_t heads, int64_t capacity, int processors) {
  const int64_t wave = std::max<int64_t>(1, processors * BLOCKS_A_PROCESSOR / heads);
  const int64_t most = std::max<int64_t>(1, ceil_div(capacity, MIN_TOKENS_A_SPLIT));
  return static_cast<int>(std::min({wave, most, int64_t{MOST_SPLITS}}));
}

}  // namespace

Tensor full_attention(Tensor query, Tensor keys, Tensor values, Tensor prompt_index, Tensor lengths,
                      double scale) {
  constexpr const char* op = "full_attention";
  check_sizes(query, op, "query", {-1, -1, -1});
  const Device device(query, op, "query");
  query = dense_query(query);
  auto p = attention_params<FullSource>(op, query, keys, values, scale);
  check_sizes(values, op, "values", {-1, -1, keys.size(2), -1});
  check_table(prompt_index, op, "prompt_index", query, {query.size(0)});
  check_table(lengths, op, "lengths", query, {query.size(0)});
  p.source.prompt_index = static_cast<const int*>(prompt_index.data_ptr());
  p.source.lengths = static_cast<const int*>(lengths.data_ptr());
  p.source.capacity = static_cast<int>(keys.size(2));
  const int splits = full_splits(keys.size(1), keys.size(2), device.processors());
  return attend(op, device, query, keys.size(1), splits, p, nullptr);
}

}  // namespace shadowkv
