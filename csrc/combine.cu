// Adds up the parts of an output that tiles of d made: a thread four neighbouring values.
#include "combine.h"

#include "element.cuh"

namespace {

constexpr int kThreads = 256;

template <class Element>
__global__ void combine_kernel(const float4* parts, int number, Element* out, int64_t quads) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= quads) return;
  float4 sum = parts[at];
  for (int part = 1; part < number; ++part) {
    const float4 x = parts[part * quads + at];
    sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
  }
  struct alignas(4 * sizeof(Element)) Quad {
    Element x, y, z, w;
  };
  reinterpret_cast<Quad*>(out)[at] = {Element(sum.x), Element(sum.y), Element(sum.z), Element(sum.w)};
}

}  // namespace

cudaError_t run_combine(const float* parts, int number, void* out, int64_t count, ElementType type,
                        cudaStream_t stream) {
  return with_element(type, [&](auto element) {
    using Element = decltype(element);
    const int64_t quads = count / 4;
    combine_kernel<<<dim3((quads + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
        reinterpret_cast<const float4*>(parts), number, static_cast<Element*>(out), quads);
    return cudaGetLastError();
  });
}
