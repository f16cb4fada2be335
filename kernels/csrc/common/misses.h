// The list of missing chunks that update_residency makes, checked.
#pragma once

#include "check.h"

namespace shadowkv {

/// Refuse tables that are not [R, Hk, N] and counts that are not [R, Hk], as the buffer has them.
inline void check_misses(const char* op, const Tensor& ids, const Tensor& slots,
                         const Tensor& misses, const Tensor& miss_counts, const Tensor& buffer) {
  const int64_t rows = buffer.size(0), heads = buffer.size(1);
  check_table(ids, op, "ids", buffer, {rows, heads, -1});
  check_table(slots, op, "slots", buffer, {rows, heads, ids.size(2)});
  check_table(misses, op, "misses", buffer, {rows, heads, ids.size(2)});
  check_table(miss_counts, op, "miss_counts", buffer, {rows, heads});
}

}  // namespace shadowkv
