// Landmarks on their way from memory to the tensor cores, and the queries they meet there.
#pragma once

#include <type_traits>

#include "common/fp8.cuh"
#include "common/matrix.cuh"
#include "common/packed.cuh"

namespace shadowkv {

template <typename Stored>
constexpr bool IS_FP8 = std::is_same_v<Stored, Fp8>;
template <typename Stored>
constexpr bool IS_PACKED = std::is_same_v<Stored, Packed>;

/// What landmarks are in registers.
template <typename Stored>
using Loaded = std::conditional_t<IS_PACKED<Stored>, __nv_bfloat16, Stored>;

/// Elements, or bytes of packed ones, from landmark to landmark.
template <typename Stored, int D>
constexpr int LANDMARK_WIDTH = IS_PACKED<Stored> ? PACKED_WIDTH<D> : D;

/// Landmarks in 8 bits are multiplied as halves.
template <typename T, typename Stored>
using ProductOf = std::conditional_t<IS_FP8<Stored>, __half, T>;

/// A lane's part of a packed landmark: of eight elements at a time every fourth eight. It lies at a
/// pointer or at an address of shared memory.
template <int D, typename Place>
struct PackedRow {
  Place start, lower, codes;
  uint32_t header[1];

  __device__ explicit PackedRow(Place row)
      : start(row),
        lower(row + PACKED_HEADER_BYTES + threadIdx.x % 4 * 8),
        codes(row + PACKED_HEADER_BYTES + D + threadIdx.x % 4 * 4) {
    load(start, header);
  }

  __device__ int strays() const { return packed_strays(header[0]); }

  /// Its j-th eight as words of bfloat16, with what strays in them or without.
  template <bool STRAYS>
  __device__ void eight(int j, uint32_t (&words)[4]) const {
    uint32_t low[2], code[1];
    load(lower + j * 32, low);
    load(codes + j * 16, code);
    const uint4 four = unpack_eight(low[0], low[1], code[0], packed_base(header[0]));
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    if constexpr (STRAYS) {
#pragma unroll 1
      for (int s = 0; s < strays(); ++s) {
        uint16_t stray[1];
        load(start + 2 + 2 * s, stray);
        const int place = stray[0] & 0xff;
        const int word = place / 8 == j * 4 + threadIdx.x % 4 ? place % 8 / 2 : 4;
        const uint32_t bytes = place % 2 ? 0x4210 : 0x3240;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          if (word == w) words[w] = __byte_perm(words[w], stray[0] >> 8, bytes);
        }
      }
    }
  }

 private:
  template <typename To>
  static __device__ void load(Place from, To& to) {
    if constexpr (std::is_pointer_v<Place>) {
      memcpy(&to, __builtin_assume_aligned(from, sizeof(to)), sizeof(to));
    } else {
      load_shared(from, to);
    }
  }
};

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
    if constexpr (IS_FP8<Stored>) {
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
