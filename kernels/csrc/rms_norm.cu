// rms_norm: see shadowkv_cli/ops/rms_norm.py.
#include "rms_norm.cuh"

#include <algorithm>

#include "common/dispatch.h"
#include "common/rows.h"
#include "common/stream.h"

namespace shadowkv {

namespace {

template <typename T, int TEAM, int WORDS>
void launch_words(const NormParams& p, const Device& device) {
  constexpr int threads = std::max(TEAM, NORM_THREADS);
  normalise_words<T, TEAM, WORDS>
      <<<ceil_div(p.rows, threads / TEAM), threads, 0, device.stream()>>>(p);
}

/// Two words a thread, and more where a team of the largest size would not hold the row: up to
/// 16,384 elements of any dtype.
template <typename T>
void launch_by_width(const NormParams& p, const Device& device) {
  const int words = p.width / static_cast<int>(16 / sizeof(T));
  if (words <= 64) return launch_words<T, 32, 2>(p, device);
  if (words <= 128) return launch_words<T, 64, 2>(p, device);
  if (words <= 256) return launch_words<T, 128, 2>(p, device);
  if (words <= 512) return launch_words<T, 256, 2>(p, device);
  if (words <= 1024) return launch_words<T, MOST_NORM_THREADS, 2>(p, device);
  if (words <= 2048) return launch_words<T, MOST_NORM_THREADS, 4>(p, device);
  if constexpr (sizeof(T) == 4) {
    if (words <= 4096) return launch_words<T, MOST_NORM_THREADS, 8>(p, device);
  }
  normalise_elements<T><<<p.rows, NORM_THREADS, 0, device.stream()>>>(p);
}

}  // namespace

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  constexpr const char* op = "rms_norm";
  const Device device(x, op, "x");
  check_rows(x, op, "x", x);
  const int64_t width = x.size(x.dim() - 1);
  check_sizes(weight, op, "weight", {width});
  check_rows(weight, op, "weight", x);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  if (x.numel() == 0) return out;
  x = regular_rows(x);

  NormParams p{};
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  p.out = out.data_ptr();
  p.rows = x.numel() / width;
  p.x_row = row_step(x);
  p.width = static_cast<int>(width);
  p.eps = static_cast<float>(eps);
  dispatch_dtype(op, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if (has_whole_words(x) && has_whole_words(weight)) {
      launch_by_width<T>(p, device);
    } else {
      normalise_elements<T><<<p.rows, NORM_THREADS, 0, device.stream()>>>(p);
    }
    device.check_launch();
  });
  return out;
}

}  // namespace shadowkv
