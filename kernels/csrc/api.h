// The ops on the host: what shadowkv_cli/ops/ defines, one function an op, the same arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace shadowkv {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> build_landmarks(Tensor keys, int64_t chunk_size, int64_t per_chunk);

Tensor select_chunks(Tensor query, Tensor landmarks, std::optional<Tensor> landmark_scales,
                     Tensor prompt_index, Tensor num_chunks, Tensor excluded, Tensor budget_chunks,
                     int64_t max_chunks, double scale, std::optional<Tensor> done,
                     std::optional<int64_t> begun);

void await_rows(Tensor done, int64_t parts);

std::tuple<Tensor, Tensor, Tensor> update_residency(Tensor ids, Tensor step, Tensor chunk_of_slot,
                                                    Tensor last_used, Tensor slot_of_chunk);

void fetch_values(Tensor values, std::optional<Tensor> scales, Tensor prompt_index, Tensor ids,
                  Tensor slots, Tensor misses, Tensor miss_counts, Tensor buffer,
                  std::optional<Tensor> buffer_scales, std::optional<Tensor> turns);

void rebuild_keys(Tensor coefficients, Tensor basis, Tensor prompt_index, Tensor rank, Tensor ids,
                  Tensor slots, Tensor misses, Tensor miss_counts, Tensor cos, Tensor sin,
                  Tensor table_index, bool interleaved, Tensor buffer);

Tensor full_attention(Tensor query, Tensor keys, Tensor values, Tensor prompt_index, Tensor lengths,
                      double scale);

std::tuple<Tensor, Tensor> sparse_attention(Tensor query, Tensor keys, Tensor values,
                                            Tensor key_slots, Tensor value_slots, Tensor lengths,
                                            std::vector<int64_t> capacities, int64_t chunk_size,
                                            double scale,
                                            std::optional<Tensor> value_buffer,
                                            std::optional<Tensor> value_scales);

Tensor rms_norm(Tensor x, Tensor weight, double eps);

Tensor gated_silu(Tensor gate, Tensor up);

std::tuple<Tensor, Tensor> rotate_heads(Tensor query, Tensor key, Tensor cos, Tensor sin,
                                        bool interleaved);
void rotate_heads_(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved);

void append_tokens(Tensor key, Tensor value, Tensor plane, Tensor place, Tensor keys,
                   Tensor values);

}  // namespace shadowkv
