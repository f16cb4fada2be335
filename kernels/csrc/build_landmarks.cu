// build_landmarks: see shadowkv_cli/ops/build_landmarks.py.
#include "build_landmarks.cuh"

#include "common/dispatch.h"
#include "common/stream.h"

namespace shadowkv {

std::tuple<Tensor, Tensor> build_landmarks(Tensor keys, int64_t chunk_size, int64_t per_chunk) {
  constexpr const char* op = "build_landmarks";
  const Device device(keys, op, "keys");
  check_sizes(keys, op, "keys", {-1, -1, -1});
  SHADOWKV_CHECK(chunk_size > 0 && per_chunk > 0 && chunk_size % per_chunk == 0, op, per_chunk,
                 " landmarks do not divide ", chunk_size);
  SHADOWKV_CHECK(keys.stride(2) == 1, op, "keys must be contiguous in the last dimension");
  const int64_t heads = keys.size(0), dim = keys.size(2), chunks = keys.size(1) / chunk_size;
  Tensor landmarks = torch::stable::new_empty(keys, {heads, chunks, per_chunk, dim});
  Tensor similarity = torch::stable::new_empty(keys, {heads, chunks}, ScalarType::Float);
  if (heads == 0 || chunks == 0) return {landmarks, similarity};

  LandmarkParams p{};
  p.keys = keys.data_ptr();
  p.key_head = keys.stride(0);
  p.key_token = keys.stride(1);
  p.chunks = static_cast<int>(chunks);
  p.chunk_size = static_cast<int>(chunk_size);
  p.per_chunk = static_cast<int>(per_chunk);
  p.landmarks = landmarks.data_ptr();
  p.similarity = static_cast<float*>(similarity.data_ptr());
  dispatch(op, keys.scalar_type(), dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    average_chunks<T, decltype(head_dim)::value>
        <<<dim3(ceil_div(chunks, LANDMARK_WARPS), heads), LANDMARK_WARPS * 32, 0,
           device.stream()>>>(p);
    device.check_launch();
  });
  return {landmarks, similarity};
}

}  // namespace shadowkv
