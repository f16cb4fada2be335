// Which tokens full attention attends: the first so many of the row's prompt.
#pragma once

#include "attention_params.cuh"

namespace shadowkv {

struct FullSource {
  static constexpr Form APART = Form::SAME;
  struct Row {
    int count;
    __device__ Place at(int i) const { return {i, i}; }
  };
  const int* prompt_index;
  const int* lengths;
  int capacity;

  __device__ int64_t plane(int row) const { return prompt_index[row]; }
  __device__ Row row(int row, int) const { return {min(lengths[row], capacity)}; }
};

}  // namespace shadowkv
