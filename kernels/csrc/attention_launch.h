// Host side of both attention ops: one launch over the splits, one that merges them.
#pragma once

#include "attention.cuh"
#include "attention_float.cuh"
#include "attention_merge.cuh"
#include "common/dispatch.h"
#include "common/stream.h"

namespace shadowkv {

constexpr double LOG2_E = 1.4426950408889634;

/// Check what both ops take, and fill in all but the source, the sums and their totals.
template <typename Source>
AttentionParams<Source> attention_params(const char* op, const Tensor& query, const Tensor& keys,
                                         const Tensor& values, double scale) {
  const int64_t dim = query.size(2);
  check_sizes(keys, op, "keys", {-1, -1, -1, dim});
  check_sizes(values, op, "values", {keys.size(0), keys.size(1), -1, dim});
  check_words(keys, op, "keys", query);
  check_words(values, op, "values", query);
  AttentionParams<Source> p{};
  p.group = static_cast<int>(check_group(op, query.size(1), keys.size(1)));
  p.query = query.data_ptr();
  p.keys = keys.data_ptr();
  p.values = values.data_ptr();
  p.key_plane = keys.stride(0);
  p.key_head = keys.stride(1);
  p.key_token = keys.stride(2);
  p.value_plane = values.stride(0);
  p.value_head = values.stride(1);
  p.value_token = values.stride(2);
  p.scale = static_cast<float>(scale * LOG2_E);
  return p;
}

/// Attend in so many splits, and return the output [R, Hq, D]; `lse` [R, Hq] may be null.
template <typename Source>
Tensor attend(const char* op, const Device& device, const Tensor& query, int64_t heads, int splits,
              AttentionParams<Source> p, float* lse) {
  const int64_t rows = query.size(0), q_heads = query.size(1), dim = query.size(2);
  Tensor out = torch::stable::new_empty(query, {rows, q_heads, dim});
  if (rows == 0 || q_heads == 0) return out;
  Tensor sums = scratch(query, rows * q_heads * splits * dim, ScalarType::Float);
  Tensor totals = scratch(query, rows * q_heads * splits * 2, ScalarType::Float);
  p.sums = static_cast<float*>(sums.data_ptr());
  p.totals = static_cast<float2*>(totals.data_ptr());
  dispatch(op, query.scalar_type(), dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(head_dim)::value;
    const size_t bytes = ATTENTION_WARPS * ATTENTION_WARP_BYTES<T, D>;
    const dim3 grid(splits, heads, rows);
    auto launch = [&](auto kernel) {
      device.allow_shared(kernel, bytes);
      kernel<<<grid, ATTENTION_WARPS * 32, bytes, device.stream()>>>(p);
    };
    if constexpr (Source::APART == Form::PACKED && !std::is_same_v<T, __nv_bfloat16>) {
      SHADOWKV_CHECK(false, op, "value_buffer is packed, which goes with bfloat16 alone");
    } else if constexpr (std::is_same_v<T, float>) {
      launch(attend_tokens<D, Source>);
    } else {
      launch(attend_tiles<T, D, Source>);
    }
    device.check_launch();
    device.allow_shared(merge_splits<T, D>, 0);
    merge_splits<T, D><<<rows * q_heads, D, 0, device.stream()>>>(
        p.sums, p.totals, splits, static_cast<T*>(out.data_ptr()), lse);
    device.check_launch();
  });
  return out;
}

}  // namespace shadowkv
