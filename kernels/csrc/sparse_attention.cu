// sparse_attention: see shadowkv_cli/ops/sparse_attention.py.
#include "sparse_attention.cuh"

#include <algorithm>

#include "attention_launch.h"

namespace shadowkv {

namespace {

constexpr int TOKENS_A_SPLIT = 256;
constexpr int MOST_SPARSE_SPLITS = 64;
static_assert(MOST_SPARSE_SPLITS <= MOST_SPLITS);

/// Values of chunks that lie apart; those in 8 bits have a scale for each slot.
struct Buffer {
  std::optional<Tensor> values, scales;
};

/// Check a buffer of that form, and let the source read it.
template <Form FORM>
void set_buffer(const char* op, SparseSource<FORM>& source, const Buffer& buffer,
                const Tensor& query, const Tensor& keys, int64_t chunk_size) {
  const Tensor& held = *buffer.values;
  constexpr bool IN_FP8 = FORM == Form::FP8;
  const int64_t dim = keys.size(3), width = IN_FP8 ? dim : packed_width(dim);
  check_sizes(held, op, "value_buffer", {keys.size(0), keys.size(1), -1, chunk_size, width});
  check_device(held, op, "value_buffer", query);
  SHADOWKV_CHECK(held.is_contiguous(), op, "value_buffer must be contiguous");
  SHADOWKV_CHECK(reinterpret_cast<int64_t>(held.data_ptr()) % 16 == 0, op,
                 "value_buffer must lie at a multiple of 16 bytes");
  source.apart = static_cast<const uint8_t*>(held.data_ptr());
  source.slots = static_cast<int>(held.size(2));
  source.buffer_bytes = held.size(2) * chunk_size * width;
  if constexpr (IN_FP8) {
    const Tensor& scales = *buffer.scales;
    check_sizes(scales, op, "value_scales", {keys.size(0), keys.size(1), held.size(2)});
    check_device(scales, op, "value_scales", query);
    SHADOWKV_CHECK(scales.scalar_type() == ScalarType::Float && scales.is_contiguous(), op,
                   "value_scales must be float32 and contiguous");
    source.scales = static_cast<const float*>(scales.data_ptr());
  }
}

template <Form FORM>
std::tuple<Tensor, Tensor> attend_chunks(const char* op, const Device& device, Tensor query,
                                         Tensor keys, Tensor values, Tensor key_slots,
                                         Tensor value_slots, Tensor lengths,
                                         const std::vector<int64_t>& capacities,
                                         int64_t chunk_size, double scale,
                                         const Buffer& buffer) {
  query = dense_query(query);
  auto p = attention_params<SparseSource<FORM>>(op, query, keys, values, scale);
  const int64_t rows = query.size(0), heads = keys.size(1);
  const int64_t sections = static_cast<int64_t>(capacities.size());
  SHADOWKV_CHECK(keys.size(0) == rows, op, "keys must have ", rows, " rows, got ", text(keys));
  SHADOWKV_CHECK(sections <= MAX_SECTIONS, op, "capacities may name ", MAX_SECTIONS,
                 " sections, got ", sections);
  SHADOWKV_CHECK(chunk_size > 0, op, "chunk_size must be positive, got ", chunk_size);
  check_table(key_slots, op, "key_slots", query, {rows, heads, -1});
  check_table(value_slots, op, "value_slots", query, {rows, heads, key_slots.size(2)});
  check_table(lengths, op, "lengths", query, {rows, sections});
  auto& source = p.source;
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
  if constexpr (FORM != Form::SAME) {
    set_buffer(op, source, buffer, query, keys, chunk_size);
  }
  // By sizes alone: where chunks lie, and with whom a row shares the batch, changes no bit.
  const int64_t tokens = source.fixed + key_slots.size(2) * chunk_size;
  const int splits = std::clamp(ceil_div(tokens, TOKENS_A_SPLIT), 1, MOST_SPARSE_SPLITS);
  Tensor lse = torch::stable::new_empty(query, {rows, query.size(1)}, ScalarType::Float);
  Tensor out =
      attend(op, device, query, heads, splits, p, static_cast<float*>(lse.data_ptr()));
  return {out, lse};
}

}  // namespace

std::tuple<Tensor, Tensor> sparse_attention(Tensor query, Tensor keys, Tensor values,
                                            Tensor key_slots, Tensor value_slots, Tensor lengths,
                                            std::vector<int64_t> capacities, int64_t chunk_size,
                                            double scale, std::optional<Tensor> value_buffer,
                                            std::optional<Tensor> value_scales) {
  constexpr const char* op = "sparse_attention";
  check_sizes(query, op, "query", {-1, -1, -1});
  const Device device(query, op, "query");
  const bool in_fp8 = value_buffer && value_buffer->scalar_type() == ScalarType::Float8_e4m3fn;
  SHADOWKV_CHECK(!value_buffer || in_fp8 || value_buffer->scalar_type() == ScalarType::Byte, op,
                 "value_buffer must be float8_e4m3fn, or uint8 beside keys in bfloat16");
  SHADOWKV_CHECK(in_fp8 == value_scales.has_value(), op,
                 "value_scales belong to a value_buffer in fp8");
  auto attend_as = [&](auto form) {
    return attend_chunks<decltype(form)::value>(op, device, query, keys, values, key_slots,
                                                value_slots, lengths, capacities, chunk_size, scale,
                                                {value_buffer, value_scales});
  };
  if (in_fp8) return attend_as(std::integral_constant<Form, Form::FP8>{});
  if (value_buffer) return attend_as(std::integral_constant<Form, Form::PACKED>{});
  return attend_as(std::integral_constant<Form, Form::SAME>{});
}

}  // namespace shadowkv
