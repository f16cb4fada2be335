// Which tokens sparse attention attends: the used parts of the fixed sections, one after the other,
// then the selected chunks in the order of their ids, wherever their slots lie.
#pragma once

#include "attention_params.cuh"

namespace shadowkv {

constexpr int MAX_SECTIONS = 4;

/// Other than SAME, values of chunks lie in a buffer of their own; those in 8 bits have a scale for
/// each slot.
template <Form FORM>
struct SparseSource {
  static constexpr Form APART = FORM;
  struct Row {
    int count;
    int used[MAX_SECTIONS];      // tokens in use of each section
    int capacity[MAX_SECTIONS];  // tokens that each holds; 0 beyond the last section
    int fixed, chunk_size;
    const int* key_slots;
    const int* value_slots;
    const uint8_t* apart;
    const float* scales;

    __device__ Place at(int i) const {
      int start = 0;
#pragma unroll
      for (int s = 0; s < MAX_SECTIONS; ++s) {
        if (i < used[s]) return {start + i, start + i};
        i -= used[s];
        start += capacity[s];
      }
      const int chunk = i / chunk_size, token = i - chunk * chunk_size;
      const int key = key_slots[chunk], value = value_slots[chunk];
      if (key < 0 || value < 0) return {-1, -1};
      const int key_token = fixed + key * chunk_size + token;
      const int value_token = value * chunk_size + token;
      if constexpr (FORM == Form::FP8) return {key_token, value_token, scales[value]};
      if constexpr (FORM == Form::PACKED) return {key_token, value_token, 0.f};
      return {key_token, fixed + value_token};
    }
  };
  const int* key_slots;    // [R, Hk, N]
  const int* value_slots;  // [R, Hk, N]
  const int* lengths;      // [R, sections]
  const uint8_t* apart;  // [R, Hk, slots, chunk_size], tokens of D or PACKED_WIDTH<D> bytes; or null
  const float* scales;   // [R, Hk, slots]
  int64_t buffer_bytes;  // of a row and head
  int slots;
  int capacity[MAX_SECTIONS];
  int sections, heads, chosen, fixed, chunk_size;

  __device__ int64_t plane(int row) const { return row; }
  __device__ Row row(int r, int head) const {
    const int64_t first = (static_cast<int64_t>(r) * heads + head) * chosen;
    Row out{chosen * chunk_size, {}, {}, fixed, chunk_size, key_slots + first,
            value_slots + first, nullptr, nullptr};
    if constexpr (FORM != Form::SAME) {
      const int64_t plane = static_cast<int64_t>(r) * heads + head;
      out.apart = apart + plane * buffer_bytes;
      if constexpr (FORM == Form::FP8) out.scales = scales + plane * slots;
    }
#pragma unroll
    for (int s = 0; s < MAX_SECTIONS; ++s) {
      out.capacity[s] = capacity[s];
      out.used[s] = s < sections ? min(max(lengths[r * sections + s], 0), capacity[s]) : 0;
      out.count += out.used[s];
    }
    return out;
  }
};

}  // namespace shadowkv
