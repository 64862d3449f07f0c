// Adds up parts of a tensor: a thread kWidth neighbouring values, read and written at once.
#include "combine.h"

#include "element.cuh"

namespace {

constexpr int kThreads = 256;

template <class Element, int kWidth>
__global__ void __launch_bounds__(kThreads) combine_kernel(const CombineParams p) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, inner = p.inner / kWidth;
  if (at >= p.outer * inner) return;
  const int64_t outer = at / inner;
  auto part = reinterpret_cast<const Pack<Element, kWidth>*>(p.parts) + outer * (p.number - 1) * inner + at;
  Pack<float, kWidth> sum{};
#pragma unroll 8
  for (int i = 0; i < p.number; ++i, part += inner) {
    const Pack<Element, kWidth> x = *part;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum.values[j] += float(x.values[j]);
  }
  Pack<Element, kWidth> rounded;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) rounded.values[j] = Element(sum.values[j]);
  reinterpret_cast<Pack<Element, kWidth>*>(p.out)[at] = rounded;
}

template <class Element, int kWidth>
cudaError_t launch(const CombineParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.outer * p.inner / kWidth + kThreads - 1) / kThreads;
  combine_kernel<Element, kWidth><<<dim3(blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

// One value at a time where they aren't aligned, as they may be in float32 alone.
template <class Element>
cudaError_t combine(const CombineParams& p, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(Element);
  const bool packs = p.inner % kWidth == 0 && reinterpret_cast<uintptr_t>(p.parts) % 16 == 0 &&
                     reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  if (packs) return launch<Element, kWidth>(p, stream);
  if constexpr (sizeof(Element) == sizeof(float)) return launch<Element, 1>(p, stream);
  return cudaErrorMisalignedAddress;  // the binding checks it
}

}  // namespace

cudaError_t run_combine(const CombineParams& p, ElementType type, cudaStream_t stream) {
  if (p.outer * p.inner == 0) return cudaSuccess;
  return with_element(type, [&](auto element) { return combine<decltype(element)>(p, stream); });
}
