// A list of the missing chunks, so that they are shared out evenly whatever head they belong to.
#pragma once

#include "common/block.cuh"

namespace shadowkv {

constexpr int LIST_THREADS = 1024;
constexpr int FLAGS_A_THREAD = 16;

/// One block: the places of the true flags in [planes, wanted], ascending, into `list`; where each
/// plane's begin into `starts` [planes + 1], the last being how many there are.
__global__ void __launch_bounds__(LIST_THREADS)
    list_misses(const uint8_t* flags, int total, int wanted, int* list, int* starts) {
  __shared__ uint64_t room[33];
  const bool aligned = reinterpret_cast<uintptr_t>(flags) % FLAGS_A_THREAD == 0;
  int listed = 0;
  for (int base = 0; base < total; base += LIST_THREADS * FLAGS_A_THREAD) {
    const int first = base + static_cast<int>(threadIdx.x) * FLAGS_A_THREAD;
    uint4 words = make_uint4(0, 0, 0, 0);
    uint8_t own[FLAGS_A_THREAD];
    if (aligned && first + FLAGS_A_THREAD <= total) {
      words = *reinterpret_cast<const uint4*>(flags + first);
      memcpy(own, &words, sizeof(words));
    } else {
#pragma unroll
      for (int i = 0; i < FLAGS_A_THREAD; ++i) own[i] = first + i < total ? flags[first + i] : 0;
    }
    int count = 0;
#pragma unroll
    for (int i = 0; i < FLAGS_A_THREAD; ++i) count += own[i] != 0;
    uint64_t tile_total;
    int place = listed + static_cast<int>(scan_block(count, room, tile_total));
    int plane = (first + wanted - 1) / wanted, boundary = plane * wanted;
#pragma unroll
    for (int i = 0; i < FLAGS_A_THREAD; ++i) {
      if (first + i == boundary && first + i < total) {
        starts[plane++] = place;
        boundary += wanted;
      }
      if (own[i]) list[place++] = first + i;
    }
    listed += static_cast<int>(tile_total);
  }
  if (threadIdx.x == 0) starts[total / wanted] = listed;
}

}  // namespace shadowkv
