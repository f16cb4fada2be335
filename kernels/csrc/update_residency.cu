// update_residency: see shadowkv_cli/ops/update_residency.py.
#include "update_residency.cuh"

#include "common/stream.h"

namespace shadowkv {

namespace {

/// What shared memory holds of a row and KV head: 64 KiB.
constexpr int64_t MOST_SHARED_WORDS = 16 * 1024;

}  // namespace

std::tuple<Tensor, Tensor, Tensor> update_residency(Tensor ids, Tensor step, Tensor chunk_of_slot,
                                                    Tensor last_used, Tensor slot_of_chunk) {
  constexpr const char* op = "update_residency";
  const Device device(ids, op, "ids");
  check_table(ids, op, "ids", ids, {-1, -1, -1});
  const int64_t rows = ids.size(0), heads = ids.size(1), wanted = ids.size(2);
  check_table(step, op, "step", ids, {rows});
  check_table(chunk_of_slot, op, "chunk_of_slot", ids, {rows, heads, -1});
  const int64_t buffer = chunk_of_slot.size(2);
  check_table(last_used, op, "last_used", ids, {rows, heads, buffer});
  check_table(slot_of_chunk, op, "slot_of_chunk", ids, {rows, heads, -1});
  SHADOWKV_CHECK(buffer >= wanted, op, "chunk_of_slot holds ", buffer, " slots, fewer than the ",
                 wanted, " chunks selected");

  Tensor slots = torch::stable::new_empty(ids, {rows, heads, wanted});
  Tensor misses = torch::stable::new_empty(ids, {rows, heads, wanted});
  Tensor counts = torch::stable::new_empty(ids, {rows, heads});
  if (ids.numel() == 0) return {slots, misses, torch::stable::zero_(counts)};
  ResidencyParams p{};
  p.ids = static_cast<const int*>(ids.data_ptr());
  p.step = static_cast<const int*>(step.data_ptr());
  p.chunk_of_slot = static_cast<int*>(chunk_of_slot.data_ptr());
  p.last_used = static_cast<int*>(last_used.data_ptr());
  p.slot_of_chunk = static_cast<int*>(slot_of_chunk.data_ptr());
  p.slots = static_cast<int*>(slots.data_ptr());
  p.misses = static_cast<int*>(misses.data_ptr());
  p.miss_counts = static_cast<int*>(counts.data_ptr());
  p.heads = static_cast<int>(heads);
  p.wanted = static_cast<int>(wanted);
  p.buffer = static_cast<int>(buffer);
  p.chunks = static_cast<int>(slot_of_chunk.size(2));
  const int64_t words = residency_words(buffer, wanted);
  const bool in_shared = words <= MOST_SHARED_WORDS;
  Tensor room = scratch(ids, in_shared ? 0 : rows * heads * words, ScalarType::Int);
  p.words = in_shared ? nullptr : static_cast<uint32_t*>(room.data_ptr());
  const size_t bytes = in_shared ? words * sizeof(uint32_t) : 0;
  device.allow_shared(place_chunks, MOST_SHARED_WORDS * sizeof(uint32_t));
  place_chunks<<<dim3(heads, rows), RESIDENCY_THREADS, bytes, device.stream()>>>(p);
  device.check_launch();
  return {slots, misses, counts};
}

}  // namespace shadowkv
