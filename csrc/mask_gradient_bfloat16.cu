// The gradient of a mask in bfloat16, and in float32 by parts of bfloat16.
#include "mask_gradient.cuh"

cudaError_t run_mask_gradient_bfloat16(const MaskGradientParams& p, int multiprocessors, cudaStream_t stream) {
  switch (p.parts) {
    case 1:
      return run_mask_gradient<__nv_bfloat16, 1>(p, multiprocessors, stream);
    case 2:
      return run_mask_gradient<__nv_bfloat16, 2>(p, multiprocessors, stream);
    case 3:
      return run_mask_gradient<__nv_bfloat16, 3>(p, multiprocessors, stream);
  }
  return cudaErrorInvalidValue;
}
