// rotate_heads: see shadowkv_cli/ops/rotate_heads.py.
#include "rotate_heads.cuh"

#include "common/dispatch.h"
#include "common/rows.h"
#include "common/stream.h"

namespace shadowkv {

namespace {

HeadParams head_params(const Tensor& from, const Tensor& to) {
  HeadParams h{};
  h.from = from.data_ptr();
  h.to = to.data_ptr();
  h.row = step(from, 0);
  h.head = step(from, 1);
  h.token = step(from, 2);
  h.to_row = step(to, 0);
  h.to_head = step(to, 1);
  h.to_token = step(to, 2);
  h.heads = static_cast<int>(from.size(1));
  return h;
}

void check_angles(const char* op, const char* name, const Tensor& table, const Tensor& query) {
  check_rows(table, op, name, query);
  check_sizes(table, op, name, {-1, query.size(2), -1});
  const int64_t rows = table.size(0), width = table.size(2);
  SHADOWKV_CHECK(rows == 1 || rows == query.size(0), op, name, " must have 1 row or ",
                 query.size(0), ", got ", rows);
  SHADOWKV_CHECK(width % 2 == 0 && width <= query.size(3), op, name, " must rotate pairs of the ",
                 query.size(3), " dimensions, got ", width);
}

void check_all(const char* op, const Tensor& query, const Tensor& key, const Tensor& cos,
               const Tensor& sin) {
  check_sizes(query, op, "query", {-1, -1, -1, -1});
  check_rows(query, op, "query", query);
  check_sizes(key, op, "key", {query.size(0), -1, query.size(2), query.size(3)});
  check_rows(key, op, "key", query);
  check_angles(op, "cos", cos, query);
  check_angles(op, "sin", sin, query);
  check_sizes(sin, op, "sin", {-1, query.size(2), cos.size(2)});
}

/// Write what was checked, turned, to tensors of the same sizes, which may be the same tensors.
void turn(const char* op, const Device& device, const Tensor& query, const Tensor& key,
          const Tensor& cos, const Tensor& sin, const Tensor& turned_query,
          const Tensor& turned_key, bool interleaved) {
  if (query.numel() == 0 && key.numel() == 0) return;
  const int64_t rows = query.size(0), tokens = query.size(2), dim = query.size(3);
  RotateParams p{};
  p.query = head_params(query, turned_query);
  p.key = head_params(key, turned_key);
  p.cos = cos.data_ptr();
  p.sin = sin.data_ptr();
  p.cos_row = step(cos, 0);
  p.cos_token = step(cos, 1);
  p.sin_row = step(sin, 0);
  p.sin_token = step(sin, 1);
  p.tokens = static_cast<int>(tokens);
  p.dim = static_cast<int>(dim);
  p.pairs = static_cast<int>(cos.size(2) / 2);
  dispatch_dtype(op, query.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    auto launch = [&](auto elements) {
      constexpr int N = decltype(elements)::value;
      p.units = (p.dim - p.pairs) / N;
      p.total = rows * tokens * (p.query.heads + p.key.heads) * p.units;
      const int blocks = ceil_div(p.total, ROTATE_THREADS);
      if (interleaved) {
        rotate_units<T, N, true><<<blocks, ROTATE_THREADS, 0, device.stream()>>>(p);
      } else {
        rotate_units<T, N, false><<<blocks, ROTATE_THREADS, 0, device.stream()>>>(p);
      }
    };
    constexpr int N = 16 / sizeof(T);
    if (p.dim % N == 0 && p.pairs % N == 0 && is_aligned(query) && is_aligned(key) &&
        is_aligned(cos) && is_aligned(sin)) {
      launch(std::integral_constant<int, N>{});
    } else {
      launch(std::integral_constant<int, 1>{});
    }
    device.check_launch();
  });
}

}  // namespace

std::tuple<Tensor, Tensor> rotate_heads(Tensor query, Tensor key, Tensor cos, Tensor sin,
                                        bool interleaved) {
  constexpr const char* op = "rotate_heads";
  const Device device(query, op, "query");
  check_all(op, query, key, cos, sin);
  Tensor turned_query = torch::stable::new_empty(query, query.sizes());
  Tensor turned_key = torch::stable::new_empty(key, key.sizes());
  turn(op, device, query, key, cos, sin, turned_query, turned_key, interleaved);
  return {turned_query, turned_key};
}

void rotate_heads_(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved) {
  constexpr const char* op = "rotate_heads_";
  const Device device(query, op, "query");
  check_all(op, query, key, cos, sin);
  turn(op, device, query, key, cos, sin, query, key, interleaved);
}

}  // namespace shadowkv
