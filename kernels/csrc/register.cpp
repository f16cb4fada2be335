// Adds CUDA to the ops that shadowkv_cli/ops/ defines, and nothing else.
#include "api.h"

STABLE_TORCH_LIBRARY_IMPL(shadowkv, CUDA, m) {
  m.impl("build_landmarks", TORCH_BOX(&shadowkv::build_landmarks));
  m.impl("select_chunks", TORCH_BOX(&shadowkv::select_chunks));
  m.impl("await_rows", TORCH_BOX(&shadowkv::await_rows));
  m.impl("update_residency", TORCH_BOX(&shadowkv::update_residency));
  m.impl("fetch_values", TORCH_BOX(&shadowkv::fetch_values));
  m.impl("rebuild_keys", TORCH_BOX(&shadowkv::rebuild_keys));
  m.impl("full_attention", TORCH_BOX(&shadowkv::full_attention));
  m.impl("sparse_attention", TORCH_BOX(&shadowkv::sparse_attention));
  m.impl("rms_norm", TORCH_BOX(&shadowkv::rms_norm));
  m.impl("gated_silu", TORCH_BOX(&shadowkv::gated_silu));
  m.impl("rotate_heads", TORCH_BOX(&shadowkv::rotate_heads));
  m.impl("rotate_heads_", TORCH_BOX(&shadowkv::rotate_heads_));
  m.impl("append_tokens", TORCH_BOX(&shadowkv::append_tokens));
}
