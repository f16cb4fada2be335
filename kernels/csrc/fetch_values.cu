// fetch_values: see shadowkv_cli/ops/fetch_values.py. It moves bytes, of any dtype.
#include "fetch_values.cuh"

#include "misses.h"

namespace shadowkv {

namespace {

/// Enough to fill the bus, and few enough that the other processors work on something else.
constexpr int HOST_BLOCKS = 32;
constexpr int COPY_BLOCKS_A_PROCESSOR = 4;

bool has_whole_chunks(const Tensor& t) {
  return (t.size(4) <= 1 || t.stride(4) == 1) && (t.size(3) <= 1 || t.stride(3) == t.size(4));
}

/// The address under which the GPU reads a tensor; host memory must be pinned.
const char* device_address(const char* op, const Tensor& values) {
  if (values.is_cuda()) return static_cast<const char*>(values.data_ptr());
  cudaPointerAttributes attributes{};
  check_cuda(cudaPointerGetAttributes(&attributes, values.data_ptr()), op);
  SHADOWKV_CHECK(attributes.type == cudaMemoryTypeHost && attributes.devicePointer, op,
                 "values must be on the GPU or in pinned host memory");
  return static_cast<const char*>(attributes.devicePointer);
}

}  // namespace

void fetch_values(Tensor values, Tensor prompt_index, Tensor ids, Tensor slots, Tensor misses,
                  Tensor buffer) {
  constexpr const char* op = "fetch_values";
  const Device device(buffer, op, "buffer");
  check_sizes(buffer, op, "buffer", {-1, -1, -1, -1, -1});
  check_sizes(values, op, "values", {-1, buffer.size(1), -1, buffer.size(3), buffer.size(4)});
  SHADOWKV_CHECK(values.scalar_type() == buffer.scalar_type(), op,
                 "values must have the dtype of the buffer");
  SHADOWKV_CHECK(has_whole_chunks(values) && has_whole_chunks(buffer), op,
                 "the chunks of values and buffer must be contiguous");
  if (values.is_cuda()) check_device(values, op, "values", buffer);
  check_table(prompt_index, op, "prompt_index", buffer, {buffer.size(0)});
  const int64_t size = values.element_size();
  const int64_t chunk_bytes = buffer.size(3) * buffer.size(4) * size;
  if (ids.numel() == 0 || chunk_bytes == 0 || values.numel() == 0) return;
  const Misses found = find_misses(op, device, ids, slots, misses, buffer);

  FetchParams p{};
  p.values = device_address(op, values);
  p.buffer = static_cast<char*>(buffer.data_ptr());
  p.value_prompt = values.stride(0) * size;
  p.value_head = values.stride(1) * size;
  p.value_chunk = values.stride(2) * size;
  p.buffer_row = buffer.stride(0) * size;
  p.buffer_head = buffer.stride(1) * size;
  p.buffer_slot = buffer.stride(2) * size;
  p.prompt_index = static_cast<const int*>(prompt_index.data_ptr());
  p.ids = static_cast<const int*>(ids.data_ptr());
  p.slots = static_cast<const int*>(slots.data_ptr());
  p.list = found.list_ptr();
  p.count = found.starts_ptr() + buffer.size(0) * buffer.size(1);
  p.heads = static_cast<int>(buffer.size(1));
  p.wanted = static_cast<int>(ids.size(2));
  const int64_t odd = chunk_bytes | p.value_prompt | p.value_head | p.value_chunk | p.buffer_row |
                      p.buffer_head | p.buffer_slot | reinterpret_cast<int64_t>(p.values) |
                      reinterpret_cast<int64_t>(p.buffer);
  const int blocks = values.is_cuda() ? device.processors() * COPY_BLOCKS_A_PROCESSOR : HOST_BLOCKS;
  auto launch = [&](auto kernel, int64_t word_bytes) {
    p.words = static_cast<int>(chunk_bytes / word_bytes);
    kernel<<<blocks, FETCH_THREADS, 0, device.stream()>>>(p);
  };
  if (odd % 16 == 0) {
    launch(copy_chunks<uint4>, 16);
  } else if (odd % 4 == 0) {
    launch(copy_chunks<unsigned>, 4);
  } else {
    launch(copy_chunks<unsigned char>, 1);
  }
  device.check_launch();
}

}  // namespace shadowkv
