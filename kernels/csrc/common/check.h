// Host checks: each names the op, the tensor, and what was expected.
#pragma once

#include <initializer_list>
#include <string>

#include "../api.h"

namespace shadowkv {

using torch::headeronly::ScalarType;

inline std::string text(const Tensor& tensor) {
  std::string out = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    out += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return out + "]";
}

#define SHADOWKV_CHECK(condition, op, ...) STD_TORCH_CHECK(condition, op, ": ", __VA_ARGS__)

/// Refuse a tensor whose sizes are not these; -1 leaves one open.
inline void check_sizes(const Tensor& tensor, const char* op, const char* name,
                        std::initializer_list<int64_t> sizes) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  std::string wanted;
  int64_t i = 0;
  for (int64_t size : sizes) {
    wanted += (i ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
    same = same && (size < 0 || tensor.size(i) == size);
    ++i;
  }
  SHADOWKV_CHECK(same, op, name, " must be [", wanted, "], got ", text(tensor));
}

inline void check_dtype(const Tensor& tensor, const char* op, const char* name, ScalarType dtype,
                        const char* wanted) {
  SHADOWKV_CHECK(tensor.scalar_type() == dtype, op, name, " must be ", wanted);
}

inline void check_device(const Tensor& tensor, const char* op, const char* name,
                         const Tensor& other) {
  SHADOWKV_CHECK(tensor.is_cuda() && tensor.get_device_index() == other.get_device_index(), op,
                 name, " must be on the GPU of the other tensors");
}

/// Refuse what is no contiguous table of indices (or flags) on the device of another tensor.
inline void check_table(const Tensor& tensor, const char* op, const char* name,
                        const Tensor& other, std::initializer_list<int64_t> sizes,
                        ScalarType dtype = ScalarType::Int) {
  check_device(tensor, op, name, other);
  check_sizes(tensor, op, name, sizes);
  check_dtype(tensor, op, name, dtype, dtype == ScalarType::Int ? "int32" : "bool");
  SHADOWKV_CHECK(tensor.is_contiguous(), op, name, " must be contiguous");
}

/// True where a pointer and the strides of all but the last dimensions are whole 16-byte words.
inline bool is_aligned(const Tensor& tensor, int64_t bytes = 16) {
  bool good = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % bytes == 0;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) {
    const int64_t stride = tensor.stride(i) * static_cast<int64_t>(tensor.element_size());
    good = good && (tensor.size(i) == 1 || stride % bytes == 0);
  }
  return good;
}

/// Refuse a tensor that can't be read in 16-byte words along its last dimension.
inline void check_words(const Tensor& tensor, const char* op, const char* name,
                        const Tensor& other) {
  check_device(tensor, op, name, other);
  SHADOWKV_CHECK(tensor.scalar_type() == other.scalar_type(), op, name,
                 " must have the dtype of the other tensors");
  SHADOWKV_CHECK(tensor.stride(tensor.dim() - 1) == 1 && is_aligned(tensor), op, name,
                 " must have rows of whole 16-byte words, contiguous in the last dimension");
}

/// The query with contiguous, aligned rows: itself, or a copy where a view is oddly strided.
inline Tensor dense_query(const Tensor& query) {
  if (query.is_contiguous() && is_aligned(query)) return query;
  return torch::stable::clone(torch::stable::contiguous(query));
}

inline int64_t check_group(const char* op, int64_t q_heads, int64_t heads) {
  SHADOWKV_CHECK(heads > 0 && q_heads % heads == 0, op, q_heads, " query heads do not share ",
                 heads, " KV heads");
  const int64_t group = q_heads / heads;
  SHADOWKV_CHECK(group <= 16, op, group, " query heads a KV head are more than 16");
  return group;
}

inline Tensor scratch(const Tensor& like, int64_t elements, ScalarType dtype) {
  return torch::stable::new_empty(like, {elements > 0 ? elements : 1}, dtype);
}

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

}  // namespace shadowkv
