// Adds up parts of a tensor: of an output, that tiles of d made, or of a gradient, that heads of a group made.
#pragma once

#include <cstdint>

#include "params.h"

// out (outer, inner) = the sum of the parts (outer, number, inner), one after another and in float32. Where the type
// has 2 bytes, parts and out are 16-byte aligned and 8 divides `inner`.
struct CombineParams {
  const void* parts;
  void* out;
  int64_t outer, inner;
  int number;
};
cudaError_t run_combine(const CombineParams& p, ElementType type, cudaStream_t stream);
