// await_rows: see shadowkv_cli/ops/await_rows.py.
#include "await_rows.cuh"

#include "api.h"
#include "common/check.h"
#include "common/stream.h"

namespace shadowkv {

void await_rows(Tensor done, int64_t parts) {
  constexpr const char* op = "await_rows";
  const Device device(done, op, "done");
  check_table(done, op, "done", done, {-1});
  if (done.numel() == 0) return;
  wait_for_rows<<<1, 32, 0, device.stream()>>>(static_cast<int*>(done.data_ptr()),
                                               static_cast<int>(done.size(0)),
                                               static_cast<int>(parts));
  device.check_launch();
}

}  // namespace shadowkv
