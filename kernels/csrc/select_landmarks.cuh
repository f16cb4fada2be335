// Landmarks on their way from memory to the tensor cores, and the queries they meet there.
#pragma once

#include <type_traits>

#include "common/fp8.cuh"
#include "common/matrix.cuh"

namespace shadowkv {

/// Landmarks in 8 bits are multiplied as halves.
template <typename T, typename Stored>
using ProductOf = std::conditional_t<sizeof(Stored) == 1, __half, T>;

/// How a lane reads landmarks [*, D] on the way to the tensor cores: of eight at a time one, pieces
/// of so many bytes, each beside those of its three neighbours.
template <typename Stored, int D>
struct Pieces {
  static constexpr int BYTES = D * sizeof(Stored) % 64 == 0 ? 16 : 8;
  static constexpr int WORDS = BYTES / 4;
  static constexpr int DIMS = BYTES / sizeof(Stored);
  static constexpr int COUNT = D / 4 / DIMS;
  static constexpr int TILES = 16 / COUNT;  // of eight landmarks: so many loads are in flight

  static __device__ void load(const Stored* from, uint64_t policy, uint32_t (&words)[WORDS]) {
    if constexpr (BYTES == 16) {
      const uint4 four = load_once(from, policy);
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else {
      const uint2 two = load_once_8(from, policy);
      words[0] = two.x, words[1] = two.y;
    }
  }

  /// The two operands of the `step`-th product of a piece: four dimensions a lane.
  static __device__ uint2 operands(const uint32_t (&words)[WORDS], int step) {
    if constexpr (sizeof(Stored) == 1) {
      return make_uint2(halves_of(words[step], 0), halves_of(words[step], 1));
    } else {
      return make_uint2(words[2 * step], words[2 * step + 1]);
    }
  }
};

/// Four elements as two registers of another type of the same size.
template <typename To, typename From>
__device__ uint2 converted(uint2 four) {
  if constexpr (std::is_same_v<To, From>) return four;
  From x[4];
  memcpy(x, &four, sizeof(x));
  return make_uint2(pack<To>(to_float(x[0]), to_float(x[1])),
                    pack<To>(to_float(x[2]), to_float(x[3])));
}

/// The queries [G, D] of a KV head as operands of the D / 16 products, permuted as `Pieces` are.
///
/// HALVES: 2, or 1 where at most 8 query heads leave the lower half of the operands empty.
template <typename T, typename Stored, int D, int HALVES>
__device__ void load_queries(const T* queries, int group, uint32_t (&query)[D / 16][2 * HALVES]) {
  using Piece = Pieces<Stored, D>;
  constexpr int STEPS = Piece::DIMS / 4;
  const int lane = threadIdx.x % 32, quad = lane % 4;
#pragma unroll
  for (int s = 0; s < D / 16; ++s) {
    const int d = (s / STEPS * 4 + quad) * Piece::DIMS + s % STEPS * 4;
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      const int g = lane / 4 + half * 8;
      uint2 four = make_uint2(0, 0);
      if (g < group) {
        four = converted<ProductOf<T, Stored>, T>(
            *reinterpret_cast<const uint2*>(queries + g * D + d));
      }
      query[s][half] = four.x, query[s][half + HALVES] = four.y;
    }
  }
}

}  // namespace shadowkv
