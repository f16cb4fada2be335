// bfloat16 in some 13 bits: shadowkv_cli/ops/packed.py says how the bytes of a row lie.
#pragma once

#include <cstdint>

namespace shadowkv {

constexpr int PACKED_HEADER_BYTES = 16;
constexpr int MOST_STRAYS = (PACKED_HEADER_BYTES - 2) / 2;

/// Bytes of a row of so many elements.
constexpr int64_t packed_width(int64_t dim) { return PACKED_HEADER_BYTES + dim * 3 / 2; }

template <int D>
constexpr int PACKED_WIDTH = static_cast<int>(packed_width(D));

/// A byte that is part of a packed row.
struct Packed {
  uint8_t bits;
};

/// The base of a row, in each byte.
__device__ inline uint32_t packed_base(uint32_t header) { return __byte_perm(header, 0, 0); }

__device__ inline int packed_strays(uint32_t header) {
  return min(static_cast<int>(header >> 8 & 0xff), MOST_STRAYS);
}

/// The upper bytes of four elements, whose codes are the lower halves of four bytes.
__device__ inline uint32_t upper_bytes(uint32_t codes, uint32_t base) {
  return ((codes & 0x07070707u) + base) | (codes << 4 & 0x80808080u);
}

/// Eight elements, from their lower bytes and their codes; what strays is put in later.
__device__ inline uint4 unpack_eight(uint32_t first, uint32_t second, uint32_t codes,
                                     uint32_t base) {
  const uint32_t upper = upper_bytes(codes, base), next = upper_bytes(codes >> 4, base);
  return {__byte_perm(first, upper, 0x5140), __byte_perm(first, upper, 0x7362),
          __byte_perm(second, next, 0x5140), __byte_perm(second, next, 0x7362)};
}

}  // namespace shadowkv
