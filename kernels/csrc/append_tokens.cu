// append_tokens: see shadowkv_cli/ops/append_tokens.py. It moves bytes, of any dtype.
#include "append_tokens.cuh"

#include <algorithm>

#include "common/rows.h"
#include "common/stream.h"

namespace shadowkv {

namespace {

AppendSide side_of(const Tensor& from, const Tensor& to) {
  const int64_t size = from.element_size();
  AppendSide s{};
  s.from = static_cast<const char*>(from.data_ptr());
  s.to = static_cast<char*>(to.data_ptr());
  s.from_row = step(from, 0) * size;
  s.from_head = step(from, 1) * size;
  s.to_plane = step(to, 0) * size;
  s.to_head = step(to, 1) * size;
  s.to_token = step(to, 2) * size;
  s.capacity = static_cast<int>(std::min<int64_t>(to.size(2), INT32_MAX));
  return s;
}

/// Its lowest bits say of which power of two all addresses are multiples.
int64_t odd_bits(const AppendSide& s) {
  return s.from_row | s.from_head | s.to_plane | s.to_head | s.to_token |
         reinterpret_cast<int64_t>(s.from) | reinterpret_cast<int64_t>(s.to);
}

}  // namespace

void append_tokens(Tensor key, Tensor value, Tensor plane, Tensor place, Tensor keys,
                   Tensor values) {
  constexpr const char* op = "append_tokens";
  const Device device(key, op, "key");
  check_sizes(key, op, "key", {-1, -1, -1});
  const int64_t rows = key.size(0), heads = key.size(1), dim = key.size(2);
  check_rows(key, op, "key", key);
  check_sizes(value, op, "value", {rows, heads, dim});
  check_rows(value, op, "value", key);
  check_sizes(keys, op, "keys", {-1, heads, -1, dim});
  check_rows(keys, op, "keys", key);
  check_sizes(values, op, "values", {keys.size(0), heads, -1, dim});
  check_rows(values, op, "values", key);
  check_table(plane, op, "plane", key, {rows});
  check_table(place, op, "place", key, {rows});
  if (key.numel() == 0) return;

  AppendParams p{};
  p.side[0] = side_of(key, keys);
  p.side[1] = side_of(value, values);
  p.plane = static_cast<const int*>(plane.data_ptr());
  p.place = static_cast<const int*>(place.data_ptr());
  p.heads = static_cast<int>(heads);
  p.planes = static_cast<int>(keys.size(0));
  const int64_t bytes = dim * static_cast<int64_t>(key.element_size());
  const int64_t odd = bytes | odd_bits(p.side[0]) | odd_bits(p.side[1]);
  auto launch = [&](auto kernel, int64_t word_bytes) {
    p.words = static_cast<int>(bytes / word_bytes);
    p.total = 2 * rows * heads * p.words;
    kernel<<<ceil_div(p.total, APPEND_THREADS), APPEND_THREADS, 0, device.stream()>>>(p);
  };
  if (odd % 16 == 0) {
    launch(append_words<uint4>, 16);
  } else if (odd % 4 == 0) {
    launch(append_words<unsigned>, 4);
  } else {
    launch(append_words<unsigned char>, 1);
  }
  device.check_launch();
}

}  // namespace shadowkv
