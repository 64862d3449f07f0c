// Two blocks of a cluster have two query heads that share a key and value head, and add up their gradients: one keeps
// those of v, the other those of k, and each gives what it makes of the others to its neighbour.
#pragma once

#include "cluster.cuh"
#include "variant.cuh"

// Whether this block keeps its second output.
__device__ inline bool keeps_second() { return rank_in_cluster() == 1; }

// The same place in the shared memory of the neighbour.
__device__ inline uint32_t address_there(uint32_t address) { return address_in(address, rank_in_cluster() ^ 1); }

// Stores 16 bytes there, and counts them at the neighbour's barrier.
__device__ inline void give(uint32_t there, uint4 value, uint32_t barrier_there) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier_there)
      : "memory");
}
