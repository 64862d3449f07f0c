// Blocks of a cluster, which see each other's shared memory.
#pragma once

#include "async.cuh"

__device__ inline int rank_in_cluster() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Of all threads of the cluster; what they wrote before is seen after it.
__device__ inline void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The same place in the shared memory of another block.
__device__ inline uint32_t address_in(uint32_t address, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// Arrives at the barrier of another block.
__device__ inline void arrive_in(Barrier& barrier, int rank) {
  asm volatile(
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(address_in(shared_address(&barrier), rank))
      : "memory");
}

// The same of what this thread has read: without making known what it wrote, which takes a microsecond.
__device__ inline void give_back_in(Barrier& barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in(shared_address(&barrier), rank))
               : "memory");
}

// Waits for what other blocks did.
__device__ inline void wait_for_cluster(Barrier& barrier, int parity) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// Copies a box to the same place in every block of `ranks`, a bit each, where it counts at the same barrier.
__device__ inline void copy_box_to(uint16_t ranks, void* to, const CUtensorMap& map, Barrier& barrier, Keep keep,
                                   const Corner& at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8, %9;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(at.column), "r"(at.token), "r"(at.panel), "r"(at.head),
      "r"(at.batch), "h"(ranks), "l"(uint64_t(keep))
      : "memory");
}
