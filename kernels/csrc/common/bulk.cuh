// Copies that the memory system makes by itself (compute capability 9.0): a thread says what goes
// where, and hears of it through a barrier in shared memory. Addresses and sizes are multiples of 16.
#pragma once

#include "matrix.cuh"

namespace shadowkv {

/// What this thread did to shared memory comes before the copies that it begins from here on. So do
/// reads only with this: one can wait in a queue, behind the atomics of another block, for longer
/// than a copy takes.
__device__ inline void fence_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Where a barrier, 8 bytes, lies in shared memory.
struct Barrier {
  uint32_t address;
  __device__ Barrier(const uint64_t* barrier) : address(shared_address(barrier)) {}
  __device__ explicit Barrier(uint32_t address) : address(address) {}
};

/// A barrier that so many arrivals complete at a time, or what was told it to expect.
__device__ inline void init_barrier(Barrier barrier, uint32_t arrivals = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier.address),
               "r"(arrivals)
               : "memory");
  fence_bulk();
}

/// Arrive at a barrier of this block: who finds it complete sees what this thread did before.
__device__ inline void arrive(Barrier barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier.address) : "memory");
}

/// Whether the barrier's phase of this parity, 0 and 1 in turns, is complete; it may wait a while.
__device__ inline bool is_complete(Barrier barrier, uint32_t parity) {
  uint32_t complete;
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, done;\n\t}"
      : "=r"(complete)
      : "r"(barrier.address), "r"(parity)
      : "memory");
  return complete != 0;
}

/// Of the next phase: it is complete when so many bytes are there.
__device__ inline void expect_bytes(Barrier barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   barrier.address),
               "r"(bytes)
               : "memory");
}

/// Begin to read 4 bytes of global memory to an address of shared memory; `arrive_when_loaded` waits.
__device__ inline void load_word(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

/// Arrive at a barrier when the words that this thread loads are there.
__device__ inline void arrive_when_loaded(Barrier barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier.address)
               : "memory");
}

/// Begin to read bytes of global memory, or of pinned host memory, to an address of shared memory;
/// `barrier` has been told to expect them.
__device__ inline void begin_load(uint32_t to, const void* from, uint32_t bytes,
                                  Barrier barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier.address)
      : "memory");
}

/// The same with a policy for the cache.
__device__ inline void begin_load(uint32_t to, const void* from, uint32_t bytes, Barrier barrier,
                                  uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier.address), "l"(policy)
      : "memory");
}

/// Begin to write bytes of shared memory to global memory, in a group that `commit_stores` ends.
__device__ inline void store_bulk(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}

/// What this thread has stored since the last one is a group, be it nothing.
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/// Wait until the shared memory that this thread's stores read may be written again, but for those
/// of the last so many groups.
template <int GROUPS>
__device__ inline void wait_until_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(GROUPS) : "memory");
}

/// Wait until this thread's stores are done.
__device__ inline void wait_until_stored() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace shadowkv
