// The gradient of log_decay, for every type.
#include "pass_float32.cuh"
#include "variants.h"

cudaError_t run_decay_gradient(const PassParams& p, ElementType type, bool exact, int64_t blocks, cudaStream_t stream) {
  constexpr Make kMake = Make::kDecayGradient;
  switch (type) {
    case ElementType::kFloat32:
      return exact ? launch_float32<float, kMake, true>(p, blocks, stream)
                   : launch_float32<float, kMake, false>(p, blocks, stream);
    case ElementType::kBfloat16:
      return launch_float32<__nv_bfloat16, kMake, false>(p, blocks, stream);
    case ElementType::kFloat16:
      return launch_float32<__half, kMake, false>(p, blocks, stream);
  }
  return cudaErrorInvalidValue;
}
