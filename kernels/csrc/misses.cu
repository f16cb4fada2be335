// The list of missing chunks, on the host; not an op of its own.
#include "misses.h"

#include <climits>

#include "misses.cuh"

namespace shadowkv {

Misses find_misses(const char* op, const Device& device, const Tensor& ids, const Tensor& slots,
                   const Tensor& misses, const Tensor& buffer) {
  const int64_t rows = buffer.size(0), heads = buffer.size(1), wanted = ids.size(2);
  check_table(ids, op, "ids", buffer, {rows, heads, -1});
  check_table(slots, op, "slots", buffer, {rows, heads, wanted});
  check_table(misses, op, "misses", buffer, {rows, heads, wanted}, ScalarType::Bool);
  const int64_t total = ids.numel();
  SHADOWKV_CHECK(total < INT_MAX - (1 << 20), op, "ids holds too many chunks: ", text(ids));
  Misses found{scratch(ids, total, ScalarType::Int),
               scratch(ids, rows * heads + 1, ScalarType::Int)};
  list_misses<<<1, LIST_THREADS, 0, device.stream()>>>(
      static_cast<const uint8_t*>(misses.data_ptr()), static_cast<int>(total),
      static_cast<int>(wanted), static_cast<int*>(found.list.data_ptr()),
      static_cast<int*>(found.starts.data_ptr()));
  device.check_launch();
  return found;
}

}  // namespace shadowkv
