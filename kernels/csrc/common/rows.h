// Tensors as rows of contiguous elements, whatever their leading dimensions.
#pragma once

#include "check.h"

namespace shadowkv {

/// Refuse a tensor without a last dimension of contiguous elements, or on another GPU.
inline void check_rows(const Tensor& tensor, const char* op, const char* name,
                       const Tensor& other) {
  check_device(tensor, op, name, other);
  SHADOWKV_CHECK(tensor.scalar_type() == other.scalar_type(), op, name,
                 " must have the dtype of the other tensors");
  SHADOWKV_CHECK(tensor.dim() > 0, op, name, " must have a dimension");
  const int64_t last = tensor.dim() - 1;
  SHADOWKV_CHECK(tensor.size(last) <= 1 || tensor.stride(last) == 1, op, name,
                 " must be contiguous in the last dimension");
}

/// A stride in elements; 0 along a dimension of one, where torch allows any number.
inline int64_t step(const Tensor& tensor, int64_t dim) {
  return tensor.size(dim) == 1 ? 0 : tensor.stride(dim);
}

/// How far apart rows are in memory, in elements, or -1 where no one distance leads through all.
inline int64_t row_step(const Tensor& tensor) {
  int64_t distance = 0, next = -1;  // of the rows so far, and where one more of them would begin
  for (int64_t i = tensor.dim() - 2; i >= 0; --i) {
    if (tensor.size(i) == 1) continue;
    if (next < 0) {
      distance = tensor.stride(i);
    } else if (tensor.stride(i) != next) {
      return -1;
    }
    next = tensor.stride(i) * tensor.size(i);
  }
  return distance;
}

/// The tensor, or a copy where its rows don't lie at one distance.
inline Tensor regular_rows(const Tensor& tensor) {
  return row_step(tensor) < 0 ? torch::stable::contiguous(tensor) : tensor;
}

/// True where the rows can be read in 16-byte words, all of them whole.
inline bool has_whole_words(const Tensor& tensor) {
  const int64_t bytes = tensor.size(tensor.dim() - 1) * static_cast<int64_t>(tensor.element_size());
  return bytes % 16 == 0 && is_aligned(tensor);
}

}  // namespace shadowkv
