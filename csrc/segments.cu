// The list of segments of packed sequences, and the state from segment to segment.
#include <algorithm>

#include "decay.cuh"
#include "segments.cuh"
#include "element.cuh"
#include "variants.h"

namespace {

constexpr int kThreads = 1024;

// One block. Sequences stay whole where none is longer than `whole`. Bounds that do not rise from 0 to T become one
// sequence of all tokens and empty others, marked as bad.
__global__ void plan_kernel(const int* cu_seqlens, int sequences, int tokens, int segment_length, int whole,
                            Segment* table, int slots) {
  __shared__ int counts[kThreads];
  __shared__ int used;
  const int thread = threadIdx.x;
  bool good = cu_seqlens[0] == 0 && cu_seqlens[sequences] == tokens;
  bool short_ones = true;
  for (int n = thread; n < sequences; n += kThreads) {
    good &= cu_seqlens[n] <= cu_seqlens[n + 1];
    short_ones &= cu_seqlens[n + 1] - cu_seqlens[n] <= whole;
  }
  good = __syncthreads_and(good);
  const bool all_whole = __syncthreads_and(short_ones) && good;
  if (all_whole) segment_length = tokens;
  if (thread == 0) used = 0;
  __syncthreads();
  for (int from = 0; from < sequences; from += kThreads) {
    const int n = from + thread;
    int start = 0, length = n == 0 ? tokens : 0;
    if (good && n < sequences) {
      start = cu_seqlens[n];
      length = cu_seqlens[n + 1] - start;
    }
    const int count = n < sequences ? max(1, (length + segment_length - 1) / segment_length) : 0;
    counts[thread] = count;
    __syncthreads();
    for (int step = 1; step < kThreads; step *= 2) {
      const int before = thread >= step ? counts[thread - step] : 0;
      __syncthreads();
      counts[thread] += before;
      __syncthreads();
    }
    const int slot = used + counts[thread] - count;
    for (int s = 0; s < count; ++s) {
      const int at = s * segment_length, ends = (s == 0 ? 1 : 0) | (s == count - 1 ? 2 : 0);
      table[slot + s] = {n, start + at, min(segment_length, length - at), ends};
    }
    __syncthreads();
    if (thread == 0) used += counts[kThreads - 1];
    __syncthreads();
  }
  for (int slot = used + thread; slot < slots; slot += kThreads) table[slot] = {0, 0, -1, 0};
  if (thread == 0) table[slots] = {used, all_whole ? 1 : 0, good ? 0 : -1, 0};
}

// A block adds up part of one head's states along one sequence, a thread kWidth neighbouring values.
template <int kWidth>
__global__ void scan_kernel(const __grid_constant__ PassParams p, int elements) {
  using Values = Pack<float, kWidth>;
  const int head = blockIdx.x % p.heads, at = (blockIdx.y * blockDim.x + threadIdx.x) * kWidth;
  Work work;
  if (!find_work(p, blockIdx.x / p.heads, work) || !work.first || work.last || at >= elements) return;
  const float log_lambda = log_decay_of(p.log_decay, head);
  float* carry = p.carry + head * p.carry_strides.head + at;
  Values state = *reinterpret_cast<const Values*>(carry + work.carry * p.carry_strides.sequence);
  while (true) {
    if (!find_work(p, work.slot + (p.reverse ? -1 : 1), work) || work.last) return;
    Values* here = reinterpret_cast<Values*>(carry + work.carry * p.carry_strides.sequence);
    const Values own = *here;
    const float carried = power(log_lambda, work.length);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) state.values[i] = own.values[i] + carried * state.values[i];
    *here = state;
  }
}

template <int kWidth>
void scan(const PassParams& p, int64_t slots, cudaStream_t stream) {
  const int elements = p.d * p.e, packs = elements / kWidth, threads = std::min(256, (packs + 31) / 32 * 32);
  scan_kernel<kWidth><<<dim3(slots * p.heads, (packs + threads - 1) / threads), threads, 0, stream>>>(p, elements);
}

}  // namespace

cudaError_t run_plan(const int* cu_seqlens, int sequences, int tokens, int segment_length, int whole, Segment* table,
                     int slots, cudaStream_t stream) {
  plan_kernel<<<1, kThreads, 0, stream>>>(cu_seqlens, sequences, tokens, segment_length, whole, table, slots);
  return cudaGetLastError();
}

cudaError_t run_scan(const PassParams& p, int64_t slots, cudaStream_t stream) {
  if (p.d * p.e % 4 == 0)
    scan<4>(p, slots, stream);
  else
    scan<1>(p, slots, stream);
  return cudaGetLastError();
}
