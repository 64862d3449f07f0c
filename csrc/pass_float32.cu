// The passes for float32.
#include "pass_float32.cuh"
#include "variants.h"

cudaError_t run_pass_float32(const PassParams& p, bool output, bool exact, int64_t blocks, cudaStream_t stream) {
  if (output && exact) return launch_float32<float, Make::kOutput, true>(p, blocks, stream);
  if (output) return launch_float32<float, Make::kOutput, false>(p, blocks, stream);
  if (exact) return launch_float32<float, Make::kStates, true>(p, blocks, stream);
  return launch_float32<float, Make::kStates, false>(p, blocks, stream);
}
