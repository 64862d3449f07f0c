// The gradient of a mask in float16.
#include "mask_gradient.cuh"

cudaError_t run_mask_gradient_float16(const MaskGradientParams& p, int multiprocessors, cudaStream_t stream) {
  return run_mask_gradient<__half, 1>(p, multiprocessors, stream);
}
