// Barriers in shared memory, the bulk copies that complete on them, and barriers among some warps of a block.
#pragma once

#include <cstdint>

#include <cuda.h>

#include "params.h"

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same, made where it is used: the compiler would make all that follows from it ahead, and keep it in registers.
__device__ inline uint32_t address_now(const void* pointer) {
  uint32_t address = shared_address(pointer);
  asm volatile("" : "+r"(address));
  return address;
}

// An mbarrier: a phase ends after `arrivals` arrivals and all bytes that were announced.
struct Barrier {
  uint64_t word;

  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals));
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  __device__ void arrive_expecting(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  __device__ void wait(int parity) {
    asm volatile(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
  }
};

// Parity of the phase that a barrier of `count` is in at a step.
__device__ inline int parity(int step, int count) { return step / count & 1; }

// Lanes that arrive for a warp. One is enough, but `compute-sanitizer --tool racecheck` does not know that it speaks
// for the others: for its sake all do.
#ifdef ALL_LANES_ARRIVE
constexpr int kArriving = 32;
#else
constexpr int kArriving = 1;
#endif

// Arrives for a warp, after all its lanes.
__device__ inline void arrive_as_warp(Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 < kArriving) barrier.arrive();
}

// Makes initialised barriers visible to the copy engine.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Makes this thread's ordinary writes to shared memory visible to the tensor cores and the copy engine, and lets its
// reads be over before the copy engine writes there: an arrival alone does not wait for them.
__device__ inline void fence_for_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barrier 1 to 15 among the `threads` threads that call it.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Registers of each thread of a warpgroup from here on; kFirst is what it has. More of them must be free in the block,
// or it waits for ever.
template <int kCount, int kFirst>
__device__ inline void set_registers() {
  if constexpr (kCount > kFirst)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
  else if constexpr (kCount < kFirst)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// How long the second cache should keep what is copied; the values are those of createpolicy for a whole access.
enum class Keep : uint64_t { kNormal = 0x1000000000000000, kShort = 0x12F0000000000000, kLong = 0x14F0000000000000 };

// Copies a box to shared memory; what lies outside of the tensor arrives as zeros.
__device__ inline void copy_box(void* to, const CUtensorMap& map, Barrier& barrier, Keep keep, const Corner& at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(at.column), "r"(at.token), "r"(at.panel), "r"(at.head),
      "r"(at.batch), "l"(uint64_t(keep))
      : "memory");
}

// Copies a box from shared memory; what lies outside of the tensor is left out.
__device__ inline void store_box(const CUtensorMap& map, const void* from, Keep keep, const Corner& at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5, %6}], [%1], "
      "%7;" ::"l"(&map),
      "r"(shared_address(from)), "r"(at.column), "r"(at.token), "r"(at.panel), "r"(at.head), "r"(at.batch),
      "l"(uint64_t(keep))
      : "memory");
}
// Of this thread's stores: begins to count them, and waits until they have read shared memory.
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ inline void wait_for_stores() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
