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

/// The same as an address of what the cluster shares.
__device__ inline uint32_t address_of_rank(const void* own, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there)
               : "r"(shared_address(own)), "r"(rank));
  return there;
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

  __device__ void sync() {
    Threads::sync();
    if (Threads::index() < blocks_) {
      asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                       address_of_rank(&barriers_[met_ & 1], Threads::index()))
                   : "memory");
    }
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

 private:
  uint64_t* barriers_;
  int blocks_;
  uint32_t met_ = 0;
};

/// Messages that the blocks of a cluster send to all of each other, one after the other: none of a
/// message's bytes are sent before its sender has all of the one before. So each has been read by all
/// when any of the one after the next is sent, and two places hold them in turns.
///
/// What is sent arrives by itself, and the barrier counts its bytes: nobody waits for other memory,
/// and no cache is emptied, as with `ClusterMeeting`.
class ClusterMail {
 public:
  /// `barriers`: two at the same place in each of the blocks, for one arrival each.
  __device__ explicit ClusterMail(uint64_t* barriers) : barriers_(barriers) {}

  /// Say how many bytes the message has that this block gets: one thread, before or while it comes.
  __device__ void expect(uint32_t bytes) const { expect_bytes(barrier(), bytes); }

  /// Write 16 bytes to what lies at `own` in the block of this rank.
  __device__ void send(const void* own, int rank, uint4 words) const {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
        "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(address_of_rank(own, rank)),
        "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w),
        "r"(address_of_rank(barrier(), rank))
        : "memory");
  }

  __device__ void send(const void* own, int rank, uint32_t first, uint32_t second) const {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
            address_of_rank(own, rank)),
        "r"(first), "r"(second), "r"(address_of_rank(barrier(), rank))
        : "memory");
  }

  /// Wait until the message is there.
  __device__ void wait() {
    uint32_t complete = 0;
    while (!complete) {
      asm volatile(
          "{\n\t.reg .pred done;\n\t"
          "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 done, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, done;\n\t}"
          : "=r"(complete)
          : "r"(shared_address(barrier())), "r"(sent_ >> 1 & 1)
          : "memory");
    }
    asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
    ++sent_;
  }

 private:
  __device__ uint64_t* barrier() const { return &barriers_[sent_ & 1]; }

  uint64_t* barriers_;
  uint32_t sent_ = 0;
};

}  // namespace shadowkv
