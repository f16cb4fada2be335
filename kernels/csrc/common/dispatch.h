// From run-time dtype and head dimension to the kernels that were compiled.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "check.h"

namespace shadowkv {

template <typename T>
struct Type {
  using type = T;
};

/// Call f(Type<T>{}) for a compiled dtype.
template <typename F>
void dispatch_dtype(const char* op, ScalarType dtype, F&& f) {
  if (dtype == ScalarType::BFloat16) return f(Type<__nv_bfloat16>{});
  if (dtype == ScalarType::Half) return f(Type<__half>{});
  if (dtype == ScalarType::Float) return f(Type<float>{});
  SHADOWKV_CHECK(false, op, "the dtype must be bfloat16, float16 or float32");
}

/// Call f(Type<T>{}, integral_constant<int, D>{}) for a compiled dtype and head dimension.
template <typename F>
void dispatch(const char* op, ScalarType dtype, int64_t dim, F&& f) {
  dispatch_dtype(op, dtype, [&](auto type) {
    if (dim == 64) return f(type, std::integral_constant<int, 64>{});
    if (dim == 96) return f(type, std::integral_constant<int, 96>{});
    if (dim == 128) return f(type, std::integral_constant<int, 128>{});
    SHADOWKV_CHECK(false, op, "head dimension ", dim, " is not compiled; 64, 96 and 128 are");
  });
}

}  // namespace shadowkv
