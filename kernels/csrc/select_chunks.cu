// select_chunks: see shadowkv_cli/ops/select_chunks.py.
#include <algorithm>

#include "common/dispatch.h"
#include "common/stream.h"
#include "select_cluster.cuh"
#include "select_scores.cuh"
#include "select_top.cuh"

namespace shadowkv {

namespace {

/// Keys of so many chunks stay in shared memory: 160 KiB.
constexpr int64_t MOST_SHARED_CHUNKS = 40 * 1024;

/// Bytes of a processor's shared memory that select_chunks leaves to kernels beside it: a block that
/// rebuilds keys, or one that attends.
constexpr size_t ROOM_BESIDE = 86 * 1024;

void check_contiguous(const char* op, const char* name, const Tensor& t) {
  int64_t step = 1;
  for (int64_t i = t.dim() - 1; i >= 2; --i) {
    SHADOWKV_CHECK(t.size(i) <= 1 || t.stride(i) == step, op, name,
                   " must be contiguous from the chunks on");
    step *= t.size(i);
  }
}

bool are_packed(const Tensor& landmarks) {
  return landmarks.scalar_type() == ScalarType::Byte;
}

void check_landmarks(const char* op, const Tensor& landmarks, const std::optional<Tensor>& scales,
                     const Tensor& query) {
  const int64_t dim = query.size(2);
  const int64_t width = are_packed(landmarks) ? packed_width(dim) : dim;
  check_sizes(landmarks, op, "landmarks", {-1, -1, -1, -1, width});
  if (are_packed(landmarks)) {
    SHADOWKV_CHECK(!scales, op, "landmark_scales belong to landmarks in fp8");
    check_dtype(query, op, "query", ScalarType::BFloat16, "bfloat16 beside packed landmarks");
    check_words(landmarks, op, "landmarks", landmarks);
    check_device(landmarks, op, "landmarks", query);
  } else if (scales) {
    check_dtype(landmarks, op, "landmarks", ScalarType::Float8_e4m3fn, "float8_e4m3fn with scales");
    check_words(landmarks, op, "landmarks", landmarks);
    check_device(landmarks, op, "landmarks", query);
    check_device(*scales, op, "landmark_scales", query);
    check_sizes(*scales, op, "landmark_scales",
                {landmarks.size(0), landmarks.size(1), landmarks.size(2), landmarks.size(3)});
    check_dtype(*scales, op, "landmark_scales", ScalarType::Float, "float32");
    check_contiguous(op, "landmark_scales", *scales);
  } else {
    check_words(landmarks, op, "landmarks", query);
  }
  const int64_t per_chunk = landmarks.size(3);
  SHADOWKV_CHECK(per_chunk >= 1 && per_chunk <= SEGMENT, op, "landmarks must be 1 to ", SEGMENT,
                 " a chunk, got ", per_chunk);
  check_contiguous(op, "landmarks", landmarks);
}

template <typename T, typename Stored, int D>
void launch_scores(const SelectParams& p, int64_t rows, const Device& device) {
  const size_t bytes = p.group * SCORE_STRIDE * sizeof(float);
  score_chunks<T, Stored, D>
      <<<dim3(p.segments, p.heads, rows), SCORE_WARPS * 32, bytes, device.stream()>>>(p);
  device.check_launch();
}

template <bool SHARED>
void launch_best(const SelectParams& p, int64_t rows, const Device& device) {
  const size_t keys = SHARED ? (p.chunks + 3) / 4 * 4 * sizeof(uint32_t) : 0;
  device.allow_shared(select_best<SHARED>,
                      sizeof(TopRoom) + (SHARED ? MOST_SHARED_CHUNKS * sizeof(uint32_t) : 0));
  select_best<SHARED>
      <<<dim3(p.heads, rows), SELECT_THREADS, sizeof(TopRoom) + keys, device.stream()>>>(p);
  device.check_launch();
}

/// Let `begun` happen when the kernel runs, so that others can wait for rows beside it.
void record_begun(std::optional<int64_t> begun, const Device& device) {
  if (begun) {
    check_cuda(cudaEventRecord(reinterpret_cast<cudaEvent_t>(*begun), device.stream()),
               "select_chunks");
  }
}

/// Bytes of shared memory of a block, whose query heads lie in banks of their own.
size_t cluster_bytes(SelectParams& p) {
  p.share_keys = std::max(cluster_share(p.chunks, p.blocks), REHEARSED);
  p.share_stride = ceil_div(p.share_keys, 32) * 32 + 8;
  const int64_t logits = static_cast<int64_t>(p.buffers) * p.group * p.share_stride;
  return sizeof(ClusterRoom) + (logits + RANK_PARTS * p.share_keys) * sizeof(float);
}

/// False where the GPU has no clusters, no code for them was compiled, or shared memory is too small.
template <typename T, typename Stored, int D, int HALVES>
bool launch_cluster(SelectParams& p, std::optional<int64_t> begun, const Device& device) {
  constexpr auto kernel = select_in_cluster<T, Stored, D, HALVES>;
  if (device.architecture(kernel) < 90) return false;
  const size_t most = device.most_shared();
  device.allow_shared(kernel, most);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeLaunchCompletionEvent;
  attributes[1].val.launchCompletionEvent.event = reinterpret_cast<cudaEvent_t>(begun.value_or(0));
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(CLUSTER_THREADS);
  config.stream = device.stream();
  config.attrs = attributes;

  // Of the sizes of a cluster the one that has read all planes first: fewer blocks take longer for
  // one plane, but more clusters run at once, and may have equal shares.
  double fastest = INFINITY;
  SelectParams chosen{};
  for (int blocks : {MOST_CLUSTER_BLOCKS, MOST_CLUSTER_BLOCKS / 2}) {
    p.blocks = blocks, p.buffers = 2;
    if (cluster_bytes(p) + ROOM_BESIDE > most) p.buffers = 1;
    const size_t bytes = cluster_bytes(p);
    const bool leaves_room = bytes + ROOM_BESIDE <= most;
    if (p.share_keys > MOST_SHARE || bytes > most || (!leaves_room && fastest < INFINITY)) continue;
    attributes[0].val.clusterDim.x = blocks;
    config.gridDim = dim3(blocks * p.planes), config.dynamicSmemBytes = bytes, config.numAttrs = 1;
    int at_once = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&at_once, kernel, &config), "select_chunks");
    if (at_once == 0) continue;
    const double time = static_cast<double>(ceil_div(p.planes, at_once)) / blocks;
    if (time < fastest) fastest = time, chosen = p, chosen.clusters = std::min(p.planes, at_once);
  }
  if (fastest == INFINITY) return false;
  p = chosen;
  attributes[0].val.clusterDim.x = p.blocks;
  config.gridDim = dim3(p.blocks * p.clusters);
  config.dynamicSmemBytes = cluster_bytes(p);
  config.numAttrs = begun ? 2 : 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, p), "select_chunks");
  return true;
}

