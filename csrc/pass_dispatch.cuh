// From the arguments of a pass to its compiled variant.
#pragma once

#include "pass_hopper.cuh"
#include "variants.h"

template <class Element>
cudaError_t dispatch_pass(const PassParams& p, Tile tile, bool output, int64_t blocks, cudaStream_t stream) {
  const bool norm = p.norm != Norm::kNone;
#define RUN(kD, kE)                                                                                  \
  if (tile.d == kD && tile.e == kE) {                                                                \
    if (norm && output) return launch_pass<Variant<Element, kD, kE, true, true>>(p, blocks, stream); \
    if (norm) return launch_pass<Variant<Element, kD, kE, true, false>>(p, blocks, stream);          \
    if (output) return launch_pass<Variant<Element, kD, kE, false, true>>(p, blocks, stream);        \
    return launch_pass<Variant<Element, kD, kE, false, false>>(p, blocks, stream);                   \
  }
  FOR_EACH_TILE(RUN)
#undef RUN
  return cudaErrorInvalidValue;
}
