// What several passes wrote in parts: sums over tiles and over query heads that share a head, and the gradient through
// u = x / |x|: equation (4) of README.md. A warp takes one token of one head.
#include "combine.h"

#include "element.cuh"

namespace {

__device__ float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

__device__ float warp_max(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

// kColumns: of each lane.
template <class Element, int kColumns, bool kNorm>
__global__ void combine_kernel(const CombineParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= int64_t(p.batch) * p.groups * p.tokens) return;
  const int64_t token = row % p.tokens, group = row / p.tokens % p.groups, batch = row / p.tokens / p.groups;
  const int shared_by = p.heads / p.groups;
  float sums[kColumns], x[kNorm ? kColumns : 1];
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    sums[n] = 0.f;
    const int column = n * 32 + lane;
    if (column >= p.width) continue;
    for (int part = 0; part < p.parts; ++part) {
      for (int head = 0; head < shared_by; ++head) {
        const int64_t at = ((int64_t(part) * p.batch + batch) * p.heads + group * shared_by + head) * p.tokens + token;
        sums[n] += p.partial[at * p.width + column];
      }
    }
  }
  if constexpr (kNorm) {
    const Element* from = static_cast<const Element*>(p.x) + batch * p.x_batch + group * p.x_head + token * p.x_token;
    float largest = 0.f, squares = 0.f, parallel = 0.f;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      x[n] = n * 32 + lane < p.width ? float(from[n * 32 + lane]) : 0.f;
      largest = fmaxf(largest, fabsf(x[n]));
    }
    largest = fmaxf(warp_max(largest), float(kMinLength));  // its square could overflow
    const float scale = 1.f / largest;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      x[n] *= scale;
      squares += x[n] * x[n];
    }
    const float inverse = 1.f / fmaxf(sqrtf(warp_sum(squares)), 1.f);
    const bool constant = largest <= float(kMinLength) * inverse;  // shorter vectors are divided by a constant
#pragma unroll
    for (int n = 0; n < kColumns; ++n) parallel += sums[n] * (x[n] * inverse);
    parallel = warp_sum(parallel);
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
      sums[n] = (constant ? sums[n] : sums[n] - parallel * (x[n] * inverse)) * inverse * scale;
  }
  Element* to = static_cast<Element*>(p.out) + row * p.width;
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
    if (n * 32 + lane < p.width) to[n * 32 + lane] = Element(sums[n]);
}

template <class Element, int kColumns>
void launch(const CombineParams& p, cudaStream_t stream) {
  constexpr int kWarps = 8;
  const int64_t rows = int64_t(p.batch) * p.groups * p.tokens;
  const dim3 blocks((rows + kWarps - 1) / kWarps);
  if (p.x != nullptr)
    combine_kernel<Element, kColumns, true><<<blocks, kWarps * 32, 0, stream>>>(p);
  else
    combine_kernel<Element, kColumns, false><<<blocks, kWarps * 32, 0, stream>>>(p);
}

template <class Element>
cudaError_t launch(const CombineParams& p, cudaStream_t stream) {
  if (p.width <= 64)
    launch<Element, 2>(p, stream);
  else if (p.width <= 128)
    launch<Element, 4>(p, stream);
  else if (p.width <= 256)
    launch<Element, 8>(p, stream);
  else
    launch<Element, 32>(p, stream);
  return cudaGetLastError();
}

}  // namespace

cudaError_t run_combine(const CombineParams& p, ElementType type, cudaStream_t stream) {
  return with_element(type, [&](auto element) { return launch<decltype(element)>(p, stream); });
}
