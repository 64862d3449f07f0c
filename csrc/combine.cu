// Adds up the parts of an output that tiles of d made: a thread kWidth neighbouring values.
#include "combine.h"

#include "element.cuh"

namespace {

constexpr int kThreads = 256;

template <class Value, int kWidth>
struct alignas(kWidth * sizeof(Value)) Pack {
  Value values[kWidth];
};

template <class Element, int kWidth>
__global__ void combine_kernel(const float* parts, int number, Element* out, int64_t packs) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= packs) return;
  Pack<float, kWidth> sum{};
  for (int part = 0; part < number; ++part) {
    const auto x = reinterpret_cast<const Pack<float, kWidth>*>(parts)[part * packs + at];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum.values[i] += x.values[i];
  }
  Pack<Element, kWidth> rounded;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) rounded.values[i] = Element(sum.values[i]);
  reinterpret_cast<Pack<Element, kWidth>*>(out)[at] = rounded;
}

template <class Element, int kWidth>
void launch(const float* parts, int number, void* out, int64_t count, cudaStream_t stream) {
  const int64_t packs = count / kWidth;
  combine_kernel<Element, kWidth><<<dim3((packs + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      parts, number, static_cast<Element*>(out), packs);
}

}  // namespace

cudaError_t run_combine(const float* parts, int number, void* out, int64_t count, ElementType type,
                        cudaStream_t stream) {
  return with_element(type, [&](auto element) {
    if (count % 4 == 0)
      launch<decltype(element), 4>(parts, number, out, count, stream);
    else
      launch<decltype(element), 1>(parts, number, out, count, stream);
    return cudaGetLastError();
  });
}
