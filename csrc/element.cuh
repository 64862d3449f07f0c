// From the type of a tensor's elements to the kernels compiled for it, and neighbouring elements moved at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"

template <class Element, int kWidth>
struct alignas(kWidth * sizeof(Element)) Pack {
  Element values[kWidth];
};

// Rounded to tf32, of which the tensor cores read the upper bits alone.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// run(element), with an element of the type.
template <class Run>
cudaError_t with_element(ElementType type, Run run) {
  switch (type) {
    case ElementType::kFloat32:
      return run(float{});
    case ElementType::kBfloat16:
      return run(__nv_bfloat16{});
    case ElementType::kFloat16:
      return run(__half{});
  }
  return cudaErrorInvalidValue;
}
