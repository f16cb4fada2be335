// 8-bit floats, e4m3: their conversion to halves is exact.
#pragma once

#include <cuda_fp8.h>

#include "matrix.cuh"

namespace shadowkv {

/// A byte that holds one; scales lie elsewhere.
struct Fp8 {
  uint8_t bits;
};

/// Two halves in one register from the lower or upper two of four.
__device__ inline uint32_t halves_of(uint32_t four, int upper) {
  const auto two = static_cast<__nv_fp8x2_storage_t>(upper ? four >> 16 : four & 0xffffu);
  const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3);
  return static_cast<uint32_t>(halves.x) | static_cast<uint32_t>(halves.y) << 16;
}

__device__ inline float to_float(Fp8 x) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.bits, __NV_E4M3)));
}

/// Eight elements times their scale, rounded to T.
template <typename T>
__device__ inline uint4 widened(uint32_t first, uint32_t second, float scale) {
  auto two = [&](uint32_t four, int upper) {
    const uint32_t halves = halves_of(four, upper);
    __half2 pair;
    memcpy(&pair, &halves, sizeof(pair));
    const float2 wide = __half22float2(pair);
    return pack<T>(wide.x * scale, wide.y * scale);
  };
  return {two(first, 0), two(first, 1), two(second, 0), two(second, 1)};
}

}  // namespace shadowkv
