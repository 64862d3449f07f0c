// Adding up what several passes wrote in parts.
#pragma once

#include <cstdint>

#include "params.h"

struct CombineParams {
  const float* partial;  // (parts, B, H, T, width)
  const void* x;         // (B, G, T, width) whose unit length was taken, or null
  int64_t x_batch, x_head, x_token;
  void* out;  // (B, G, T, width) contiguous
  int parts, batch, heads, groups, tokens, width;
};

cudaError_t run_combine(const CombineParams& p, ElementType type, cudaStream_t stream);
