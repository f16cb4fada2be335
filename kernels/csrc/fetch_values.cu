// fetch_values: see shadowkv_cli/ops/fetch_values.py. It moves bytes of any dtype.
#include "fetch_values.cuh"

#include "common/misses.h"
#include "common/stream.h"
#include "fetch_bulk.cuh"

namespace shadowkv {

namespace {

/// Enough to fill the bus, and few enough that the other processors work on something else.
constexpr int HOST_BLOCKS = 32;
constexpr int COPY_BLOCKS_A_PROCESSOR = 4;
/// So that a block finds room on a processor beside one of select_chunks.
constexpr size_t MOST_BULK_BYTES = 80 * 1024;
/// Which are counted in 32 bits, with those that a step goes beyond the last.
constexpr int64_t MOST_BULK_PIECES = int64_t{1} << 30;
/// Rows times heads whose misses are counted in shared memory: 160 KiB.
constexpr int64_t MOST_PLANES = 40 * 1024;

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

/// Copy in bulk; false where the GPU can't, or so many rows and heads leave no room to share.
bool launch_bulk(const FetchParams& p, const Device& device) {
  const size_t bytes = bulk_bytes(p.planes);
  if (bytes > MOST_BULK_BYTES || device.architecture(fetch_in_bulk) < 90) return false;
  const int64_t pieces = ceil_div(p.words * 16, BULK_PIECE);
  if (int64_t{p.planes} * p.wanted * pieces > MOST_BULK_PIECES) return false;
  device.allow_shared(fetch_in_bulk, MOST_BULK_BYTES);
  fetch_in_bulk<<<BULK_BLOCKS, BULK_THREADS, bytes, device.stream()>>>(p);
  device.check_launch();
  return true;
}

}  // namespace

void fetch_values(Tensor values, std::optional<Tensor> scales, Tensor prompt_index, Tensor ids,
                  Tensor slots, Tensor misses, Tensor miss_counts, Tensor buffer,
                  std::optional<Tensor> buffer_scales, std::optional<Tensor> turns) {
  constexpr const char* op = "fetch_values";
  const Device device(buffer, op, "buffer");
  check_sizes(buffer, op, "buffer", {-1, -1, -1, -1, -1});
  check_sizes(values, op, "values", {-1, buffer.size(1), -1, buffer.size(3), buffer.size(4)});
  SHADOWKV_CHECK(values.scalar_type() == buffer.scalar_type(), op,
                 "values must have the dtype of the buffer");
  SHADOWKV_CHECK(scales.has_value() == buffer_scales.has_value(), op,
                 "scales and buffer_scales come together, or neither does");
  auto check_scales = [&](const Tensor& t, const char* name, const Tensor& of) {
    check_device(t, op, name, buffer);
    check_sizes(t, op, name, {of.size(0), of.size(1), of.size(2)});
    SHADOWKV_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), op, name,
                   " must be float32 and contiguous");
  };
  if (scales) {
    check_scales(*scales, "scales", values);
    check_scales(*buffer_scales, "buffer_scales", buffer);
  }
  SHADOWKV_CHECK(has_whole_chunks(values) && has_whole_chunks(buffer), op,
                 "the chunks of values and buffer must be contiguous");
  if (values.is_cuda()) check_device(values, op, "values", buffer);
  check_table(prompt_index, op, "prompt_index", buffer, {buffer.size(0)});
  const int64_t size = values.element_size();
  const int64_t chunk_bytes = buffer.size(3) * buffer.size(4) * size;
  check_misses(op, ids, slots, misses, miss_counts, buffer);
  if (turns) check_table(*turns, op, "turns", buffer, {2});
  const int64_t planes = buffer.size(0) * buffer.size(1);
  SHADOWKV_CHECK(planes <= MOST_PLANES, op, "buffer has ", planes, " rows and heads, more than ",
                 MOST_PLANES);
  if (ids.numel() == 0 || chunk_bytes == 0 || values.numel() == 0) return;

  FetchParams p{};
  p.values = device_address(op, values);
  p.buffer = static_cast<char*>(buffer.data_ptr());
  if (scales) {
    p.scales = static_cast<const float*>(scales->data_ptr());
    p.buffer_scales = static_cast<float*>(buffer_scales->data_ptr());
  }
  p.value_prompt = values.stride(0) * size;
  p.value_head = values.stride(1) * size;
  p.value_chunk = values.stride(2) * size;
  p.buffer_row = buffer.stride(0) * size;
  p.buffer_head = buffer.stride(1) * size;
  p.buffer_slot = buffer.stride(2) * size;
  p.prompt_index = static_cast<const int*>(prompt_index.data_ptr());
  p.ids = static_cast<const int*>(ids.data_ptr());
  p.slots = static_cast<const int*>(slots.data_ptr());
  p.misses = static_cast<const int*>(misses.data_ptr());
  p.miss_counts = static_cast<const int*>(miss_counts.data_ptr());
  p.turns = turns ? static_cast<uint32_t*>(turns->data_ptr()) : nullptr;
  p.planes = static_cast<int>(planes);
  p.heads = static_cast<int>(buffer.size(1));
  p.chunks = static_cast<int>(values.size(2));
  p.slots_of_head = static_cast<int>(buffer.size(2));
  p.wanted = static_cast<int>(ids.size(2));
  const int64_t places = chunk_bytes | p.value_prompt | p.value_head | p.value_chunk |
                         p.buffer_row | p.buffer_head | p.buffer_slot |
                         reinterpret_cast<int64_t>(p.values) | reinterpret_cast<int64_t>(p.buffer);
  const int word = places % 16 == 0 ? 16 : places % 4 == 0 ? 4 : 1;
  p.words = static_cast<int>(chunk_bytes / word);
  if (!values.is_cuda() && word == 16 && launch_bulk(p, device)) return;
  const int blocks = values.is_cuda() ? device.processors() * COPY_BLOCKS_A_PROCESSOR : HOST_BLOCKS;
  const size_t shared = (planes + 1) * sizeof(int);
  auto launch = [&](auto kernel) {
    device.allow_shared(kernel, (MOST_PLANES + 1) * sizeof(int));
    kernel<<<blocks, FETCH_THREADS, shared, device.stream()>>>(p);
  };
  if (word == 16) {
    launch(copy_chunks<uint4>);
  } else if (word == 4) {
    launch(copy_chunks<unsigned>);
  } else {
    launch(copy_chunks<unsigned char>);
  }
  device.check_launch();
}

}  // namespace shadowkv
