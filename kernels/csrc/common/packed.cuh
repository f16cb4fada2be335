// bfloat16 in some 13 bits: shadowkv_cli/ops/packed.py says how the bytes of a token lie.
#pragma once

#include <cstdint>

namespace shadowkv {

constexpr int PACKED_HEADER_BYTES = 16;
constexpr int MOST_STRAYS = (PACKED_HEADER_BYTES - 2) / 2;

/// Bytes of a token of a head of dimension D.
template <int D>
constexpr int PACKED_WIDTH = PACKED_HEADER_BYTES + D * 3 / 2;

/// Two elements of bfloat16: their signs and mantissas are two bytes of `signs` from `first` on,
/// their codes are in bits 0 to 3 and 16 to 19 of `codes`. Exponents of listed strays come later.
__device__ inline uint32_t unpack_pair(uint32_t signs, int first, uint32_t codes, uint32_t base) {
  const uint32_t both = __byte_perm(signs, 0, first ? 0x4342 : 0x4140);  // a byte in each half
  const uint32_t used = (codes + 0x000f000fu) >> 4 & 0x00010001u;        // 1 where the code is not 0
  const uint32_t exponents = codes + used * base;
  return (both & 0x007f007fu) | (both & 0x00800080u) << 8 | exponents << 7;
}

/// Eight elements, from eight bytes of signs and mantissas and four bytes of codes.
__device__ inline uint4 unpack_eight(uint32_t first, uint32_t second, uint32_t codes,
                                     uint32_t base) {
  constexpr uint32_t HALVES = 0x000f000fu;
  return {unpack_pair(first, 0, codes & HALVES, base),
          unpack_pair(first, 2, codes >> 4 & HALVES, base),
          unpack_pair(second, 0, codes >> 8 & HALVES, base),
          unpack_pair(second, 2, codes >> 12 & HALVES, base)};
}

}  // namespace shadowkv
