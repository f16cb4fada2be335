// Thread block clusters (compute capability 9.0): barriers, and the shared memory of other blocks.
#pragma once

#include "bulk.cuh"

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

/// Where another block of the cluster has what lies at `own` in this one's shared memory. It must
/// have begun, and must not end before it was read: both take a barrier.
template <typename T>
__device__ const T* of_rank(const T* own, int rank) {
  uint64_t there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(rank));
  return reinterpret_cast<const T*>(there);
}

/// Where `Threads` of all blocks of a cluster meet while others go on: who has waited sees what those
/// that arrived had written to shared and global memory.
///
/// Two barriers take turns, so that a block that is ahead does not arrive where others still wait.
template <typename Threads>
class ClusterMeeting {
 public:
  /// `barriers`: two at the same place in each of the blocks, for as many arrivals each.
  __device__ ClusterMeeting(uint64_t* barriers, int blocks) : barriers_(barriers), blocks_(blocks) {}

  __device__ void arrive() const {
    Threads::sync();
    if (Threads::index() >= blocks_) return;
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(there)
                 : "r"(shared_address(&barriers_[met_ & 1])), "r"(Threads::index()));
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(there)
                 : "memory");
  }

  __device__ void wait() {
    uint32_t complete = 0;
    while (!complete) {
      asm volatile(
          "{\n\t.reg .pred done;\n\t"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, done;\n\t}"
          : "=r"(complete)
          : "r"(shared_address(&barriers_[met_ & 1])), "r"(met_ >> 1 & 1)
          : "memory");
    }
    ++met_;
  }

  __device__ void sync() {
    arrive();
    wait();
  }

 private:
  uint64_t* barriers_;
  int blocks_;
  uint32_t met_ = 0;
};

}  // namespace shadowkv
