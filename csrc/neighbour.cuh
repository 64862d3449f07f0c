// Two blocks of a cluster have two query heads that share a key and value head, and add up their gradients: one keeps
// those of v, the other those of k, and each gives what it makes of the others to its neighbour.
#pragma once

#include "variant.cuh"

__device__ inline int rank_in_cluster() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Whether this block keeps its second output.
__device__ inline bool keeps_second() { return rank_in_cluster() == 1; }

// Of all threads of both blocks; what they wrote before is seen after it.
__device__ inline void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The same place in the shared memory of the neighbour.
__device__ inline uint32_t address_there(uint32_t address) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank_in_cluster() ^ 1));
  return there;
}

// Stores 16 bytes there, and counts them at the neighbour's barrier.
__device__ inline void give(uint32_t there, uint4 value, uint32_t barrier_there) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier_there)
      : "memory");
}

__device__ inline void arrive_there(Barrier& barrier) {
  asm volatile(
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(address_there(shared_address(&barrier)))
      : "memory");
}

// Waits for what the neighbour did.
__device__ inline void wait_for_neighbour(Barrier& barrier, int parity) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}
