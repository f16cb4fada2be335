// gated_silu: see shadowkv_cli/ops/gated_silu.py.
#include "gated_silu.cuh"

#include "common/dispatch.h"
#include "common/rows.h"
#include "common/stream.h"

namespace shadowkv {

Tensor gated_silu(Tensor gate, Tensor up) {
  constexpr const char* op = "gated_silu";
  const Device device(gate, op, "gate");
  check_rows(gate, op, "gate", gate);
  check_rows(up, op, "up", gate);
  bool same = gate.dim() == up.dim();
  for (int64_t i = 0; same && i < gate.dim(); ++i) same = gate.size(i) == up.size(i);
  SHADOWKV_CHECK(same, op, "up must be ", text(gate), ", got ", text(up));
  Tensor out = torch::stable::new_empty(gate, gate.sizes());
  if (gate.numel() == 0) return out;
  gate = regular_rows(gate);
  up = regular_rows(up);

  GateParams p{};
  p.gate = gate.data_ptr();
  p.up = up.data_ptr();
  p.out = out.data_ptr();
  p.gate_row = row_step(gate);
  p.up_row = row_step(up);
  const int64_t width = gate.size(gate.dim() - 1);
  dispatch_dtype(op, gate.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    auto launch = [&](auto elements) {
      constexpr int N = decltype(elements)::value;
      p.words = static_cast<int>(width / N);
      p.total = gate.numel() / N;
      gate_words<T, N><<<ceil_div(p.total, GATE_THREADS * GATE_WORDS), GATE_THREADS, 0,
                         device.stream()>>>(p);
    };
    if (has_whole_words(gate) && has_whole_words(up)) {
      launch(std::integral_constant<int, 16 / sizeof(T)>{});
    } else {
      launch(std::integral_constant<int, 1>{});
    }
    device.check_launch();
  });
  return out;
}

}  // namespace shadowkv
