// Vectors divided by their length, where no pass does it by itself.
#pragma once

#include "params.h"

// u = x / |x| of x (B, heads, T, width), any strides but the last; or, with the gradient of u, that of x. The result is
// contiguous, of the type of all. Width up to 1,024. Equation (4) of README.md, unit_length of ops/numerics.py.
struct UnitLengthParams {
  View x, grad;  // grad.data null: u
  void* out;
  int64_t pairs;  // B × heads
  int heads, tokens, width;
};
cudaError_t run_unit_length(const UnitLengthParams& p, ElementType type, cudaStream_t stream);
