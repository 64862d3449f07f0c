// One pass of lightning attention over the sequences, for Hopper: equations (1) to (3) of README.md.
//
// A block walks through segments of heads, chunk by chunk, and its warpgroups share the work:
//   fetch    copies the tiles of a chunk; only it knows the order, the others do what it says of each chunk
//   store    copies outputs to global memory
//   inspect  (two warps) prepares the weights of tokens, lengths of vectors and looks for values that are not finite
//   state    keeps the state, transposed (E × D), in registers and shows it to the outputs before each chunk
//   output   two of them: lengths, scores, masked, times values, plus what is read from the state; they take turns, or
//            one makes the gradients of v and the other those of k
// Only `state` depends on the chunk before, and does no more than one product for each.
#pragma once

#include <algorithm>

#include "fetch.cuh"
#include "inspect.cuh"
#include "output.cuh"
#include "state.cuh"
#include "store.cuh"

template <class V>
__global__ void __launch_bounds__(V::kThreads, 1) pass_kernel(const __grid_constant__ PassParams p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<SharedStorage<V>*>(memory);
  constexpr int kWarps = kWarpgroup / 32 * kArriving, kInspectors = kInspecting / 32 * kArriving;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < V::kStages; ++stage) {
      shared.full[stage].init(1);
      shared.ready[stage].init(kInspectors);
      shared.looked[stage].init(kWarps + (V::kLooksAtB ? kInspectors : 0));
      shared.measured[stage].init((V::kMeasures ? kWarps : 0) + kInspectors);
      shared.advanced[stage].init(kWarps);
      shared.scored[stage].init(V::kBoth ? 2 * kWarps : kWarps);
      shared.through[stage].init(V::kLate ? 1 : kWarps);
      shared.put_down[stage].init(V::kBoth ? 2 * kWarps : kWarps);
      shared.empty[stage].init(2 * kWarps + 1);
      shared.notes[stage].n = -1;
      for (auto& of_output : shared.notes[stage].nonfinite)
        for (int& found : of_output) found = 0;
    }
    for (int buffer = 0; buffer < V::kStates; ++buffer) {
      shared.state_full[buffer].init(kWarps);
      shared.state_empty[buffer].init(V::kBoth ? 2 * kWarps : kWarps);
    }
    if constexpr (V::kSums) {
      shared.given.init(1);
      shared.summed.init(kWarps);
      shared.sum_empty.init(1);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if constexpr (V::kSums) sync_cluster();
  // By a shuffle, so that the compiler knows it to be the same for a warp.
  const int group = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0), thread = threadIdx.x % kWarpgroup;
  if (group == 0) {
    set_registers<V::kStateRegisters, V::kFirstRegisters>();
    keep_state<V>(p, shared);
  } else if (group < 3) {
    set_registers<V::kOutputRegisters, V::kFirstRegisters>();
    make_outputs<V>(p, shared, group - 1);
  } else {
    set_registers<V::kFetchRegisters, V::kFirstRegisters>();
    if (thread == 0)
      fetch<V>(p, shared);
    else if (thread == 32)
      store_outputs<V>(p, shared);
    else if (thread >= kWarpgroup - kInspecting)
      inspect<V>(p, shared, thread - (kWarpgroup - kInspecting));
  }
  if constexpr (V::kSums) sync_cluster();  // the neighbour may still use this block's memory
}

// Launches the kernel on as many blocks as run at a time.
template <class V>
cudaError_t launch_pass(const PassParams& p, int pieces, int multiprocessors, cudaStream_t stream) {
  constexpr int kBytes = sizeof(SharedStorage<V>);
  static_assert(kBytes <= 227 * 1024);
  cudaError_t error = cudaFuncSetAttribute(pass_kernel<V>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute pairs;
  pairs.id = cudaLaunchAttributeClusterDimension;
  pairs.val.clusterDim = {2, 1, 1};
  const int blocks = std::min(pieces, multiprocessors);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(V::kSums ? blocks / 2 * 2 : blocks);
  config.blockDim = dim3(V::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &pairs;
  config.numAttrs = V::kSums;
  return cudaLaunchKernelEx(&config, pass_kernel<V>, p);
}
