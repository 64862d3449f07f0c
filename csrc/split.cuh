// Which products stand for one of float32 numbers, x = x_0 + x_1 (+ x_2), each the rest rounded to bfloat16.
#pragma once

// visit(a, b) for the products of parts a and b with a + b < kParts, the smallest first: 3 for 2 parts, 6 for 3. What
// is left out is as small as what the last part rounds away.
template <int kParts, class Visit>
__device__ inline void each_product(Visit visit) {
#pragma unroll
  for (int order = kParts - 1; order >= 0; --order)
#pragma unroll
    for (int a = 0; a <= order; ++a) visit(a, order - a);
}
