// Host side of the list of missing chunks.
#pragma once

#include "common/stream.h"

namespace shadowkv {

struct Misses {
  Tensor list;    // int32 [R * Hk * N], filled as far as chunks are missing
  Tensor starts;  // int32 [R * Hk + 1]

  const int* list_ptr() const { return static_cast<const int*>(list.data_ptr()); }
  const int* starts_ptr() const { return static_cast<const int*>(starts.data_ptr()); }
};

/// Check ids, slots and flags [R, Hk, N] (not empty), and list the places of those that miss.
Misses find_misses(const char* op, const Device& device, const Tensor& ids, const Tensor& slots,
                   const Tensor& misses, const Tensor& buffer);

}  // namespace shadowkv
