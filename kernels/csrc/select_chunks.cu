// select_chunks: see shadowkv_cli/ops/select_chunks.py.
#include <algorithm>

#include "common/dispatch.h"
#include "common/stream.h"
#include "select_scores.cuh"
#include "select_top.cuh"

namespace shadowkv {

namespace {

/// Keys of so many chunks stay in shared memory: 80 KiB, two blocks on a processor of an H100.
constexpr int64_t MOST_SHARED_CHUNKS = 20 * 1024;

void check_landmarks(const char* op, const Tensor& landmarks, const Tensor& query) {
  check_words(landmarks, op, "landmarks", query);
  const int64_t dim = landmarks.size(4), per_chunk = landmarks.size(3);
  SHADOWKV_CHECK(per_chunk >= 1 && per_chunk <= SEGMENT, op, "landmarks must be 1 to ", SEGMENT,
                 " a chunk, got ", per_chunk);
  SHADOWKV_CHECK((per_chunk == 1 || landmarks.stride(3) == dim) &&
                     (landmarks.size(2) <= 1 || landmarks.stride(2) == per_chunk * dim),
                 op, "landmarks must be contiguous from the chunks on");
}

}  // namespace

Tensor select_chunks(Tensor query, Tensor landmarks, Tensor prompt_index, Tensor num_chunks,
                     Tensor excluded, Tensor budget_chunks, int64_t max_chunks, double scale) {
  constexpr const char* op = "select_chunks";
  check_sizes(query, op, "query", {-1, -1, -1});
  const int64_t rows = query.size(0), q_heads = query.size(1), dim = query.size(2);
  check_sizes(landmarks, op, "landmarks", {-1, -1, -1, -1, dim});
  const int64_t heads = landmarks.size(1), chunks = landmarks.size(2), parts = landmarks.size(3);
  const Device device(query, op, "query");
  query = dense_query(query);
  check_landmarks(op, landmarks, query);
  check_table(prompt_index, op, "prompt_index", query, {rows});
  check_table(num_chunks, op, "num_chunks", query, {rows});
  check_table(budget_chunks, op, "budget_chunks", query, {rows});
  check_device(excluded, op, "excluded", query);
  check_sizes(excluded, op, "excluded", {rows, heads, chunks});
  check_dtype(excluded, op, "excluded", ScalarType::Bool, "bool");
  SHADOWKV_CHECK(chunks <= 1 || excluded.stride(2) == 1, op,
                 "excluded must be contiguous in the last dimension");
  SHADOWKV_CHECK(max_chunks >= 0, op, "max_chunks must not be negative, got ", max_chunks);

  SelectParams p{};
  p.group = static_cast<int>(check_group(op, q_heads, heads));
  Tensor ids = torch::stable::new_empty(query, {rows, heads, max_chunks}, ScalarType::Int);
  if (ids.numel() == 0) return ids;
  p.query = query.data_ptr();
  p.landmarks = landmarks.data_ptr();
  p.landmark_prompt = landmarks.stride(0);
  p.landmark_head = landmarks.stride(1);
  p.prompt_index = static_cast<const int*>(prompt_index.data_ptr());
  p.num_chunks = static_cast<const int*>(num_chunks.data_ptr());
  p.excluded = static_cast<const bool*>(excluded.data_ptr());
  p.excluded_row = excluded.stride(0);
  p.excluded_head = excluded.stride(1);
  p.budget_chunks = static_cast<const int*>(budget_chunks.data_ptr());
  p.heads = static_cast<int>(heads);
  p.chunks = static_cast<int>(chunks);
  p.per_chunk = static_cast<int>(parts);
  p.max_chunks = static_cast<int>(max_chunks);
  p.segment_chunks = static_cast<int>(SEGMENT / parts);
  p.segments = ceil_div(chunks, p.segment_chunks);
  p.scale = static_cast<float>(scale * 1.4426950408889634);
  p.ids = static_cast<int*>(ids.data_ptr());

  const bool in_shared = chunks <= MOST_SHARED_CHUNKS;
  Tensor logits = scratch(query, rows * q_heads * chunks, ScalarType::Float);
  Tensor totals = scratch(query, rows * q_heads * p.segments * 2, ScalarType::Float);
  Tensor keys = scratch(query, in_shared ? 0 : rows * heads * chunks, ScalarType::Int);
  p.logits = static_cast<float*>(logits.data_ptr());
  p.totals = static_cast<float2*>(totals.data_ptr());
  p.keys = in_shared ? nullptr : static_cast<uint32_t*>(keys.data_ptr());

  dispatch(op, query.scalar_type(), dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    if (p.segments == 0) return;
    const size_t bytes = p.group * SCORE_STRIDE * sizeof(float);
    score_chunks<T, decltype(head_dim)::value>
        <<<dim3(p.segments, heads, rows), SCORE_WARPS * 32, bytes, device.stream()>>>(p);
    device.check_launch();
  });
  const size_t bytes = in_shared ? std::max<int64_t>(chunks, 1) * sizeof(uint32_t) : 0;
  device.allow_shared(select_best, MOST_SHARED_CHUNKS * sizeof(uint32_t));
  select_best<<<dim3(heads, rows), SELECT_THREADS, bytes, device.stream()>>>(p);
  device.check_launch();
  return ids;
}

}  // namespace shadowkv
