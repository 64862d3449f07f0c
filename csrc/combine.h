// Adds up the parts of an output that tiles of d made.
#pragma once

#include <cstdint>

#include "params.h"

// out (count values of `type`) = the sum of `number` parts of float32, one after another.
cudaError_t run_combine(const float* parts, int number, void* out, int64_t count, ElementType type,
                        cudaStream_t stream);
