// S ← λ S + kᵀ v, o = q S: equation (8) of README.md. A block takes 32 columns of one head's state, a thread 4 of them
// in every 32nd row. States are read and written as what is not wanted again: of all layers they rarely fit the second
// cache.
#include "step.h"

#include "element.cuh"

#include <math_constants.h>

namespace {

constexpr int kColumns = 32, kThreads = 256, kRows = kThreads / (kColumns / 4), kUnroll = 4;

template <class Element, bool kVector>
__global__ void __launch_bounds__(kThreads) step_kernel(const StepParams p) {
  __shared__ float sums[kThreads / 32][kColumns];
  const int tiles = (p.e + kColumns - 1) / kColumns;
  const int64_t pair = blockIdx.x / tiles;
  const int head = pair % p.heads;
  const int64_t batch = pair / p.heads;
  const int row = threadIdx.x / (kColumns / 4);
  const int column = blockIdx.x % tiles * kColumns + threadIdx.x % (kColumns / 4) * 4;
  const Element* q = static_cast<const Element*>(p.q) + batch * p.q_batch + head * p.q_head;
  const Element* k = static_cast<const Element*>(p.k) + batch * p.k_batch + head / p.k_group * p.k_head;
  const Element* v = static_cast<const Element*>(p.v) + batch * p.v_batch + head / p.v_group * p.v_head;
  float* state = p.state + pair * p.d * p.e + column;

  // λ near 1 rounded to float32 is off by up to 3e-8 a step: it is kept as 1 and λ - 1. Where λ is small that cancels.
  float keep = 1.f, change = 0.f;
  if (p.log_decay != nullptr) {
    const float x = p.log_decay[head] <= 0.f ? p.log_decay[head] : CUDART_NAN_F;
    const bool strong = x <= -0.5f;
    keep = strong ? 0.f : 1.f;
    change = strong ? expf(x) : expm1f(x);
  }
  const int columns = min(4, p.e - column);
  float values[4], out[4] = {};
#pragma unroll
  for (int c = 0; c < 4; ++c) values[c] = c < columns ? float(v[column + c]) : 0.f;
  for (int first = row; first < p.d; first += kRows * kUnroll) {
    float s[kUnroll][4];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = first + u * kRows;
      if (at >= p.d) continue;
      if constexpr (kVector) {
        if (columns > 0)
          *reinterpret_cast<float4*>(s[u]) = __ldcs(reinterpret_cast<const float4*>(state + int64_t(at) * p.e));
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (c < columns) s[u][c] = state[int64_t(at) * p.e + c];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = first + u * kRows;
      if (at >= p.d) continue;
      const float key = float(k[at]), query = float(q[at]);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        s[u][c] = fmaf(s[u][c], keep, fmaf(s[u][c], change, key * values[c]));
        out[c] = fmaf(query, s[u][c], out[c]);
      }
      if constexpr (kVector) {
        if (columns > 0)
          __stcs(reinterpret_cast<float4*>(state + int64_t(at) * p.e), *reinterpret_cast<const float4*>(s[u]));
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (c < columns) state[int64_t(at) * p.e + c] = s[u][c];
      }
    }
  }
  // Rows of a warp are 8 lanes apart, then warps follow in order: the sum is the same in every run.
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    out[c] += __shfl_xor_sync(~0u, out[c], 8);
    out[c] += __shfl_xor_sync(~0u, out[c], 16);
    if (threadIdx.x % 32 < 8) sums[threadIdx.x / 32][threadIdx.x % 8 * 4 + c] = out[c];
  }
  __syncthreads();
  const int mine = blockIdx.x % tiles * kColumns + threadIdx.x;
  if (threadIdx.x < kColumns && mine < p.e) {
    float sum = 0.f;
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += sums[warp][threadIdx.x];
    static_cast<Element*>(p.out)[pair * p.e + mine] = Element(sum);
  }
}

template <class Element>
cudaError_t launch(const StepParams& p, cudaStream_t stream) {
  const dim3 blocks(int64_t(p.batch) * p.heads * ((p.e + kColumns - 1) / kColumns));
  if (p.e % 4 == 0)
    step_kernel<Element, true><<<blocks, kThreads, 0, stream>>>(p);
  else
    step_kernel<Element, false><<<blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t run_step(const StepParams& p, ElementType type, cudaStream_t stream) {
  return with_element(type, [&](auto element) { return launch<decltype(element)>(p, stream); });
}