/// Select in one kernel; false where that takes what is not there: clusters, 16-bit queries, 1, 2 or
/// 4 landmarks a chunk that lie at multiples of 16 bytes, and logits that fit shared memory.
template <typename T, typename Stored, int D>
bool select_at_once(SelectParams& p, std::optional<int64_t> begun, const Device& device) {
  if constexpr (sizeof(T) == 4) {
    return false;
  } else {
    if (p.chunks > MOST_CLUSTER_CHUNKS) return false;
    if (p.per_chunk != 1 && p.per_chunk != 2 && p.per_chunk != 4) return false;
    const int64_t size = sizeof(Stored);
    const int64_t places = reinterpret_cast<int64_t>(p.landmarks) | p.landmark_prompt * size |
                           p.landmark_head * size;
    if (places % 16 != 0) return false;  // They are copied in bulk.
    return p.group > 8 ? launch_cluster<T, Stored, D, 2>(p, begun, device)
                       : launch_cluster<T, Stored, D, 1>(p, begun, device);
  }
}

/// Call f(Type<T>{}, Type<Stored>{}, integral_constant<int, D>{}).
template <typename F>
void dispatch_landmarks(const char* op, const Tensor& query, bool in_fp8, bool packed, F&& f) {
  dispatch(op, query.scalar_type(), query.size(2), [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    if (in_fp8) return f(type, Type<Fp8>{}, head_dim);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      if (packed) return f(type, Type<Packed>{}, head_dim);
    }
    return f(type, type, head_dim);
  });
}

}  // namespace

