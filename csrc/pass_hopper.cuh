// One pass of lightning attention over the sequences, for Hopper: equations (1) to (3) of README.md.
//
// A block walks through one segment of one head, chunk by chunk, and its warpgroups share the work:
//   fetch   copies the tiles of q, k and v; with kNorm three of its warps measure their vectors
//   score   makes the masked scores (q kᵀ) ⊙ M of a chunk and a copy of v scaled by what it weighs in the state
//   attend  (one or two) own 64 columns of v each, and keep their part of the state, transposed (E × D), in registers:
//             oᵀ  =  Sᵀ qᵀ, columns scaled, + vᵀ scoresᵀ           (E × C)
//             Sᵀ  ←  λ^n Sᵀ + (scaled v)ᵀ k
// Only `attend` depends on the chunk before, and it does little else than products.
#pragma once

#include "attend.cuh"
#include "decay.cuh"
#include "fetch.cuh"
#include "score.cuh"

template <class V>
__global__ void __launch_bounds__(V::kThreads, V::kBlocks) pass_kernel(const __grid_constant__ PassParams p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<SharedStorage<V>*>(memory);
  const int tiles = p.d_tiles * p.e_tiles, tile = blockIdx.x % tiles;
  const int head = blockIdx.x / tiles % p.heads;
  Work work;
  if (!find_work(p, blockIdx.x / tiles / p.heads, work)) return;
  if (!V::kOutput && work.last) return;  // nobody needs the state after it
  float log2_lambda = log2_decay(p.log_decay, head);
  if (!work.valid) log2_lambda = CUDART_NAN_F;
  if (threadIdx.x <= kChunk) shared.powers[threadIdx.x] = power(log2_lambda, threadIdx.x);
  if (threadIdx.x < 2 * kChunk) {
    const int later = threadIdx.x - kChunk, distance = p.reverse ? -later : later;
    shared.weights[threadIdx.x] = distance < 0 ? -1.f : power(log2_lambda, distance);
  }
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < V::kStages; ++stage) {
      shared.full[stage].init(1);
      shared.measured[stage].init(kMeasuring);
      shared.empty[stage].init(V::kAttending * 4);
    }
    for (int buffer = 0; buffer < V::kBuffers; ++buffer) {
      shared.ready[buffer].init(kWarpgroup);
      shared.used[buffer].init(V::kAttending * 4);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int d_tile = tile / p.e_tiles, e_tile = tile % p.e_tiles;
  if (threadIdx.x < V::kAttending * kWarpgroup) {
    more_registers<V::kAttendRegisters>();
    attend<V>(p, shared, work, head, d_tile, e_tile);
  } else if (threadIdx.x < (V::kAttending + 1) * kWarpgroup) {
    set_registers<V::kScoreRegisters, V::kFirstRegisters>();
    score<V>(p, shared, work);
  } else {
    fewer_registers<V::kFetchRegisters>();
    const int thread = threadIdx.x - (V::kAttending + 1) * kWarpgroup;
    if (thread == 0)
      fetch<V>(p, shared, work, head, d_tile, e_tile);
    else if (V::kNorm && thread >= kWarpgroup - kMeasuring)
      measure<V>(p, shared, work, thread - (kWarpgroup - kMeasuring));
  }
}

// Launches the kernel on `blocks` blocks.
template <class V>
cudaError_t launch_pass(const PassParams& p, int64_t blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(SharedStorage<V>);
  static_assert(kBytes <= 227 * 1024 / V::kBlocks);
  cudaError_t error = cudaFuncSetAttribute(pass_kernel<V>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  pass_kernel<V><<<dim3(blocks), V::kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}
