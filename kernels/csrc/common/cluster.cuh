// Thread block clusters (compute capability 9.0): barriers, and the shared memory of other blocks.
#pragma once

#include <cstdint>

namespace shadowkv {

__device__ inline int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

/// Every thread of the cluster arrives at a barrier once and then waits for it once: it sees what
/// the others wrote to shared and global memory before they arrived.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

/// Where another block of the cluster has what lies at `own` in this one's shared memory. It must
/// have begun, and must not end before it was read: both take a barrier.
template <typename T>
__device__ const T* of_rank(const T* own, int rank) {
  uint64_t there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(rank));
  return reinterpret_cast<const T*>(there);
}

/// A kernel that was launched to follow this one on its stream may begin when every block was here.
/// It does not wait for what this one writes.
__device__ inline void start_following() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace shadowkv