Tensor select_chunks(Tensor query, Tensor landmarks, std::optional<Tensor> landmark_scales,
                     Tensor prompt_index, Tensor num_chunks, Tensor excluded, Tensor budget_chunks,
                     int64_t max_chunks, double scale, std::optional<Tensor> done,
                     std::optional<int64_t> begun) {
  constexpr const char* op = "select_chunks";
  check_sizes(query, op, "query", {-1, -1, -1});
  const int64_t rows = query.size(0), q_heads = query.size(1);
  const Device device(query, op, "query");
  query = dense_query(query);
  check_landmarks(op, landmarks, landmark_scales, query);
  const int64_t heads = landmarks.size(1), chunks = landmarks.size(2), parts = landmarks.size(3);
  check_table(prompt_index, op, "prompt_index", query, {rows});
  check_table(num_chunks, op, "num_chunks", query, {rows});
  check_table(budget_chunks, op, "budget_chunks", query, {rows});
  check_device(excluded, op, "excluded", query);
  check_sizes(excluded, op, "excluded", {rows, heads, chunks});
  check_dtype(excluded, op, "excluded", ScalarType::Bool, "bool");
  SHADOWKV_CHECK(chunks <= 1 || excluded.stride(2) == 1, op,
                 "excluded must be contiguous in the last dimension");
  SHADOWKV_CHECK(max_chunks >= 0, op, "max_chunks must not be negative, got ", max_chunks);
  if (done) check_table(*done, op, "done", query, {rows});

  SelectParams p{};
  p.group = static_cast<int>(check_group(op, q_heads, heads));
  Tensor ids = torch::stable::new_empty(query, {rows, heads, max_chunks}, ScalarType::Int);
  if (rows * heads == 0) {
    record_begun(begun, device);
    return ids;
  }
  p.query = query.data_ptr();
  p.landmarks = landmarks.data_ptr();
  p.landmark_prompt = landmarks.stride(0);
  p.landmark_head = landmarks.stride(1);
  if (landmark_scales) {
    p.scales = static_cast<const float*>(landmark_scales->data_ptr());
    p.scale_prompt = landmark_scales->stride(0);
    p.scale_head = landmark_scales->stride(1);
    const uint64_t address = reinterpret_cast<uint64_t>(p.scales) / sizeof(float);
    p.scales_in_words = (p.scale_prompt | p.scale_head | static_cast<int64_t>(address)) % 4 == 0;
  }
  p.prompt_index = static_cast<const int*>(prompt_index.data_ptr());
  p.num_chunks = static_cast<const int*>(num_chunks.data_ptr());
  p.excluded = static_cast<const bool*>(excluded.data_ptr());
  p.excluded_row = excluded.stride(0);
  p.excluded_head = excluded.stride(1);
  p.budget_chunks = static_cast<const int*>(budget_chunks.data_ptr());
  p.heads = static_cast<int>(heads);
  p.planes = static_cast<int>(rows * heads);
  p.chunks = static_cast<int>(chunks);
  p.per_chunk = static_cast<int>(parts);
  p.max_chunks = static_cast<int>(max_chunks);
  p.segment_chunks = static_cast<int>(SEGMENT / parts);
  p.segments = ceil_div(chunks, p.segment_chunks);
  p.scale = static_cast<float>(scale * 1.4426950408889634);
  p.ids = static_cast<int*>(ids.data_ptr());
  p.done = done ? static_cast<int*>(done->data_ptr()) : nullptr;

  const bool in_fp8 = landmark_scales.has_value(), packed = are_packed(landmarks);
  bool at_once = false;
  dispatch_landmarks(op, query, in_fp8, packed, [&](auto type, auto stored, auto head_dim) {
    at_once = select_at_once<typename decltype(type)::type, typename decltype(stored)::type,
                             decltype(head_dim)::value>(p, begun, device);
  });
  if (at_once) return ids;

  p.logit_stride = ceil_div(chunks, 4) * 4;  // whole 16-byte words
  const bool in_shared = chunks <= MOST_SHARED_CHUNKS;
  Tensor logits = scratch(query, rows * q_heads * p.logit_stride, ScalarType::Float);
  Tensor totals = scratch(query, rows * q_heads * p.segments * 2, ScalarType::Float);
  Tensor keys = scratch(query, in_shared ? 0 : rows * heads * chunks, ScalarType::Int);
  p.logits = static_cast<float*>(logits.data_ptr());
  p.totals = static_cast<float2*>(totals.data_ptr());
  p.keys = static_cast<uint32_t*>(keys.data_ptr());

  dispatch_landmarks(op, query, in_fp8, packed, [&](auto type, auto stored, auto head_dim) {
    if (p.segments == 0) return;
    launch_scores<typename decltype(type)::type, typename decltype(stored)::type,
                  decltype(head_dim)::value>(p, rows, device);
  });
  if (in_shared) {
    launch_best<true>(p, rows, device);
  } else {
    launch_best<false>(p, rows, device);
  }
  record_begun(begun, device);
  return ids;
}

}  // namespace shadowkv
