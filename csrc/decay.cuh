// Powers of λ = exp(log_decay) of non-negative exponents: 1 / λ^n overflows on long sequences.
#pragma once

#include <math_constants.h>

// log λ. A positive log_decay becomes NaN, and so everything that it touches: it can't go unnoticed.
__device__ inline float log_decay_of(const float* log_decay, int head) {
  if (log_decay == nullptr) return 0.f;
  const float x = log_decay[head];
  if (!(x <= 0.f)) return CUDART_NAN_F;
  return fmaxf(x, -1e30f);  // -inf · 0 would be NaN, and λ^0 is 1
}

// In base e: log2 λ, rounded, would be off by a part in 10^7 of a large exponent.
__device__ inline float power(float log_lambda, int exponent) { return expf(log_lambda * float(exponent)); }
