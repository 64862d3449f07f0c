// From the arguments of a pass to its compiled variant.
#pragma once

#include "pass_hopper.cuh"
#include "variants.h"

template <class Element>
cudaError_t dispatch_pass(const PassParams& p, Tile tile, int pieces, int multiprocessors, cudaStream_t stream) {
#define RUN(kD, kE, kNorm, kOutputs)                                                           \
  if (tile.d == kD && tile.e == kE && p.norm == Norm::kNorm && p.outputs == Outputs::kOutputs) \
    return launch_pass<Variant<Element, kD, kE, Norm::kNorm, Outputs::kOutputs>>(p, pieces, multiprocessors, stream);
  FOR_EACH_VARIANT(RUN)
#undef RUN
  return cudaErrorInvalidValue;
}
