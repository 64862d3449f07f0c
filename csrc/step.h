// One token: the state is read and written once.
#pragma once

#include <cstdint>

#include "params.h"

struct StepParams {
  const void *q, *k, *v;  // (B, heads, width), last dim contiguous
  int64_t q_batch, q_head, k_batch, k_head, v_batch, v_head;
  int k_group, v_group;    // query heads that share a head
  const float* log_decay;  // (H,) or null
  float* state;            // (B, H, D, E) contiguous
  void* out;               // (B, H, E) contiguous
  int batch, heads, d, e;
};

cudaError_t run_step(const StepParams& p, ElementType type, cudaStream_t stream);
