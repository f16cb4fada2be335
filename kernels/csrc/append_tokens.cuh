// Puts one token a row into the planes of keys and values, whatever its bytes mean.
#pragma once

#include "common/words.cuh"

namespace shadowkv {

/// Strides are in bytes.
struct AppendSide {
  const char* from;  // [R, Hk] vectors of `words` words
  char* to;          // [P, Hk, S] of the same
  int64_t from_row, from_head, to_plane, to_head, to_token;
  int capacity;  // S
};

struct AppendParams {
  AppendSide side[2];  // keys, values
  const int* plane;    // [R]
  const int* place;    // [R]
  int64_t total;       // words of all
  int heads, planes, words;
};

constexpr int APPEND_THREADS = 128;

template <typename Word>
__global__ void __launch_bounds__(APPEND_THREADS)
    append_words(const __grid_constant__ AppendParams p) {
  int64_t row = flat_thread();
  if (row >= p.total) return;
  const int64_t offset = static_cast<int64_t>(split_index(row, p.words)) * sizeof(Word);
  const int64_t head = split_index(row, p.heads);
  const AppendSide& side = p.side[split_index(row, 2)];
  const int plane = p.plane[row], place = p.place[row];
  if (plane < 0 || plane >= p.planes || place < 0 || place >= side.capacity) return;
  const char* from = side.from + row * side.from_row + head * side.from_head + offset;
  char* to = side.to + plane * side.to_plane + head * side.to_head + place * side.to_token + offset;
  *reinterpret_cast<Word*>(to) = *reinterpret_cast<const Word*>(from);
}

}  // namespace shadowkv
